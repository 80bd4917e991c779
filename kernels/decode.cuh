// Products of one row with weights as they are stored, on tensor cores: the core of decode.cu.
//
// A block walks over tiles of 16 rows of weights. The depth of a tile is shared out to the block's warps in
// steps; each warp has a ring of STAGES steps in shared memory that asynchronous copies fill, across
// the ends of tiles, so that reading never stops. The numbers of a block's groups, which share a scale,
// are whole and small, so they are exact in bf16: they are multiplied before they are scaled. Column n of
// the product's right side holds the row's numbers of group n alone and zeros elsewhere, so a warp gets
// the sums of 16 rows times 8 groups, and scales these.
//
// Whole numbers q become bf16 by setting bits: 128 + q for q < 128. The row's own sums over groups take the
// 128, and the minimum of Q4_K and Q5_K, off again.
//
// Tried: float32 multiply-adds on widened weights take 3 integer operations a weight, more than there
// is time for while 4 TB/s arrive. The numbers of a chunk of eight lie in the order 0 2 1 3 4 6 5 7 in
// shared memory, as masks on words of bytes or nibbles give them.
#pragma once
#include "quantized.cuh"

constexpr int TILE_ROWS = 16;
constexpr int STAGES = 3;
constexpr int WARP_THREADS = 32;

// Eight numbers of bf16 in natural order, as pairs 0 2, 1 3, 4 6, 5 7.
DEVICE Words interleaved(Words x) {
  Words mixed;
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const uint32_t first = x.at[2 * half], second = x.at[2 * half + 1];
    mixed.at[2 * half] = (first & 0xffffu) | second << 16;
    mixed.at[2 * half + 1] = first >> 16 | (second & 0xffff0000u);
  }
  return mixed;
}

// The row that is multiplied, in shared memory.
struct RowOperand {
  unsigned char* numbers;  // bf16, chunks of eight interleaved, zeros after the depth
  float* sums;             // over groups of 16
  int64_t depth;
};

// The sums of a warp's two rows of weights: rows lane / 4 and lane / 4 + 8 of the tile.
struct TileSums {
  float low, high;
};

// Lane 4 n + c multiplies: its pairs of the row count where n is the group.
DEVICE void multiply_group(float (&sums)[4], const uint32_t (&weights)[4], bool mine, uint32_t x0,
                           uint32_t x1) {
  multiply_add(sums, weights, mine ? x0 : 0u, mine ? x1 : 0u);
}

// A format's step: NUMBERS of a row, in BYTES; CHUNKS of 16 bytes in shared memory take these wherever
// they start; rows of an ALIGNED one start at multiples of 16. `multiply` adds the step's share to the sums; `low` and `high` are the lane's two rows.
template <class Format>
struct Step;

DEVICE uint32_t four_at(const unsigned char* at) { return *reinterpret_cast<const uint32_t*>(at); }
// Four bytes from an even address.
DEVICE uint32_t four_from_two(const unsigned char* at) {
  return uint32_t(two_bytes(at)) | uint32_t(two_bytes(at + 2)) << 16;
}

// Scales and minimums of groups 2 c and 2 c + 1, a byte each.
DEVICE void two_scales(const Words& header, int c, uint32_t& scales, uint32_t& minimums) {
  const int shift = 16 * (c & 1);
  const uint32_t first = header.at[1] >> shift, second = header.at[2] >> shift;
  const uint32_t third = header.at[3] >> shift;
  scales = c < 2 ? first & 0x3f3fu : (third & 0x0f0fu) | (first >> 2 & 0x3030u);
  minimums = c < 2 ? second & 0x3f3fu : (third >> 4 & 0x0f0fu) | (second >> 2 & 0x3030u);
}

// The sum of a row of Q4_K or Q5_K over groups 2 c and 2 c + 1, from products with 128 + q.
DEVICE float scaled_pair(const Words& header, int c, float first, float second, float x_first,
                         float x_second) {
  uint32_t scales, minimums;
  two_scales(header, c, scales, minimums);
  const float d = half_to_float(uint16_t(header.at[0] & 0xffffu));
  const float m = half_to_float(uint16_t(header.at[0] >> 16));
  const float products = float(scales & 0xffu) * (first - 128.0f * x_first) +
                         float(scales >> 8) * (second - 128.0f * x_second);
  const float offsets = float(minimums & 0xffu) * x_first + float(minimums >> 8) * x_second;
  return d * products - m * offsets;
}

