// Products of 1 to 4 bf16 rows with quantized weights, bound by reading the weights.
//
// A block owns a share of the outputs. Its work is cut into units, up to 16 outputs times 256 or 512 numbers of the
// depth, and each warp takes units one after another, through several outputs if need be, and never
// waits for another before its end.
//
// Arithmetic: the weights' integers stay bytes. Each 32 numbers of a row share a power of two, the least that makes
// them integers of 15 bits; a bf16 number is exact so unless the largest of the 32 is 64 times as large or more, and
// otherwise within 2^-14 of that largest. The upper and the lower byte of these are two columns of a product of bytes,
// which is exact. The sums of 32 numbers (16 of Q6_K) are scaled and added in float32 and rounded once at the
// end. A row's number that is not finite makes the row's sums NaN.
//
// Tried (H200, one row, 3584 to 37888 of Q4_K): widening to bf16 (few.cuh) 31 us against 21.7; without hints for the
// caches 21.9; 12 or 28 warps 22.7 and 22.9; three units ahead 22.3.
#pragma once
#include "few.cuh"

// Integers of 8 numbers that a lane holds; the neighbours up to four hold 32 that share `power`.
struct RowBytes {
  uint32_t upper[2], lower[2];
  float power;       // a number is its integer times this
  int sum16, sum32;  // of integers, of 16 and 32 numbers
};

// All lanes of the warp call it.
DEVICE RowBytes row_bytes(const float (&x)[8]) {
  float largest = fabsf(x[0]);
  UNROLL
  for (int i = 1; i < 8; ++i) largest = max_or_nan(largest, fabsf(x[i]));
  UNROLL
  for (int step = 1; step < 4; step *= 2) largest = max_or_nan(largest, shuffle_xor(largest, step));
  uint32_t exponent = float_to_bits(largest) >> 23;
  if (exponent < 14) exponent = 14;
  const float inverse = bits_to_float((267 - exponent) << 23);
  // 1.5 · 2^23, whose lower bits count units, and 128, so that the second byte is rounded.
  const float offset = 12582912.0f + 128.0f;
  uint32_t sum = 0u - 8 * float_to_bits(offset);
  RowBytes to;
  UNROLL
  for (int half = 0; half < 2; ++half) {
    uint32_t bits[4];
    UNROLL
    for (int i = 0; i < 4; ++i) {
      bits[i] = float_to_bits(fmaf(x[4 * half + i], inverse, offset));
      sum += bits[i];
    }
    const uint32_t first = select_bytes(bits[0], bits[1], 0x5140), second = select_bytes(bits[2], bits[3], 0x5140);
    to.lower[half] = select_bytes(first, second, 0x5410) ^ 0x80808080u;
    to.upper[half] = select_bytes(first, second, 0x7632);
  }
  const uint32_t sum16 = sum + shuffle_xor_bits(sum, 1);
  to.sum16 = int(sum16);
  to.sum32 = int(sum16 + shuffle_xor_bits(sum16, 2));
  // Not a number where one of the numbers was not finite.
  to.power = fmaf(0.0f, largest, bits_to_float((exponent - 13) << 23));
  return to;
}

// What follows: g and t are a lane's group and place in it, as products of bytes lay them out. Columns 2 i and
// 2 i + 1 are the upper and lower bytes of row numbers of the i-th of four groups; a lane's sums are of
// group t.

struct BytesQ4K {
  static constexpr int BYTES = 144, UNIT = 1, X_BYTES = 576;
  static constexpr bool STAGED = false;
  static constexpr int PIECES = 0;
  struct Raw {
    Words head[2], quants[2][2];
  };
  DEVICE static void load(Raw& to, const uint8_t* const (&rows)[2]) {
    UNROLL
    for (int i = 0; i < 2; ++i) {
      const int t = lane() & 3;
      to.head[i] = load_words_once(rows[i]);
      to.quants[i][0] = load_words_once(rows[i] + 16 + 16 * t);
      to.quants[i][1] = load_words_once(rows[i] + 80 + 16 * t);
    }
  }
  DEVICE static int place(int k, int plane) { return 2 * (k & ~15) + 16 * plane + (k & 15); }
  DEVICE static void extra(unsigned char* x, int k, const RowBytes& bytes, bool there) {
    const int group = k / 32;
    // Upper half bytes are taken where they are, times 16.
    const uint32_t power = float_to_bits(bytes.power * (group & 1 ? 0.0625f : 1.0f));
    const uint32_t sum = float_to_bits(bytes.power * float(bytes.sum32));
    uint64_t* to = reinterpret_cast<uint64_t*>(x + 512 + 16 * (group & 3) + 8 * (group >> 2));
    if (there && k % 32 == 0) *to = power | uint64_t(sum) << 32;
  }

