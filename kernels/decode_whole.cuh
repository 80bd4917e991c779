// What decode_whole.cu computes and how weights come: products, a block's shares of them, formats, rings.
#pragma once
#include "decode_bytes.cuh"

#ifdef HAS_COUNTING_BARRIERS

// A matrix of a product.
struct WholeMatrix {
  const uint8_t* bytes;
  const uint8_t* second;  // of `up`, beside a gate
  const bf16* bias;       // [rows], or null
  bf16* to;               // the cache's keys or values [token][key heads][D], gated [outs]
  int64_t outs;           // outputs; of queries, keys and values pairs of them
  int64_t format;         // 0 q4_k, 1 q6_k, 2 q8_0
  int64_t blocks;         // that share it
  int64_t tile_outs;      // outputs of a tile
  const BoxMap* map;      // boxes of a tile's rows and a unit's columns; null: rows are copied one by one
  const BoxMap* second_map;  // of `second`; of keys and values of the cache, in boxes of 16 tokens of a head
};

// What is multiplied, and what follows: queries, keys and values; attention, added to the residual stream; gate and up;
// these, added; logits.
constexpr int WHOLE_QKV = 0, WHOLE_ATTENDED = 1, WHOLE_GATE_UP = 2, WHOLE_DOWN = 3, WHOLE_LOGITS = 4;

struct WholeProduct {
  int64_t kind, depth;
  int64_t shape, is_first;  // products of one shape are shared out alike; whether this is the first of them
  int64_t sums_at;          // a place in shared memory, behind the row
  const void* norm;       // [depth] in bf16 or float32, of the residual stream; or null
  int64_t norm_is_float;
  const bf16* row;        // [depth] of WHOLE_DOWN
  WholeMatrix matrix[3];  // of queries, keys and values; otherwise the first
};

struct WholeArgs {
  const WholeProduct* products;
  int64_t count;          // of products
  StoredRows embedding;   // no bytes: the host has written the row to x
  float* x;               // the residual stream [width]
  int64_t width;
  double eps;
  float* logits;
  uint64_t* arrived;      // of blocks at barriers, a multiple of all of a launch between launches
  // Queries, the new key and the new value, [heads, key heads, key heads][D / 2]: numbers i and i + D / 2 of a head in bf16, and a tag.
  uint64_t* handed;
  bf16* partial;          // of attention, sums of each share [key heads][8][SHARES][D]
  float* stats;           // [key heads][8][SHARES][maximum, sum]
  int64_t group, key_heads;  // query heads that share a key head, at most 8
  double scale;           // of scores, positive
  // Places in shared memory; the row with its sums, or what warps have attended to, is at the start.
  int64_t scratch_at, angles_at, shares_at, shapes_at, barriers_at, rings_at;
  int64_t slot_bytes, slots;  // of one of four rings
  int64_t token, past;        // tokens in the cache before this one
  float angles[128];          // cosines [D / 2] and sines [D / 2] of the token's position
};

constexpr int WHOLE_WARPS = 8, WHOLE_THREADS = 32 * WHOLE_WARPS;  // that multiply
// Warps that bring weights, each for the warps that multiply of this number and of this plus 4.
constexpr int WHOLE_BRINGING = 4;
constexpr int WHOLE_SLOTS_MAX = 16;  // of a warp that brings
// Units that are on their way to one of them at most; those that are there do not count. More would only wait before the memory,
// and everything else that is read behind them. Three places more are needed (`SLOTS` of `ops/cuda/decode/whole.rs`).
constexpr int WHOLE_UNDER_WAY = 3;
// The same of those that are asked for long before they are multiplied, while blocks wait for each other and attend.
constexpr int WHOLE_UNDER_WAY_EARLY = 1;
static_assert(WHOLE_WARPS == 2 * WHOLE_BRINGING, "a ring is for two warps");
// Whether warps that multiply have those of warps that bring.
#ifdef HAS_GROUP_PRODUCTS
constexpr bool WHOLE_HAS_REGISTERS = true;
#else
constexpr bool WHOLE_HAS_REGISTERS = false;
#endif
constexpr int WHOLE_GROUP = 8;

// Of the warps that multiply.
DEVICE void whole_barrier() { named_barrier(1, WHOLE_THREADS); }