// Q4_K and Q5_K: eight groups of 32 in a block.
template <class Format, int BLOCKS>
struct StepOfMinimums {
  static constexpr bool FIVE = Format::BYTES == Q5K::BYTES;
  static constexpr int NUMBERS = BLOCKS * Format::NUMBERS, BYTES = BLOCKS * Format::BYTES;
  static constexpr int CHUNKS = BYTES / 16;
  static constexpr bool ALIGNED = true;
  static constexpr int START = FIVE ? 48 : 16;  // of the nibbles

  // Numbers 8 c .. 8 c + 8 of a group as the left operands of two products: `words` has a nibble in each
  // byte at `shift`, `bits` the fifth bit at `group`.
  DEVICE static void operand(uint32_t (&to)[4], int row, const uint32_t (&words)[2], int word,
                             const uint32_t (&bits)[2], int shift, int group) {
    UNROLL
    for (int odd = 0; odd < 2; ++odd) {
      uint32_t pair = words[word] >> (shift + 8 * odd) & 0x000f000fu;
      if (FIVE) pair |= (bits[word] >> (group + 8 * odd) & 0x00010001u) << 4;
      to[row + 2 * odd] = pair | 0x43004300u;
    }
  }

  DEVICE static void multiply(TileSums& sums, const unsigned char* low, const unsigned char* high,
                              const RowOperand& x, int step) {
    const int n = lane() >> 2, c = lane() & 3;
    UNROLL
    for (int block = 0; block < BLOCKS; ++block) {
      const unsigned char* rows[2] = {low + block * Format::BYTES, high + block * Format::BYTES};
      const int at = step * BLOCKS + block;
      const Words mine = load_words(x.numbers + 16 * (32 * at + lane()));
      const Words headers[2] = {load_words(rows[0]), load_words(rows[1])};
      uint32_t bits[2][2] = {{0, 0}, {0, 0}};
      if (FIVE) {
        UNROLL
        for (int row = 0; row < 2; ++row) {
          bits[row][0] = four_at(rows[row] + 16 + 8 * c);
          bits[row][1] = four_at(rows[row] + 20 + 8 * c);
        }
      }
      float products[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};  // of even and odd groups
      UNROLL
      for (int two = 0; two < 4; ++two) {
        uint32_t words[2][2];
        UNROLL
        for (int row = 0; row < 2; ++row) {
          const uint32_t* from =
              reinterpret_cast<const uint32_t*>(rows[row] + START + 32 * two + 8 * c);
          words[row][0] = from[0];
          words[row][1] = from[1];
        }
        UNROLL
        for (int odd = 0; odd < 2; ++odd) {
          const int group = 2 * two + odd;
          UNROLL
          for (int word = 0; word < 2; ++word) {
            uint32_t weights[4];
            UNROLL
            for (int row = 0; row < 2; ++row) {
              operand(weights, row, words[row], word, bits[row], 4 * odd, group);
            }
            multiply_group(products[odd], weights, n == group, mine.at[2 * word],
                           mine.at[2 * word + 1]);
          }
        }
      }
      const float* x_sums = x.sums + 16 * at + 4 * c;
      const float x_first = x_sums[0] + x_sums[1], x_second = x_sums[2] + x_sums[3];
      sums.low += scaled_pair(headers[0], c, products[0][0] + products[1][0],
                              products[0][1] + products[1][1], x_first, x_second);
      sums.high += scaled_pair(headers[1], c, products[0][2] + products[1][2],
                               products[0][3] + products[1][3], x_first, x_second);
    }
  }
};
template <>
struct Step<Q4K> : StepOfMinimums<Q4K, 2> {};
template <>
struct Step<Q5K> : StepOfMinimums<Q5K, 1> {};

// Sixteen groups of 16 in a block, in two halves of eight.
template <>
struct Step<Q6K> {
  static constexpr int NUMBERS = 256, BYTES = 210, CHUNKS = 14;
  static constexpr bool ALIGNED = false;

