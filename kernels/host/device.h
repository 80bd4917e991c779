// The machine's side of device.cuh without a GPU: see emulation.cpp for how threads run.
#pragma once
#include <stdint.h>
#include <string.h>

#define DEVICE inline
#define UNROLL
#define NO_UNROLL
#define HAS_GROUP_PRODUCTS 1
#define KERNEL(name, Args, threads, blocks)                                                        \
  static void name(const Args& args);                                                           \
  static const emulation::Kernel name##_entry{                                                  \
      #name, sizeof(Args), threads,                                                             \
      [](const void* args) { name(*static_cast<const Args*>(args)); }};                         \
  static void name(const Args& args)

namespace emulation {

// Makes a kernel known by its name.
struct Kernel {
  const char* name;
  uint64_t argument_bytes;
  int threads_max;
  void (*run)(const void* args);
  const Kernel* next;
  Kernel(const char* name, uint64_t argument_bytes, int threads_max, void (*run)(const void*));
};

struct Place {
  int thread;
  int threads;
  int64_t block[3];
  int64_t grid[3];
  unsigned char* shared;
};

// Where the fiber that runs now is.
extern thread_local Place place;

// Waits for all lanes of the warp; the last one runs `exchange` on what the lanes brought. Lanes that
// are in different operations are an error.
void together(const char* operation, void* operands, void (*exchange)(void* const* lanes));
void wait_for_block();
// Stops the launch and reports why.
[[noreturn]] void fail(const char* why);

void copy_later(void* to, const void* from, bool there);
void commit_copies();
void finish_copies(int pending);

struct LoadMatrices {
  uint32_t* to;
  const void* row;
};
struct MultiplyAdd {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
struct SharedOperand {
  const unsigned char* at;
  int leading, stride;
};
// A warp's share of a product of four warps.
struct GroupProduct {
  float (*d)[4];
  const uint32_t* a;  // in registers, or null
  SharedOperand rows, columns;
  bool add;
};
struct Shuffle {
  float value;
  int from;
  float result;
};
void load_matrices(void* const* lanes);
void load_matrices_transposed(void* const* lanes);
void multiply_add(void* const* lanes);
void shuffle(void* const* lanes);
void group_product(void* const* lanes);

}  // namespace emulation

inline unsigned char* shared_memory() { return emulation::place.shared; }
inline int thread_index() { return emulation::place.thread; }
inline int block_threads() { return emulation::place.threads; }
inline int lane() { return emulation::place.thread & 31; }
inline int warp() { return emulation::place.thread >> 5; }
inline int64_t block_x() { return emulation::place.block[0]; }
inline int64_t block_y() { return emulation::place.block[1]; }
inline int64_t block_z() { return emulation::place.block[2]; }
inline int64_t grid_x() { return emulation::place.grid[0]; }
inline int64_t grid_z() { return emulation::place.grid[2]; }

inline void block_barrier() { emulation::wait_for_block(); }
inline void warp_barrier() { emulation::together("warp_barrier", nullptr, nullptr); }
inline float shuffle(float x, int from) {
  emulation::Shuffle operands{x, from & 31, 0.0f};
  emulation::together("shuffle", &operands, emulation::shuffle);
  return operands.result;
}
inline float shuffle_xor(float x, int mask) { return shuffle(x, lane() ^ mask); }
inline float atomic_add(float* at, float x) {
  const float before = *at;
  *at = before + x;
  return before;
}

inline uint32_t atomic_increment(uint32_t* at) { return (*at)++; }
inline void memory_fence() {}
inline void release_next_kernel() {}
inline void wait_for_last_kernel() {}

inline float load_fresh(const float* from) { return *from; }
inline void load_fresh(uint32_t (&to)[4], const void* from) { memcpy(to, from, 16); }

inline float exp2_fast(float x) { return exp2f(x); }
inline float inverse_root(float x) { return 1.0f / sqrtf(x); }

inline uint16_t round_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline uint32_t pack_bf16(float low, float high) {
  return uint32_t(round_to_bf16(low)) | uint32_t(round_to_bf16(high)) << 16;
}

inline uint32_t add_bf16_pairs(uint32_t a, uint32_t b) {
  auto value = [](uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
  };
  return pack_bf16(value(a << 16) + value(b << 16),
                   value(a & 0xffff0000u) + value(b & 0xffff0000u));
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  emulation::LoadMatrices operands{to, row};
  emulation::together("load_matrices", &operands, emulation::load_matrices);
}
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  emulation::LoadMatrices operands{to, row};
  emulation::together("load_matrices_transposed", &operands, emulation::load_matrices_transposed);
}
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::MultiplyAdd operands{d, a, {b0, b1}};
  emulation::together("multiply_add", &operands, emulation::multiply_add);
}

inline void copy_async(void* to_shared, const void* from, bool there) {
  emulation::copy_later(to_shared, from, there);
}
inline void copy_commit() { emulation::commit_copies(); }
template <int pending>
inline void copy_wait() {
  emulation::finish_copies(pending);
}

using SharedOperand = emulation::SharedOperand;
inline SharedOperand shared_operand(const void* at, int leading_bytes, int stride_bytes) {
  return {static_cast<const unsigned char*>(at), leading_bytes, stride_bytes};
}
inline void publish_shared() {}
inline void products_begin() { emulation::together("products_begin", nullptr, nullptr); }
inline void products_wait(float (&)[16][4]) {
  emulation::together("products_wait", nullptr, nullptr);
}
inline void multiply_add_scores(float (&d)[16][4], SharedOperand a, SharedOperand b, bool add) {
  emulation::GroupProduct operands{d, nullptr, a, b, add};
  emulation::together("multiply_add_scores", &operands, emulation::group_product);
}
inline void multiply_add_values(float (&d)[16][4], const uint32_t (&a)[4], SharedOperand b) {
  emulation::GroupProduct operands{d, a, {}, b, true};
  emulation::together("multiply_add_values", &operands, emulation::group_product);
}