  // Lane (g, t) holds bytes of row g from group 2 (t / 2) of four on, and its lane of the next column two.
  struct Columns {
    const unsigned char* at;
    bool mine[2];  // whether the lane holds something of lower and of upper half bytes
    // [part][half] of one row's bytes; where nothing is the lane's, zeros from the start on.
    Words held[2][2];
  };
  DEVICE static Columns columns(const unsigned char* x, int g, int t) {
    const int group = g >> 1;
    const bool mine = group >> 1 == t >> 1;
    return {x + 64 * group + 32 * (t & 1) + 16 * (g & 1), {mine && !(group & 1), mine && (group & 1)}, {}};
  }

  template <int ROWS>
  DEVICE static void multiply(float (&sums)[ROWS][2], const Raw& raw, const unsigned char* x, Columns& columns,
                              int block, int row_stride, int t) {
    // Both rows in one word, in the lower bytes of its halves.
    const uint32_t which = 0x11u * uint32_t(t) | 0x1100u * uint32_t(4 + t);
    const uint32_t first = select_bytes(raw.head[0].at[1], raw.head[1].at[1], which);
    const uint32_t second = select_bytes(raw.head[0].at[2], raw.head[1].at[2], which);
    const uint32_t third = select_bytes(raw.head[0].at[3], raw.head[1].at[3], which);
    const uint32_t integers[2][2] = {
        {first & 0x003f003fu, second & 0x003f003fu},
        {(third & 0x000f000fu) | (first >> 2 & 0x00300030u),
         (third >> 4 & 0x000f000fu) | (second >> 2 & 0x00300030u)}};
    float scale[2][2], minimum[2][2];  // [part][row]
    UNROLL
    for (int row = 0; row < 2; ++row) {
      const float d = widen_half(raw.head[row].at[0]), m = widen_half(raw.head[row].at[0] >> 16);
      UNROLL
      for (int part = 0; part < 2; ++part) {
        scale[part][row] = d * float(row ? integers[part][0] >> 16 : integers[part][0] & 0xffff);
        minimum[part][row] = m * float(row ? integers[part][1] >> 16 : integers[part][1] & 0xffff);
      }
    }
    const unsigned char* at = columns.at + block * X_BYTES;
    const unsigned char* extra = x + block * X_BYTES + 512 + 16 * t;
    UNROLL
    for (int part = 0; part < 2; ++part) {
      uint32_t a[2][2][4];  // [half of a byte][product]
      UNROLL
      for (int word = 0; word < 4; ++word) {
        UNROLL
        for (int row = 0; row < 2; ++row) {
          const uint32_t bits = raw.quants[row][part].at[word];
          a[0][word / 2][2 * (word % 2) + row] = bits & 0x0f0f0f0fu;
          a[1][word / 2][2 * (word % 2) + row] = bits & 0xf0f0f0f0u;
        }
      }
      UNROLL
      for (int r = 0; r < ROWS; ++r) {
        int c[4] = {0, 0, 0, 0};
        UNROLL
        for (int half = 0; half < 2; ++half) {
          Words fresh = {{0, 0, 0, 0}};
          Words& b = ROWS == 1 ? columns.held[part][half] : fresh;
          if (columns.mine[half]) b = load_words(at + r * row_stride + 256 * part);
          multiply_add_bytes<false>(c, a[half][0], b.at[0], b.at[1]);
          multiply_add_bytes<false>(c, a[half][1], b.at[2], b.at[3]);
        }
        const float* own = reinterpret_cast<const float*>(extra + r * row_stride + 8 * part);
        UNROLL
        for (int row = 0; row < 2; ++row) {
          sums[r][row] += scale[part][row] * (own[0] * float(256 * c[2 * row] + c[2 * row + 1]));
          sums[r][row] -= minimum[part][row] * own[1];
        }
      }
    }
  }
};

