// The products of decode.cu with Q4_K, Q6_K and Q8_0 as few_bytes.cuh computes them. A block owns neighbouring
// outputs of one matrix, or pairs of outputs that end in one number.
//
// Tried (H200, 7B of Q4_K, one layer's gate and up): 8 warps of a block 26.0 us, two such blocks 29, 10 warps of 96
// registers 33, 16 warps of 128 registers 22.4; asking for this kernel's or the next one's weights for the cache of
// the second level gains nothing.
#pragma once
#include "few_bytes.cuh"

struct NormArgs {
  const float* x;      // [depth]
  const void* weight;  // [depth] in bf16 or float32
  int64_t is_float;
  double eps;
  int64_t depth, scratch_at;  // a place in shared memory for a float of each warp
};

// The residual stream times a norm's weight; the norm's factor comes after the products.
struct NormedRow {
  static constexpr int TOGETHER = 2;
  const NormArgs& norm;
  float squares = 0.0f;
  struct Held {
    Words x[2], weight[2];
  };
  DEVICE explicit NormedRow(const NormArgs& norm) : norm(norm) {}
  DEVICE float* scratch() const { return reinterpret_cast<float*>(shared_memory() + norm.scratch_at); }
  DEVICE void start() { wait_for_last_kernel(); }
  DEVICE Held load(int, int chunk) const {
    Held held;
    load_weight(held, chunk);
    load_x(held, chunk);
    return held;
  }
  DEVICE void load_weight(Held& held, int chunk) const {
    held.weight[0] = held.weight[1] = {{0, 0, 0, 0}};
    if (8 * int64_t(chunk) >= norm.depth) return;
    held.weight[0] = load_words(static_cast<const uint8_t*>(norm.weight) + (norm.is_float ? 32 : 16) * chunk);
    if (norm.is_float) held.weight[1] = load_words(static_cast<const float*>(norm.weight) + 8 * chunk + 4);
  }
  DEVICE void load_x(Held& held, int chunk) const {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      held.x[half] = {{0, 0, 0, 0}};
      if (8 * int64_t(chunk) < norm.depth) held.x[half] = load_words_fresh(norm.x + 8 * chunk + 4 * half);
    }
  }
  DEVICE void widen(const Held& held, float (&to)[8]) {
    UNROLL
    for (int i = 0; i < 8; ++i) {
      const float x = bits_to_float(held.x[i / 4].at[i % 4]);
      const uint32_t pair = held.weight[0].at[i / 2];
      const float narrow = i % 2 ? high_float(pair) : low_float(pair);
      squares = fmaf(x, x, squares);
      to[i] = x * (norm.is_float ? bits_to_float(held.weight[i / 4].at[i % 4]) : narrow);
    }
  }
  DEVICE void ready() {
    const float sum = sum_lanes(squares, 32);
    if (lane() == 0) scratch()[warp()] = sum;
  }
  // After the products, in any thread.
  DEVICE float factor() const {
    float sum = 0.0f;
    for (int i = 0; i < block_threads() / 32; ++i) sum += scratch()[i];
    return inverse_root(sum / float(norm.depth) + float(norm.eps));
  }
};

// A block's outputs.
struct Share {
  int first, outs;
};
DEVICE Share share_of(int64_t all, int64_t block, int64_t blocks) {
  const uint32_t outs = uint32_t(all), own = uint32_t(block), count = uint32_t(blocks);
  const uint32_t first = own * outs / count;
  return {int(first), int((own + 1) * outs / count - first)};
}

template <class Format>
DEVICE uint64_t stored_row_bytes(int64_t depth) {
  return uint64_t(depth / 256) * Format::BYTES;
}

struct QkvBytesArgs {
  NormArgs norm;
  struct {
    const uint8_t* bytes;
    const bf16* bias;  // [2 pairs], or null
    bf16* to;          // [heads][D], or the cache [token][key heads][D]
    int64_t pairs, format, blocks;  // formats: 0 q4_k, 1 q6_k, 2 q8_0
  } matrix[3];                      // of queries, keys, values
  const DecodeState* state;
  int64_t width;  // of a head
};

