// What is done to whole tensors between the models' own kernels. Candle has kernels for all of it, but as code that
// the driver compiles when it is first used, file by file: that takes seconds.
//
// combine: a + b, a - b, a * b or a / b in bf16 or float32, rounded once; b's numbers repeat along a: element i of a meets
//   number (i / inner) % period of b. Grid: (chunks of 8 / 256, 1, 1); 256 threads.
// clamp: NaN stays NaN. Grid: likewise.
// take_rows: rows of a matrix by their numbers, in pieces of 16 bytes; all bits are set of one that is not there.
//   Grid: (pieces / 256, 1, 1); 256 threads.
// row_sizes: the sum of the absolute numbers of each row, in float32. Grid: (rows / 8, 1, 1); 256 threads: a warp for each row.
// lay_out: numbers of 2 or 4 bytes that lie apart, one after the other. Grid: (numbers / 256, 1, 1); 256 threads.
#include "device.cuh"

struct CombineArgs {
  const void *a, *b;
  void* out;
  int64_t count, inner, period;
  int64_t operation;  // + - * /
  int64_t is_float;
};

DEVICE float combined(float a, float b, int operation) {
  switch (operation) {
    case 0: return a + b;
    case 1: return a - b;
    case 2: return a * b;
    default: return a / b;
  }
}

// Up to eight numbers from `first` on, one by one.
template <class Number, class Of>
DEVICE void each_of_eight(const Number* x, Number* out, int64_t first, int64_t count, const Of& of) {
  for (int64_t i = first; i < first + 8 && i < count; ++i) out[i] = from_float<Number>(of(to_float(x[i]), i));
}

template <class Number>
DEVICE void combine(const CombineArgs& args, int64_t first) {
  const Number *a = static_cast<const Number*>(args.a), *b = static_cast<const Number*>(args.b);
  const int operation = int(args.operation);
  each_of_eight(a, static_cast<Number*>(args.out), first, args.count, [&](float x, int64_t i) {
    const int64_t at = args.period == args.count ? i : i / args.inner % args.period;
    return combined(x, to_float(b[at]), operation);
  });
}

KERNEL(combine, CombineArgs, 256, 1) {
  const int64_t first = 8 * (block_x() * block_threads() + thread_index());
  if (args.is_float) return combine<float>(args, first);
  const bool together = args.period == args.count && first + 8 <= args.count;
  if (!together) return combine<bf16>(args, first);
  const Words a = load_words(static_cast<const bf16*>(args.a) + first);
  const Words b = load_words(static_cast<const bf16*>(args.b) + first);
  const int operation = int(args.operation);
  Words out;
  UNROLL
  for (int i = 0; i < 4; ++i) {
    out.at[i] = pack_bf16(combined(low_float(a.at[i]), low_float(b.at[i]), operation),
                          combined(high_float(a.at[i]), high_float(b.at[i]), operation));
  }
  store_words(static_cast<bf16*>(args.out) + first, out);
}

struct ClampArgs {
  const void* x;
  void* out;
  int64_t count;
  double low, high;
  int64_t is_float;
};

KERNEL(clamp, ClampArgs, 256, 1) {
  const int64_t first = 8 * (block_x() * block_threads() + thread_index());
  const float low = float(args.low), high = float(args.high);
  const auto of = [&](float x, int64_t) { return x < low ? low : x > high ? high : x; };
  if (args.is_float) {
    each_of_eight(static_cast<const float*>(args.x), static_cast<float*>(args.out), first, args.count, of);
  } else {
    each_of_eight(static_cast<const bf16*>(args.x), static_cast<bf16*>(args.out), first, args.count, of);
  }
}

struct TakeRowsArgs {
  const unsigned char* from;  // [rows][pieces of 16 bytes]
  const uint32_t* numbers;    // [count]
  unsigned char* out;         // [count][pieces]
  int64_t rows, pieces, count;
};

KERNEL(take_rows, TakeRowsArgs, 256, 1) {
  const int64_t i = block_x() * block_threads() + thread_index();
  if (i >= args.count * args.pieces) return;
  const int64_t row = args.numbers[i / args.pieces], piece = i % args.pieces;
  Words words = {{0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu}};
  if (row < args.rows) words = load_words(args.from + 16 * (row * args.pieces + piece));
  store_words(args.out + 16 * i, words);
}

struct RowSizesArgs {
  const void* x;  // [rows][width]
  float* out;     // [rows]
  int64_t rows, width;
  int64_t is_float;
};

KERNEL(row_sizes, RowSizesArgs, 256, 1) {
  const int64_t row = block_x() * (block_threads() / 32) + warp();
  const bool there = row < args.rows;
  float sum = 0.0f;
  for (int64_t i = lane(); there && i < args.width; i += 32) {
    const int64_t at = row * args.width + i;
    sum += fabsf(args.is_float ? static_cast<const float*>(args.x)[at] : to_float(static_cast<const bf16*>(args.x)[at]));
  }
  sum = sum_lanes(sum, 32);
  if (there && lane() == 0) args.out[row] = sum;
}

struct LayOutArgs {
  static constexpr int RANK = 6;
  const void* from;
  void* out;
  int64_t count, number_bytes;
  int64_t sizes[RANK], strides[RANK];  // in numbers; the last axis is the innermost
};

KERNEL(lay_out, LayOutArgs, 256, 1) {
  const int64_t i = block_x() * block_threads() + thread_index();
  if (i >= args.count) return;
  int64_t rest = i, at = 0;
  UNROLL
  for (int axis = LayOutArgs::RANK - 1; axis >= 0; --axis) {
    at += rest % args.sizes[axis] * args.strides[axis];
    rest /= args.sizes[axis];
  }
  if (args.number_bytes == 2) {
    static_cast<uint16_t*>(args.out)[i] = static_cast<const uint16_t*>(args.from)[at];
  } else {
    static_cast<uint32_t*>(args.out)[i] = static_cast<const uint32_t*>(args.from)[at];
  }
}