// Formats whose blocks are no multiple of 16 bytes come through shared memory. A quarter of the lanes hold the
// bytes that a word of the weights is multiplied with: those of columns 2 i and 2 i + 1 in quarter i.
struct QuarterColumns {
  const unsigned char* at;
  int quarter;
  // Eight bytes of column pair `i`, zeros in other lanes.
  DEVICE void load(uint32_t& first, uint32_t& second, int i, int offset) const {
    first = second = 0;
    if (quarter != i) return;
    const uint64_t pair = *reinterpret_cast<const uint64_t*>(at + offset);
    first = uint32_t(pair);
    second = uint32_t(pair >> 32);
  }
};
DEVICE QuarterColumns quarter_columns(const unsigned char* x) { return {x + 16 * lane(), lane() >> 3}; }

// Four bytes of shared memory, 2 bytes off a multiple of four or not at all.
template <bool OFF>
DEVICE uint32_t staged_word(const uint8_t* at) {
  if (!OFF) return four_bytes(at);
  return select_bytes(four_bytes(at - 2), four_bytes(at + 2), 0x5432);
}

struct BytesQ6K {
  static constexpr int BYTES = 210, UNIT = 2, X_BYTES = 640;
  static constexpr bool STAGED = true;
  static constexpr int PIECES = 27;  // of 16 bytes, of two blocks from a multiple of 4 on
  using Columns = QuarterColumns;
  DEVICE static int place(int k, int plane) {
    return 16 * (8 * (k >> 4 & 3) + 4 * plane + (k >> 2 & 3)) + 4 * (k >> 6);
  }
  DEVICE static void extra(unsigned char* x, int k, const RowBytes& bytes, bool there) {
    unsigned char* to = x + 512 + 32 * (k >> 4 & 3) + 4 * (k >> 6);
    const bool first = there && k % 16 == 0;
    if (first) *reinterpret_cast<int*>(to) = int(0u - 32u * uint32_t(bytes.sum16));
    if (first) *reinterpret_cast<float*>(to + 16) = bytes.power;
  }
  DEVICE static Columns columns(const unsigned char* x, int, int) { return quarter_columns(x); }
  template <bool OFF, int ROWS>
  DEVICE static void one(float (&sums)[ROWS][2], const uint8_t* const (&rows)[2], const unsigned char* x,
                         Columns& columns, int block, int row_stride, int t) {
    float scale[4][2];
    UNROLL
    for (int row = 0; row < 2; ++row) {
      const float d = widen_half(two_bytes(rows[row] + 208));
      UNROLL
      for (int part = 0; part < 4; ++part) {
        scale[part][row] = d * float(int8_t(rows[row][192 + 4 * part + t]));
      }
    }
    const unsigned char* extra = x + block * X_BYTES + 512 + 32 * t;
    UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t low[2][2][2], high[2][2];  // [quarter % 2][16 numbers][row]
      UNROLL
      for (int part = 0; part < 2; ++part) {
        UNROLL
        for (int row = 0; row < 2; ++row) {
          const uint8_t* at = rows[row] + 16 * part + 4 * t;
          low[0][part][row] = staged_word<OFF>(at + 64 * half);
          low[1][part][row] = staged_word<OFF>(at + 64 * half + 32);
          high[part][row] = staged_word<OFF>(at + 128 + 32 * half);
        }
      }
      uint32_t a[2][2][4];  // [quarter / 2][quarter % 2]
      UNROLL
      for (int quarter = 0; quarter < 4; ++quarter) {
        UNROLL
        for (int part = 0; part < 2; ++part) {
          UNROLL
          for (int row = 0; row < 2; ++row) {
            const uint32_t bits = high[part][row];
            const uint32_t upper = (quarter < 2 ? bits << (4 - 2 * quarter) : bits >> (2 * quarter - 4)) & 0x30303030u;
            const uint32_t lower = low[quarter & 1][part][row] >> (quarter & 2 ? 4 : 0) & 0x0f0f0f0fu;
            a[quarter / 2][quarter % 2][2 * part + row] = upper | lower;
          }
        }
      }
      UNROLL
      for (int r = 0; r < ROWS; ++r) {
        uint32_t b[4][2];
        UNROLL
        for (int i = 0; i < 4; ++i) {
          columns.load(b[i][0], b[i][1], i, block * X_BYTES + r * row_stride + 8 * half);
        }
        UNROLL
        for (int upper = 0; upper < 2; ++upper) {
          const int part = 2 * half + upper;
          const int start = *reinterpret_cast<const int*>(extra + r * row_stride + 4 * part);
          const float power = *reinterpret_cast<const float*>(extra + r * row_stride + 16 + 4 * part);
          int c[4] = {0, start, 0, start};
          multiply_add_bytes<false>(c, a[upper][0], b[0][upper], b[1][upper]);
          multiply_add_bytes<false>(c, a[upper][1], b[2][upper], b[3][upper]);
          UNROLL
          for (int row = 0; row < 2; ++row) {
            sums[r][row] += scale[part][row] * (power * float(256 * c[2 * row] + c[2 * row + 1]));
          }
        }
      }
    }
  }
  template <int ROWS>
  DEVICE static void multiply(float (&sums)[ROWS][2], const uint8_t* const (&rows)[2], const unsigned char* x,
                              Columns& columns, int block, int row_stride, int t) {
    one<false, ROWS>(sums, rows, x, columns, block, row_stride, t);
    const uint8_t* const next[2] = {rows[0] + BYTES, rows[1] + BYTES};
    one<true, ROWS>(sums, next, x, columns, block + 1, row_stride, t);
  }
};

