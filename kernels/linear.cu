// Products of bf16 rows with weights as they are stored:  y[row][out] = sum_k x[row][k] w[out][k] + bias[out].
// Weights are widened in registers; activations stay bf16, since blocks of 8-bit activations with half
// scales overflow on outliers. Sums are float32, rounded once.
//
// few_bytes_R_F: up to R rows of q4_k, q6_k, q8_0, see few_bytes.cuh. Grid: (multiprocessors, 1, 1).
// few_bytes_each: one row by up to three such matrices. Grid: (multiprocessors, 1, 1), shared out by the
//   matrices' bytes.
// few_one_F, few_rows_F: one row, up to 8 rows, see few.cuh. Grid: (tiles of 16 outputs, or 32 for q4_k, 1, 1).
// linear_few_F: up to 8 rows of sizes and addresses that the above do not take. A warp owns one output; its
//   lanes share the depth, eight numbers each. Bound by integer work on the weights: 3 to 5 times as long as the
//   above. Grid: (outs / 8, 1, 1); 256 threads.
// linear_many_F: tiles of 128 rows by 128 outputs, see product.cuh; a tile of weights is widened to
//   bf16 in shared memory. Grid: (row tiles, out tiles, 1); 256 threads. For where cuBLASLt is not used.
// widen_F: the matrix as bf16, for a product by cuBLASLt; fp8 without its scale, so that it is exact.
//   Bound by writing. Grid: (chunks of 8 numbers / 256, 1, 1); 256 threads.
// F: q8_0, q4_k, q5_k, q6_k, f8_e4m3 (with one scale for the matrix), bf16 (but for widen).
// Tried (H200): widening within the product stays at 128-135 TFLOP/s at 8704 rows, and takes 124-136 us for
//   64 rows as for 256 (3072 to 3072). Widening first takes 29-34 us for 3072 x 12288 numbers (3200-3800 GB/s
//   read and written) and the product 12 us for 64 of the former rows; at 8704 rows it is 1/30 of the product.
//   Two or four chunks a thread: 0-3 and 7-12 % slower than one.
//
// float8_rows_3, _6: each bf16 row [depth] as e4m3 bytes and a float32 scale, with the row's largest number
//   at 448; for products by cuBLASLt. A thread keeps 3 or 6 chunks of 8 numbers in registers, so x is read
//   once. Bound by reading x. Grid: (rows, 1, 1); up to 256 threads, as many as the row needs; shared memory:
//   a float for each warp.
// float8_rows: rows of any length, read twice, the second time from the cache. 256 threads.
// Tried (H200): reading twice and rounding in integers, 128 threads: 39 us for 8704 rows of 3072 and 152 us
//   for 12288, 2050-2100 GB/s of bytes that must be read and written once.
#include "few_bytes.cuh"
#include "product.cuh"
#include "quantized.cuh"

struct LinearArgs {
  const bf16* x;          // [rows][depth]
  const uint8_t* weight;  // [outs] rows of depth / NUMBERS blocks
  const bf16* bias;       // [outs], or null
  bf16* y;                // [rows][outs]
  int64_t rows, depth, outs;  // depth: a multiple of 8
  double scale;           // of the weights; 1 but for fp8
};

template <class Format>
DEVICE void linear_few(const LinearArgs& args) {
  constexpr int ROWS = 8;
  const int64_t out = block_x() * (block_threads() / 32) + warp();
  if (out >= args.outs) return;
  const uint8_t* weight = args.weight + out * (args.depth / Format::NUMBERS * Format::BYTES);
  float sums[ROWS];
  UNROLL
  for (int row = 0; row < ROWS; ++row) sums[row] = 0.0f;
  const int chunks = int(args.depth / 8);
  for (int chunk = lane(); chunk < chunks; chunk += 32) {
    float w[8];
    widen_chunk<Format>(weight, chunk, w);
    UNROLL
    for (int row = 0; row < ROWS; ++row) {
      if (row < args.rows) {
        const Words x = load_words(args.x + row * args.depth + 8 * chunk);
        UNROLL
        for (int i = 0; i < 4; ++i) {
          sums[row] += low_float(x.at[i]) * w[2 * i];
          sums[row] += high_float(x.at[i]) * w[2 * i + 1];
        }
      }
    }
  }
  const float bias = args.bias ? to_float(args.bias[out]) : 0.0f;
  UNROLL
  for (int row = 0; row < ROWS; ++row) {
    const float sum = sum_lanes(sums[row], 32);
    if (row < args.rows && lane() == 0) {
      args.y[row * args.outs + out] = from_float<bf16>(sum * float(args.scale) + bias);
    }
  }
}

