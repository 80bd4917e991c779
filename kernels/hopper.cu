// Joint attention with Hopper's own instructions, for compute capability 9.0 only.
//
// attention_hopper_d128: what attention_joint_d128 computes, see attention.cuh. A block has three groups of
//   four warps. One thread of the first brings tiles of 192 keys and values (TMA), two of each at a time;
//   the other two groups own 64 rows of queries each. The tensor cores read operands from shared memory
//   (wgmma). A group begins a tile's scores before it sums the last tile's values, so that its
//   exponentials are computed while products run, and the groups take turns at the tensor cores, so that
//   the exponentials of one fall into the products of the other.
//   Grid: as many blocks as run at a time, or one for each tile of 128 rows where these are fewer; a
//   block takes tiles in turn. 384 threads; 224 KiB of shared memory.
//
// attention_hopper_grouped_d128: what attention_d128 computes without segments, see attention.cu, in the same way; all of it is
//   in the first stream. Rows are a token's query heads of one key head, token after token. Rows that see the most keys come first.
//
// Tried on an H200, 24 heads, TFLOP/s at 8704 tokens, at 8704 twice, and at 16896 (its best run):
//   as it is                              674  696  725
//   176 keys a tile                       670  686  716
//   160 keys                              649  629  700
//   128 keys                              655  608  703; with three tiles at a time 659 609 709
//   128 keys, a block for each tile       659  606  702
//   128 keys, without turns               639  606  686
//   128 keys, scores not begun ahead      592  571  632; without turns either 533 554 572
//   128 keys, sums left where their factor is one: 645 644 685
//   two groups, tiles brought by all threads, nothing ahead (its predecessor): 276 289 299
//   attention_joint_d128                  240  258  269
#include "attention.cuh"

#ifdef HAS_GROUP_PRODUCTS

// Rows of 128 numbers as two pieces of 64, which is as wide as the swizzle is.
template <int ROWS>
struct PiecedRows {
  static constexpr int CHUNKS = 16;
  static constexpr int PIECE_BYTES = ROWS * SharedRows<64>::ROW_BYTES;
  static constexpr int BYTES = 2 * PIECE_BYTES;
  DEVICE static unsigned char* at(unsigned char* rows, int row, int chunk) {
    return SharedRows<64>::at(rows + chunk / 8 * PIECE_BYTES, row, chunk % 8);
  }
};

struct HopperArgs {
  TileMap keys[2], values[2];  // of each stream
  AttentionArgs attention;
  int64_t batch;
};

// A tile of rows of one key head and batch entry, and the tiles of keys that it sees: those of the text first,
// then those of the picture.
struct HopperItem {
  AttentionWork work;
  int64_t head, batch;
  int rows[2], tiles[2];  // of keys, of each stream
  int padded;             // the tile that ends in rows of text which the entry does not have, or -1

  DEVICE int total() const { return tiles[0] + tiles[1]; }
};

// GROUPED: of one stream, whose query heads may share a key head, and which may be causal.
template <bool GROUPED_>
struct HopperBlock {
  static constexpr bool GROUPED = GROUPED_;
  static constexpr int KEYS = 192, STAGES = 2;
  static constexpr int D = 128, GROUPS = 2, GROUP_ROWS = 64, ROWS = GROUPS * GROUP_ROWS;
  static constexpr int CONSUMERS = 128 * GROUPS;  // threads
  // Named barriers: 1 and 2 are the groups' turns, 3 and 4 their own, 5 is both groups'.
  static constexpr int TURNS = 1, OWN = 3, BOTH = 5;
  static constexpr int EIGHT_ROWS = 8 * SharedRows<64>::ROW_BYTES;
  using Queries = PiecedRows<ROWS>;
  using Keys = PiecedRows<KEYS>;

  const HopperArgs& args;
  unsigned char *queries, *keys, *values;
  CountingBarrier *keys_there, *keys_read, *values_there, *values_read;
  int64_t tiles[2], items;  // of queries