struct BytesQ8_0 {
  static constexpr int BYTES = 272, UNIT = 1, X_BYTES = 576;
  static constexpr bool STAGED = true;
  static constexpr int PIECES = 17;
  using Columns = QuarterColumns;
  DEVICE static int place(int k, int plane) {
    return 16 * (8 * (k >> 5 & 3) + 4 * plane + (k >> 2 & 3)) + 8 * (k >> 7) + 4 * (k >> 4 & 1);
  }
  DEVICE static void extra(unsigned char* x, int k, const RowBytes& bytes, bool there) {
    if (there && k % 32 == 0) *reinterpret_cast<float*>(x + 512 + 8 * (k >> 5 & 3) + 4 * (k >> 7)) = bytes.power;
  }
  DEVICE static Columns columns(const unsigned char* x, int, int) { return quarter_columns(x); }
  template <int ROWS>
  DEVICE static void multiply(float (&sums)[ROWS][2], const uint8_t* const (&rows)[2], const unsigned char* x,
                              Columns& columns, int block, int row_stride, int t) {
    const unsigned char* extra = x + block * X_BYTES + 512 + 8 * t;
    UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t a[4][4];
      UNROLL
      for (int i = 0; i < 4; ++i) {
        UNROLL
        for (int part = 0; part < 2; ++part) {
          UNROLL
          for (int row = 0; row < 2; ++row) {
            const uint8_t* at = rows[row] + 34 * (4 * half + i) + 2 + 16 * part + 4 * t;
            a[i][2 * part + row] = i & 1 ? staged_word<false>(at) : staged_word<true>(at);
          }
        }
      }
      float scale[2];
      UNROLL
      for (int row = 0; row < 2; ++row) scale[row] = widen_half(two_bytes(rows[row] + 34 * (4 * half + t)));
      UNROLL
      for (int r = 0; r < ROWS; ++r) {
        int c[4] = {0, 0, 0, 0};
        UNROLL
        for (int i = 0; i < 4; ++i) {
          uint32_t b[2];
          columns.load(b[0], b[1], i, block * X_BYTES + r * row_stride + 8 * half);
          multiply_add_bytes<true>(c, a[i], b[0], b[1]);
        }
        const float power = *reinterpret_cast<const float*>(extra + r * row_stride + 4 * half);
        UNROLL
        for (int row = 0; row < 2; ++row) {
          sums[r][row] += scale[row] * (power * float(256 * c[2 * row] + c[2 * row + 1]));
        }
      }
    }
  }
};

// Places 256 numbers of a row, eight of each lane of a warp, where products with `Format` find them, from `x` on; nothing if
// not `there`, which is the same in all lanes. Without branches, so that several of them are computed side by side.
template <class Format>
DEVICE void place_row_bytes(unsigned char* x, const float (&numbers)[8], bool there) {
  const RowBytes bytes = row_bytes(numbers);
  const int k = 8 * lane();
  UNROLL
  for (int plane = 0; plane < 2; ++plane) {
    const uint32_t(&own)[2] = plane ? bytes.lower : bytes.upper;
    if (Format::place(4, 0) == 4) {
      if (there) *reinterpret_cast<uint64_t*>(x + Format::place(k, plane)) = own[0] | uint64_t(own[1]) << 32;
    } else {
      if (there) *reinterpret_cast<uint32_t*>(x + Format::place(k, plane)) = own[0];
      if (there) *reinterpret_cast<uint32_t*>(x + Format::place(k + 4, plane)) = own[1];
    }
  }
  Format::extra(x, k, bytes, there);
}

