// Attention of decode_whole.cu: warps of a block share a share of the keys.
#pragma once
#include "decode_whole.cuh"

#ifdef HAS_COUNTING_BARRIERS

// A warp's part of attention: 16 keys at a time, from memory to registers. Numbers of a key lie in the order in which loads of 16
// bytes bring them, and so do those of a query; columns of values too.
template <int D>
struct WholeAttention {
  static constexpr int KEYS = 16, CHUNKS = D / 32, PARTS = D / 64, SHARES = 8;
  struct Tile {
    Words key[2][CHUNKS], value[PARTS][4];
  };
  const WholeArgs& args;
  const bf16 *keys, *values;
  int head;

  DEVICE void bring(Words& to, const bf16* from, int key, int begin, int end, int column) const {
    if (key < begin || key >= end) return;
    to = load_words_fresh(from + (int64_t(key) * args.key_heads + head) * D + column);
  }
  // Brings what a tile has of the keys from `begin` to `end`, and leaves the others as they are.
  DEVICE void load(Tile& tile, int start, int begin, int end) const {
    const int n = lane() >> 2, c = lane() & 3;
    UNROLL
    for (int i = 0; i < 2; ++i) {
      UNROLL
      for (int j = 0; j < CHUNKS; ++j) bring(tile.key[i][j], keys, start + 8 * i + n, begin, end, 32 * j + 8 * c);
    }
    UNROLL
    for (int part = 0; part < PARTS; ++part) {
      UNROLL
      for (int i = 0; i < 4; ++i) {
        bring(tile.value[part][i], values, start + 8 * (i >> 1) + 2 * c + (i & 1), begin, end, 64 * part + 8 * n);
      }
    }
  }
  DEVICE void load_query(Words (&query)[CHUNKS]) const {
    const int row = lane() >> 2, c = lane() & 3;
    UNROLL
    for (int j = 0; j < CHUNKS; ++j) {
      query[j] = {{0, 0, 0, 0}};
      if (row >= args.group) continue;
      query[j] = load_words_fresh(args.query + (head * args.group + row) * D + 32 * j + 8 * c);
    }
  }
  DEVICE void add(AttentionSums<D>& own, const Tile& tile, const Words (&query)[CHUNKS], int start, int end,
                  float factor) const {
    float scores[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    UNROLL
    for (int i = 0; i < 2; ++i) {
      UNROLL
      for (int j = 0; j < CHUNKS; ++j) {
        UNROLL
        for (int pair = 0; pair < 4; pair += 2) {
          const uint32_t a[4] = {query[j].at[pair], 0, query[j].at[pair + 1], 0};
          multiply_add(scores[i], a, tile.key[i][j].at[pair], tile.key[i][j].at[pair + 1]);
        }
      }
    }
    hide<16>(scores, start, end, 0, 1, false, 0);
    own.template soften<16>(scores, factor);
    uint32_t a[4];
    weights_operand<16>(a, scores, 0);
    a[1] = a[3] = 0;
    UNROLL
    for (int part = 0; part < PARTS; ++part) {
      const Words(&value)[4] = tile.value[part];
      UNROLL
      for (int t = 0; t < 8; ++t) {
        const uint32_t which = t & 1 ? 0x7632 : 0x5410;
        const uint32_t b0 = select_bytes(value[0].at[t / 2], value[1].at[t / 2], which);
        const uint32_t b1 = select_bytes(value[2].at[t / 2], value[3].at[t / 2], which);
        multiply_add(own.out[8 * part + t], a, b0, b1);
      }
    }
  }
  // Leaves the warp's sums in shared memory: [warp][8][D], and [warp][8][maximum, sum] after them.
  DEVICE static float* sums() { return reinterpret_cast<float*>(shared_memory()); }
  DEVICE static float* stats() { return sums() + WHOLE_WARPS * WHOLE_GROUP * D; }
  DEVICE void leave(const AttentionSums<D>& own) const {
    const int row = WHOLE_GROUP * warp() + (lane() >> 2), c = lane() & 3;
    UNROLL
    for (int part = 0; part < PARTS; ++part) {
      UNROLL
      for (int side = 0; side < 2; ++side) {
        UNROLL
        for (int t = 0; t < 8; t += 4) {
          Words four;
          UNROLL
          for (int i = 0; i < 4; ++i) four.at[i] = float_to_bits(own.out[8 * part + t + i][side]);
          store_words(sums() + row * D + 64 * part + 8 * (2 * c + side) + t, four);
        }
      }
    }
    if (c == 0) {
      stats()[2 * row] = own.maximum[0];
      stats()[2 * row + 1] = own.sum[0];
    }
  }
  // Joins what the warps have left.
  DEVICE void join(int share, float factor) const {
    for (int item = thread_index(); item < args.group * (D / 4); item += WHOLE_THREADS) {
      const int row = item / (D / 4), column = 4 * (item % (D / 4));
      float largest = -INFINITY, total = 0.0f, out[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      UNROLL
      for (int i = 0; i < WHOLE_WARPS; ++i) largest = fmaxf(largest, stats()[2 * (WHOLE_GROUP * i + row)]);
      UNROLL
      for (int i = 0; i < WHOLE_WARPS; ++i) {
        const int at = WHOLE_GROUP * i + row;
        const float by = part_of(stats()[2 * at], largest, factor);
        const Words four = load_words(sums() + at * D + column);
        total += by * stats()[2 * at + 1];
        UNROLL
        for (int j = 0; j < 4; ++j) out[j] += by * bits_to_float(four.at[j]);
      }
      const int64_t place = (int64_t(head) * WHOLE_GROUP + row) * SHARES + share;
      const uint64_t upper = pack_bf16(out[2], out[3]);
      *reinterpret_cast<uint64_t*>(args.partial + place * D + column) = upper << 32 | pack_bf16(out[0], out[1]);
      if (column > 0) continue;
      float* stats = args.stats + 2 * place;
      stats[0] = largest;
      stats[1] = total;
    }
  }
};

#endif