// Pairs are the numbers of a head that rotation mixes.
template <class Format, int AHEAD>
DEVICE void qkv_bytes(const QkvBytesArgs& args, int which, int64_t block) {
  const auto& matrix = args.matrix[which];
  const Share share = share_of(matrix.pairs, block, matrix.blocks);
  const uint64_t bytes = stored_row_bytes<Format>(args.norm.depth);
  const int half = int(args.width / 2);
  const float* angles = decode_angles(args.state);
  struct Aid {
    int row;  // the first of the pair
    float cos, sin, bias[2];
  };
  auto row_of = [&](int out) {
    const int at = share.first + out, head = at / half;
    return head * half + at;
  };
  auto aid_of = [&](int out) -> Aid {
    const int row = row_of(out), pair = row % int(args.width);
    Aid aid = {row, 1.0f, 0.0f, {0.0f, 0.0f}};
    if (which < 2) {
      aid.cos = angles[pair];
      aid.sin = angles[half + pair];
    }
    if (matrix.bias) {
      aid.bias[0] = to_float(matrix.bias[row]);
      aid.bias[1] = to_float(matrix.bias[row + half]);
    }
    return aid;
  };
  // What this thread's first output needs is asked for early.
  const Aid held = aid_of(thread_index() < share.outs ? thread_index() : 0);
  bf16* to = matrix.to + (which == 0 ? 0 : args.state->past * 2 * matrix.pairs);
  NormedRow source(args.norm);
  FewBytes<Format, 1, AHEAD, true>::multiply(
      args.norm.depth, share.outs,
      [&](int out, int second) { return matrix.bytes + uint64_t(row_of(out) + (second ? half : 0)) * bytes; },
      source,
      [&](int, int out, float sum, float second) {
        const Aid aid = out == thread_index() ? held : aid_of(out);
        const float factor = source.factor();
        const float a = sum * factor + aid.bias[0], b = second * factor + aid.bias[1];
        to[aid.row] = from_float<bf16>(a * aid.cos - b * aid.sin);
        to[aid.row + half] = from_float<bf16>(b * aid.cos + a * aid.sin);
      });
}

DEVICE void qkv_bytes_of_each(const QkvBytesArgs& args) {
  release_next_kernel();
  int which = 0;
  int64_t block = block_x();
  while (block >= args.matrix[which].blocks) block -= args.matrix[which++].blocks;
  const int64_t format = args.matrix[which].format;
  if (format == 0) return qkv_bytes<BytesQ4K, 2>(args, which, block);
  if (format == 1) return qkv_bytes<BytesQ6K, 1>(args, which, block);
  qkv_bytes<BytesQ8_0, 2>(args, which, block);
}

struct AddBytesArgs {
  const bf16* row;  // [depth]
  int64_t depth;
  const uint8_t* matrix;
  int64_t outs;
  float* x;  // [outs]
};

template <class Format, int AHEAD>
DEVICE void add_bytes(const AddBytesArgs& args) {
  release_next_kernel();
  const Share share = share_of(args.outs, block_x(), grid_x());
  const uint64_t bytes = stored_row_bytes<Format>(args.depth);
  const uint8_t* matrix = args.matrix + share.first * bytes;
  float* x = args.x + share.first;
  struct Source : PlainRows {
    const float* from;
    bool own;
    float held;  // this thread's first output before, asked for ahead of the sums
    DEVICE void start() {
      wait_for_last_kernel();
      held = own ? load_fresh(from) : 0.0f;
    }
    DEVICE void ready() const {}
  };
  Source source{{args.row, args.depth, 1}, x + thread_index(), thread_index() < share.outs, 0.0f};
  FewBytes<Format, 1, AHEAD>::multiply(
      args.depth, share.outs, [&](int out, int) { return matrix + uint64_t(out) * bytes; }, source,
      [&](int, int out, float sum, float) {
        x[out] = (out == thread_index() ? source.held : load_fresh(x + out)) + sum;
      });
}

struct GateUpBytesArgs {
  NormArgs norm;
  const uint8_t* matrix[2];
  int64_t outs;
  bf16* out;  // [outs]
};

template <class Format, int AHEAD>
DEVICE void gate_up_bytes(const GateUpBytesArgs& args) {
  release_next_kernel();
  const Share share = share_of(args.outs, block_x(), grid_x());
  const uint64_t bytes = stored_row_bytes<Format>(args.norm.depth);
  NormedRow source(args.norm);
  FewBytes<Format, 1, AHEAD, true>::multiply(
      args.norm.depth, share.outs,
      [&](int out, int second) { return args.matrix[second] + uint64_t(share.first + out) * bytes; }, source,
      [&](int, int out, float sum, float second) {
        const float factor = source.factor(), gate = sum * factor, up = second * factor;
        args.out[share.first + out] = from_float<bf16>(gate * sigmoid(gate) * up);
      });
}

struct LogitsBytesArgs {
  NormArgs norm;
  const uint8_t* matrix;
  int64_t outs;
  float* logits;  // [outs]
};

template <class Format, int AHEAD>
DEVICE void logits_bytes(const LogitsBytesArgs& args) {
  release_next_kernel();
  const Share share = share_of(args.outs, block_x(), grid_x());
  const uint64_t bytes = stored_row_bytes<Format>(args.norm.depth);
  const uint8_t* matrix = args.matrix + share.first * bytes;
  NormedRow source(args.norm);
  FewBytes<Format, 1, AHEAD>::multiply(
      args.norm.depth, share.outs, [&](int out, int) { return matrix + uint64_t(out) * bytes; }, source,
      [&](int, int out, float sum, float) { args.logits[share.first + out] = sum * source.factor(); });
}