// Quotients of numbers below 2^15 by a number d below 2^15.
DEVICE uint32_t reciprocal(int d) { return (0x80000000u + uint32_t(d) - 1) / uint32_t(d); }
DEVICE int quotient(int x, uint32_t reciprocal) { return int(uint64_t(uint32_t(x)) * reciprocal >> 31); }

// A block's share of the products of a shape; computed once.
struct WholeShare : UnitPlan {
  uint32_t row_bytes, unit_bytes, by_tile_outs, by_per_warp, by_units;
  int warps, last;  // warps that have units, and how many the last of these has
  int copied, last_copied;  // bytes of a row of a unit, and of the last one of a tile; see the formats
  int first, outs, head_mask, all;  // all: outputs of the matrix
  int kind, format, which, pairs, norm_is_float;
  int blocks, sums_at;  // blocks: of a row

  // Which row of the matrix an output of the block is. Of pairs of a head the first half are rows.
  DEVICE int row_of(int out) const {
    const int at = first + out;
    return at + (at & head_mask);
  }
  // Bytes from a multiple of 16 to the weights of row `at` of 16 of a tile, whose rows beyond the outputs repeat the last one.
  DEVICE uint32_t offset(int tile, int at) const {
    const int own = pairs ? at & 7 : at;
    int out = tile_outs * tile + (own < tile_outs ? own : tile_outs - 1);
    out = out < outs ? out : outs - 1;
    return uint32_t(row_of(out) - (pairs && at >= 8 ? head_mask : 0)) * row_bytes;
  }
  // Units of a warp; earlier ones have as many or more.
  DEVICE int units_of(int warp) const { return warp + 1 < warps ? per_warp : warp < warps ? last : 0; }
  // Outputs of a tile.
  DEVICE int outs_of(int tile) const {
    const int left = outs - tile * tile_outs;
    return left < tile_outs ? left : tile_outs;
  }
};
// A warp's units of a product: how many, and the first; and how many the other warp has that has the ring.
struct WholeUnits {
  int left, tile, unit, others;
  DEVICE WholeUnits(const WholeShare& share, int warp) {
    const int from = warp * share.per_warp;
    left = share.units_of(warp);
    tile = from / share.units;
    unit = from - tile * share.units;
    others = share.units_of(warp ^ WHOLE_BRINGING);
  }
};
// `ops/cuda/decode/whole.rs` leaves room for as many bytes.
static_assert(sizeof(WholeShare) == 100, "a share has another size");

// What a block has of all products, in shared memory: its shares of the shapes, and the shape of each product.
struct WholeShares {
  WholeShare* of_shapes;
  uint16_t* shapes;
  DEVICE explicit WholeShares(const WholeArgs& args)
      : of_shapes(reinterpret_cast<WholeShare*>(shared_memory() + args.shares_at)),
        shapes(reinterpret_cast<uint16_t*>(shared_memory() + args.shapes_at)) {}
  DEVICE const WholeShare& operator[](int product) const { return of_shapes[shapes[product]]; }
};

// Where a block's weights of a product are.
struct WholeWeights {
  const uint8_t *rows, *second;  // rows of outputs, and of pairs the other ones
  const BoxMap *map, *second_map;
  DEVICE WholeWeights(const WholeProduct& product, const WholeShare& share) {
    const WholeMatrix& matrix = product.matrix[share.which];
    rows = matrix.bytes;
    second = share.head_mask ? rows + uint64_t(uint32_t(-share.head_mask)) * share.row_bytes : matrix.second;
    map = matrix.map;
    second_map = share.head_mask ? map : matrix.second_map;  // of pairs in a head rows of the same matrix
  }
};