// The two operands of a tile, as product.cuh asks for them.
template <class Format>
struct LinearOperands {
  const LinearArgs& args;

  DEVICE int64_t rows() const { return args.rows; }
  DEVICE int64_t columns() const { return args.outs; }
  DEVICE int64_t depth() const { return args.depth; }

  DEVICE void copy_rows(unsigned char* to, int64_t first, int k) const {
    copy_row_tile(to, args.x, args.depth, first, args.rows, k);
  }

  static constexpr bool COLUMNS_BY_DEPTH = false;  // a column's numbers lie side by side
  static constexpr int HELD = PRODUCT_COLUMNS * PRODUCT_DEPTH / 8 / PRODUCT_THREADS;
  struct Held {
    Words words[HELD];
  };

  // Widens this thread's share of the next tile while the last one is multiplied.
  DEVICE void fetch_columns(Held& held, int64_t first, int k) const {
    const int64_t row_bytes = args.depth / Format::NUMBERS * Format::BYTES;
    UNROLL
    for (int i = 0; i < HELD; ++i) {
      const int at = thread_index() + i * PRODUCT_THREADS;
      const int column = at / (PRODUCT_DEPTH / 8), chunk = at % (PRODUCT_DEPTH / 8);
      held.words[i] = {{0, 0, 0, 0}};
      if (first + column < args.outs && k + 8 * chunk < args.depth) {
        float w[8];
        widen_chunk<Format>(args.weight + (first + column) * row_bytes, k / 8 + chunk, w);
        UNROLL
        for (int j = 0; j < 4; ++j) held.words[i].at[j] = pack_bf16(w[2 * j], w[2 * j + 1]);
      }
    }
  }

  DEVICE void place_columns(unsigned char* to, const Held& held) const {
    UNROLL
    for (int i = 0; i < HELD; ++i) {
      const int at = thread_index() + i * PRODUCT_THREADS;
      const int column = at / (PRODUCT_DEPTH / 8), chunk = at % (PRODUCT_DEPTH / 8);
      store_words(SharedRows<PRODUCT_DEPTH>::at(to, column, chunk), held.words[i]);
    }
  }

  DEVICE void store(int64_t row, int64_t column, float first, float second) const {
    if (row >= args.rows) return;
    const float scale = float(args.scale);
    auto result = [&](float sum, int64_t column) {
      return sum * scale + (args.bias ? to_float(args.bias[column]) : 0.0f);
    };
    bf16* y = args.y + row * args.outs + column;
    if (column + 1 < args.outs && args.outs % 2 == 0) {
      *reinterpret_cast<uint32_t*>(y) = pack_bf16(result(first, column), result(second, column + 1));
      return;
    }
    if (column < args.outs) y[0] = from_float<bf16>(result(first, column));
    if (column + 1 < args.outs) y[1] = from_float<bf16>(result(second, column + 1));
  }
};

template <class Format>
DEVICE void linear_many(const LinearArgs& args) {
  product_block(LinearOperands<Format>{args});
}

