// What the convolutions share: how a picture's pixels and the weights of a convolution come to shared
// memory, and how results leave.
//
// Pictures lie as [b][height][width][channels], channels side by side and a multiple of 8, filled up with
// zeros. A convolution is a matrix product that never stores its patches: rows are pixels, columns are
// outputs, the depth runs over taps and channels.
//
// A block owns 16 × 16 pixels of the result by COLUMNS outputs. The depth comes in slabs: CHUNK channels of
// the pixels that one column of taps meets, which are up to 18 × 16. Each tap of the column multiplies 16
// of a slab's 18 rows, so that a pixel is read three times for nine taps. With a stride of two a slab has
// every other row, so that the same holds there.
//
// After the picture's own slabs come those of a second picture with the result's sides, which is
// multiplied pixel by pixel: the shortcut of a residual block. An identity there adds the second picture
// exactly, since sums are float32.
//
// Where a block has all outputs of its pixels, it can norm them over the channels and apply SiLU before they
// are rounded and written, as pixel_norm would after it.
#pragma once
#include "attention.cuh"

struct ConvArgs {
  const bf16* x;         // [b][height][width][channels]
  const bf16* weight;    // [kernel_width][kernel_height][outs][channels]
  const bf16* shortcut;  // [b][out_height][out_width][shortcut_channels], or null
  const bf16* shortcut_weight;  // [outs][shortcut_channels]
  const float* bias;     // [outs], or null
  const float* gamma;    // [outs], of the norm of the result; or null, if that is not normed
  bf16* y;               // [b][out_height][out_width][outs]
  int64_t batches, channels, shortcut_channels, outs;  // multiples of 8 but for the first
  int64_t height, width, out_height, out_width;
  int64_t kernel_height, kernel_width, stride, pad_top, pad_left;  // kernels: at most 3 high
  int64_t enlarge;       // 1 where each pixel of x counts as 2 × 2
  int64_t norm_channels; // outputs that are no filling, of which the norm is
};

constexpr int CONV_SIDE = 16, CONV_PIXELS = CONV_SIDE * CONV_SIDE;
constexpr int CONV_SLAB_ROWS = CONV_SIDE + 2;

// Rows of CHUNK numbers in shared memory, in pieces of 16 bytes whose places are mixed so that eight rows
// lie in different banks: for 64 numbers as the 128-byte swizzle does.
template <int CHUNK>
struct PixelRows {
  static constexpr int PIECES = CHUNK / 8;
  static constexpr int ROW_BYTES = 16 * PIECES;
  DEVICE static unsigned char* at(unsigned char* rows, int row, int piece) {
    const int mixed = PIECES == 8 ? piece ^ (row & 7) : piece ^ (row >> 1 & 3);
    return rows + row * ROW_BYTES + 16 * mixed;
  }
};

// Where a block's result lies.
struct ConvTile {
  int batch, y, x, out;

  DEVICE ConvTile(const ConvArgs& args, int64_t number, int columns) {
    const int index = int(number);
    const int outs = int((args.outs + columns - 1) / columns);
    const int wide = int((args.out_width + CONV_SIDE - 1) / CONV_SIDE);
    const int tall = int((args.out_height + CONV_SIDE - 1) / CONV_SIDE);
    out = index % outs * columns;
    const int patch = index / outs;
    x = patch % wide * CONV_SIDE;
    y = patch / wide % tall * CONV_SIDE;
    batch = patch / wide / tall;
  }

  DEVICE static int64_t count(const ConvArgs& args, int columns) {
    return (args.outs + columns - 1) / columns * args.batches *
           ((args.out_width + CONV_SIDE - 1) / CONV_SIDE) *
           ((args.out_height + CONV_SIDE - 1) / CONV_SIDE);
  }
};

// A part of the depth.
struct ConvSlab {
  const bf16* x;
  const bf16* weight;  // of the slab's first tap and channel
  int channels;        // of x
  int chunk;           // first channel
  int height, width, enlarge, stride;
  int first_y, first_x;  // of the block's first pixel, in x
  int rows, columns;     // of taps: each moves by one row or column of the slab
  int64_t row_step, column_step;  // numbers between the weights of two taps

  // Steps of 16 channels.
  DEVICE int steps(int chunk_max) const {
    const int left = channels - chunk;
    return ((left < chunk_max ? left : chunk_max) + 15) / 16;
  }
};