// Rows of bf16 as what is multiplied, see FewBytes.
struct PlainRows {
  static constexpr int TOGETHER = 4;  // chunks that a thread has under way
  const bf16* x;                      // [rows][depth]
  int64_t depth;
  int rows;
  struct Held {
    Words words;
  };
  DEVICE Held load(int row, int chunk) const {
    if (row >= rows || 8 * int64_t(chunk) >= depth) return {{{0, 0, 0, 0}}};
    return {load_words_fresh(x + row * depth + 8 * chunk)};
  }
  DEVICE void widen(const Held& held, float (&to)[8]) const {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = low_float(held.words.at[i]);
      to[2 * i + 1] = high_float(held.words.at[i]);
    }
  }
};

// How a block's outputs, in tiles of at most so many, are shared among its warps. `sums_bytes` of `ops/cuda/few.rs`
// computes the same.
struct UnitPlan {
  int units, tiles, tile_outs, per_warp, sharers;  // units: of a tile
  UnitPlan() = default;
  // Tiles of about the same size, so that the warps read about as much.
  DEVICE UnitPlan(int outs, int tile_most, int units, int warps)
      : UnitPlan(of_tiles(outs, even_tile(outs, tile_most), units, warps)) {}
  DEVICE static UnitPlan of_tiles(int outs, int tile_outs, int units, int warps) {
    UnitPlan plan;
    plan.units = units;
    plan.tile_outs = tile_outs;
    plan.tiles = (outs + tile_outs - 1) / tile_outs;
    plan.per_warp = (plan.tiles * units + warps - 1) / warps;
    if (plan.per_warp == 0) plan.per_warp = 1;
    plan.sharers = (units + plan.per_warp - 2) / plan.per_warp + 1;
    return plan;
  }
  DEVICE static int even_tile(int outs, int tile_most) {
    const int tiles = (outs + tile_most - 1) / tile_most;
    return tiles ? (outs + tiles - 1) / tiles : 1;
  }
};

// `AHEAD`: units that are under way while one is computed. With PAIRS an output is two rows of weights.
template <class Format, int ROWS, int AHEAD, bool PAIRS = false>
struct FewBytes {
  static constexpr int STAGE_STRIDE = 16 * Format::PIECES, STAGE_BYTES = 16 * STAGE_STRIDE;
  static constexpr int STAGES = AHEAD + 1, TILE_OUTS = PAIRS ? 8 : 16;

  struct Cursor {
    int left, block, tile;
  };

