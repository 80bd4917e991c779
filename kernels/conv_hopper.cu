// Convolutions with Hopper's products of four warps (wgmma), for compute capability 9.0 only, see conv.cuh.
//
// conv2d_hopper_N: what conv2d_N computes. Four warps bring slabs of 64 channels and the weights tap by tap;
//   two groups of four multiply, each 8 × 16 pixels by N outputs. A slab has the 18 × 18 pixels that all
//   nine taps of a block meet: a tap is a place in the slab where a product begins, and eight pixels
//   beside each other are what a product finds at once, so that rows may be 18 pixels apart. Slabs and
//   taps go round in rings of places in shared memory: a place is full when its copies have arrived and
//   empty when its products have ended, which barriers in shared memory count. Blocks stay and take one
//   tile after the other, so that the next tile's first slabs arrive while results are written.
//   Grid: (multiprocessors, 1, 1); 384 threads.
//
// TFLOP/s on an H200: conv2d_hopper_192 435 to 512 where it fits, conv2d_hopper_96 326 (96 to 96 channels,
// 1024 × 1024) and 424 (192 to 96, enlarged to 1024 × 1024); with a stride of two 322 and 213.
// Tried, for 96 to 96 channels at 1024 × 1024 and 384 to 384 at 256 × 256:
// - a slab for each column of taps, 16 pixels wide, so that products find 64 pixels in one piece: 278 and 433;
// - rows 24 pixels apart: 328 and 475, with more shared memory;
// - copies of 4 taps under way in place of 2: 311 and 422 (blocks of 96 outputs);
// - two slabs and 12 taps in place of 3 and 9, blocks of 96 outputs: 276 and 364.
#include "conv.cuh"

#ifdef HAS_GROUP_PRODUCTS

template <int COLUMNS_, int SLABS_, int TAPS_>
struct HopperConv {
  static constexpr int COLUMNS = COLUMNS_, SLABS = SLABS_, TAPS = TAPS_, CHUNK = 64;
  static constexpr int PITCH = CONV_SIDE + 2;
  static constexpr int AHEAD = 2;  // taps whose copies may be under way before the oldest is awaited
  static constexpr int PRODUCERS = 128;
  static constexpr int SLAB_BYTES =
      (CONV_SLAB_ROWS * PITCH * PixelRows<CHUNK>::ROW_BYTES + 1023) / 1024 * 1024;
  static constexpr int TAP_BYTES = COLUMNS * PixelRows<CHUNK>::ROW_BYTES;
  static constexpr int ROW_BYTES = PixelRows<CHUNK>::ROW_BYTES, EIGHT_ROWS = 8 * ROW_BYTES;
  // A product's 64 pixels are eight rows of 8: from one row to the next.
  static constexpr int NEXT_ROW = PITCH * ROW_BYTES;

  unsigned char *slabs, *taps;
  CountingBarrier *full, *empty, *slab_empty;

  DEVICE HopperConv() {
    slabs = shared_memory();
    taps = slabs + SLABS * SLAB_BYTES;
    full = reinterpret_cast<CountingBarrier*>(taps + TAPS * TAP_BYTES);
    empty = full + TAPS;
    slab_empty = empty + TAPS;
  }

  DEVICE void prepare() const {
    constexpr int CONSUMER_WARPS = 8;
    if (thread_index() == 0) {
      for (int i = 0; i < TAPS; ++i) barrier_start(full + i, PRODUCERS);
      for (int i = 0; i < TAPS; ++i) barrier_start(empty + i, CONSUMER_WARPS);
      for (int i = 0; i < SLABS; ++i) barrier_start(slab_empty + i, CONSUMER_WARPS);
      barriers_started();
    }
    block_barrier();
  }

  // Brings what all tiles of this block need.
  DEVICE void produce(const ConvArgs& args, int thread) const {
    const int outs = int(args.outs);
    int slab_place = 0, slab_round = 0, place = 0, round = 0, announced = 0, under_way = 0;
    auto announce = [&] {
      publish_shared();
      barrier_arrive(full + announced);
      announced = announced + 1 == TAPS ? 0 : announced + 1;
    };
    // Everything that was brought is announced before a place is awaited: it may be what makes it free.
    auto await = [&](CountingBarrier* emptied, int round) {
      if (round == 0 || barrier_ready(emptied, (round - 1) & 1)) return;
      copy_wait<0>();
      for (; under_way > 0; --under_way) announce();
      barrier_wait(emptied, (round - 1) & 1);
    };
    const int64_t tiles = ConvTile::count(args, COLUMNS);
    for (int64_t index = block_x(); index < tiles; index += grid_x()) {
      const ConvTile tile(args, index, COLUMNS);
      conv_slabs<CHUNK, true>(args, tile, [&](const ConvSlab& slab) {
        await(slab_empty + slab_place, slab_round);
        copy_slab<CHUNK, PITCH, PRODUCERS>(slabs + slab_place * SLAB_BYTES, slab, thread);
        for (int tap = 0; tap < slab.rows * slab.columns; ++tap) {
          await(empty + place, round);
          const int column = tap / slab.rows, row = tap - column * slab.rows;
          copy_tap<CHUNK, COLUMNS, PRODUCERS>(taps + place * TAP_BYTES, slab, tile, row, column, outs,
                                              thread);
          copy_commit();
          if (under_way == AHEAD) {
            copy_wait<AHEAD>();
            announce();
          } else {
            ++under_way;
          }
          if (++place == TAPS) {
            place = 0;
            ++round;
          }
        }
        if (++slab_place == SLABS) {
          slab_place = 0;
          ++slab_round;
        }
      });
    }
    copy_wait<0>();
    for (; under_way > 0; --under_way) announce();
  }