// Calls `each` with every slab of a tile, in the order of the depth. A WIDE slab serves taps beside each other
// as well.
template <int CHUNK, bool WIDE, class Each>
DEVICE void conv_slabs(const ConvArgs& args, const ConvTile& tile, Each each) {
  ConvSlab slab;
  const int stride = int(args.stride), kernel_height = int(args.kernel_height);
  const int kernel_width = int(args.kernel_width);
  for (int part = 0; part < 2; ++part) {
    const bool own = part == 0;
    slab.channels = int(own ? args.channels : args.shortcut_channels);
    slab.height = int(own ? args.height : args.out_height);
    slab.width = int(own ? args.width : args.out_width);
    slab.enlarge = own ? int(args.enlarge) : 0;
    slab.stride = own ? stride : 1;
    slab.x = (own ? args.x : args.shortcut) +
             int64_t(tile.batch) * slab.height * slab.width * slab.channels;
    slab.row_step = int64_t(stride) * args.outs * args.channels;
    slab.column_step = slab.row_step * kernel_height;
    // Pixels that a step of the stride apart meet belong to one slab.
    const int rows = own && stride < kernel_height ? stride : own ? kernel_height : 1;
    const int columns = !own ? 1 : WIDE && stride < kernel_width ? stride : kernel_width;
    for (slab.chunk = 0; slab.chunk < slab.channels; slab.chunk += CHUNK) {
      for (int column = 0; column < columns; ++column) {
        for (int row = 0; row < rows; ++row) {
          slab.rows = own ? (kernel_height - row + stride - 1) / stride : 1;
          slab.columns = WIDE && own ? (kernel_width - column + stride - 1) / stride : 1;
          slab.first_y = tile.y * slab.stride + (own ? row - int(args.pad_top) : 0);
          slab.first_x = tile.x * slab.stride + (own ? column - int(args.pad_left) : 0);
          const int64_t tap = int64_t(column) * kernel_height + row;
          slab.weight = (own ? args.weight + tap * args.outs * args.channels : args.shortcut_weight) +
                        slab.chunk;
          each(slab);
        }
      }
    }
  }
}

// Starts the copies of a slab's pixels: row r comes to rows PITCH r of `to`. THREADS threads call it with
// their numbers.
template <int CHUNK, int PITCH, int THREADS>
DEVICE void copy_slab(unsigned char* to, const ConvSlab& slab, int thread) {
  constexpr int PIECES = CHUNK / 8, ROWS_AT_ONCE = THREADS / (CONV_SIDE * PIECES);
  const int piece = thread % PIECES;
  if (piece >= 2 * slab.steps(CHUNK)) return;
  const int channel = slab.chunk + 8 * piece;
  const bf16* from = slab.x + channel;
  const int rows = CONV_SIDE - 1 + slab.rows;
  auto copy = [&](int row, int column) {
    const int y = slab.first_y + row * slab.stride, x = slab.first_x + column * slab.stride;
    const bool there = channel < slab.channels && x >= 0 && x < slab.width << slab.enlarge && y >= 0 &&
                       y < slab.height << slab.enlarge;
    const int64_t pixel = int64_t(y >> slab.enlarge) * slab.width + (x >> slab.enlarge);
    copy_async(PixelRows<CHUNK>::at(to, row * PITCH + column, piece),
               there ? from + pixel * slab.channels : slab.x, there);
  };
  const int column = thread / PIECES % CONV_SIDE;
  for (int row = thread / (PIECES * CONV_SIDE); row < rows; row += ROWS_AT_ONCE) copy(row, column);
  const int more = slab.columns - 1;
  for (int i = thread / PIECES; i < rows * more; i += THREADS / PIECES) {
    copy(more == 1 ? i : i >> 1, CONV_SIDE + (more == 1 ? 0 : i & 1));
  }
}

// Starts the copies of the weights of one tap for COLUMNS of `outs` outputs.
template <int CHUNK, int COLUMNS, int THREADS>
DEVICE void copy_tap(unsigned char* to, const ConvSlab& slab, const ConvTile& tile, int row_of_tap,
                     int column_of_tap, int outs, int thread) {
  constexpr int PIECES = CHUNK / 8, ROWS_AT_ONCE = THREADS / PIECES;
  const int piece = thread % PIECES;
  if (piece >= 2 * slab.steps(CHUNK)) return;
  const bool there = slab.chunk + 8 * piece < slab.channels;
  const bf16* from = slab.weight + row_of_tap * slab.row_step + column_of_tap * slab.column_step +
                     8 * piece;
  for (int row = thread / PIECES; row < COLUMNS; row += ROWS_AT_ONCE) {
    const bool row_there = there && tile.out + row < outs;
    copy_async(PixelRows<CHUNK>::at(to, row, piece),
               row_there ? from + int64_t(tile.out + row) * slab.channels : slab.x, row_there);
  }
}

