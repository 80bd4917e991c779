// The machine's side of device.cuh without a GPU: see emulation.cpp for how threads run.
#pragma once
#include <stdint.h>
#include <string.h>

#define DEVICE inline
#define UNROLL
#define NO_UNROLL
#define KERNEL(name, Args, threads, blocks)                                                        \
  static void name(const Args& args);                                                           \
  static const emulation::Kernel name##_entry{                                                  \
      #name, sizeof(Args), threads,                                                             \
      [](const void* args) { name(*static_cast<const Args*>(args)); }};                         \
  static void name(const Args& args)

#define HAS_COUNTING_BARRIERS
using CountingBarrier = uint64_t;

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
void wait_for_warp();
void wait_for_block();
// Stops the launch and reports why.
[[noreturn]] void fail(const char* why);

void copy_later(void* to, const void* from, int bytes);
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
struct MultiplyAddBytes {
  int* d;
  const uint32_t* a;
  uint32_t b[2];
  bool is_signed;
};
struct Shuffle {
  float value;
  int from;
  float result;
};
void load_matrices(void* const* lanes);
void load_matrices_transposed(void* const* lanes);
void multiply_add(void* const* lanes);
void multiply_add_bytes(void* const* lanes);
void start_barrier(CountingBarrier* at, int count);
void arrive(CountingBarrier* at, int bytes);
void wait_for_phase(CountingBarrier* at, int parity);
void copy_row(void* to, const void* from, int bytes, CountingBarrier* arrived);
void arrive_at_grid(uint64_t* count);
void store_tagged(uint64_t* to, uint64_t word);
void load_tagged(uint64_t (&two)[2], const uint64_t* from);
uint64_t count_of_grid(const uint64_t* count);
void let_others_go_on();
void wait_for_grid(const uint64_t* count, uint64_t target);
void shuffle(void* const* lanes);
uint32_t turn_atomically(uint32_t* at, uint32_t count);
void memory_fence();
void wait_for_last_kernel();
void publish_shared();

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
inline void warp_barrier() { emulation::wait_for_warp(); }
inline float shuffle(float x, int from) {
  emulation::Shuffle operands{x, from & 31, 0.0f};
  emulation::together("shuffle", &operands, emulation::shuffle);
  return operands.result;
}
inline float shuffle_xor(float x, int mask) { return shuffle(x, lane() ^ mask); }
inline uint32_t atomic_turn(uint32_t* at, uint32_t count) { return emulation::turn_atomically(at, count); }
inline void memory_fence() { emulation::memory_fence(); }
inline void release_next_kernel() {}
inline void wait_for_last_kernel() { emulation::wait_for_last_kernel(); }

inline float load_fresh(const float* from) { return *from; }
inline void load_fresh(uint32_t (&to)[4], const void* from) { memcpy(to, from, 16); }

inline float exp2_fast(float x) { return exp2f(x); }
inline float inverse_fast(float x) { return 1.0f / x; }
inline float inverse_root(float x) { return 1.0f / sqrtf(x); }
inline float max_or_nan(float x, float y) { return x != x || y != y ? NAN : fmaxf(x, y); }

inline uint16_t round_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline uint32_t pack_bf16(float low, float high) {
  return uint32_t(round_to_bf16(low)) | uint32_t(round_to_bf16(high)) << 16;
}

inline void write_words(void* to, const uint32_t (&words)[4]) { memcpy(to, words, 16); }
template <class Work>
inline uint32_t each_of_pair(uint32_t a, uint32_t b, const Work& work) {
  auto value = [](uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
  };
  return pack_bf16(work(value(a << 16), value(b << 16)),
                   work(value(a & 0xffff0000u), value(b & 0xffff0000u)));
}
inline uint32_t scale_bf16(uint32_t pair, uint32_t by) {
  return each_of_pair(pair, by, [](float a, float b) { return a * b; });
}
inline uint32_t subtract_bf16(uint32_t from, uint32_t what) {
  return each_of_pair(from, what, [](float a, float b) { return a - b; });
}
inline uint32_t add_bf16_pairs(uint32_t a, uint32_t b) {
  return each_of_pair(a, b, [](float a, float b) { return a + b; });
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

template <bool is_signed>
inline void multiply_add_bytes(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::MultiplyAddBytes operands{d, a, {b0, b1}, is_signed};
  emulation::together("multiply_add_bytes", &operands, emulation::multiply_add_bytes);
}
inline uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t both = uint64_t(high) << 32 | low;
  uint32_t to = 0;
  for (int i = 0; i < 4; ++i) to |= uint32_t(both >> (8 * (which >> (4 * i) & 7)) & 0xff) << (8 * i);
  return to;
}
float half_to_float(uint16_t half);
inline float widen_half(uint32_t word) { return half_to_float(uint16_t(word)); }
inline void load_once(uint32_t (&to)[4], const void* from) { memcpy(to, from, 16); }

inline void keep_in_register(int&) {}
inline bool elected() { return lane() == 0; }
using CopyBarrier = uint64_t;
inline void barrier_start(CopyBarrier* at) { emulation::start_barrier(at, 1); }
inline void barrier_expect(CopyBarrier* at, int bytes) { emulation::arrive(at, bytes); }
inline void copy_row(void* to_shared, const void* from, int bytes, CopyBarrier* at) {
  emulation::copy_row(to_shared, from, bytes, at);
}
inline void barrier_wait(CopyBarrier* at, uint32_t parity) { emulation::wait_for_phase(at, int(parity)); }

inline uint64_t grid_count(const uint64_t* count) { return emulation::count_of_grid(count); }
inline void grid_arrive(uint64_t* count) { emulation::arrive_at_grid(count); }
inline void store_tagged(uint64_t* to, uint32_t bits, uint32_t tag) {
  emulation::store_tagged(to, uint64_t(tag) << 32 | bits);
}
inline void load_tagged(uint64_t (&two)[2], const uint64_t* from) { emulation::load_tagged(two, from); }
inline void let_others_go_on() { emulation::let_others_go_on(); }
inline void grid_wait(const uint64_t* count, uint64_t target) { emulation::wait_for_grid(count, target); }

inline void copy_async(void* to_shared, const void* from, bool there) {
  emulation::copy_later(to_shared, from, there ? 16 : 0);
}
inline void copy_async_some(void* to_shared, const void* from, int bytes) {
  emulation::copy_later(to_shared, from, bytes);
}
inline void copy_commit() { emulation::commit_copies(); }
template <int pending>
inline void copy_wait() {
  emulation::finish_copies(pending);
}

#include "hopper.h"