  DEVICE HopperBlock(const HopperArgs& args) : args(args) {
    queries = shared_memory();
    keys = queries + Queries::BYTES;
    values = keys + STAGES * Keys::BYTES;
    keys_there = reinterpret_cast<CountingBarrier*>(values + STAGES * Keys::BYTES);
    keys_read = keys_there + STAGES;
    values_there = keys_read + STAGES;
    values_read = values_there + STAGES;
    const AttentionArgs& own = args.attention;
    for (int i = 0; i < 2; ++i) tiles[i] = (own.stream[i].query_rows * heads_each() + ROWS - 1) / ROWS;
    items = (tiles[0] + tiles[1]) * key_heads() * args.batch;
  }

  DEVICE int64_t heads_each() const { return GROUPED ? args.attention.group : 1; }
  DEVICE int64_t key_heads() const { return GROUPED ? args.attention.heads / args.attention.group : args.attention.heads; }

  DEVICE HopperItem item(int64_t i) const { return GROUPED ? grouped_item(i) : joint_item(i); }

  // Keys that a row sees.
  DEVICE int seen_by(int64_t row) const {
    const AttentionArgs& own = args.attention;
    const int64_t keys = own.stream[0].key_rows;
    return int(own.causal ? min64(keys, row / own.group + own.offset + 1) : keys);
  }

  // Tiles with the most keys first, of all heads, so that no block is left with one of these in the end.
  DEVICE HopperItem grouped_item(int64_t i) const {
    const AttentionArgs& own = args.attention;
    const int64_t alike = key_heads() * args.batch;
    HopperItem item;
    item.head = i % alike % key_heads();
    item.batch = i % alike / key_heads();
    item.work.stream = 0;
    item.work.row_first = (tiles[0] - 1 - i / alike) * ROWS;
    item.work.row_end = min64(item.work.row_first + ROWS, own.stream[0].query_rows * own.group);
    item.rows[0] = seen_by(item.work.row_end - 1);
    item.tiles[0] = (item.rows[0] + KEYS - 1) / KEYS;
    item.rows[1] = item.tiles[1] = 0;
    item.padded = -1;
    return item;
  }

  // Tiles of a head follow each other, so that its keys and values stay in the cache.
  DEVICE HopperItem joint_item(int64_t i) const {
    const AttentionArgs& own = args.attention;
    const int64_t all = tiles[0] + tiles[1], tile = i % all;
    HopperItem item;
    item.head = i / all % own.heads;
    item.batch = i / all / own.heads;
    item.work.stream = tile < tiles[0] ? 0 : 1;
    item.work.row_first = (tile < tiles[0] ? tile : tile - tiles[0]) * ROWS;
    item.work.row_end = min64(item.work.row_first + ROWS, own.stream[item.work.stream].query_rows);
    item.rows[0] = int(own.lengths ? own.lengths[item.batch] : own.stream[0].key_rows);
    item.rows[1] = int(own.stream[1].key_rows);
    for (int k = 0; k < 2; ++k) item.tiles[k] = (item.rows[k] + KEYS - 1) / KEYS;
    const bool ends_early = item.rows[0] % KEYS != 0 && item.rows[0] < own.stream[0].key_rows;
    item.padded = ends_early ? item.tiles[0] - 1 : -1;
    return item;
  }

  // Place and phase of the block's tile number `t`.
  DEVICE static int stage(int t) { return t % STAGES; }
  DEVICE static int parity(int t) { return t / STAGES & 1; }

  DEVICE void start_barriers() {
    if (thread_index() == 0) {
      for (int i = 0; i < STAGES; ++i) {
        barrier_start(keys_there + i, 1);
        barrier_start(values_there + i, 1);
        barrier_start(keys_read + i, 4 * GROUPS);
        barrier_start(values_read + i, 4 * GROUPS);
      }
      barriers_started();
    }
    block_barrier();
  }

