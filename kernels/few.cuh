// Products of up to 8 bf16 rows with weights as they are stored, bound by reading the weights.
//
// A warp owns 16 outputs times a share of the depth, in pieces of 256 numbers that its own asynchronous copies bring to
// shared memory several pieces ahead. The weights' integers become bf16 exactly and are multiplied by tensor cores; the
// scales multiply the sums of a group, in float32, so nothing is rounded but the result.
//
// One row: column j of the right operand holds the numbers of group j alone, so that the eight columns
// are the sums of eight groups. Several rows: a column is a row, and sums are scaled group by group.
#pragma once
#include "attention.cuh"
#include "quantized.cuh"

// Integers of 7 bits in bf16: 128 + n.
constexpr uint32_t FEW_OFFSET = 0x43004300u;

// The 6-bit scales and minima of groups 2 t and 2 t + 1 of a block of 8, from its first 16 bytes.
struct FewScales {
  float scale[2], minimum[2];
};

DEVICE FewScales few_scales_k(const uint8_t* block, int t) {
  const Words head = load_words(block);
  const uint32_t low = head.at[1], middle = head.at[2], high = head.at[3];
  uint32_t scales = low & 0x3f3f3f3fu, minima = middle & 0x3f3f3f3fu;
  if (t >= 2) {
    scales = (high & 0x0f0f0f0fu) | (low >> 2 & 0x30303030u);
    minima = (high >> 4 & 0x0f0f0f0fu) | (middle >> 2 & 0x30303030u);
  }
  scales >>= 16 * (t & 1);
  minima >>= 16 * (t & 1);
  const float d = half_to_float(uint16_t(head.at[0])), m = half_to_float(uint16_t(head.at[0] >> 16));
  FewScales to;
  to.scale[0] = d * float(scales & 0xff);
  to.scale[1] = d * float(scales >> 8 & 0xff);
  to.minimum[0] = m * float(minima & 0xff) + 128.0f * to.scale[0];
  to.minimum[1] = m * float(minima >> 8 & 0xff) + 128.0f * to.scale[1];
  return to;
}

// Of a word with four small integers in its bytes: those of bytes 0 and 2, and those of bytes 1 and 3.
DEVICE void few_pairs(uint32_t bytes, uint32_t mask, uint32_t& even, uint32_t& odd) {
  even = (bytes & mask) | FEW_OFFSET;
  odd = (bytes >> 8 & mask) | FEW_OFFSET;
}

// A format for few rows: its bytes of 256 numbers, pieces of 16 bytes that hold them, numbers that share a
// scale; `unit` gives lane t of four the 8 weights that it multiplies of numbers 32 u .. 32 u + 32.
struct FewQ4K {
  static constexpr int BYTES = 144, PIECES = 9, GROUP = 32;
  static constexpr bool SCALED = true, MINIMUM = true, MIXED = true, ALIGNED = true;
  DEVICE static void unit(const uint8_t* block, int u, int t, uint32_t (&to)[4]) {
    const uint8_t* at = block + 16 + 32 * (u / 2) + 8 * t;
    UNROLL
    for (int i = 0; i < 2; ++i) {
      few_pairs(four_bytes(at + 4 * i) >> (4 * (u & 1)), 0x000f000fu, to[2 * i], to[2 * i + 1]);
    }
  }
  DEVICE static FewScales scales(const uint8_t* block, int, int t) { return few_scales_k(block, t); }
};

struct FewQ5K {
  static constexpr int BYTES = 176, PIECES = 11, GROUP = 32;
  static constexpr bool SCALED = true, MINIMUM = true, MIXED = true, ALIGNED = true;
  DEVICE static void unit(const uint8_t* block, int u, int t, uint32_t (&to)[4]) {
    UNROLL
    for (int i = 0; i < 2; ++i) {
      const int at = 8 * t + 4 * i;
      const uint32_t low = four_bytes(block + 48 + 32 * (u / 2) + at) >> (4 * (u & 1));
      const uint32_t bits = four_bytes(block + 16 + at);
      const uint32_t high = (u < 4 ? bits << (4 - u % 5) : bits >> (u - 4)) & 0x10101010u;
      few_pairs((low & 0x0f0f0f0fu) | high, 0x00ff00ffu, to[2 * i], to[2 * i + 1]);
    }
  }
  DEVICE static FewScales scales(const uint8_t* block, int, int t) { return few_scales_k(block, t); }
};

// Four bytes at an even address of shared memory.
DEVICE uint32_t few_word(const uint8_t* at) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(at);
  const uint8_t* aligned = at - (address & 2);
  const uint32_t low = four_bytes(aligned), high = four_bytes(aligned + 4);
  return uint32_t((uint64_t(high) << 32 | low) >> (8 * (address & 2)));
}

