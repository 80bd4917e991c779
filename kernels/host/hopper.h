// Hopper's own instructions without a GPU: see emulation_hopper.h for what they do.
#pragma once
#define HAS_GROUP_PRODUCTS 1

// What stands for a tensor map; strides in bytes. Axes: 64 columns, rows, pieces, batch entries.
struct alignas(64) TileMap {
  const unsigned char* base;
  int64_t rows, pieces, batch;
  int64_t row_stride, piece_stride, batch_stride;
  int64_t box_rows, box_pieces;
  uint64_t unused[7];
};

// The same of a matrix of rows of words; strides in bytes.
struct alignas(64) BoxMap {
  const unsigned char* base;
  int64_t words, rows, row_stride;
  int64_t box_words, box_rows;
  uint64_t unused[10];
};

namespace emulation {

struct SharedOperand {
  const unsigned char* at;
  int leading, stride;
};
// A warp's share of a product of four warps: 16 rows, `columns` columns.
struct GroupProduct {
  float (*d)[4];
  int columns;
  const uint32_t* a;  // in registers, or null
  SharedOperand left, right;
  bool add;
};
void group_product(void* const* lanes);
void commit_products(void* const* lanes);
void finish_products(void* const* pending);

void named_barrier(int number, int threads, bool wait);
bool phase_ended(CountingBarrier* at, int parity);
void copy_tile(void* to, const TileMap& map, CountingBarrier* arrived, int row, int piece, int batch);
void copy_box(void* to, const BoxMap* map, CountingBarrier* arrived, int word, int row);

}  // namespace emulation

inline int warp_group() { return emulation::place.thread >> 7; }
template <int count>
inline void registers_give() {
  emulation::together("registers_give", nullptr, nullptr);
}
template <int count>
inline void registers_take() {
  emulation::together("registers_take", nullptr, nullptr);
}

inline void named_barrier(int number, int threads) { emulation::named_barrier(number, threads, true); }
inline void named_barrier_arrive(int number, int threads) {
  emulation::named_barrier(number, threads, false);
}

inline void barrier_start(CountingBarrier* at, int count) { emulation::start_barrier(at, count); }
inline void barriers_started() {}
inline void barrier_arrive(CountingBarrier* at) { emulation::arrive(at, 0); }
inline void barrier_arrive_expecting(CountingBarrier* at, int bytes) { emulation::arrive(at, bytes); }
inline void barrier_wait(CountingBarrier* at, int parity) { emulation::wait_for_phase(at, parity); }
inline bool barrier_ready(CountingBarrier* at, int parity) { return emulation::phase_ended(at, parity); }

inline void copy_tile(void* to_shared, const TileMap& map, CountingBarrier* arrived, int row, int piece,
                      int batch) {
  emulation::copy_tile(to_shared, map, arrived, row, piece, batch);
}

inline void map_ready(const BoxMap*) {}
inline void prefetch_map(const BoxMap*) {}
inline void copy_box(void* to_shared, const BoxMap* map, int word, int row, CountingBarrier* arrived) {
  emulation::copy_box(to_shared, map, arrived, word, row);
}

using SharedOperand = emulation::SharedOperand;
inline SharedOperand shared_operand(const void* at, int leading_bytes, int stride_bytes) {
  return {static_cast<const unsigned char*>(at), leading_bytes, stride_bytes};
}
inline void publish_shared() { emulation::publish_shared(); }
inline void products_begin() { emulation::together("products_begin", nullptr, nullptr); }
inline void products_commit() {
  emulation::together("products_commit", nullptr, emulation::commit_products);
}
template <int pending>
inline void products_wait_for() {
  int count = pending;
  emulation::together("products_wait_for", &count, emulation::finish_products);
}
template <int N>
inline void settle(float (&)[N][4]) {}
inline void multiply_scores(float (&d)[24][4], SharedOperand a, SharedOperand b, bool add) {
  emulation::GroupProduct operands{d, 192, nullptr, a, b, add};
  emulation::together("multiply_scores", &operands, emulation::group_product);
}
inline void multiply_scores(float (&d)[12][4], SharedOperand a, SharedOperand b, bool add) {
  emulation::GroupProduct operands{d, 96, nullptr, a, b, add};
  emulation::together("multiply_scores", &operands, emulation::group_product);
}
inline void multiply_values(float (&d)[16][4], const uint32_t (&a)[4], SharedOperand b) {
  emulation::GroupProduct operands{d, 128, a, {}, b, true};
  emulation::together("multiply_values", &operands, emulation::group_product);
}