  // Brings the item's tile `t`, the block's tile `number`.
  DEVICE void bring(const TileMap (&maps)[2], unsigned char* places, CountingBarrier* there,
                    CountingBarrier* read, const HopperItem& item, int t, int number) {
    const int at = stage(number), stream = t < item.tiles[0] ? 0 : 1;
    barrier_wait(read + at, parity(number) ^ 1);
    barrier_arrive_expecting(there + at, Keys::BYTES);
    copy_tile(places + at * Keys::BYTES, maps[stream], there + at,
              (stream == 0 ? t : t - item.tiles[0]) * KEYS, 2 * int(item.head), int(item.batch));
  }

  // One thread brings all tiles.
  DEVICE void bring_all() {
    int before = 0;
    for (int64_t i = block_x(); i < items; i += grid_x()) {
      const HopperItem own = item(i);
      const int n = own.total();
      for (int t = 0; t <= n; ++t) {
        if (t < n) bring(args.keys, keys, keys_there, keys_read, own, t, before + t);
        if (t > 0) bring(args.values, values, values_there, values_read, own, t - 1, before + t - 1);
      }
      before += n;
    }
  }

  // The group's 64 rows of queries, prepared.
  DEVICE void load_queries(const HopperItem& item, int group) {
    constexpr int EACH = GROUP_ROWS * Queries::CHUNKS / 128;
    const AttentionWork& work = item.work;
    const AttentionStream& own = args.attention.stream[work.stream];
    const int chunk = thread_index() % Queries::CHUNKS;
    const int first = group * GROUP_ROWS + thread_index() % 128 / Queries::CHUNKS;
    const bf16* from = own.query + item.batch * own.query_batch + item.head * heads_each() * D + 8 * chunk;
    Words words[EACH];
    int64_t tokens[EACH];
    UNROLL
    for (int i = 0; i < EACH; ++i) {
      const int64_t row = min64(work.row_first + first + 8 * i, work.row_end - 1);
      tokens[i] = row / heads_each();
      words[i] = load_words(from + tokens[i] * own.query_stride + row % heads_each() * D);
    }
    if (!GROUPED) prepare_chunks<D>(words, own.prepare, tokens, chunk);
    named_barrier(OWN + group, 128);  // nobody reads what was there before
    UNROLL
    for (int i = 0; i < EACH; ++i) store_words(Queries::at(queries, first + 8 * i, chunk), words[i]);
    publish_shared();
    named_barrier(OWN + group, 128);
  }

  // Clears the values of tile `t` from `row` on: their weights are zero, but zero times NaN is NaN.
  DEVICE void clear_values(int row, int t) {
    unsigned char* tile = values + stage(t) * Keys::BYTES;
    for (int i = thread_index() - 128; i < (KEYS - row) * Keys::CHUNKS; i += CONSUMERS) {
      store_words(Keys::at(tile, row + i / Keys::CHUNKS, i % Keys::CHUNKS), {{0, 0, 0, 0}});
    }
    publish_shared();
    named_barrier(BOTH, CONSUMERS);
  }

  DEVICE void begin_scores(float (&scores)[KEYS / 8][4], int group, int t) {
    const unsigned char* own = queries + group * GROUP_ROWS * SharedRows<64>::ROW_BYTES;
    const unsigned char* tile = keys + stage(t) * Keys::BYTES;
    products_begin();
    UNROLL
    for (int k = 0; k < D / 16; ++k) {
      const int piece = k / 4, column = 32 * (k % 4);  // bytes
      multiply_scores(scores,
                      shared_operand(own + piece * Queries::PIECE_BYTES + column, 16, EIGHT_ROWS),
                      shared_operand(tile + piece * Keys::PIECE_BYTES + column, 16, EIGHT_ROWS),
                      k > 0);
    }
    products_commit();
  }