struct FewQ6K {
  static constexpr int BYTES = 210, PIECES = 14, GROUP = 16;
  static constexpr bool SCALED = true, MINIMUM = true, MIXED = true, ALIGNED = false;
  DEVICE static void unit(const uint8_t* block, int u, int t, uint32_t (&to)[4]) {
    const int half = u / 4, quarter = u % 4;
    UNROLL
    for (int i = 0; i < 2; ++i) {
      const int at = 16 * i + 4 * t;
      const uint32_t low = few_word(block + 64 * half + 32 * (quarter & 1) + at) >> (4 * (quarter >> 1));
      const uint32_t bits = few_word(block + 128 + 32 * half + at);
      const uint32_t high = (quarter < 2 ? bits << (4 - 2 * (quarter & 1)) : bits >> (2 * quarter - 4)) &
                            0x30303030u;
      few_pairs((low & 0x0f0f0f0fu) | high, 0x00ff00ffu, to[2 * i], to[2 * i + 1]);
    }
  }
  DEVICE static FewScales scales(const uint8_t* block, int half, int t) {
    const uint32_t pair = two_bytes(block + 192 + 8 * half + 2 * t);
    const float d = half_to_float(two_bytes(block + 208));
    FewScales to;
    to.scale[0] = d * float(int8_t(pair & 0xff));
    to.scale[1] = d * float(int8_t(pair >> 8));
    to.minimum[0] = 160.0f * to.scale[0];
    to.minimum[1] = 160.0f * to.scale[1];
    return to;
  }
};

struct FewQ8_0 {
  static constexpr int BYTES = 272, PIECES = 17, GROUP = 32;
  static constexpr bool SCALED = true, MINIMUM = false, MIXED = true, ALIGNED = true;
  DEVICE static void unit(const uint8_t* block, int u, int t, uint32_t (&to)[4]) {
    uint32_t words[2];
    if (u & 1) {
      words[0] = four_bytes(block + 34 * u + 2 + 8 * t);
      words[1] = four_bytes(block + 34 * u + 6 + 8 * t);
    } else {
      const uint8_t* at = block + 34 * u + 8 * t;
      const uint32_t middle = four_bytes(at + 4);
      words[0] = four_bytes(at) >> 16 | middle << 16;
      words[1] = middle >> 16 | uint32_t(two_bytes(at + 8)) << 16;
    }
    UNROLL
    for (int i = 0; i < 2; ++i) {
      UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        const uint32_t pair = words[i] >> (8 * odd);
        // 128 + the lower 7 bits, less 128, or 256 for negative numbers.
        to[2 * i + odd] = subtract_bf16((pair & 0x007f007fu) | FEW_OFFSET, (pair & 0x00800080u) | FEW_OFFSET);
      }
    }
  }
  DEVICE static FewScales scales(const uint8_t* block, int, int t) {
    FewScales to;
    to.scale[0] = half_to_float(two_bytes(block + 68 * t));
    to.scale[1] = half_to_float(two_bytes(block + 68 * t + 34));
    to.minimum[0] = to.minimum[1] = 0.0f;
    return to;
  }
};

// e4m3: sign, four bits of exponent with a bias of 7, three of fraction; the largest pattern is NaN.
struct FewFloat8 {
  static constexpr int BYTES = 256, PIECES = 16, GROUP = 32;
  static constexpr bool SCALED = false, MINIMUM = false, MIXED = true, ALIGNED = true;
  DEVICE static void unit(const uint8_t* block, int u, int t, uint32_t (&to)[4]) {
    UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t bytes = four_bytes(block + 32 * u + 8 * t + 4 * i);
      UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        const uint32_t pair = bytes >> (8 * odd), size = pair & 0x007f007fu;
        // At their places in bf16 the bits are the number times 2^-120; NaN gets all bits of the exponent.
        const uint32_t nan = (size + 0x00010001u) & 0x00800080u;
        to[2 * i + odd] = scale_bf16(size << 4, 0x7b807b80u) | ((nan << 8) - nan) | (pair & 0x00800080u) << 8;
      }
    }
  }
  DEVICE static FewScales scales(const uint8_t*, int, int) { return {}; }
};

struct FewBf16 {
  static constexpr int BYTES = 512, PIECES = 32, GROUP = 32;
  static constexpr bool SCALED = false, MINIMUM = false, MIXED = false, ALIGNED = true;
  DEVICE static void unit(const uint8_t* block, int u, int t, uint32_t (&to)[4]) {
    const Words words = load_words(block + 64 * u + 16 * t);
    UNROLL
    for (int i = 0; i < 4; ++i) to[i] = words.at[i];
  }
  DEVICE static FewScales scales(const uint8_t*, int, int) { return {}; }
};