// Formats. BLOCKS: of 256 numbers that a unit of 16 rows is deep. COPIED: bytes of a row of it, LAST: of the last one of
// a tile where it has one block less, STEP: from unit to unit. `row`: which of eight rows the lanes of a group multiply.
struct WholeQ4K {
  using Row = BytesQ4K;
  static constexpr int BLOCKS = 2, COPIED = 288, LAST = 144, STEP = 288;
  // So eight lanes that load 16 bytes each of two rows find them in different banks.
  DEVICE static int row(int g) { return (g & 4) | (g & 1) << 1 | (g >> 1 & 1); }
  // Both blocks come to registers at once, the second one where it is none, too, so that the place is free early.
  static constexpr bool IN_REGISTERS = true;
  struct Held {
    Row::Raw raw[BLOCKS];
  };
  DEVICE static void load(Held& held, const uint8_t* const (&rows)[2], int t) {
    UNROLL
    for (int block = 0; block < BLOCKS; ++block) {
      UNROLL
      for (int row = 0; row < 2; ++row) {
        const uint8_t* at = rows[row] + 144 * block;
        held.raw[block].head[row] = load_words(at);
        held.raw[block].quants[row][0] = load_words(at + 16 + 16 * t);
        held.raw[block].quants[row][1] = load_words(at + 80 + 16 * t);
      }
    }
  }
  DEVICE static void multiply(float (&sums)[1][2], const Held& held, const unsigned char* x, Row::Columns& columns,
                              int block, int count, int t) {
    if (count > 1) {  // together
      Row::multiply<1>(sums, held.raw[0], x, columns, block, 0, t);
      Row::multiply<1>(sums, held.raw[1], x, columns, block + 1, 0, t);
    } else {
      Row::multiply<1>(sums, held.raw[0], x, columns, block, 0, t);
    }
  }
};
// A unit's rows in shared memory.
struct WholeRows {
  const uint8_t* rows[2];
};
struct WholeQ6K {
  using Row = BytesQ6K;
  // From the 16 bytes on in which a block begins.
  static constexpr int BLOCKS = 1, COPIED = 224, LAST = 224, STEP = 210;
  static constexpr bool IN_REGISTERS = false;
  using Held = WholeRows;
  DEVICE static int row(int g) { return g; }
  DEVICE static void load(Held& held, const uint8_t* const (&rows)[2], int) { held = {{rows[0], rows[1]}}; }
  DEVICE static void multiply(float (&sums)[1][2], const Held& held, const unsigned char* x, Row::Columns& columns,
                              int block, int, int t) {
    if (block & 1) return Row::one<true, 1>(sums, held.rows, x, columns, block, 0, t);
    Row::one<false, 1>(sums, held.rows, x, columns, block, 0, t);
  }
};
struct WholeQ8_0 {
  using Row = BytesQ8_0;
  static constexpr int BLOCKS = 1, COPIED = 272, LAST = 272, STEP = 272;
  static constexpr bool IN_REGISTERS = false;
  using Held = WholeRows;
  DEVICE static int row(int g) { return g; }
  DEVICE static void load(Held& held, const uint8_t* const (&rows)[2], int) { held = {{rows[0], rows[1]}}; }
  DEVICE static void multiply(float (&sums)[1][2], const Held& held, const unsigned char* x, Row::Columns& columns,
                              int block, int, int t) {
    Row::multiply<1>(sums, held.rows, x, columns, block, 0, t);
  }
};

template <class Work>
DEVICE void with_whole_format(int64_t format, const Work& work) {
  if (format == 0) return work(WholeQ4K());
  if (format == 1) return work(WholeQ6K());
  work(WholeQ8_0());
}

// Weights on their way to two warps that multiply, which take them in turn: places in shared memory, each with a barrier that ends
// when the weights are there and one that ends when they are multiplied or in registers.
struct WholeRing {
  unsigned char* slots;
  CountingBarrier *full, *empty;
  int slot_bytes, count, slot;
  int parity;

