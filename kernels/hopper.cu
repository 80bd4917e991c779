// Joint attention with Hopper's products of four warps (wgmma), for compute capability 9.0 only.
//
// attention_hopper_d128: what attention_joint_d128 computes, see attention.cuh. Two groups of four warps own
//   64 rows each; tiles of 128 keys and values are doubled in shared memory, so that the next ones arrive
//   while these are multiplied. Operands are read by the tensor cores from shared memory, where the
//   other kernels load each of them into registers first. While one group computes exponentials, the
//   other's products run.
//   Grid: (tiles of both streams' rows, key heads, b); 256 threads; 160 KiB of shared memory.
//
// Off until a check on a GPU has shown it right: the emulation holds that the arithmetic and the
// layouts are what the manual says, and cannot show more.
#include "attention.cuh"

#ifdef HAS_GROUP_PRODUCTS

// Rows of 128 numbers as two pieces of 64, which is as wide as the swizzle is.
template <int ROWS>
struct SplitRows {
  static constexpr int CHUNKS = 16;
  static constexpr int PIECE_BYTES = ROWS * SharedRows<64>::ROW_BYTES;
  DEVICE static unsigned char* at(unsigned char* rows, int row, int chunk) {
    return SharedRows<64>::at(rows + chunk / 8 * PIECE_BYTES, row, chunk % 8);
  }
};

KERNEL(attention_hopper_d128, AttentionArgs, 256, 1) {
  constexpr int D = 128, ROWS = 128, KEYS = 128, THREADS = 256, GROUP_ROWS = 64;
  constexpr int TILE_BYTES = 2 * SplitRows<KEYS>::PIECE_BYTES;
  constexpr int EIGHT_ROWS = 8 * SharedRows<64>::ROW_BYTES;
  using Queries = SplitRows<ROWS>;
  using Keys = SplitRows<KEYS>;
  unsigned char* query_rows = shared_memory();
  unsigned char* key_rows = query_rows + 2 * Queries::PIECE_BYTES;  // two tiles
  unsigned char* value_rows = key_rows + 2 * TILE_BYTES;            // two tiles

  const AttentionWork work = attention_work<ROWS, KEYS>(args);
  const int64_t batch = block_z(), head = block_y();
  const KeyRows keys = keys_of<D>(args, batch, head);
  const KeyRows values = values_of<D>(args, batch, head);
  auto load = [&](int start, int stage) {
    load_key_rows<Keys, KEYS, THREADS>(key_rows + stage * TILE_BYTES, keys, start, work.key_end);
    load_key_rows<Keys, KEYS, THREADS>(value_rows + stage * TILE_BYTES, values, start, work.key_end);
  };
  if (work.key_first < work.key_end) load(work.key_first, 0);
  load_query_rows<Queries, D, ROWS, THREADS, true>(query_rows, args.stream[work.stream], work, batch,
                                                   head, 1);

  const int group = warp() / 4;
  const unsigned char* own_rows = query_rows + group * GROUP_ROWS * SharedRows<64>::ROW_BYTES;
  const float factor = float(args.scale * 1.4426950408889634);
  AttentionSums<D> sums;
  sums.clear();
  int stage = 0;
  for (int start = work.key_first; start < work.key_end; start += KEYS) {
    block_barrier();  // nobody reads the other stage any more
    if (start + KEYS < work.key_end) {
      load(start + KEYS, 1 - stage);
      copy_wait<2>();
    } else {
      copy_wait<0>();
    }
    publish_shared();
    block_barrier();  // this stage is there

    const unsigned char* tile = key_rows + stage * TILE_BYTES;
    float scores[KEYS / 8][4];
    products_begin();
    UNROLL
    for (int k = 0; k < D / 16; ++k) {
      const int column = 32 * (k % 4);  // bytes within a piece
      multiply_add_scores(
          scores,
          shared_operand(own_rows + k / 4 * Queries::PIECE_BYTES + column, 16, EIGHT_ROWS),
          shared_operand(tile + k / 4 * Keys::PIECE_BYTES + column, 16, EIGHT_ROWS), k > 0);
    }
    products_wait(scores);
    if (start + KEYS > work.key_end) hide<KEYS>(scores, start, work.key_end, 0, 1, false, 0);
    sums.soften<KEYS>(scores, factor);

    tile = value_rows + stage * TILE_BYTES;
    uint32_t weights[KEYS / 16][4];
    UNROLL
    for (int k = 0; k < KEYS / 16; ++k) weights_operand<KEYS>(weights[k], scores, k);
    products_begin();
    UNROLL
    for (int k = 0; k < KEYS / 16; ++k) {
      multiply_add_values(sums.out, weights[k],
                          shared_operand(tile + 2 * k * EIGHT_ROWS, Keys::PIECE_BYTES, EIGHT_ROWS));
    }
    products_wait(sums.out);
    stage = 1 - stage;
  }

  sums.finish();
  block_barrier();  // nobody reads queries any more
  const int row_of_warp = 16 * warp();
  sums.place<Queries>(query_rows, row_of_warp);
  warp_barrier();
  write_rows<Queries, D>(query_rows, row_of_warp, 16, args, work, batch, head, 1);
}

#endif
