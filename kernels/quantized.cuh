// Weights as they are stored, widened eight at a time. Layouts: ggml's block_q8_0, block_q4_K, block_q5_K,
// block_q6_K (https://github.com/ggml-org/llama.cpp/blob/b6000/ggml/src/ggml-common.h), fp8 e4m3.
#pragma once
#include "device.cuh"

// A format says how many numbers and bytes a block has, and how numbers 8 * i .. 8 * i + 8 of a block
// are widened.
struct Q8_0 {
  static constexpr int NUMBERS = 32, BYTES = 34;
  DEVICE static void widen(const uint8_t* block, int i, float (&to)[8]);
};
struct Q4K {
  static constexpr int NUMBERS = 256, BYTES = 144;
  DEVICE static void widen(const uint8_t* block, int i, float (&to)[8]);
};
struct Q5K {
  static constexpr int NUMBERS = 256, BYTES = 176;
  DEVICE static void widen(const uint8_t* block, int i, float (&to)[8]);
};
struct Q6K {
  static constexpr int NUMBERS = 256, BYTES = 210;
  DEVICE static void widen(const uint8_t* block, int i, float (&to)[8]);
};
struct Float8 {
  static constexpr int NUMBERS = 8, BYTES = 8;
  DEVICE static void widen(const uint8_t* block, int i, float (&to)[8]);
};
struct Plain {  // bf16
  static constexpr int NUMBERS = 8, BYTES = 16;
  DEVICE static void widen(const uint8_t* block, int i, float (&to)[8]);
};

// Blocks start at even addresses only.
DEVICE uint16_t two_bytes(const uint8_t* at) { return *reinterpret_cast<const uint16_t*>(at); }
// Blocks of 144 and 176 bytes start at multiples of 16.
DEVICE uint32_t four_bytes(const uint8_t* at) { return *reinterpret_cast<const uint32_t*>(at); }

DEVICE void Q8_0::widen(const uint8_t* block, int i, float (&to)[8]) {
  const float scale = half_to_float(two_bytes(block));
  UNROLL
  for (int j = 0; j < 4; ++j) {
    const uint16_t pair = two_bytes(block + 2 + 8 * i + 2 * j);
    to[2 * j] = scale * float(int8_t(pair & 0xff));
    to[2 * j + 1] = scale * float(int8_t(pair >> 8));
  }
}

// The 6-bit scale and minimum of 32 numbers, group `g` of 8.
DEVICE void scale_and_minimum(const uint8_t* scales, int g, int& scale, int& minimum) {
  if (g < 4) {
    scale = scales[g] & 63;
    minimum = scales[g + 4] & 63;
  } else {
    scale = (scales[g + 4] & 15) | (scales[g - 4] >> 6) << 4;
    minimum = (scales[g + 4] >> 4) | (scales[g] >> 6) << 4;
  }
}

DEVICE void Q4K::widen(const uint8_t* block, int i, float (&to)[8]) {
  const int group = i / 4;  // 32 numbers share a scale; two groups share their bytes
  int scale, minimum;
  scale_and_minimum(block + 4, group, scale, minimum);
  const float d = half_to_float(two_bytes(block)) * float(scale);
  const float m = half_to_float(two_bytes(block + 2)) * float(minimum);
  UNROLL
  for (int word = 0; word < 2; ++word) {
    uint32_t bits = four_bytes(block + 16 + 32 * (group / 2) + 8 * (i % 4) + 4 * word);
    bits >>= 4 * (group & 1);
    UNROLL
    for (int j = 0; j < 4; ++j) to[4 * word + j] = d * float((bits >> (8 * j)) & 15) - m;
  }
}

DEVICE void Q5K::widen(const uint8_t* block, int i, float (&to)[8]) {
  const int group = i / 4;
  int scale, minimum;
  scale_and_minimum(block + 4, group, scale, minimum);
  const float d = half_to_float(two_bytes(block)) * float(scale);
  const float m = half_to_float(two_bytes(block + 2)) * float(minimum);
  UNROLL
  for (int word = 0; word < 2; ++word) {
    const int at = 8 * (i % 4) + 4 * word;
    const uint32_t low = four_bytes(block + 48 + 32 * (group / 2) + at) >> (4 * (group & 1));
    const uint32_t high = four_bytes(block + 16 + at) >> group;
    UNROLL
    for (int j = 0; j < 4; ++j) {
      const uint32_t number = ((low >> (8 * j)) & 15) | ((high >> (8 * j)) & 1) << 4;
      to[4 * word + j] = d * float(number) - m;
    }
  }
}

DEVICE void Q6K::widen(const uint8_t* block, int i, float (&to)[8]) {
  // Halves of 128 numbers; in each, four quarters of 32 share 64 bytes of low and 32 of high bits.
  const int half = i / 16, quarter = i / 4 % 4, at = 8 * (i % 4);
  const uint8_t* low = block + 64 * half + 32 * (quarter & 1) + at;
  const uint8_t* high = block + 128 + 32 * half + at;
  const int8_t scale = int8_t(block[192 + 8 * half + 2 * quarter + at / 16]);
  const float d = half_to_float(two_bytes(block + 208)) * float(scale);
  UNROLL
  for (int j = 0; j < 4; ++j) {
    const uint32_t lows = two_bytes(low + 2 * j) >> (4 * (quarter >> 1));
    const uint32_t highs = two_bytes(high + 2 * j) >> (2 * quarter);
    to[2 * j] = d * float(int((lows & 15) | (highs & 3) << 4) - 32);
    to[2 * j + 1] = d * float(int(((lows >> 8) & 15) | ((highs >> 8) & 3) << 4) - 32);
  }
}

DEVICE void Float8::widen(const uint8_t* block, int, float (&to)[8]) {
  UNROLL
  for (int j = 0; j < 8; ++j) {
    const uint32_t bits = block[j];
    // e4m3 has a bias of 7 and no infinity. The bits, moved to their places in a float32, are the
    // number times 2^-120, subnormals included; the largest pattern is NaN.
    const uint32_t rest = bits & 0x7f;
    const float size = rest == 0x7f ? NAN : bits_to_float(rest << 20) * 1.329227995784916e36f;
    to[j] = bits & 0x80 ? -size : size;
  }
}

DEVICE void Plain::widen(const uint8_t* block, int, float (&to)[8]) {
  const Words words = load_words(block);
  UNROLL
  for (int j = 0; j < 4; ++j) {
    to[2 * j] = low_float(words.at[j]);
    to[2 * j + 1] = high_float(words.at[j]);
  }
}

// Numbers 8 * chunk .. of a row of blocks.
template <class Format>
DEVICE void widen_chunk(const uint8_t* row, int chunk, float (&to)[8]) {
  constexpr int CHUNKS = Format::NUMBERS / 8;
  Format::widen(row + int64_t(chunk / CHUNKS) * Format::BYTES, chunk % CHUNKS, to);
}
