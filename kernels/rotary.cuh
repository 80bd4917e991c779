// RMS norm over a head and rotation of neighbouring pairs, on eight numbers a thread.
#pragma once
#include "device.cuh"

struct Preparation {
  const void* norm;      // [D] in bf16 or float32, or null for no norm
  int64_t norm_is_float;
  const float* cos;      // [token][D / 2], or null for no rotation
  const float* sin;
  double eps;
};

// Eight numbers of each of N heads' rows, chunk `chunk` of D / 8, after norm and rotation, rounded once.
// All lanes of the warp call it, and the D / 8 neighbouring lanes that start at a multiple of D / 8
// hold one row. What rows read from memory is read at once.
template <int D, int N>
DEVICE void prepare_chunks(Words (&words)[N], const Preparation& prepare, const int64_t (&tokens)[N],
                           int chunk) {
  float x[N][8];
  UNROLL
  for (int n = 0; n < N; ++n) {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      x[n][2 * i] = low_float(words[n].at[i]);
      x[n][2 * i + 1] = high_float(words[n].at[i]);
    }
  }
  if (prepare.norm) {
    static_assert((D & (D - 1)) == 0, "lanes share rows of a power of two");
    float weight[8];
    UNROLL
    for (int i = 0; i < 8; ++i) {
      const int at = 8 * chunk + i;
      weight[i] = prepare.norm_is_float ? static_cast<const float*>(prepare.norm)[at]
                                        : to_float(static_cast<const bf16*>(prepare.norm)[at]);
    }
    UNROLL
    for (int n = 0; n < N; ++n) {
      float squares = 0.0f;
      UNROLL
      for (int i = 0; i < 8; ++i) squares += x[n][i] * x[n][i];
      squares = sum_lanes(squares, D / 8);
      const float factor = inverse_root(squares / D + float(prepare.eps));
      UNROLL
      for (int i = 0; i < 8; ++i) x[n][i] = x[n][i] * factor * weight[i];
    }
  }
  if (prepare.cos) {
    UNROLL
    for (int n = 0; n < N; ++n) {
      UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t at = tokens[n] * (D / 2) + 4 * chunk + i;
        const float cos = prepare.cos[at], sin = prepare.sin[at];
        const float even = x[n][2 * i], odd = x[n][2 * i + 1];
        x[n][2 * i] = even * cos - odd * sin;
        x[n][2 * i + 1] = even * sin + odd * cos;
      }
    }
  }
  UNROLL
  for (int n = 0; n < N; ++n) {
    UNROLL
    for (int i = 0; i < 4; ++i) words[n].at[i] = pack_bf16(x[n][2 * i], x[n][2 * i + 1]);
  }
}

template <int D>
DEVICE Words prepared_chunk(Words words, const Preparation& prepare, int64_t token, int chunk) {
  Words one[1] = {words};
  const int64_t tokens[1] = {token};
  prepare_chunks<D>(one, prepare, tokens, chunk);
  return one[0];
}
