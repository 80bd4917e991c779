// Norms over rows and what surrounds them. Rows are bf16 and lie side by side; a row's width is a
// multiple of 8. Sums are float32; each result is rounded once.
//
// layer_norm: (x - mean) / sqrt(variance + eps), times 1 + scale, plus shift, where these are there.
//   With a gate, x is first replaced by residual + gate * x, rounded to bf16 and written to `sum`:
//   the end of one half of a block and the norm before the next in one pass.
//   Grid: (rows of all pieces, 1, 1); 128 threads; shared memory: width floats.
// rms_norm: x / sqrt(mean(x^2) + eps) * weight. Launched as layer_norm, of one piece.
// gated_add: residual + gate * x. Grid: (chunks of 8 of all pieces / 256, 1, 1); 256 threads.
//
// Rows come in pieces, which lie anywhere and are modulated each in its own way: the text and the picture, or
// tokens that are free of noise among others. A block or a thread looks for its own.
//
// Tried: the row stays in shared memory, so that mean, variance and result read global memory once.
#include "device.cuh"

struct RowPiece {
  const bf16* x;         // [rows][width]
  bf16* out;             // [rows][width]
  int64_t rows;
  const bf16* scale;     // [rows / shared][width], or null
  const bf16* shift;
  int64_t shared;        // rows of x that share one row of scale, shift and gate
  const bf16* residual;  // [rows][width], or null
  const bf16* gate;      // [rows / shared][width]
  bf16* sum;             // [rows][width], or null
};

struct RowArgs {
  static constexpr int PIECES = 8;
  int64_t width;
  const void* weight;    // [width] in bf16 or float32
  int64_t weight_is_float;
  double eps;
  RowPiece pieces[PIECES];  // those that are not there have no rows

  // The piece with element `i` of all, which becomes that of the piece; null behind the last.
  DEVICE const RowPiece* piece_of(int64_t& i) const {
    for (int p = 0; p < PIECES; ++p) {
      const int64_t elements = pieces[p].rows * width;
      if (i < elements) return pieces + p;
      i -= elements;
    }
    return nullptr;
  }
};

struct Eight {
  float at[8];
};

DEVICE Eight widened(Words words) {
  Eight x;
  UNROLL
  for (int i = 0; i < 4; ++i) {
    x.at[2 * i] = low_float(words.at[i]);
    x.at[2 * i + 1] = high_float(words.at[i]);
  }
  return x;
}

DEVICE Eight load_eight(const bf16* from) { return widened(load_words(from)); }

DEVICE Words rounded(const Eight& x) {
  Words words;
  UNROLL
  for (int i = 0; i < 4; ++i) words.at[i] = pack_bf16(x.at[2 * i], x.at[2 * i + 1]);
  return words;
}

// residual + gate * x, rounded.
DEVICE Words gated(const Eight& residual, const Eight& gate, const Eight& x) {
  Eight sum;
  UNROLL
  for (int i = 0; i < 8; ++i) sum.at[i] = residual.at[i] + gate.at[i] * x.at[i];
  return rounded(sum);
}

KERNEL(layer_norm, RowArgs, 128, 1) {
  float* row = reinterpret_cast<float*>(shared_memory());
  float* scratch = row + args.width;
  int64_t at = block_x() * args.width;
  const RowPiece* of = args.piece_of(at);
  if (!of) return;
  const RowPiece& piece = *of;
  const int64_t shared_at = at / args.width / piece.shared * args.width;
  float sum = 0.0f;
  for (int64_t i = 8 * thread_index(); i < args.width; i += 8 * block_threads()) {
    Eight x = load_eight(piece.x + at + i);
    if (piece.residual) {
      const Words words =
          gated(load_eight(piece.residual + at + i), load_eight(piece.gate + shared_at + i), x);
      store_words(piece.sum + at + i, words);
      x = widened(words);
    }
    UNROLL
    for (int j = 0; j < 8; ++j) {
      row[i + j] = x.at[j];
      sum += x.at[j];
    }
  }
  const float mean = sum_block(sum, scratch) / float(args.width);
  float squares = 0.0f;
  for (int64_t i = 8 * thread_index(); i < args.width; i += 8 * block_threads()) {
    UNROLL
    for (int j = 0; j < 8; ++j) squares += (row[i + j] - mean) * (row[i + j] - mean);
  }
  const float factor =
      inverse_root(sum_block(squares, scratch) / float(args.width) + float(args.eps));
  for (int64_t i = 8 * thread_index(); i < args.width; i += 8 * block_threads()) {
    Eight y;
    UNROLL
    for (int j = 0; j < 8; ++j) y.at[j] = (row[i + j] - mean) * factor;
    if (piece.scale) {
      const Eight scale = load_eight(piece.scale + shared_at + i);
      const Eight shift = load_eight(piece.shift + shared_at + i);
      UNROLL
      for (int j = 0; j < 8; ++j) y.at[j] = y.at[j] * (1.0f + scale.at[j]) + shift.at[j];
    }
    store_words(piece.out + at + i, rounded(y));
  }
}

KERNEL(rms_norm, RowArgs, 128, 1) {
  float* row = reinterpret_cast<float*>(shared_memory());
  float* scratch = row + args.width;
  const int64_t at = block_x() * args.width;
  float squares = 0.0f;
  for (int64_t i = 8 * thread_index(); i < args.width; i += 8 * block_threads()) {
    const Eight x = load_eight(args.pieces[0].x + at + i);
    UNROLL
    for (int j = 0; j < 8; ++j) {
      row[i + j] = x.at[j];
      squares += x.at[j] * x.at[j];
    }
  }
  const float factor =
      inverse_root(sum_block(squares, scratch) / float(args.width) + float(args.eps));
  for (int64_t i = 8 * thread_index(); i < args.width; i += 8 * block_threads()) {
    Eight y;
    UNROLL
    for (int j = 0; j < 8; ++j) {
      const float weight = args.weight_is_float
                               ? static_cast<const float*>(args.weight)[i + j]
                               : to_float(static_cast<const bf16*>(args.weight)[i + j]);
      y.at[j] = row[i + j] * factor * weight;
    }
    store_words(args.pieces[0].out + at + i, rounded(y));
  }
}

KERNEL(gated_add, RowArgs, 256, 1) {
  int64_t i = 8 * (block_x() * block_threads() + thread_index());
  const RowPiece* of = args.piece_of(i);
  if (!of) return;
  const RowPiece& piece = *of;
  const int64_t gate_at = i / args.width / piece.shared * args.width + i % args.width;
  store_words(piece.out + i, gated(load_eight(piece.residual + i), load_eight(piece.gate + gate_at),
                                   load_eight(piece.x + i)));
}
