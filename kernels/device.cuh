// What a kernel may ask of the machine. Every kernel is written against these names only. The compiler
// for GPUs gets instructions (device_ptx.cuh); any other C++ compiler gets an emulation in which the
// threads of a block are fibers of one thread (host/device.h), so that the same source is tested
// without a GPU.
#pragma once
#include <math.h>
#include <stdint.h>

// Numbers as they lie in memory.
struct bf16 {
  uint16_t bits;
};

#ifdef __CUDACC__
#include "device_ptx.cuh"
#else
#include "host/device.h"
#endif

DEVICE float bits_to_float(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both;
  both.bits = bits;
  return both.value;
}

DEVICE uint32_t float_to_bits(float value) {
  union {
    float value;
    uint32_t bits;
  } both;
  both.value = value;
  return both.bits;
}

DEVICE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
DEVICE float to_float(float x) { return x; }
// The halves of two bf16 packed in a word; the lower address is the lower half.
DEVICE float low_float(uint32_t pair) { return bits_to_float(pair << 16); }
DEVICE float high_float(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }

template <class T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
  return x;
}
template <>
DEVICE bf16 from_float<bf16>(float x) {
  return {uint16_t(pack_bf16(x, 0.0f) & 0xffffu)};
}

// An IEEE half, widened.
DEVICE float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Subnormals come out right, since the product is exact.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 5.192296858534828e33f));
}

// 16 bytes, moved at once.
struct alignas(16) Words {
  uint32_t at[4];
};

DEVICE Words load_words(const void* from) { return *static_cast<const Words*>(from); }
// Of what another block or another kernel wrote.
DEVICE Words load_words_fresh(const void* from) {
  Words words;
  load_fresh(words.at, from);
  return words;
}
DEVICE void store_words(void* to, Words words) { *static_cast<Words*>(to) = words; }

// The sum over groups of `width` neighbouring lanes, a power of two; every lane of the warp calls it.
DEVICE float sum_lanes(float x, int width) {
  for (int step = width / 2; step > 0; step /= 2) x += shuffle_xor(x, step);
  return x;
}

DEVICE float max_lanes(float x, int width) {
  for (int step = width / 2; step > 0; step /= 2) x = fmaxf(x, shuffle_xor(x, step));
  return x;
}

// The sum over all threads of the block, the same in each. `scratch` holds one float a warp; the
// block's threads are a multiple of 32.
DEVICE float sum_block(float x, float* scratch) {
  x = sum_lanes(x, 32);
  block_barrier();
  if (lane() == 0) scratch[warp()] = x;
  block_barrier();
  float sum = 0.0f;
  for (int i = 0; i < block_threads() / 32; ++i) sum += scratch[i];
  return sum;
}

// The largest over all threads of the block, as sum_block.
DEVICE float max_block(float x, float* scratch) {
  x = max_lanes(x, 32);
  block_barrier();
  if (lane() == 0) scratch[warp()] = x;
  block_barrier();
  float largest = scratch[0];
  for (int i = 1; i < block_threads() / 32; ++i) largest = fmaxf(largest, scratch[i]);
  return largest;
}

DEVICE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