  // Multiplies the block's `outs` outputs. `weights(out, half)` is the first byte of an output's weights, of the second
  // row of a pair if `half`. `source.start()` waits for what the row depends on, `load` and `widen` bring
  // chunks of eight of its numbers (zeros beyond rows and depth), TOGETHER a thread, `ready` runs after all. `finish(row, out, sum,
  // second)` gets each result once, in some thread; `second` is that of a pair's second row.
  template <class Weights, class Source, class Finish>
  DEVICE static void multiply(int64_t depth, int outs, const Weights& weights, Source& source, const Finish& finish) {
    const int g = lane() >> 2, t = lane() & 3, warps = block_threads() / 32;
    const int count = int(depth / 256);
    const UnitPlan plan(outs, TILE_OUTS, count / Format::UNIT, warps);
    const int row_stride = count * Format::X_BYTES;
    unsigned char* x = shared_memory();
    float* shares = reinterpret_cast<float*>(x + ROWS * row_stride);

    const int from = warp() * plan.per_warp;
    const int units = int(min64(from + plan.per_warp, plan.tiles * plan.units)) - from;
    Cursor loads{units, 0, 0};
    loads.tile = from / plan.units;
    loads.block = (from - loads.tile * plan.units) * Format::UNIT;
    Cursor now = loads;
    auto step = [&](Cursor& cursor) {
      --cursor.left;
      cursor.block += Format::UNIT;
      if (cursor.block < count) return false;
      cursor.block = 0;
      ++cursor.tile;
      return true;
    };
    // A tile's rows beyond the outputs repeat the last one.
    auto weights_of = [&](int tile, int half, int at) {
      const int own = PAIRS ? at : 8 * half + at;
      const int out = plan.tile_outs * tile + int(min64(own, plan.tile_outs - 1));
      return weights(int(min64(out, outs - 1)), PAIRS && half);
    };

    auto prepare = [&] {
      constexpr int TOGETHER = Source::TOGETHER;
      source.start();
      const int chunks = int(depth / 8);
      for (int row = 0; row < ROWS; ++row) {
        for (int base = 0; base < chunks; base += TOGETHER * block_threads()) {
          typename Source::Held held[TOGETHER];
          UNROLL
          for (int i = 0; i < TOGETHER; ++i) held[i] = source.load(row, base + i * block_threads() + thread_index());
          UNROLL
          for (int i = 0; i < TOGETHER; ++i) {
            if (base + i * block_threads() >= chunks) break;
            const int block = base / 32 + i * warps + warp();
            float numbers[8];
            source.widen(held[i], numbers);
            place_row_bytes<Format>(x + row * row_stride + block * Format::X_BYTES, numbers, block < count);
          }
        }
      }
      block_barrier();
      source.ready();
    };

    typename Format::Columns columns = Format::columns(x, g, t);
    float sums[ROWS][2];
    auto clear = [&] {
      UNROLL
      for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = 0.0f;
    };
    auto flush = [&](int tile) {
      const int sharer = warp() - tile * plan.units / plan.per_warp;
      UNROLL
      for (int r = 0; r < ROWS; ++r) {
        UNROLL
        for (int half = 0; half < 2; ++half) {
          const float sum = sum_lanes(sums[r][half], 4);
          if (t == 0) shares[((tile * plan.sharers + sharer) * ROWS + r) * 16 + 8 * half + g] = sum;
        }
      }
      clear();
    };
    auto after = [&] {
      const int tile = now.tile;
      const bool ended = step(now);
      if (ended || now.left == 0) flush(tile);
    };
    clear();

    if constexpr (!Format::STAGED) {
      const uint8_t* rows[2];
      auto aim = [&] {
        UNROLL
        for (int i = 0; i < 2; ++i) rows[i] = weights_of(loads.tile, i, g) + loads.block * Format::BYTES;
      };
      auto load = [&](typename Format::Raw& raw) {
        if (loads.left <= 0) return;
        Format::load(raw, rows);
        if (step(loads)) {
          aim();
        } else {
          rows[0] += Format::BYTES;
          rows[1] += Format::BYTES;
        }
      };
      aim();
      typename Format::Raw raw[AHEAD];
      UNROLL
      for (int i = 0; i < AHEAD; ++i) load(raw[i]);
      prepare();
      while (now.left > 0) {
        UNROLL
        for (int i = 0; i < AHEAD; ++i) {
          if (now.left <= 0) break;
          Format::template multiply<ROWS>(sums, raw[i], x, columns, now.block, row_stride, t);
          load(raw[i]);
          after();
        }
      }
    } else {
      unsigned char* area = reinterpret_cast<unsigned char*>(shares + plan.tiles * plan.sharers * 16 * ROWS);
      area += (128 - (area - shared_memory()) % 128) % 128;
      CopyBarrier* barriers = reinterpret_cast<CopyBarrier*>(area) + 8 * warp();
      unsigned char* stages = area + 64 * warps + warp() * (STAGES * STAGE_BYTES);
      if (lane() == 0) {
        UNROLL
        for (int i = 0; i < STAGES; ++i) barrier_start(barriers + i);
      }
      warp_barrier();
      // A row's pieces start and end where 16 bytes do that hold some of it, so nothing beyond is read.
      auto load = [&](int stage) {
        if (loads.left <= 0) return;
        if (lane() == 0) barrier_expect(barriers + stage, STAGE_BYTES);
        if (lane() < 16) {
          const uint8_t* row = weights_of(loads.tile, lane() >> 3, lane() & 7) + loads.block * Format::BYTES;
          row -= reinterpret_cast<uintptr_t>(row) & 15;
          copy_row(stages + stage * STAGE_BYTES + lane() * STAGE_STRIDE, row, STAGE_STRIDE, barriers + stage);
        }
        step(loads);
      };
      UNROLL
      for (int i = 0; i < AHEAD; ++i) load(i);
      prepare();
      int stage = 0;
      uint32_t parity = 0;
      while (now.left > 0) {
        load(stage == 0 ? STAGES - 1 : stage - 1);
        barrier_wait(barriers + stage, parity);
        const uint8_t* rows[2];
        UNROLL
        for (int i = 0; i < 2; ++i) {
          rows[i] = stages + stage * STAGE_BYTES + (8 * i + g) * STAGE_STRIDE;
          if (Format::UNIT > 1) {
            const uint8_t* start = weights_of(now.tile, i, g) + now.block * Format::BYTES;
            rows[i] += reinterpret_cast<uintptr_t>(start) & 15;
          }
        }
        Format::template multiply<ROWS>(sums, rows, x, columns, now.block, row_stride, t);
        warp_barrier();
        after();
        stage = stage == STAGES - 1 ? 0 : stage + 1;
        if (stage == 0) parity ^= 1;
      }
    }

    block_barrier();
    for (int i = thread_index(); i < outs * ROWS; i += block_threads()) {
      const int out = i % outs, row = i / outs, tile = out / plan.tile_outs, at = out % plan.tile_outs;
      const int begin = tile * plan.units, end = begin + plan.units;
      const int sharers = (end - 1) / plan.per_warp - begin / plan.per_warp + 1;
      float sum = 0.0f, second = 0.0f;
      for (int share = 0; share < sharers; ++share) {
        const float* own = shares + ((tile * plan.sharers + share) * ROWS + row) * 16 + at;
        sum += own[0];
        if (PAIRS) second += own[8];
      }
      finish(row, out, sum, second);
    }
  }
};