  DEVICE static void multiply(TileSums& sums, const unsigned char* low, const unsigned char* high,
                              const RowOperand& x, int step) {
    const int n = lane() >> 2, c = lane() & 3;
    const unsigned char* rows[2] = {low, high};
    float totals[2] = {0.0f, 0.0f};
    UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t* mine =
          reinterpret_cast<const uint32_t*>(x.numbers + 8 * (64 * step + 32 * half + lane()));
      const uint32_t x0 = mine[0], x1 = mine[1];
      float products[4] = {0, 0, 0, 0};
      UNROLL
      for (int side = 0; side < 2; ++side) {
        uint32_t lows[2][2], highs[2];
        UNROLL
        for (int row = 0; row < 2; ++row) {
          const unsigned char* from = rows[row] + 64 * half + 16 * side + 4 * c;
          lows[row][0] = four_from_two(from);
          lows[row][1] = four_from_two(from + 32);
          highs[row] = four_from_two(rows[row] + 128 + 32 * half + 16 * side + 4 * c);
        }
        UNROLL
        for (int quarter = 0; quarter < 4; ++quarter) {
          uint32_t weights[4];
          UNROLL
          for (int row = 0; row < 2; ++row) {
            const uint32_t bytes = (lows[row][quarter & 1] >> (4 * (quarter >> 1)) & 0x0f0f0f0fu) |
                                   (highs[row] >> (2 * quarter) & 0x03030303u) << 4;
            weights[row] = (bytes & 0x00ff00ffu) | 0x43004300u;
            weights[row + 2] = (bytes >> 8 & 0x00ff00ffu) | 0x43004300u;
          }
          multiply_group(products, weights, n == 2 * quarter + side, x0, x1);
        }
      }
      const float* x_sums = x.sums + 16 * step + 8 * half + 2 * c;
      UNROLL
      for (int row = 0; row < 2; ++row) {
        const uint16_t scales = two_bytes(rows[row] + 192 + 8 * half + 2 * c);
        // 128 of the bf16 and 32 of the format.
        totals[row] += float(int8_t(scales & 0xff)) * (products[2 * row] - 160.0f * x_sums[0]) +
                       float(int8_t(scales >> 8)) * (products[2 * row + 1] - 160.0f * x_sums[1]);
      }
    }
    sums.low += half_to_float(two_bytes(low + 208)) * totals[0];
    sums.high += half_to_float(two_bytes(high + 208)) * totals[1];
  }
};

// Eight blocks of 32.
template <>
struct Step<Q8_0> {
  static constexpr int NUMBERS = 256, BYTES = 272, CHUNKS = 18;
  static constexpr bool ALIGNED = false;

  DEVICE static void multiply(TileSums& sums, const unsigned char* low, const unsigned char* high,
                              const RowOperand& x, int step) {
    const int n = lane() >> 2, c = lane() & 3;
    const unsigned char* rows[2] = {low, high};
    const Words mine = load_words(x.numbers + 16 * (32 * step + lane()));
    float products[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    UNROLL
    for (int group = 0; group < 8; ++group) {
      UNROLL
      for (int word = 0; word < 2; ++word) {
        uint32_t weights[4];
        UNROLL
        for (int row = 0; row < 2; ++row) {
          const uint32_t bytes = four_from_two(rows[row] + 34 * group + 2 + 8 * c + 4 * word);
          UNROLL
          for (int odd = 0; odd < 2; ++odd) {
            // 128 + the low seven bits, less 128 or, with the sign, 256.
            const uint32_t some = bytes >> (8 * odd);
            weights[row + 2 * odd] = add_bf16_pairs((some & 0x007f007fu) | 0x43004300u,
                                                    (some & 0x00800080u) | 0xc300c300u);
          }
        }
        multiply_group(products[word], weights, n == group, mine.at[2 * word],
                       mine.at[2 * word + 1]);
      }
    }
    UNROLL
    for (int odd = 0; odd < 2; ++odd) {
      const int group = 2 * c + odd;
      // What follows a row is not its own.
      if (256 * int64_t(step) + 32 * group >= x.depth) continue;
      sums.low += half_to_float(two_bytes(low + 34 * group)) * (products[0][odd] + products[1][odd]);
      sums.high +=
          half_to_float(two_bytes(high + 34 * group)) * (products[0][2 + odd] + products[1][2 + odd]);
    }
  }
};

// bf16: four groups of 32 without scales.
template <>
struct Step<Plain> {
  static constexpr int NUMBERS = 128, BYTES = 256, CHUNKS = 16;
  static constexpr bool ALIGNED = true;