  DEVICE WholeRing(const WholeArgs& args, int which) : slot_bytes(int(args.slot_bytes)), count(int(args.slots)) {
    full = reinterpret_cast<CountingBarrier*>(shared_memory() + args.barriers_at) + 2 * WHOLE_SLOTS_MAX * which;
    empty = full + WHOLE_SLOTS_MAX;
    slots = shared_memory() + args.rings_at + which * count * slot_bytes;
    slot = parity = 0;
    // Or they would be read again for each unit.
    keep_in_register(slot_bytes);
    keep_in_register(count);
  }
  DEVICE void start() const {
    for (int i = 0; i < count; ++i) {
      barrier_start(full + i, 1);
      barrier_start(empty + i, 1);
    }
    barriers_started();
  }
  DEVICE unsigned char* at() const { return slots + slot * slot_bytes; }
  // By at most a turn.
  DEVICE void advance(int by) {
    slot += by;
    const bool wraps = slot >= count;
    slot -= wraps ? count : 0;
    parity ^= int(wraps);
  }
  DEVICE void skip(int by) {
    for (; by > count; by -= count) parity ^= 1;
    advance(by);
  }
  // The unit of this place, when it is there.
  DEVICE const unsigned char* take() const {
    barrier_wait(full + slot, parity);
    return at();
  }
  // After all lanes have read it.
  DEVICE void give_back() const {
    warp_barrier();
    if (lane() == 0) barrier_arrive(empty + slot);
  }
  // Before a unit is asked for, by one thread: there is a place, and of `before` earlier ones at most so many are on their way.
  // So those that long before a unit that came have come, too: a warp takes units that are at most three places
  // apart, or all warps met in between, and what was in a unit's place a turn ago cannot be still to come, which has the same parity.
  DEVICE void wait_for_place(int before, int most) const {
    barrier_wait(empty + slot, parity ^ 1);
    if (before < most) return;
    const bool wraps = slot < most;
    barrier_wait(full + slot - most + (wraps ? count : 0), wraps ? parity ^ 1 : parity);
  }
};

// A ring in the warp that fills it.
struct WholeBringing : WholeRing {
  int before = 0;  // units that were asked for
  using WholeRing::WholeRing;
  // The next unit: `bring(place, came)` in one thread, when at most so many are on their way.
  template <class Bring>
  DEVICE void ask(int most, const Bring& bring) {
    if (elected()) {  // others must not wait: they could come late and miss a phase
      wait_for_place(before, most);
      bring(at(), full + slot);
    }
    warp_barrier();
    advance(1);
    ++before;
  }
};

// How the keys of a token are shared out: parts of a head's, a block's each, of which a warp has 16 at a time. Where many
// are a block's, a warp has others 128 on.
struct WholeKeys {
  static constexpr int EACH = 16, STEP = EACH * WHOLE_WARPS, SHARES = 8;
  static constexpr int SECOND = EACH * WHOLE_BRINGING;  // from keys of the first of two warps that have a ring to the second's
  int past, shares, each, heads, items;  // past: of earlier tokens; items: parts of all heads
  struct Item {
    int head, share, begin, end;  // end: of earlier tokens
  };

  DEVICE explicit WholeKeys(const WholeArgs& args) : past(int(args.past)), heads(int(args.key_heads)) {
    const int all = past + 1, wanted = (all + STEP - 1) / STEP, most = wanted < SHARES ? wanted : SHARES;
    each = ((all + most - 1) / most + STEP - 1) / STEP * STEP;
    shares = (all + each - 1) / each;
    items = heads * shares;
  }
  DEVICE Item item(int number) const {
    const int share = number / heads, begin = share * each, end = begin + each;
    return {number - share * heads, share, begin, end < past ? end : past};
  }
};

// Brings keys and values of earlier tokens to the two warps that have the ring: of each step keys and values of the first, and of
// the second if there are so many.
template <int D>
DEVICE void bring_keys(const WholeKeys& keys, const WholeProduct& qkv, WholeBringing& ring, int which) {
  const BoxMap *of_keys = qkv.matrix[1].second_map, *of_values = qkv.matrix[2].second_map;
  for (int number = int(block_x()); number < keys.items; number += int(grid_x())) {
    const WholeKeys::Item item = keys.item(number);
    for (int start = item.begin + WholeKeys::EACH * which; start < item.end; start += WholeKeys::STEP) {
      for (int i = 0; i < 4; ++i) {
        const int first = start + (i / 2) * WholeKeys::SECOND;
        if (first >= item.end) break;
        ring.ask(WHOLE_UNDER_WAY, [&](unsigned char* to, CountingBarrier* came) {
          barrier_arrive_expecting(came, WholeKeys::EACH * D * int(sizeof(bf16)));
          copy_box(to, i % 2 ? of_values : of_keys, item.head * (D / 2), first, came);
        });
      }
    }
  }
}

// The boxes of a tile. What the first one needs is computed before a place is free for it.
struct TileBoxes {
  bool there;  // otherwise rows are copied one by one
  int row, bytes;