struct BytesArgs {
  const bf16* x;          // [rows][depth]
  const uint8_t* weight;  // [outs] rows of blocks, from a multiple of 16 on
  const bf16* bias;       // [outs], or null
  bf16* y;                // [rows][outs]
  int64_t rows, depth, outs;  // depth: a multiple of 256 * UNIT; outs times blocks: below 2^32
  double scale;
};

template <class Format, int ROWS, int AHEAD>
DEVICE void few_bytes(const BytesArgs& args, int64_t own_block, int64_t own_blocks) {
  release_next_kernel();
  // This block of those that share the matrix.
  const uint32_t block = uint32_t(own_block), blocks = uint32_t(own_blocks), all = uint32_t(args.outs);
  const int first = int(block * all / blocks), outs = int((block + 1) * all / blocks) - first;
  const uint64_t row_bytes = uint64_t(args.depth / 256) * Format::BYTES;
  const uint8_t* weight = args.weight + first * row_bytes;
  struct Source : PlainRows {
    const bf16* bias;
    bool has_bias;
    float held;  // the bias of this thread's first output, asked for before the sums are there
    DEVICE void start() {
      wait_for_last_kernel();
      held = has_bias ? to_float(*bias) : 0.0f;
    }
    DEVICE void ready() const {}
  };
  const bf16* bias = args.bias + first;
  Source source{{args.x, args.depth, int(args.rows)}, bias + thread_index(), args.bias && thread_index() < outs, 0.0f};
  FewBytes<Format, ROWS, AHEAD>::multiply(
      args.depth, outs, [&](int out, int) { return weight + uint64_t(out) * row_bytes; }, source,
      [&](int row, int out, float sum, float) {
        if (row >= args.rows) return;
        const float add = row == 0 && out == thread_index() ? source.held : args.bias ? to_float(bias[out]) : 0.0f;
        args.y[row * args.outs + first + out] = from_float<bf16>(sum * float(args.scale) + add);
      });
}

// Up to three matrices that multiply one row: each has blocks of its own.
struct BytesEachArgs {
  const bf16* x;  // [depth]
  int64_t depth;
  struct {
    const uint8_t* weight;
    const bf16* bias;
    bf16* y;
    int64_t outs, format, blocks;  // format: 0 q4_k, 1 q6_k, 2 q8_0
  } matrix[3];
};

DEVICE void few_bytes_of_each(const BytesEachArgs& args) {
  int which = 0;
  int64_t block = block_x();
  while (block >= args.matrix[which].blocks) block -= args.matrix[which++].blocks;
  const auto& matrix = args.matrix[which];
  const BytesArgs own{args.x, matrix.weight, matrix.bias, matrix.y, 1, args.depth, matrix.outs, 1.0};
  if (matrix.format == 0) return few_bytes<BytesQ4K, 1, 2>(own, block, matrix.blocks);
  if (matrix.format == 1) return few_bytes<BytesQ6K, 1, 1>(own, block, matrix.blocks);
  few_bytes<BytesQ8_0, 1, 2>(own, block, matrix.blocks);
}
