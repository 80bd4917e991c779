// Attention of decode_whole.cu: warps of a block share a share of the keys.
#pragma once
#include "decode_whole.cuh"

#ifdef HAS_COUNTING_BARRIERS

// A warp's part of attention: 16 keys at a time, from a ring to registers. Numbers of a key lie in the order in which loads of 16
// bytes bring them, and so do those of a query; columns of values too.
template <int D>
struct WholeAttention {
  static constexpr int CHUNKS = D / 32, PARTS = D / 64, SHARES = WholeKeys::SHARES;
  struct Tile {
    Words key[2][CHUNKS], value[PARTS][4];
  };
  const WholeArgs& args;
  int head;

  // Takes keys and values from `first` on from two places of the ring. Values from `end` on, which may be anything, become zeros;
  // scores of such keys are hidden later.
  DEVICE void load(Tile& tile, WholeRing& ring, int first, int end) const {
    const int n = lane() >> 2, c = lane() & 3;
    constexpr int ROW = 2 * D;
    const unsigned char* keys = ring.take() + n * ROW + 16 * c;
    UNROLL
    for (int i = 0; i < 2; ++i) {
      UNROLL
      for (int j = 0; j < CHUNKS; ++j) tile.key[i][j] = load_words(keys + 8 * i * ROW + 64 * j);
    }
    ring.give_back();
    ring.advance(1);
    const unsigned char* values = ring.take() + 2 * c * ROW + 16 * n;
    UNROLL
    for (int part = 0; part < PARTS; ++part) {
      UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * (i >> 1) + (i & 1);
        tile.value[part][i] = {{0, 0, 0, 0}};
        if (first + 2 * c + row < end) tile.value[part][i] = load_words(values + row * ROW + 128 * part);
      }
    }
    ring.give_back();
    ring.advance(1);
  }
  // Brings what other blocks hand on with this tag to shared memory, as soon as it is there, a row for a warp: queries and, if the
  // share has it, the token's own key and value. Two pairs of numbers for a lane, see WholeArgs.
  DEVICE void take_rows(bool has_own, uint32_t tag) const {
    const int group = int(args.group), rows = group + (has_own ? 2 : 0);
    const int64_t first = int64_t(head) * group, others = int64_t(args.key_heads) * group + head;
    for (int row = warp(); row < rows && lane() < D / 4; row += WHOLE_WARPS) {
      const int64_t from = row < group ? first + row : others + (row - group) * args.key_heads;
      const uint64_t* at = args.handed + from * (D / 2) + 2 * lane();
      uint64_t pairs[2];
      load_tagged(pairs, at);
      while ((pairs[0] >> 32 ^ tag) | (pairs[1] >> 32 ^ tag)) {
        let_others_go_on();
        load_tagged(pairs, at);
      }
      uint32_t* to = row_of(row) + lane();
      to[0] = select_bytes(uint32_t(pairs[0]), uint32_t(pairs[1]), 0x5410);
      to[D / 4] = select_bytes(uint32_t(pairs[0]), uint32_t(pairs[1]), 0x7632);
    }
    warp_barrier();  // lanes may have looked unequally often, and barriers of all threads are for whole warps
  }
  // A row from shared memory, in the order of a lane's numbers of a query.
  DEVICE void load_row(Words (&to)[CHUNKS], int row) const {
    UNROLL
    for (int j = 0; j < CHUNKS; ++j) to[j] = load_words(row_of(row) + 16 * j + 4 * (lane() & 3));
  }
  DEVICE void load_query(Words (&query)[CHUNKS]) const {
    const int row = lane() >> 2;
    UNROLL
    for (int j = 0; j < CHUNKS; ++j) query[j] = {{0, 0, 0, 0}};
    if (row < args.group) load_row(query, row);
  }
  // Leaves the scores of the token's own key in shared memory, for one warp.
  DEVICE void leave_own(const Words (&query)[CHUNKS]) const {
    Words key[CHUNKS];
    load_row(key, int(args.group));
    float score = 0.0f;
    UNROLL
    for (int j = 0; j < CHUNKS; ++j) {
      UNROLL
      for (int i = 0; i < 4; ++i) {
        score = fmaf(low_float(query[j].at[i]), low_float(key[j].at[i]), score);
        score = fmaf(high_float(query[j].at[i]), high_float(key[j].at[i]), score);
      }
    }
    score = sum_lanes(score, 4);
    if ((lane() & 3) == 0) own_scores()[lane() >> 2] = score;
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
  // Leaves the warp's sums in shared memory: [warp][8][D], and [warp][8][maximum, sum] after them; scores of the token's own key
  // [8] follow, and rows [10][D] in bf16, each 16 bytes longer: queries, that key and its value.
  DEVICE static float* sums() { return reinterpret_cast<float*>(shared_memory()); }
  DEVICE static float* stats() { return sums() + WHOLE_WARPS * WHOLE_GROUP * D; }
  DEVICE static float* own_scores() { return stats() + 2 * WHOLE_WARPS * WHOLE_GROUP; }
  DEVICE static uint32_t* row_of(int row) {
    return reinterpret_cast<uint32_t*>(own_scores() + WHOLE_GROUP) + row * (D / 2 + 4);
  }
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
  // Joins what the warps have left, with the token's own key if it is of this share.
  DEVICE void join(int share, bool has_own, float factor) const {
    for (int item = thread_index(); item < args.group * (D / 4); item += WHOLE_THREADS) {
      const int row = item / (D / 4), column = 4 * (item % (D / 4));
      float largest = -INFINITY, total = 0.0f, out[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      UNROLL
      for (int i = 0; i < WHOLE_WARPS; ++i) largest = fmaxf(largest, stats()[2 * (WHOLE_GROUP * i + row)]);
      if (has_own) largest = fmaxf(largest, own_scores()[row]);
      UNROLL
      for (int i = 0; i < WHOLE_WARPS; ++i) {
        const int at = WHOLE_GROUP * i + row;
        const float by = part_of(stats()[2 * at], largest, factor);
        const Words four = load_words(sums() + at * D + column);
        total += by * stats()[2 * at + 1];
        UNROLL
        for (int j = 0; j < 4; ++j) out[j] += by * bits_to_float(four.at[j]);
      }
      if (has_own) {
        const float by = part_of(own_scores()[row], largest, factor);
        total += by;
        const uint32_t* value = row_of(int(args.group) + 1) + column / 2;
        UNROLL
        for (int j = 0; j < 4; j += 2) {
          out[j] += by * low_float(value[j / 2]);
          out[j + 1] += by * high_float(value[j / 2]);
        }
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
