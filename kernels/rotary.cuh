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

// Eight numbers of a head's row, chunk `chunk` of D / 8, after norm and rotation, rounded once.
// All lanes of the warp call it, and the D / 8 neighbouring lanes that start at a multiple of D / 8
// hold one row.
template <int D>
DEVICE Words prepared_chunk(Words words, const Preparation& prepare, int64_t token, int chunk) {
  float x[8];
  UNROLL
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = low_float(words.at[i]);
    x[2 * i + 1] = high_float(words.at[i]);
  }
  if (prepare.norm) {
    static_assert((D & (D - 1)) == 0, "lanes share rows of a power of two");
    float squares = 0.0f;
    UNROLL
    for (int i = 0; i < 8; ++i) squares += x[i] * x[i];
    squares = sum_lanes(squares, D / 8);
    const float factor = inverse_root(squares / D + float(prepare.eps));
    UNROLL
    for (int i = 0; i < 8; ++i) {
      const int at = 8 * chunk + i;
      const float weight = prepare.norm_is_float ? static_cast<const float*>(prepare.norm)[at]
                                                 : to_float(static_cast<const bf16*>(prepare.norm)[at]);
      x[i] = x[i] * factor * weight;
    }
  }
  if (prepare.cos) {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const int64_t at = token * (D / 2) + 4 * chunk + i;
      const float cos = prepare.cos[at], sin = prepare.sin[at];
      const float even = x[2 * i], odd = x[2 * i + 1];
      x[2 * i] = even * cos - odd * sin;
      x[2 * i + 1] = even * sin + odd * cos;
    }
  }
  UNROLL
  for (int i = 0; i < 4; ++i) words.at[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
  return words;
}