struct FewArgs {
  const bf16* x;          // [rows][depth]
  const uint8_t* weight;  // [outs] rows of blocks
  const bf16* bias;       // [outs], or null
  bf16* y;                // [rows][outs]
  int64_t rows, depth, outs;  // depth: a multiple of 256
  double scale;
};

// The numbers of x that lane t multiplies with its weights of a unit, in their order.
template <class Format>
DEVICE void few_x(const unsigned char* x, int u, int t, uint32_t (&to)[4]) {
  uint32_t words[4];
  if (Format::GROUP == 32) {
    const Words all = load_words(x + 64 * u + 16 * t);
    UNROLL
    for (int i = 0; i < 4; ++i) words[i] = all.at[i];
  } else {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      words[i] = *reinterpret_cast<const uint32_t*>(x + 64 * u + 32 * (i / 2) + 8 * t + 4 * (i % 2));
    }
  }
  UNROLL
  for (int i = 0; i < 4; i += 2) {
    to[i] = Format::MIXED ? (words[i] & 0xffffu) | words[i + 1] << 16 : words[i];
    to[i + 1] = Format::MIXED ? words[i] >> 16 | (words[i + 1] & 0xffff0000u) : words[i + 1];
  }
}

template <class Format, int TILES, int STAGES, bool ONE>
struct Few {
  static constexpr int OUTS = 16 * TILES, PIECES = OUTS * Format::PIECES, COPIES = (PIECES + 31) / 32;
  static constexpr int COLUMNS = ONE ? 1 : 8;
  static constexpr int ROW_BYTES = 16 * Format::PIECES;
  static constexpr int X_STRIDE = 528;
  static constexpr int STAGE_BYTES = 16 * PIECES + (ONE ? 512 : 8 * X_STRIDE);
  static constexpr int WARP_BYTES = STAGES * STAGE_BYTES;
  static constexpr bool BY_GROUP = ONE && Format::SCALED;
  static constexpr uint32_t ONES = 0x3f803f80u;

  DEVICE static void clear(float (&c)[4]) {
    UNROLL
    for (int i = 0; i < 4; ++i) c[i] = 0.0f;
  }

  // Unit u of a tile's 16 rows, as the left operands of its two products.
  DEVICE static void operands(uint32_t (&first)[4], uint32_t (&second)[4],
                              const unsigned char* const (&rows)[2], int u, int t) {
    uint32_t upper[4], lower[4];
    Format::unit(rows[0], u, t, upper);
    Format::unit(rows[1], u, t, lower);
    UNROLL
    for (int i = 0; i < 2; ++i) {
      first[2 * i] = upper[i];
      first[2 * i + 1] = lower[i];
      second[2 * i] = upper[2 + i];
      second[2 * i + 1] = lower[2 + i];
    }
  }

  // One row: a column is a group.
  DEVICE static void groups(float (&sums)[TILES][4], const unsigned char* const (&rows)[TILES][2],
                            const unsigned char* x, int g, int t) {
    constexpr int PARTS = 32 / Format::GROUP;  // of a unit
    UNROLL
    for (int half = 0; half < PARTS; ++half) {
      float c[TILES][4], ones[4];
      UNROLL
      for (int tile = 0; tile < TILES; ++tile) clear(c[tile]);
      clear(ones);
      uint32_t own[4];
      if (PARTS == 1) {
        few_x<Format>(x, g, t, own);
      } else {
        const uint32_t* at = reinterpret_cast<const uint32_t*>(x + 256 * half + 32 * g + 8 * t);
        own[0] = (at[0] & 0xffffu) | at[1] << 16;
        own[1] = at[0] >> 16 | (at[1] & 0xffff0000u);
        own[2] = own[0];
        own[3] = own[1];
      }
      UNROLL
      for (int i = 0; i < 8 / PARTS; ++i) {
        const int u = half * (8 / PARTS) + i;
        uint32_t b[4];
        UNROLL
        for (int j = 0; j < 4; ++j) b[j] = g == (PARTS == 1 ? i : 2 * i + j / 2) ? own[j] : 0;
        UNROLL
        for (int tile = 0; tile < TILES; ++tile) {
          uint32_t first[4], second[4];
          operands(first, second, rows[tile], u, t);
          multiply_add(c[tile], first, b[0], b[1]);
          multiply_add(c[tile], second, b[2], b[3]);
        }
        if (Format::MINIMUM) {
          const uint32_t all[4] = {ONES, ONES, ONES, ONES};
          multiply_add(ones, all, b[0], b[1]);
          multiply_add(ones, all, b[2], b[3]);
        }
      }
      UNROLL
      for (int tile = 0; tile < TILES; ++tile) {
        UNROLL
        for (int row = 0; row < 2; ++row) {
          const FewScales s = Format::scales(rows[tile][row], half, t);
          UNROLL
          for (int i = 0; i < 2; ++i) {
            sums[tile][2 * row] += s.scale[i] * c[tile][2 * row + i];
            if (Format::MINIMUM) sums[tile][2 * row] -= s.minimum[i] * ones[i];
          }
        }
      }
    }
  }