  DEVICE TileBoxes(const WholeWeights& weights, const WholeShare& share, int tile) {
    const int mask = share.head_mask;
    const int first = share.first + tile * share.tile_outs, last = first + share.outs_of(tile) - 1;
    // Rows of two heads are not neighbours.
    there = weights.map && ((first ^ last) & mask) == 0;
    row = first + (first & mask);
    bytes = (share.pairs ? 2 : 1) * share.tile_outs * share.copied;
  }
  // For one thread.
  DEVICE void bring(const WholeWeights& weights, const WholeShare& share, unsigned char* to, int unit,
                    CountingBarrier* came) const {
    const int word = unit * int(share.unit_bytes / sizeof(uint32_t));
    barrier_arrive_expecting(came, bytes);
    copy_box(to, weights.map, word, row, came);
    if (!weights.second_map) return;
    // Of a pair in a head: its half later.
    copy_box(to + 8 * share.copied, weights.second_map, word, row - share.head_mask, came);
  }
};

// Brings a unit to `to` row by row; for one thread, of which the compiler knows that it is one: for several lanes it makes a loop
// over them of each copy.
DEVICE void bring_rows(const WholeWeights& weights, const WholeShare& share, unsigned char* to, CountingBarrier* came,
                       int tile, int unit) {
  const int mask = share.head_mask, pairs = share.pairs;
  const int first = share.first + tile * share.tile_outs, last = share.outs_of(tile) - 1;
  const int bytes = unit + 1 < share.units ? share.copied : share.last_copied;
  const uint32_t row_bytes = share.row_bytes, start = uint32_t(unit) * share.unit_bytes;
  const uint8_t* rows[2] = {weights.rows + start, (pairs ? weights.second : weights.rows) + start};
  barrier_arrive_expecting(came, 16 * bytes);
  UNROLL
  for (int at = 0; at < 16; ++at) {
    // As WholeShare::offset, which would take nearly twice as many instructions here.
    const int own = pairs ? at & 7 : at, out = first + (own < last ? own : last);
    const uint8_t* row = rows[at / 8] + uint64_t(uint32_t(out + (out & mask))) * row_bytes;
    row -= reinterpret_cast<uintptr_t>(row) & 15;
    copy_row(to + at * share.copied, row, bytes, came);
  }
}

// Brings the weights of all products, and the keys between them, to two warps that multiply.
template <int D>
DEVICE void bring_weights(const WholeArgs& args, const WholeShares& shares, const WholeKeys& keys, int which) {
  WholeBringing ring(args, which);
  for (int product = 0; product < args.count; ++product) {
    const WholeShare& share = shares[product];
    const WholeWeights weights(args.products[product], share);
    const int second = share.units_of(which + WHOLE_BRINGING), all = share.units_of(which) + second;
    // Of gate and up the places fill while attention, and the product after it, are waited for.
    const int early = share.kind == WHOLE_ATTENDED ? all : share.kind == WHOLE_GATE_UP ? ring.count - 1 : 0;
    for (int i = 0; i < all; ++i) {
      const bool in_turn = i < 2 * second;
      const int warp = in_turn && i % 2 ? which + WHOLE_BRINGING : which;
      const int at = warp * share.per_warp + (in_turn ? i / 2 : i - second);
      const int tile = quotient(at, share.by_units), unit = at - tile * share.units;
      const TileBoxes boxes(weights, share, tile);
      ring.ask(i < early ? WHOLE_UNDER_WAY_EARLY : WHOLE_UNDER_WAY, [&](unsigned char* to, CountingBarrier* came) {
        if (boxes.there) {
          boxes.bring(weights, share, to, unit, came);
        } else {
          bring_rows(weights, share, to, came, tile, unit);
        }
      });
      if (i == 0 && which == 1 && share.kind == WHOLE_QKV && elected()) {
        prefetch_map(args.products[product].matrix[1].second_map);
        prefetch_map(args.products[product].matrix[2].second_map);
      }
      if (i == 0 && which == 0 && product + 1 < args.count && elected()) {
        const WholeWeights next(args.products[product + 1], shares[product + 1]);
        prefetch_map(next.map);
        prefetch_map(next.second_map);
      }
    }
    if (share.kind == WHOLE_QKV) bring_keys<D>(keys, args.products[product], ring, which);
  }
}

#endif