  DEVICE static void multiply(TileSums& sums, const unsigned char* low, const unsigned char* high,
                              const RowOperand& x, int step) {
    const int n = lane() >> 2, c = lane() & 3;
    const Words mine = load_words(x.numbers + 16 * (16 * step + (lane() & 15)));
    float products[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    UNROLL
    for (int group = 0; group < 4; ++group) {
      const Words first = interleaved(load_words(low + 64 * group + 16 * c));
      const Words second = interleaved(load_words(high + 64 * group + 16 * c));
      UNROLL
      for (int word = 0; word < 2; ++word) {
        const uint32_t weights[4] = {first.at[2 * word], second.at[2 * word], first.at[2 * word + 1],
                                     second.at[2 * word + 1]};
        multiply_group(products[word], weights, n == group, mine.at[2 * word],
                       mine.at[2 * word + 1]);
      }
    }
    sums.low += products[0][0] + products[0][1] + products[1][0] + products[1][1];
    sums.high += products[0][2] + products[0][3] + products[1][2] + products[1][3];
  }
};

// Where a tile's rows lie: 0 .. 8 from `first` on, 8 .. 16 from `second` on, in a matrix each of which
// rows from `*_rows` on repeat the last one.
struct TileRows {
  const uint8_t* first;
  const uint8_t* second;
  int first_rows, second_rows;  // at least 1