// Lane i of four holds part j of row i before, part i of row j after.
DEVICE void transpose_quad(uint32_t (&words)[4]) {
  UNROLL
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane() & bit;
    UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t sent = upper ? words[i] : words[i | bit];
      const uint32_t got = float_to_bits(shuffle_xor(bits_to_float(sent), bit));
      words[i] = upper ? got : words[i];
      words[i | bit] = upper ? words[i | bit] : got;
    }
  }
}

struct OutPair {
  float low, high;
};

// The two numbers of `of: [outs]` that belong to the sums of block n in this lane; zeros behind the last.
DEVICE OutPair of_outs(const ConvArgs& args, const ConvTile& tile, const float* of, int n) {
  const int out = tile.out + 8 * n + 2 * (lane() & 3);
  if (out >= args.outs) return {0.0f, 0.0f};
  return {of[out], of[out + 1]};
}

// sqrt(channels) / max(|y|, 1e-12), of the sum of squares.
DEVICE float channel_factor(float squares, int64_t channels) {
  const float length = sqrtf(squares);
  // Not a maximum, which would hide NaN.
  return sqrtf(float(channels)) / (length < 1e-12f ? 1e-12f : length);
}

// y / max(|y|, 1e-12) * sqrt(channels) * gamma of 16 pixels, and SiLU of it. Four lanes have a pixel's outputs.
template <int BLOCKS>
DEVICE void norm_pixels(const ConvArgs& args, const ConvTile& tile, float (&sums)[BLOCKS][4]) {
  float factors[2];
  UNROLL
  for (int half = 0; half < 2; ++half) {
    float squares = 0.0f;
    UNROLL
    for (int n = 0; n < BLOCKS; ++n) {
      const float low = sums[n][2 * half], high = sums[n][2 * half + 1];
      squares += low * low + high * high;
    }
    factors[half] = channel_factor(sum_lanes(squares, 4), args.norm_channels);
  }
  UNROLL
  for (int n = 0; n < BLOCKS; ++n) {
    const OutPair gamma = of_outs(args, tile, args.gamma, n);
    UNROLL
    for (int part = 0; part < 4; ++part) {
      const float y = sums[n][part] * factors[part >> 1] * (part & 1 ? gamma.high : gamma.low);
      sums[n][part] = y * sigmoid(y);
    }
  }
}

// Writes 16 pixels as multiply_add lays them out: `sums` of BLOCKS times 8 outputs. The first eight pixels begin
// at `row` and `column` of the tile; the others are below or beside them.
template <int BLOCKS, bool BELOW>
DEVICE void finish_pixels(const ConvArgs& args, const ConvTile& tile, int row, int column,
                          float (&sums)[BLOCKS][4]) {
  const int outs = int(args.outs);
  UNROLL
  for (int n = 0; n < BLOCKS; ++n) {
    if (!args.bias) continue;
    const OutPair bias = of_outs(args, tile, args.bias, n);
    UNROLL
    for (int part = 0; part < 4; ++part) sums[n][part] += part & 1 ? bias.high : bias.low;
  }
  if (args.gamma) norm_pixels(args, tile, sums);
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const int y = tile.y + row + (BELOW ? half : 0);
    const int x = tile.x + column + (BELOW ? 0 : 8 * half) + (lane() >> 2);
    const bool there = y < args.out_height && x < args.out_width;
    bf16* to = args.y +
               ((int64_t(tile.batch) * args.out_height + y) * args.out_width + x) * args.outs + tile.out;
    if constexpr (BLOCKS % 4 == 0) {
      UNROLL
      for (int first = 0; first < BLOCKS; first += 4) {
        uint32_t words[4];
        UNROLL
        for (int i = 0; i < 4; ++i) {
          words[i] = pack_bf16(sums[first + i][2 * half], sums[first + i][2 * half + 1]);
        }
        transpose_quad(words);
        const int out = 8 * (first + (lane() & 3));
        if (there && tile.out + out < outs) {
          write_words(to + out, words);
        }
      }
    } else {
      UNROLL
      for (int n = 0; n < BLOCKS; ++n) {
        const int out = 8 * n + 2 * (lane() & 3);
        if (there && tile.out + out < outs) {
          *reinterpret_cast<uint32_t*>(to + out) =
              pack_bf16(sums[n][2 * half], sums[n][2 * half + 1]);
        }
      }
    }
  }
}