KERNEL(linear_few_q8_0, LinearArgs, 256, 1) { linear_few<Q8_0>(args); }
KERNEL(linear_few_q4_k, LinearArgs, 256, 1) { linear_few<Q4K>(args); }
KERNEL(linear_few_q5_k, LinearArgs, 256, 1) { linear_few<Q5K>(args); }
KERNEL(linear_few_q6_k, LinearArgs, 256, 1) { linear_few<Q6K>(args); }
KERNEL(linear_few_f8_e4m3, LinearArgs, 256, 1) { linear_few<Float8>(args); }
KERNEL(linear_few_bf16, LinearArgs, 256, 1) { linear_few<Plain>(args); }
KERNEL(few_bytes_1_q4_k, BytesArgs, 640, 1) { few_bytes<BytesQ4K, 1, 2>(args, block_x(), grid_x()); }
KERNEL(few_bytes_4_q4_k, BytesArgs, 384, 1) { few_bytes<BytesQ4K, 4, 1>(args, block_x(), grid_x()); }
KERNEL(few_bytes_1_q6_k, BytesArgs, 384, 1) { few_bytes<BytesQ6K, 1, 1>(args, block_x(), grid_x()); }
KERNEL(few_bytes_4_q6_k, BytesArgs, 256, 1) { few_bytes<BytesQ6K, 4, 1>(args, block_x(), grid_x()); }
KERNEL(few_bytes_1_q8_0, BytesArgs, 512, 1) { few_bytes<BytesQ8_0, 1, 2>(args, block_x(), grid_x()); }
KERNEL(few_bytes_4_q8_0, BytesArgs, 512, 1) { few_bytes<BytesQ8_0, 4, 1>(args, block_x(), grid_x()); }
KERNEL(few_bytes_each, BytesEachArgs, 512, 1) { few_bytes_of_each(args); }
KERNEL(few_one_q5_k, FewArgs, 512, 1) { Few<FewQ5K, 1, 2, true>::run(args); }
KERNEL(few_one_f8_e4m3, FewArgs, 512, 1) { Few<FewFloat8, 1, 2, true>::run(args); }
KERNEL(few_one_bf16, FewArgs, 512, 1) { Few<FewBf16, 1, 2, true>::run(args); }
KERNEL(few_rows_q8_0, FewArgs, 512, 1) { Few<FewQ8_0, 1, 2, false>::run(args); }
KERNEL(few_rows_q4_k, FewArgs, 512, 1) { Few<FewQ4K, 2, 3, false>::run(args); }
KERNEL(few_rows_q5_k, FewArgs, 512, 1) { Few<FewQ5K, 1, 2, false>::run(args); }
KERNEL(few_rows_q6_k, FewArgs, 512, 1) { Few<FewQ6K, 1, 2, false>::run(args); }
KERNEL(few_rows_f8_e4m3, FewArgs, 512, 1) { Few<FewFloat8, 1, 2, false>::run(args); }
KERNEL(few_rows_bf16, FewArgs, 512, 1) { Few<FewBf16, 1, 2, false>::run(args); }
KERNEL(linear_many_q8_0, LinearArgs, 256, 2) { linear_many<Q8_0>(args); }
KERNEL(linear_many_q4_k, LinearArgs, 256, 2) { linear_many<Q4K>(args); }
KERNEL(linear_many_q5_k, LinearArgs, 256, 2) { linear_many<Q5K>(args); }
KERNEL(linear_many_q6_k, LinearArgs, 256, 2) { linear_many<Q6K>(args); }
KERNEL(linear_many_f8_e4m3, LinearArgs, 256, 2) { linear_many<Float8>(args); }
KERNEL(linear_many_bf16, LinearArgs, 256, 2) { linear_many<Plain>(args); }

struct WidenArgs {
  const uint8_t* weight;  // rows of whole blocks, one after the other
  bf16* out;              // their numbers
  int64_t chunks;         // of 8 numbers
};

template <class Format>
DEVICE void widen_matrix(const WidenArgs& args) {
  constexpr int CHUNKS = Format::NUMBERS / 8;
  const int64_t chunk = block_x() * block_threads() + thread_index();
  if (chunk >= args.chunks) return;
  float w[8];
  Format::widen(args.weight + chunk / CHUNKS * Format::BYTES, int(chunk % CHUNKS), w);
  Words words;
  UNROLL
  for (int j = 0; j < 4; ++j) words.at[j] = pack_bf16(w[2 * j], w[2 * j + 1]);
  store_words(args.out + 8 * chunk, words);
}

