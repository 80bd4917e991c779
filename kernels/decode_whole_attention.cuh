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

  // Takes keys and values from two places of the ring.
  DEVICE void load(Tile& tile, WholeRing& ring) const {
    const int n = lane() >> 2, c = lane() & 3;
    constexpr int ROW = KeyTile<D>::ROW_BYTES;
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
        tile.value[part][i] = load_words(values + (8 * (i >> 1) + (i & 1)) * ROW + 128 * part);
      }
    }
    ring.give_back();
    ring.advance(1);
  }
  // What other blocks hand on with this tag, as soon as it is there: N times two words, see WholeArgs.
  template <int N>
  DEVICE static void take(uint64_t (&words)[N][2], const uint64_t* const (&at)[N], uint32_t tag) {
    while (true) {
      uint32_t missing = 0;
      UNROLL
      for (int n = 0; n < N; ++n) load_tagged(words[n], at[n]);
      UNROLL
      for (int n = 0; n < N; ++n) missing |= (words[n][0] >> 32 ^ tag) | (words[n][1] >> 32 ^ tag);
      if (missing == 0) return;
      let_others_go_on();
    }
  }
  DEVICE const uint64_t* handed(int64_t row) const { return args.handed + row * (D / 2); }
  // A row that is handed on, in the order of a lane's numbers of a query.
  DEVICE void take_row(Words (&to)[CHUNKS], int64_t row, uint32_t tag) const {
    constexpr int HALF = CHUNKS / 2;
    uint64_t words[4 * HALF][2];
    const uint64_t* at[4 * HALF];
    UNROLL
    for (int n = 0; n < 4 * HALF; ++n) at[n] = handed(row) + 32 * (n / 4) + 8 * (lane() & 3) + 2 * (n % 4);
    take(words, at, tag);
    UNROLL
    for (int n = 0; n < 4 * HALF; ++n) {
      const uint32_t one = uint32_t(words[n][0]), next = uint32_t(words[n][1]);
      to[n / 4].at[n % 4] = select_bytes(one, next, 0x5410);
      to[n / 4 + HALF].at[n % 4] = select_bytes(one, next, 0x7632);
    }
  }
  DEVICE void take_query(Words (&query)[CHUNKS], uint32_t tag) const {
    const int row = lane() >> 2;
    UNROLL
    for (int j = 0; j < CHUNKS; ++j) query[j] = {{0, 0, 0, 0}};
    if (row < args.group) take_row(query, head * args.group + row, tag);
  }
  // Leaves the scores of the token's own key and its value in shared memory, for one warp.
  DEVICE void leave_own(const Words (&query)[CHUNKS], uint32_t tag) const {
    const int64_t key_row = args.group * args.key_heads + head, value_row = key_row + args.key_heads;
    Words key[CHUNKS];
    take_row(key, key_row, tag);
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
    if (lane() >= D / 4) return;
    const uint64_t* const at[1] = {handed(value_row) + 2 * lane()};
    uint64_t words[1][2];
    take(words, at, tag);
    UNROLL
    for (int i = 0; i < 2; ++i) {
      own_value()[2 * lane() + i] = low_float(uint32_t(words[0][i]));
      own_value()[2 * lane() + i + D / 2] = high_float(uint32_t(words[0][i]));
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
  // Leaves the warp's sums in shared memory: [warp][8][D], and [warp][8][maximum, sum] after them; of the token's own key a value
  // [D] and scores [8] follow.
  DEVICE static float* sums() { return reinterpret_cast<float*>(shared_memory()); }
  DEVICE static float* stats() { return sums() + WHOLE_WARPS * WHOLE_GROUP * D; }
  DEVICE static float* own_value() { return stats() + 2 * WHOLE_WARPS * WHOLE_GROUP; }
  DEVICE static float* own_scores() { return own_value() + D; }
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
        UNROLL
        for (int j = 0; j < 4; ++j) out[j] += by * own_value()[column + j];
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