  DEVICE const uint8_t* row(int at, int64_t row_bytes) const {
    const bool later = at >= 8;
    const int rows = later ? second_rows : first_rows, own = at & 7;
    return (later ? second : first) + (own < rows ? own : rows - 1) * row_bytes;
  }
};

// Shared memory of a block: rings, the row, its sums, the warps' sums of a tile, twice, and of squares.
struct ProductMemory {
  unsigned char* ring;  // of this warp
  int stage_bytes;
  RowOperand x;
  float* partial;
  float* squares;
  int warps;
};

constexpr int PADDED_TO = 512;  // numbers of the longest step

DEVICE ProductMemory product_memory(int64_t depth, int stage_bytes) {
  ProductMemory memory;
  memory.warps = block_threads() / WARP_THREADS;
  memory.stage_bytes = stage_bytes;
  unsigned char* all = shared_memory();
  memory.ring = all + int64_t(warp()) * STAGES * stage_bytes;
  const int64_t padded = (depth + PADDED_TO - 1) / PADDED_TO * PADDED_TO;
  memory.x.numbers = all + int64_t(memory.warps) * STAGES * stage_bytes;
  memory.x.sums = reinterpret_cast<float*>(memory.x.numbers + 2 * padded);
  memory.x.depth = depth;
  memory.partial = memory.x.sums + padded / 16;
  memory.squares = memory.partial + 2 * TILE_ROWS * memory.warps;
  return memory;
}

// Starts copies of a step of a tile to a place in the ring.
template <class Format>
DEVICE void copy_step(unsigned char* to, const TileRows& tile, int64_t row_bytes, int step) {
  using Own = Step<Format>;
  constexpr int COPIES = TILE_ROWS * Own::CHUNKS;
  UNROLL
  for (int i = 0; i < (COPIES + 31) / 32; ++i) {
    const int at = 32 * i + lane();
    if (COPIES % 32 != 0 && at >= COPIES) break;
    const int row = at / Own::CHUNKS, chunk = at % Own::CHUNKS;
    const uint8_t* start = tile.row(row, row_bytes);
    const uint8_t* from = start + int64_t(step) * Own::BYTES;
    if (!Own::ALIGNED) from -= reinterpret_cast<uintptr_t>(from) & 15;
    from += 16 * chunk;
    const bool there = from < start + row_bytes;
    if (!there) from = start - (reinterpret_cast<uintptr_t>(start) & 15);
    copy_async(to + 16 * at, from, there);
  }
}

// The first byte of the step of one of the tile's rows in the ring.
template <class Format>
DEVICE const unsigned char* step_row(const unsigned char* ring, const TileRows& tile,
                                     int64_t row_bytes, int step, int row) {
  using Own = Step<Format>;
  const unsigned char* at = ring + row * 16 * Own::CHUNKS;
  if (Own::ALIGNED) return at;
  const uint8_t* from = tile.row(row, row_bytes) + int64_t(step) * Own::BYTES;
  return at + (reinterpret_cast<uintptr_t>(from) & 15);
}

// Multiplies tiles `first`, `first + stride`, .. below `tiles`. `rows(tile)` says where a tile lies;
// `prepare()` brings the row to shared memory, where that is still to be done; `turn` counts the block's tiles; `finish(tile, row, sum)` gets the sum of row
// lane % 16 in all lanes of one warp.
template <class Format, class Rows, class Prepare, class Finish>
DEVICE void multiply_tiles(const ProductMemory& memory, int first, int stride, int tiles, int& turn,
                           const Rows& rows, const Prepare& prepare, const Finish& finish) {
  using Own = Step<Format>;
  if (first >= tiles) return;
  const int64_t row_bytes = memory.x.depth / Format::NUMBERS * Format::BYTES;
  const int steps = int((memory.x.depth + Own::NUMBERS - 1) / Own::NUMBERS);
  int ahead_tile = first, ahead_step = warp(), ahead_place = 0;
  TileRows ahead = rows(first);
  auto fetch = [&] {
    while (ahead_step >= steps && ahead_tile < tiles) {
      ahead_tile += stride;
      ahead_step = warp();
      if (warp() >= steps) ahead_tile = tiles;
      if (ahead_tile < tiles) ahead = rows(ahead_tile);
    }
    if (ahead_tile < tiles) {
      copy_step<Format>(memory.ring + ahead_place * memory.stage_bytes, ahead, row_bytes, ahead_step);
      ahead_step += memory.warps;
    }
    copy_commit();
    ahead_place = ahead_place + 1 == STAGES ? 0 : ahead_place + 1;
  };
  UNROLL
  for (int stage = 0; stage < STAGES - 1; ++stage) fetch();
  prepare();

  int place = 0;
  for (int tile = first; tile < tiles; tile += stride, ++turn) {
    const TileRows own = rows(tile);
    TileSums sums = {0.0f, 0.0f};
    for (int step = warp(); step < steps; step += memory.warps) {
      copy_wait<STAGES - 2>();
      warp_barrier();  // all lanes' copies are there, and nobody reads the place that is filled next
      fetch();
      const unsigned char* ring = memory.ring + place * memory.stage_bytes;
      Own::multiply(sums, step_row<Format>(ring, own, row_bytes, step, lane() >> 2),
                    step_row<Format>(ring, own, row_bytes, step, 8 + (lane() >> 2)), memory.x, step);
      place = place + 1 == STAGES ? 0 : place + 1;
    }
    float* partial = memory.partial + (turn & 1) * TILE_ROWS * memory.warps;
    const float low = sum_lanes(sums.low, 4), high = sum_lanes(sums.high, 4);
    if ((lane() & 3) == 0) {
      partial[warp() * TILE_ROWS + (lane() >> 2)] = low;
      partial[warp() * TILE_ROWS + 8 + (lane() >> 2)] = high;
    }
    // Two tiles' sums have places of their own, so that one barrier a tile is enough.
    block_barrier();
    if (warp() == turn % memory.warps) {
      float sum = 0.0f;
      for (int i = 0; i < memory.warps; ++i) sum += partial[i * TILE_ROWS + (lane() & 15)];
      finish(tile, lane() & 15, sum);
    }
  }
  copy_wait<0>();
}

// Formats by their numbers, as `ops/cuda/decode.rs` has them.
enum StoredFormat { STORED_Q8_0, STORED_Q4K, STORED_Q5K, STORED_Q6K, STORED_BF16 };

// Calls `work` with the format.
template <class Work>
DEVICE void with_format(int64_t format, const Work& work) {
  switch (format) {
    case STORED_Q8_0: return work(Q8_0());
    case STORED_Q4K: return work(Q4K());
    case STORED_Q5K: return work(Q5K());
    case STORED_Q6K: return work(Q6K());
    default: return work(Plain());
  }
}

// Writes eight numbers of the row, interleaved, and, with its neighbour, their sum. All lanes of a warp
// call it with neighbouring chunks.
DEVICE void place_chunk(const RowOperand& x, int chunk, Words words) {
  store_words(x.numbers + 16 * chunk, interleaved(words));
  float sum = 0.0f;
  UNROLL
  for (int i = 0; i < 4; ++i) sum += low_float(words.at[i]) + high_float(words.at[i]);
  sum += shuffle_xor(sum, 1);
  if ((chunk & 1) == 0) x.sums[chunk >> 1] = sum;
}