  // Starts the products of one tap with a group's pixels.
  template <int STEPS>
  DEVICE static void multiply(float (&sums)[2][COLUMNS / 8][4], const unsigned char* left,
                              const unsigned char* right, bool add) {
    products_begin();
    UNROLL
    for (int k = 0; k < STEPS; ++k) {
      const SharedOperand columns = shared_operand(right + 32 * k, 16, EIGHT_ROWS);
      UNROLL
      for (int m = 0; m < 2; ++m) {
        const SharedOperand rows = shared_operand(left + m * EIGHT_ROWS + 32 * k, 16, NEXT_ROW);
        multiply_scores(sums[m], rows, columns, add || k > 0);
      }
    }
    products_commit();
  }

  DEVICE void consume(const ConvArgs& args, int group) const {
    int slab_place = 0, place = 0, round = 0;
    int last_place = -1, last_slab = -1;  // whose products may still run
    auto release = [&] {
      if (lane() == 0 && last_place >= 0) {
        barrier_arrive(empty + last_place);
        if (last_slab >= 0) barrier_arrive(slab_empty + last_slab);
      }
    };
    const int64_t tiles = ConvTile::count(args, COLUMNS);
    for (int64_t index = block_x(); index < tiles; index += grid_x()) {
      const ConvTile tile(args, index, COLUMNS);
      float sums[2][COLUMNS / 8][4];
      bool add = false;
      conv_slabs<CHUNK, true>(args, tile, [&](const ConvSlab& slab) {
        const int steps = slab.steps(CHUNK);
        const unsigned char* slab_rows = slabs + slab_place * SLAB_BYTES;
        const int slab_taps = slab.rows * slab.columns;
        for (int tap = 0; tap < slab_taps; ++tap) {
          barrier_wait(full + place, round & 1);
          const int column = tap / slab.rows, row = tap - column * slab.rows;
          const unsigned char* left = slab_rows + ((8 * group + row) * PITCH + column) * ROW_BYTES;
          const unsigned char* right = taps + place * TAP_BYTES;
          // Each number of steps without a loop, so that a tap's products end as one.
          switch (steps) {
            case 4: multiply<4>(sums, left, right, add); break;
            case 3: multiply<3>(sums, left, right, add); break;
            case 2: multiply<2>(sums, left, right, add); break;
            default: multiply<1>(sums, left, right, add);
          }
          add = true;
          products_wait_for<1>();  // the last tap's have ended
          release();
          last_place = place;
          last_slab = tap + 1 == slab_taps ? slab_place : -1;
          if (++place == TAPS) {
            place = 0;
            ++round;
          }
        }
        if (++slab_place == SLABS) slab_place = 0;
      });
      products_wait_for<0>();
      release();
      last_place = -1;
      UNROLL
      for (int m = 0; m < 2; ++m) {
        settle(sums[m]);
        finish_pixels<COLUMNS / 8, true>(args, tile, 8 * group + 2 * (warp() % 4), 8 * m, sums[m]);
      }
    }
  }
};

template <class Conv, int PRODUCER_REGISTERS, int CONSUMER_REGISTERS>
DEVICE void conv_hopper(const ConvArgs& args) {
  const Conv conv;
  conv.prepare();
  const int group = warp_group();
  if (group == 2) {
    registers_give<PRODUCER_REGISTERS>();
    conv.produce(args, thread_index() % Conv::PRODUCERS);
  } else {
    registers_take<CONSUMER_REGISTERS>();
    conv.consume(args, group);
  }
}

KERNEL(conv2d_hopper_96, ConvArgs, 384, 1) {
  conv_hopper<HopperConv<96, 3, 8>, 104, 200>(args);
}
KERNEL(conv2d_hopper_192, ConvArgs, 384, 1) {
  conv_hopper<HopperConv<192, 2, 6>, 40, 232>(args);
}

#endif