  // Several rows: a column is a row.
  DEVICE static void columns(float (&sums)[TILES][4], const unsigned char* const (&rows)[TILES][2],
                             const unsigned char* x, int t) {
    constexpr int PARTS = 32 / Format::GROUP;
    UNROLL
    for (int half = 0; half < PARTS; ++half) {
      FewScales scales[TILES][2];
      if (Format::SCALED) {
        UNROLL
        for (int tile = 0; tile < TILES; ++tile) {
          UNROLL
          for (int row = 0; row < 2; ++row) scales[tile][row] = Format::scales(rows[tile][row], half, t);
        }
      }
      UNROLL
      for (int i = 0; i < 8 / PARTS; ++i) {
        const int u = half * (8 / PARTS) + i;
        uint32_t b[4];
        few_x<Format>(x, u, t, b);
        float ones[2][4];
        if (Format::MINIMUM) {
          const uint32_t all[4] = {ONES, ONES, ONES, ONES};
          clear(ones[0]);
          clear(ones[1]);
          multiply_add(ones[0], all, b[0], b[1]);
          multiply_add(ones[PARTS - 1], all, b[2], b[3]);
        }
        UNROLL
        for (int tile = 0; tile < TILES; ++tile) {
          uint32_t first[4], second[4];
          operands(first, second, rows[tile], u, t);
          if (!Format::SCALED) {
            multiply_add(sums[tile], first, b[0], b[1]);
            multiply_add(sums[tile], second, b[2], b[3]);
            continue;
          }
          float c[2][4];
          clear(c[0]);
          clear(c[1]);
          multiply_add(c[0], first, b[0], b[1]);
          multiply_add(c[PARTS - 1], second, b[2], b[3]);
          UNROLL
          for (int part = 0; part < PARTS; ++part) {
            const int group = PARTS * i + part;
            const int from = (lane() & 28) | group / 2;
            UNROLL
            for (int row = 0; row < 2; ++row) {
              const float scale = shuffle(scales[tile][row].scale[group & 1], from);
              const float minimum =
                  Format::MINIMUM ? shuffle(scales[tile][row].minimum[group & 1], from) : 0.0f;
              UNROLL
              for (int column = 0; column < 2; ++column) {
                sums[tile][2 * row + column] += scale * c[part][2 * row + column];
                if (Format::MINIMUM) sums[tile][2 * row + column] -= minimum * ones[part][column];
              }
            }
          }
        }
      }
    }
  }