KERNEL(widen_q8_0, WidenArgs, 256, 1) { widen_matrix<Q8_0>(args); }
KERNEL(widen_q4_k, WidenArgs, 256, 1) { widen_matrix<Q4K>(args); }
KERNEL(widen_q5_k, WidenArgs, 256, 1) { widen_matrix<Q5K>(args); }
KERNEL(widen_q6_k, WidenArgs, 256, 1) { widen_matrix<Q6K>(args); }
KERNEL(widen_f8_e4m3, WidenArgs, 256, 1) { widen_matrix<Float8>(args); }

struct Float8RowsArgs {
  const bf16* x;  // [rows][depth], depth: a multiple of 8
  uint8_t* out;   // [rows][depth]
  float* scales;  // [rows]
  int64_t rows, depth;
};

// The largest magnitude of eight numbers and one more. NaN is no maximum, and stays NaN when rounded.
DEVICE float largest_of(Words words, float largest) {
  UNROLL
  for (int j = 0; j < 4; ++j) {
    largest = fmaxf(largest, fmaxf(fabsf(low_float(words.at[j])), fabsf(high_float(words.at[j]))));
  }
  return largest;
}

// What a row is multiplied by; one thread writes its scale.
DEVICE float row_factor(const Float8RowsArgs& args, float largest) {
  if (thread_index() == 0) {
    args.scales[block_x()] = largest == 0.0f ? 1.0f : largest / 448.0f;
  }
  return largest == 0.0f ? 1.0f : 448.0f / largest;
}

DEVICE void store_e4m3(uint8_t* to, Words words, float factor) {
  uint64_t bytes = 0;
  UNROLL
  for (int j = 0; j < 4; ++j) {
    const uint64_t pair =
        pack_e4m3(low_float(words.at[j]) * factor, high_float(words.at[j]) * factor);
    bytes |= pair << (16 * j);
  }
  *reinterpret_cast<uint64_t*>(to) = bytes;
}

template <int CHUNKS>
DEVICE void float8_row_in_registers(const Float8RowsArgs& args) {
  const int64_t at = block_x() * args.depth;
  Words words[CHUNKS];
  UNROLL
  for (int i = 0; i < CHUNKS; ++i) {
    const int k = 8 * (thread_index() + i * block_threads());
    words[i] = {{0, 0, 0, 0}};
    if (k < args.depth) words[i] = load_words(args.x + at + k);
  }
  float largest = 0.0f;
  UNROLL
  for (int i = 0; i < CHUNKS; ++i) largest = largest_of(words[i], largest);
  largest = max_block(largest, reinterpret_cast<float*>(shared_memory()));
  const float factor = row_factor(args, largest);
  UNROLL
  for (int i = 0; i < CHUNKS; ++i) {
    const int k = 8 * (thread_index() + i * block_threads());
    if (k < args.depth) store_e4m3(args.out + at + k, words[i], factor);
  }
}

KERNEL(float8_rows_3, Float8RowsArgs, 256, 4) { float8_row_in_registers<3>(args); }
KERNEL(float8_rows_6, Float8RowsArgs, 256, 3) { float8_row_in_registers<6>(args); }

KERNEL(float8_rows, Float8RowsArgs, 256, 1) {
  const int64_t at = block_x() * args.depth;
  float largest = 0.0f;
  for (int64_t k = 8 * thread_index(); k < args.depth; k += 8 * block_threads()) {
    largest = largest_of(load_words(args.x + at + k), largest);
  }
  largest = max_block(largest, reinterpret_cast<float*>(shared_memory()));
  const float factor = row_factor(args, largest);
  for (int64_t k = 8 * thread_index(); k < args.depth; k += 8 * block_threads()) {
    store_e4m3(args.out + at + k, load_words(args.x + at + k), factor);
  }
}
