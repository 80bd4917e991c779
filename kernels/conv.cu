// Two-dimensional convolutions of pictures, see conv.cuh:
//   y[pixel][out] = sum over (tap, in) of w[tap][out][in] x[pixel moved by the tap][in] + bias[out]
// with zeros around the picture, and the shortcut's product with it where there is one.
//
// conv2d_N: blocks of 16 × 16 pixels by N outputs. Eight warps own two rows of pixels each; slabs of 32
//   channels with the weights of their taps are doubled in shared memory, so that the next ones arrive while
//   these are multiplied. Grid: (tiles, 1, 1); 256 threads.
//
// TFLOP/s on an H200: conv2d_96 228 to 245 (96 to 96 channels at 1024 × 1024; 384 to 384 at 256 × 256),
// conv2d_64 178 to 247; conv2d_16 takes 0.34 ms from 96 channels to 3 outputs at 1024 × 1024.
// Tried: one block of 96 a multiprocessor with more registers: 203 to 215; one of 128: 182 to 245.
#include "conv.cuh"

template <int COLUMNS>
DEVICE void conv_block(const ConvArgs& args) {
  constexpr int CHUNK = 32, THREADS = 256, ROWS = 2;
  using Rows = PixelRows<CHUNK>;
  constexpr int SLAB_BYTES = CONV_SLAB_ROWS * CONV_SIDE * Rows::ROW_BYTES;
  constexpr int TAP_BYTES = COLUMNS * Rows::ROW_BYTES;
  constexpr int STAGE_BYTES = SLAB_BYTES + 3 * TAP_BYTES;
  const ConvTile tile(args, block_x(), COLUMNS);
  float sums[ROWS][COLUMNS / 8][4];
  UNROLL
  for (int m = 0; m < ROWS; ++m) {
    UNROLL
    for (int n = 0; n < COLUMNS / 8; ++n) {
      UNROLL
      for (int part = 0; part < 4; ++part) sums[m][n][part] = 0.0f;
    }
  }

  const int outs = int(args.outs);
  int stage = 0, taps = 0, steps = 0;  // of the slab that is multiplied next
  auto multiply = [&](unsigned char* slab_rows) {
    for (int tap = 0; tap < taps; ++tap) {
      unsigned char* tap_rows = slab_rows + SLAB_BYTES + tap * TAP_BYTES;
      for (int k = 0; k < steps; ++k) {
        uint32_t a[ROWS][4];
        UNROLL
        for (int m = 0; m < ROWS; ++m) {
          const int row = (ROWS * warp() + m + tap) * CONV_SIDE + (lane() & 15);
          load_matrices(a[m], Rows::at(slab_rows, row, 2 * k + (lane() >> 4)));
        }
        UNROLL
        for (int n = 0; n < COLUMNS / 16; ++n) {
          uint32_t b[4];
          const int row = 16 * n + (lane() & 7) + 8 * (lane() >> 4);
          load_matrices(b, Rows::at(tap_rows, row, 2 * k + (lane() >> 3 & 1)));
          UNROLL
          for (int m = 0; m < ROWS; ++m) {
            multiply_add(sums[m][2 * n], a[m], b[0], b[1]);
            multiply_add(sums[m][2 * n + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
  };
  conv_slabs<CHUNK, false>(args, tile, [&](const ConvSlab& slab) {
    unsigned char* next = shared_memory() + (1 - stage) * STAGE_BYTES;
    copy_slab<CHUNK, CONV_SIDE, THREADS>(next, slab, thread_index());
    for (int tap = 0; tap < slab.rows; ++tap) {
      copy_tap<CHUNK, COLUMNS, THREADS>(next + SLAB_BYTES + tap * TAP_BYTES, slab, tile, tap, 0, outs,
                                        thread_index());
    }
    copy_commit();
    multiply(shared_memory() + stage * STAGE_BYTES);
    copy_wait<0>();
    block_barrier();  // the next slab is there, and nobody reads this one any more
    stage = 1 - stage;
    taps = slab.rows;
    steps = slab.steps(CHUNK);
  });
  multiply(shared_memory() + stage * STAGE_BYTES);

  UNROLL
  for (int m = 0; m < ROWS; ++m) {
    finish_pixels<COLUMNS / 8, false>(args, tile, ROWS * warp() + m, 0, sums[m]);
  }
}

KERNEL(conv2d_96, ConvArgs, 256, 2) { conv_block<96>(args); }
KERNEL(conv2d_64, ConvArgs, 256, 2) { conv_block<64>(args); }
KERNEL(conv2d_16, ConvArgs, 256, 2) { conv_block<16>(args); }