  DEVICE static void run(const FewArgs& args) {
    const int g = lane() >> 2, t = lane() & 3, warps = block_threads() / 32;
    unsigned char* mine = shared_memory() + warp() * WARP_BYTES;
    float* shares = reinterpret_cast<float*>(shared_memory() + warps * WARP_BYTES);
    const int count = int(args.depth / 256);
    const int64_t row_bytes = int64_t(count) * Format::BYTES;
    const uint8_t* end = args.weight + args.outs * row_bytes;
    // The last tile overlaps the one before, where outputs are no multiple of it.
    auto first_of = [&](int64_t tile) { return min64(tile * OUTS, args.outs - OUTS); };
    const int64_t tiles = (args.outs + OUTS - 1) / OUTS;
    // Where this lane's pieces start, from the tile's first output on.
    uint32_t starts[COPIES];
    UNROLL
    for (int i = 0; i < COPIES; ++i) {
      const int piece = lane() + 32 * i;
      starts[i] = uint32_t(piece / Format::PIECES * row_bytes) +
                  (Format::ALIGNED ? 16 * (piece % Format::PIECES) : 0);
    }
    auto load_weights = [&](const uint8_t* weight, int block, int stage) {
      unsigned char* to = mine + stage * STAGE_BYTES;
      UNROLL
      for (int i = 0; i < COPIES; ++i) {
        const int piece = lane() + 32 * i;
        if (PIECES % 32 != 0 && piece >= PIECES) continue;
        const uint8_t* from = weight + uint32_t(starts[i] + block * Format::BYTES);
        if (Format::ALIGNED) {
          copy_async(to + 16 * piece, from, true);
        } else {
          from -= reinterpret_cast<uintptr_t>(from) & 15;
          from += 16 * (piece % Format::PIECES);
          copy_async_some(to + 16 * piece, from, int(min64(16, end - from)));
        }
      }
    };
    auto load_x = [&](int block, int stage) {
      unsigned char* to = mine + stage * STAGE_BYTES + 16 * PIECES;
      if (ONE) {
        copy_async(to + 16 * lane(), args.x + int64_t(block) * 256 + 8 * lane(), true);
      } else {
        for (int row = 0; row < args.rows; ++row) {
          copy_async(to + row * X_STRIDE + 16 * lane(),
                     args.x + row * args.depth + int64_t(block) * 256 + 8 * lane(), true);
        }
      }
    };
    // What is loaded next: it runs ahead of what is computed, into the next tile of outputs.
    int64_t next_tile = block_x();
    int next_block = warp();
    const uint8_t* next_weight = args.weight + first_of(next_tile) * row_bytes;
    auto step = [&] {
      next_block += warps;
      if (next_block < count) return;
      next_block = warp();
      next_tile += grid_x();
      next_weight = args.weight + first_of(next_tile) * row_bytes;
    };
    const bool idle = warp() >= count;
    UNROLL
    for (int i = 0; i < STAGES - 1; ++i) {
      if (!idle && next_tile < tiles) {
        load_weights(next_weight, next_block, i);
        load_x(next_block, i);
        step();
      }
      copy_commit();
    }
    int stage = 0;
    for (int64_t tile = block_x(); tile < tiles; tile += grid_x()) {
      const int64_t first_out = first_of(tile);
      float sums[TILES][4];
      UNROLL
      for (int i = 0; i < TILES; ++i) clear(sums[i]);
      for (int block = warp(); block < count; block += warps) {
        if (next_tile < tiles) {
          const int free_stage = stage == 0 ? STAGES - 1 : stage - 1;
          load_weights(next_weight, next_block, free_stage);
          load_x(next_block, free_stage);
          step();
        }
        copy_commit();
        copy_wait<STAGES - 1>();
        warp_barrier();
        const unsigned char* from = mine + stage * STAGE_BYTES;
        const unsigned char* rows[TILES][2];
        UNROLL
        for (int i = 0; i < TILES; ++i) {
          UNROLL
          for (int half = 0; half < 2; ++half) {
            const int row = 16 * i + 8 * half + g;
            rows[i][half] = from + row * ROW_BYTES;
            if (!Format::ALIGNED) {
              rows[i][half] += reinterpret_cast<uintptr_t>(args.weight + (first_out + row) * row_bytes +
                                                           block * Format::BYTES) & 15;
            }
          }
        }
        const unsigned char* x = from + 16 * PIECES;
        if constexpr (BY_GROUP) {
          groups(sums, rows, x, g, t);
        } else {
          columns(sums, rows, ONE ? x : x + int(min64(g, args.rows - 1)) * X_STRIDE, t);
        }
        warp_barrier();
        stage = stage == STAGES - 1 ? 0 : stage + 1;
      }

      // The warps' shares of each sum.
      UNROLL
      for (int i = 0; i < TILES; ++i) {
        UNROLL
        for (int half = 0; half < 2; ++half) {
          const int out = warp() * OUTS + 16 * i + 8 * half + g;
          if (ONE) {
            const float sum = BY_GROUP ? sum_lanes(sums[i][2 * half], 4) : sums[i][2 * half];
            if (t == 0) shares[out] = sum;
          } else {
            shares[out * COLUMNS + 2 * t] = sums[i][2 * half];
            shares[out * COLUMNS + 2 * t + 1] = sums[i][2 * half + 1];
          }
        }
      }
      block_barrier();
      for (int i = thread_index(); i < OUTS * COLUMNS; i += block_threads()) {
        const int64_t out = first_out + i % OUTS, row = i / OUTS;
        // The last tile begins with outputs of the one before.
        if (row >= args.rows || out < tile * OUTS) continue;
        float sum = 0.0f;
        for (int share = 0; share < warps; ++share) {
          sum += shares[(share * OUTS + i % OUTS) * COLUMNS + row];
        }
        const float bias = args.bias ? to_float(args.bias[out]) : 0.0f;
        args.y[row * args.outs + out] = from_float<bf16>(sum * float(args.scale) + bias);
      }
      block_barrier();
    }
  }
};