  DEVICE void begin_values(float (&out)[16][4], const uint32_t (&weights)[KEYS / 16][4], int t) {
    const unsigned char* tile = values + stage(t) * Keys::BYTES;
    products_begin();
    UNROLL
    for (int k = 0; k < KEYS / 16; ++k) {
      multiply_values(out, weights[k],
                      shared_operand(tile + 2 * k * EIGHT_ROWS, Keys::PIECE_BYTES, EIGHT_ROWS));
    }
    products_commit();
  }
};

// The running maximum and sum of a thread's two rows.
struct SoftmaxRows {
  float maximum[2], sum[2];

  DEVICE SoftmaxRows() {
    maximum[0] = maximum[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  // Turns scores into weights; `keep` is what earlier weights are worth then. Each row sees a key.
  template <int KEYS>
  DEVICE void soften(float (&scores)[KEYS / 8][4], float factor, float (&keep)[2]) {
    float base[2];
    UNROLL
    for (int half = 0; half < 2; ++half) {
      float one = fmaxf(maximum[half], scores[0][2 * half]), other = scores[0][2 * half + 1];
      UNROLL
      for (int n = 1; n < KEYS / 8; ++n) {
        one = fmaxf(one, scores[n][2 * half]);
        other = fmaxf(other, scores[n][2 * half + 1]);
      }
      const float largest = max_lanes(fmaxf(one, other), 4);
      keep[half] = exp2_fast((maximum[half] - largest) * factor);
      base[half] = largest * factor;
      maximum[half] = largest;
      sum[half] *= keep[half];
    }
    float added[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    UNROLL
    for (int n = 0; n < KEYS / 8; ++n) {
      UNROLL
      for (int part = 0; part < 4; ++part) {
        scores[n][part] = exp2_fast(scores[n][part] * factor - base[part / 2]);
        added[part] += scores[n][part];
      }
    }
    sum[0] += added[0] + added[1];
    sum[1] += added[2] + added[3];
  }
};

// What a group does with one item. `before` counts the tiles that the block has seen before.
template <class Block>
DEVICE void hopper_consumer(Block& block, const HopperItem& item, int group, int before) {
  constexpr int KEYS = Block::KEYS;
  using Queries = typename Block::Queries;
  const AttentionArgs& args = block.args.attention;
  const float factor = float(args.scale * 1.4426950408889634);
  // Keys that the thread's two rows see, and the first of the group's rows.
  int seen[2] = {0, 0}, seen_first = 0;
  if (Block::GROUPED) {
    // No more than the tile's last row, also behind it.
    const auto seen_of = [&](int row) { return int(min64(item.rows[0], block.seen_by(item.work.row_first + row))); };
    const int of_group = group * Block::GROUP_ROWS;
    seen_first = seen_of(of_group);
    UNROLL
    for (int half = 0; half < 2; ++half) seen[half] = seen_of(of_group + warp() % 4 * 16 + 8 * half + (lane() >> 2));
  }
  const int total = item.total();
  auto my_turn = [&] { named_barrier(Block::TURNS + group, Block::CONSUMERS); };
  auto your_turn = [&] { named_barrier_arrive(Block::TURNS + 1 - group, Block::CONSUMERS); };
  auto wait = [&](CountingBarrier* there, int t) {
    barrier_wait(there + Block::stage(before + t), Block::parity(before + t));
  };
  auto release = [&](CountingBarrier* read, int t) {
    if (lane() == 0) barrier_arrive(read + Block::stage(before + t));
  };
  block.load_queries(item, group);

  float out[16][4];
  UNROLL
  for (int n = 0; n < 16; ++n) {
    UNROLL
    for (int part = 0; part < 4; ++part) out[n][part] = 0.0f;
  }
  SoftmaxRows softmax;
  uint32_t weights[KEYS / 16][4];
  float keep[2];
  auto soften = [&](float (&scores)[KEYS / 8][4], int t) {
    const int there =
        t < item.tiles[0] ? item.rows[0] - t * KEYS : item.rows[1] - (t - item.tiles[0]) * KEYS;
    if (Block::GROUPED) {
      const int of_tile[2] = {seen[0] - t * KEYS, seen[1] - t * KEYS};
      if (seen_first < (t + 1) * KEYS) hide_from<KEYS>(scores, of_tile);
    } else if (there < KEYS) {
      hide<KEYS>(scores, 0, there, 0, 1, false, 0);
    }
    softmax.soften<KEYS>(scores, factor, keep);
  };
  auto rescale = [&] {
    UNROLL
    for (int n = 0; n < 16; ++n) {
      UNROLL
      for (int part = 0; part < 4; ++part) out[n][part] *= keep[part / 2];
    }
  };
  auto pack = [&](const float (&scores)[KEYS / 8][4]) {
    UNROLL
    for (int k = 0; k < KEYS / 16; ++k) weights_operand<KEYS>(weights[k], scores, k);
  };
  // Both groups come here before either takes its turn.
  auto clear_padding = [&](int t) {
    if (t != item.padded) return;
    wait(block.values_there, t);
    block.clear_values(item.rows[0] - t * KEYS, before + t);
  };

  if (total > 0) {
    float scores[KEYS / 8][4];
    wait(block.keys_there, 0);
    block.begin_scores(scores, group, before);
    products_wait_for<0>();
    settle(scores);
    release(block.keys_read, 0);
    soften(scores, 0);
    pack(scores);
  }
  for (int t = 1; t < total; ++t) {
    float scores[KEYS / 8][4];
    clear_padding(t - 1);
    wait(block.keys_there, t);
    my_turn();
    block.begin_scores(scores, group, before + t);
    wait(block.values_there, t - 1);
    block.begin_values(out, weights, before + t - 1);
    your_turn();
    products_wait_for<1>();
    settle(scores);
    release(block.keys_read, t);
    soften(scores, t);
    products_wait_for<0>();
    settle(out);
    release(block.values_read, t - 1);
    settle(scores);
    rescale();
    pack(scores);
  }
  if (total > 0) {
    clear_padding(total - 1);
    wait(block.values_there, total - 1);
    block.begin_values(out, weights, before + total - 1);
    products_wait_for<0>();
    settle(out);
    release(block.values_read, total - 1);
  }

  // The queries' place takes the output.
  named_barrier(Block::OWN + group, 128);
  const int first = group * Block::GROUP_ROWS + warp() % 4 * 16;
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const float sum = sum_lanes(softmax.sum[half], 4);
    const float share = sum == 0.0f ? 0.0f : 1.0f / sum;
    UNROLL
    for (int n = 0; n < 16; ++n) {
      const uint32_t pair = pack_bf16(out[n][2 * half] * share, out[n][2 * half + 1] * share);
      unsigned char* at = Queries::at(block.queries, first + 8 * half + (lane() >> 2), n);
      *reinterpret_cast<uint32_t*>(at + 4 * (lane() & 3)) = pair;
    }
  }
  warp_barrier();
  write_rows<Queries, 128>(block.queries, first, 16, args, item.work, item.batch, item.head, block.heads_each());
}

template <bool GROUPED>
DEVICE void attention_hopper(const HopperArgs& args) {
  using Block = HopperBlock<GROUPED>;
  Block block(args);
  block.start_barriers();
  const int group = warp_group() - 1;
  if (group < 0) {
    registers_give<24>();
    if (thread_index() == 0) block.bring_all();
    return;
  }
  registers_take<240>();
  if (group == 1) named_barrier_arrive(Block::TURNS, Block::CONSUMERS);  // group 0 begins
  int before = 0;
  for (int64_t i = block_x(); i < block.items; i += grid_x()) {
    const HopperItem item = block.item(i);
    hopper_consumer(block, item, group, before);
    before += item.total();
  }
}

KERNEL(attention_hopper_d128, HopperArgs, 384, 1) { attention_hopper<false>(args); }
KERNEL(attention_hopper_grouped_d128, HopperArgs, 384, 1) { attention_hopper<true>(args); }

#endif
