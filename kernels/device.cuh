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

// The nearest number of e4m3, ties to even; beyond its range the largest.
DEVICE uint32_t to_e4m3(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fu;  // NaN
  if (size < 0x3c800000u) {  // 1/64: multiples of 1/512, rounded where a float has no more bits
    return sign | (float_to_bits(bits_to_float(size) * 512.0f + 8388608.0f) & 0xffu);
  }
  const uint32_t code = ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
  return sign | (code < 0x7eu ? code : 0x7eu);
}

// Two of them; `low` comes to the lower address. The instruction gives the same bits.
DEVICE uint32_t pack_e4m3(float low, float high) {
#ifdef HAS_E4M3
  return convert_to_e4m3(low, high);
#else
  return to_e4m3(low) | to_e4m3(high) << 8;
#endif
}

// 1 / (1 + exp(-x)), within some units in the last place of float32.
DEVICE float sigmoid(float x) { return inverse_fast(1.0f + exp2_fast(-1.4426950408889634f * x)); }

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
// Of what nothing writes and nobody reads again.
DEVICE Words load_words_once(const void* from) {
  Words words;
  load_once(words.at, from);
  return words;
}
DEVICE void store_words(void* to, Words words) { *static_cast<Words*>(to) = words; }

// The sum over groups of `width` neighbouring lanes, a power of two; every lane of the warp calls it.
DEVICE float sum_lanes(float x, int width) {
  for (int step = width / 2; step > 0; step /= 2) x += shuffle_xor(x, step);
  return x;
}

DEVICE uint32_t shuffle_xor_bits(uint32_t x, int mask) {
  return float_to_bits(shuffle_xor(bits_to_float(x), mask));
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
