// One token through the language model as one kernel. Its blocks, one a multiprocessor, stay until the logits are
// there and wait for each other between products. Weights depend on nothing, so four of a block's warps do nothing but
// ask for them, in the order in which the other eight multiply them, each warp for two: through a ring in shared memory
// that goes on from product to product (decode_whole.cuh). While blocks wait, convert the row or attend, memory is read.
//
// decode_whole_dD: embedding; for each layer: norm with queries, keys and values, attention (decode_whole_attention.cuh), the
//   product after it, norm with gate and up, the product after these; norm and logits. Formats, arithmetic and sums of a unit are those of
//   few_bytes.cuh; outputs end as in decode_bytes.cuh. Shares of attention are handed on in bf16.
// Grid: (multiprocessors, 1, 1), all of it running at a time; 384 threads. `ops/cuda/decode/whole.rs` computes places in shared
// memory and what each product is; the arguments of a launch say which token it is.
//
// Measured (H200): a barrier of 132 blocks takes 1.0 us, with 14 KB that each reads after it 1.5 us. One warp that asks
// for boxes of 16 rows by 288 bytes reads 4320 to 4470 GB/s; a copy moves 4240. From shared memory alone 8 warps multiply
// 40 bytes of Q4_K a clock tick, 12 warps 47 and 15 warps 41; memory gives 19. A token of 7B in Q4_K takes 1.40 to 1.41 ms, one
// kernel after another 1.79. docs/CUDA.md says where the time goes and what else was tried.
// Tried, in ms at a time when this took 1.64 to 1.77: rows copied one by one 1.77 instead of 1.68; 16 warps that ask for
// their own weights 2.19; asking the cache of the second level for weights ahead of the rings, 2 units of a warp 1.86, 8
// and more 2.4 to 2.5, by the copy engine as by other instructions. When it took 1.42 to 1.55: 14 warps that multiply and
// 2 that bring 1.66, 12 and 4 1.55 to 1.61, 15 and 1 1.65; the residual stream with a tag beside each number, so that it needs
// no barriers, 1.64 (all blocks ask for the whole row again and again); one loop that converts the row, instead of ten copies
// of its instructions, takes 7700 ticks and not 5500; one ring of which each warp that brings asks for every fourth unit,
// as fast, but a warp that multiplies could then come to a place two turns early, and to wait for each other takes 3 %.
#include "decode_whole_attention.cuh"

#ifdef HAS_COUNTING_BARRIERS

template <int D>
struct Whole {
  using Attention = WholeAttention<D>;
  // What outputs of queries, keys and values end with.
  struct Aid {
    int row;  // the first of the pair
    float cos, sin, bias[2];
  };
  // Addresses of a product, read from global memory a product ahead.
  struct Addresses {
    const void* norm;
    const bf16 *row, *bias;
    bf16* to;
    // Of the product after attention, which needs none: so attention has the registers.
    DEVICE Addresses() : norm(nullptr), row(nullptr), bias(nullptr), to(nullptr) {}
    DEVICE Addresses(const WholeProduct& product, int which)
        : norm(product.norm), row(product.row), bias(product.matrix[which].bias), to(product.matrix[which].to) {}
  };
  const WholeArgs& args;
  const WholeShares shares;
  const WholeKeys keys;
  const WholeKeys::Item first_item;  // of this block
  uint64_t target;
  uint32_t by_group;
  float factor;  // of scores, for powers of two

  DEVICE explicit Whole(const WholeArgs& args) : args(args), shares(args), keys(args), first_item(keys.item(int(block_x()))) {
    for (int i = thread_index(); i < args.count; i += block_threads()) {
      const WholeProduct& product = args.products[i];
      shares.shapes[i] = uint16_t(product.shape);
      if (product.is_first) shares.of_shapes[product.shape] = share_of_block(product);
    }
    if (warp() < WHOLE_BRINGING && lane() == 0) WholeRing(args, warp()).start();
    for (int i = thread_index(); i < D; i += block_threads()) angles()[i] = args.angles[i];
    block_barrier();
    for (int i = thread_index(); i < args.count; i += block_threads()) {
      const WholeMatrix& matrix = args.products[i].matrix[shares[i].which];
      map_ready(matrix.map);
      map_ready(matrix.second_map);
      if (args.products[i].kind != WHOLE_QKV) continue;
      map_ready(args.products[i].matrix[1].second_map);
      map_ready(args.products[i].matrix[2].second_map);
    }
    block_barrier();
  }

  // What warps that multiply know of the token.
  DEVICE void start() {
    // Before this block has arrived anywhere, less than one launch's has been added.
    const uint64_t all = uint64_t(args.count) * uint64_t(grid_x());
    target = grid_count(args.arrived) / all * all;
    by_group = reciprocal(int(args.group));
    factor = float(args.scale * 1.4426950408889634);
  }

  DEVICE static WholeShare share_of_block(const WholeProduct& product) {
    WholeShare to;
    int64_t block = block_x();
    to.which = 0;
    while (to.which < 2 && block >= product.matrix[to.which].blocks) block -= product.matrix[to.which++].blocks;
    const WholeMatrix& matrix = product.matrix[to.which];
    to.kind = int(product.kind);
    to.norm_is_float = int(product.norm_is_float);
    to.sums_at = int(product.sums_at);
    to.all = int(matrix.outs);
    to.format = int(matrix.format);
    to.pairs = product.kind == WHOLE_QKV || product.kind == WHOLE_GATE_UP;
    to.head_mask = product.kind == WHOLE_QKV ? -(D / 2) : 0;
    Share share = {0, 0};
    if (block < matrix.blocks) share = ::share_of(matrix.outs, block, matrix.blocks);
    to.first = share.first;
    to.outs = share.outs;
    int units = 1;
    with_whole_format(to.format, [&](auto format) {
      using Format = decltype(format);
      to.blocks = int(product.depth / 256);
      to.row_bytes = uint32_t(to.blocks) * Format::Row::BYTES;
      to.unit_bytes = Format::STEP;
      units = (to.blocks + Format::BLOCKS - 1) / Format::BLOCKS;
      to.copied = Format::COPIED;
      to.last_copied = to.blocks % Format::BLOCKS ? Format::LAST : Format::COPIED;
    });
    static_cast<UnitPlan&>(to) = UnitPlan::of_tiles(to.outs, int(matrix.tile_outs), units, WHOLE_WARPS);
    to.by_tile_outs = reciprocal(to.tile_outs);
    to.by_per_warp = reciprocal(to.per_warp);
    to.by_units = reciprocal(to.units);
    const int all = to.tiles * to.units;
    to.warps = (all + to.per_warp - 1) / to.per_warp;
    to.last = all - (to.warps - 1) * to.per_warp;
    return to;
  }

  // Barriers of all blocks, in two halves: what comes between does not depend on other blocks.
  DEVICE void arrive() {
    whole_barrier();
    target += uint64_t(grid_x());
    if (thread_index() == 0) grid_arrive(args.arrived);
  }
  // Of what is handed on before the next of them; another one for each layer and token.
  DEVICE uint32_t tag() const { return uint32_t(target); }
  DEVICE void wait() const {
    if (thread_index() == 0) grid_wait(args.arrived, target);
    whole_barrier();
  }

  DEVICE void embed() const {
    const int chunk = int(block_x()) * WHOLE_THREADS + thread_index();
    if (8 * int64_t(chunk) >= args.width) return;
    embed_chunk(args.embedding, args.token, args.width, chunk, args.x);
  }

  DEVICE float* angles() const { return reinterpret_cast<float*>(shared_memory() + args.angles_at); }
  DEVICE float* scratch() const { return reinterpret_cast<float*>(shared_memory() + args.scratch_at); }

  // Places eight numbers of each lane: of the warp's i-th block of 256 of the row from `block` on.
  template <class Row>
  DEVICE static void place(const float (&numbers)[8], int block, int i, int blocks) {
    unsigned char* to = shared_memory() + block * Row::X_BYTES + i * WHOLE_WARPS * Row::X_BYTES;
    place_row_bytes<Row>(to, numbers, block + i * WHOLE_WARPS < blocks);
  }

  // Places the row: the residual stream with the weight of a norm whose factor comes later.
  template <class Row>
  DEVICE void prepare_normed(const WholeShare& share, const void* weight) const {
    constexpr int TOGETHER = 2;
    const int blocks = share.blocks;
    const NormArgs norm{args.x, weight, share.norm_is_float, args.eps, args.width, args.scratch_at};
    NormedRow source(norm);
    // The first weights are asked for before x is there.
    typename NormedRow::Held held[TOGETHER];
    UNROLL
    for (int i = 0; i < TOGETHER; ++i) source.load_weight(held[i], i * WHOLE_THREADS + thread_index());
    wait();
    for (int block = warp(); block - warp() < blocks; block += TOGETHER * WHOLE_WARPS) {
      UNROLL
      for (int i = 0; i < TOGETHER; ++i) {
        const int chunk = 32 * (block + i * WHOLE_WARPS) + lane();
        if (block >= WHOLE_WARPS) source.load_weight(held[i], chunk);
        source.load_x(held[i], chunk);
      }
      UNROLL
      for (int i = 0; i < TOGETHER; ++i) {
        float numbers[8];
        source.widen(held[i], numbers);
        place<Row>(numbers, block, i, blocks);
      }
    }
    const float sum = sum_lanes(source.squares, 32);
    if (lane() == 0) scratch()[warp()] = sum;
  }

  // Places the row: numbers of bf16.
  template <class Row>
  DEVICE void prepare_plain(const WholeShare& share, const bf16* row) const {
    // That many are asked for, and of these so many converted, together.
    constexpr int TOGETHER = 10, CONVERTED = 5;
    const int blocks = share.blocks;
    const PlainRows source{row, 256 * int64_t(blocks), 1};
    wait();
    for (int block = warp(); block - warp() < blocks; block += TOGETHER * WHOLE_WARPS) {
      PlainRows::Held held[TOGETHER];
      UNROLL
      for (int i = 0; i < TOGETHER; ++i) held[i] = source.load(0, 32 * (block + i * WHOLE_WARPS) + lane());
      UNROLL
      for (int i = 0; i < TOGETHER; ++i) {
        if (i % CONVERTED == 0 && block - warp() + i * WHOLE_WARPS >= blocks) break;
        float numbers[8];
        source.widen(held[i], numbers);
        place<Row>(numbers, block, i, blocks);
      }
    }
  }

  // Places the row: what attention's shares come to.
  template <class Row>
  DEVICE void prepare_attended(const WholeShare& share) const {
    constexpr int SHARES = Attention::SHARES, TOGETHER = WHOLE_HAS_REGISTERS ? 2 : 1;
    const int blocks = share.blocks, group = int(args.group);
    wait();
    for (int block = warp(); block - warp() < blocks; block += TOGETHER * WHOLE_WARPS) {
      Words held[TOGETHER][SHARES], stats[TOGETHER][SHARES / 2];
      UNROLL
      for (int n = 0; n < TOGETHER; ++n) {
        const int chunk = 32 * (block + n * WHOLE_WARPS) + lane(), own = chunk < 32 * blocks ? chunk : 0;
        const int query = own / (D / 8), head = quotient(query, by_group), row = query - head * group;
        const int64_t place = SHARES * (int64_t(head) * WHOLE_GROUP + row);
        // All are written, or they would take registers from one product to the next.
        UNROLL
        for (int i = 0; i < SHARES; ++i) held[n][i] = stats[n][i / 2] = {{0, 0, 0, 0}};
        UNROLL
        for (int i = 0; i < SHARES; ++i) {
          if (i >= keys.shares) break;
          if (i % 2 == 0) stats[n][i / 2] = load_words_fresh(args.stats + 2 * (place + i));
          held[n][i] = load_words_fresh(args.partial + (place + i) * D + 8 * (own % (D / 8)));
        }
      }
      UNROLL
      for (int n = 0; n < TOGETHER; ++n) {
        float numbers[8];
        join_shares(numbers, held[n], stats[n]);
        place<Row>(numbers, block, n, blocks);
      }
    }
  }

  // What the shares' sums come to; `stats` holds the maximum and the sum of each.
  template <int SHARES>
  DEVICE void join_shares(float (&numbers)[8], const Words (&held)[SHARES], const Words (&stats)[SHARES / 2]) const {
    float largest = -INFINITY, total = 0.0f;
    UNROLL
    for (int i = 0; i < SHARES; ++i) {
      if (i >= keys.shares) break;
      largest = fmaxf(largest, bits_to_float(stats[i / 2].at[i % 2 * 2]));
    }
    UNROLL
    for (int j = 0; j < 8; ++j) numbers[j] = 0.0f;
    UNROLL
    for (int i = 0; i < SHARES; ++i) {
      if (i >= keys.shares) break;
      const float by = part_of(bits_to_float(stats[i / 2].at[i % 2 * 2]), largest, factor);
      total += bits_to_float(stats[i / 2].at[i % 2 * 2 + 1]) * by;
      UNROLL
      for (int j = 0; j < 8; j += 2) {
        numbers[j] += by * low_float(held[i].at[j / 2]);
        numbers[j + 1] += by * high_float(held[i].at[j / 2]);
      }
    }
    const float inverse = 1.0f / total;
    UNROLL
    for (int j = 0; j < 8; ++j) numbers[j] *= inverse;
  }

  // This warp's units of a product, in turn with those of the other warp that has the ring.
  template <class Format>
  DEVICE void multiply(WholeRing ring, const WholeShare& share, WholeUnits own) const {
    using Row = typename Format::Row;
    const int g = lane() >> 2, t = lane() & 3;
    const unsigned char* x = shared_memory();
    float* sums_at = reinterpret_cast<float*>(shared_memory() + share.sums_at);
    typename Row::Columns columns = Row::columns(x, g, t);
    const int units = share.units, blocks = share.blocks;
    auto& [left, tile, unit, others] = own;
    if (warp() >= WHOLE_BRINGING) ring.advance(1);
    float sums[1][2] = {{0.0f, 0.0f}};
    uint32_t offset[2] = {0, 0};  // of a tile's weights
    auto aim = [&] {
      UNROLL
      for (int i = 0; i < 2 && Format::STEP % 16; ++i) {
        offset[i] = share.offset(tile, 8 * i + g);
      }
    };
    if (left > 0) aim();
    while (left > 0) {
      const unsigned char* slot = ring.take();
      const uint8_t* rows[2];
      UNROLL
      for (int i = 0; i < 2; ++i) {
        rows[i] = slot + (8 * i + Format::row(g)) * Format::COPIED;
        if (Format::STEP % 16) rows[i] += (offset[i] + uint32_t(unit * Format::STEP)) & 15;
      }
      const int block = unit * Format::BLOCKS;
      typename Format::Held held;
      Format::load(held, rows, t);
      if (Format::IN_REGISTERS) ring.give_back();
      Format::multiply(sums, held, x, columns, block, blocks - block, t);
      if (!Format::IN_REGISTERS) ring.give_back();
      --left;
      // The first of the two has as many units as the second, or more, which follow one after the other then.
      ring.advance(others-- > 0 ? 2 : 1);
      ++unit;
      if (unit < units && left > 0) continue;
      const int sharer = warp() - quotient(tile * units, share.by_per_warp);
      UNROLL
      for (int half = 0; half < 2; ++half) {
        const float sum = sum_lanes(sums[0][half], 4);
        if (t == 0) sums_at[(tile * share.sharers + sharer) * 16 + 8 * half + Format::row(g)] = sum;
        sums[0][half] = 0.0f;
      }
      unit = 0;
      ++tile;
      if (left > 0) aim();
    }
  }

  DEVICE Aid aid_of(const WholeShare& share, const bf16* bias, int out) const {
    const int row = share.row_of(out), pair = row & (D - 1);
    Aid aid = {row, 1.0f, 0.0f, {0.0f, 0.0f}};
    if (share.which < 2) {
      aid.cos = angles()[pair];
      aid.sin = angles()[D / 2 + pair];
    }
    if (bias) {
      aid.bias[0] = to_float(bias[row]);
      aid.bias[1] = to_float(bias[row + D / 2]);
    }
    return aid;
  }

  // The sums of an output and, of a pair, of the other one.
  DEVICE void output(const WholeShare& share, int out, float& sum, float& second) const {
    constexpr int TOGETHER = 4;
    const float* sums_at = reinterpret_cast<const float*>(shared_memory() + share.sums_at);
    const int tile = quotient(out, share.by_tile_outs), at = out - tile * share.tile_outs;
    const int begin = tile * share.units, end = begin + share.units;
    const int sharers = quotient(end - 1, share.by_per_warp) - quotient(begin, share.by_per_warp) + 1;
    const float* own = sums_at + tile * share.sharers * 16 + at;
    sum = second = 0.0f;
    for (int base = 0; base < sharers; base += TOGETHER) {
      UNROLL
      for (int i = 0; i < TOGETHER; ++i) {
        if (base + i >= sharers) break;
        sum += own[16 * (base + i)];
        if (share.pairs) second += own[16 * (base + i) + 8];
      }
    }
  }

  // After a norm, in any thread.
  DEVICE float norm_factor() const {
    float sum = 0.0f;
    UNROLL
    for (int i = 0; i < WHOLE_WARPS; ++i) sum += scratch()[i];
    return inverse_root(sum / float(args.width) + float(args.eps));
  }

  // Ends each output of this thread with its sums.
  template <class End>
  DEVICE void finish(const WholeShare& share, const End& end) const {
    for (int out = thread_index(); out < share.outs; out += WHOLE_THREADS) {
      float sum, second;
      output(share, out, sum, second);
      end(out, sum, second);
    }
  }

  DEVICE void finish_qkv(const WholeShare& share, const Addresses& at, const Aid& held, float by) const {
    // Heads before the matrix's in what is handed on.
    const int before = share.which == 0 ? 0 : int((args.group + share.which - 1) * args.key_heads);
    bf16* cache = at.to + int64_t(keys.past) * 2 * share.all;
    finish(share, [&](int out, float sum, float second) {
      const Aid aid = out == thread_index() ? held : aid_of(share, at.bias, out);
      const float a = sum * by + aid.bias[0], b = second * by + aid.bias[1];
      const float one = a * aid.cos - b * aid.sin, other = b * aid.cos + a * aid.sin;
      const int pair = (before + aid.row / D) * (D / 2) + aid.row % D;
      store_tagged(args.handed + pair, pack_bf16(one, other), tag());
      if (share.which == 0) return;
      cache[aid.row] = from_float<bf16>(one);
      cache[aid.row + D / 2] = from_float<bf16>(other);
    });
  }
  DEVICE void finish_add(const WholeShare& share, float held) const {
    float* x = args.x + share.first;
    finish(share, [&](int out, float sum, float) {
      x[out] = (out == thread_index() ? held : load_fresh(x + out)) + sum;
    });
  }
  DEVICE void finish_gate_up(const WholeShare& share, bf16* all, float by) const {
    bf16* to = all + share.first;
    finish(share, [&](int out, float sum, float up) {
      const float gate = sum * by;
      to[out] = from_float<bf16>(gate * sigmoid(gate) * (up * by));
    });
  }
  DEVICE void finish_logits(const WholeShare& share, float by) const {
    float* to = args.logits + share.first;
    finish(share, [&](int out, float sum, float) { to[out] = sum * by; });
  }

  // A product from its row to its outputs. `at` is of the next product afterwards.
  template <class Format>
  DEVICE void run(WholeRing& ring, const WholeShare& share, int product, Addresses& at) const {
    using Row = typename Format::Row;
    const int kind = share.kind, own = thread_index() < share.outs ? thread_index() : 0;
    const WholeUnits units(share, warp());
    if (kind == WHOLE_DOWN) {
      prepare_plain<Row>(share, at.row);
    } else if (kind == WHOLE_ATTENDED) {
      prepare_attended<Row>(share);
    } else {
      prepare_normed<Row>(share, at.norm);
    }
    // What this thread's first output ends with is asked for early.
    Aid aid = {0, 1.0f, 0.0f, {0.0f, 0.0f}};
    float held = 0.0f;
    const bool adds = kind == WHOLE_DOWN || kind == WHOLE_ATTENDED;
    if (kind == WHOLE_QKV && share.outs > 0) aid = aid_of(share, at.bias, own);
    if (adds && share.outs > 0) held = load_fresh(args.x + share.first + own);
    whole_barrier();
    const float by = adds ? 1.0f : norm_factor();
    const int following = kind == WHOLE_LOGITS ? product : product + 1;
    const Addresses next(args.products[following], shares[following].which);
    multiply<Format>(ring, share, units);
    ring.skip(units.left + units.others);
    whole_barrier();
    if (kind == WHOLE_QKV) {
      finish_qkv(share, at, aid, by);
    } else if (adds) {
      finish_add(share, held);
    } else if (kind == WHOLE_GATE_UP) {
      finish_gate_up(share, at.to, by);
    } else {
      finish_logits(share, by);
    }
    at = next;
  }

  // From queries, keys and values that this block has handed on to its shares of attention.
  DEVICE void attend(WholeRing& ring) const {
    Attention attention{args, 0};
    const int which = warp() % WHOLE_BRINGING;
    const bool is_second = warp() >= WHOLE_BRINGING;
    const int ahead = is_second ? WholeKeys::SECOND : 0;  // of the keys of the first of two warps
    WholeKeys::Item item = first_item;
    for (int number = int(block_x()); number < keys.items; item = keys.item(number += int(grid_x()))) {
      whole_barrier();  // what is read lies where attention leaves its own: a product's sums, those of the item before
      attention.head = item.head;
      typename Attention::Tile tile = {};
      // The place in the ring is that of the first of two warps before, and behind both afterwards.
      auto take = [&](int start) {
        const bool has_second = start + WholeKeys::SECOND < item.end;
        if (is_second) ring.advance(2);
        if (start + ahead < item.end) attention.load(tile, ring, start + ahead, item.end);
        if (!is_second && has_second) ring.advance(2);
      };
      int start = item.begin + WholeKeys::EACH * which;
      // A warp's first keys come to registers before the query is there.
      bool is_there = WHOLE_HAS_REGISTERS && start < item.end;
      if (is_there) take(start);
      const bool has_own = item.share == keys.shares - 1;
      attention.take_rows(has_own, tag());
      whole_barrier();
      Words query[Attention::CHUNKS];
      attention.load_query(query);
      // In the warp that has the fewest other keys.
      if (has_own && warp() == WHOLE_WARPS - 1) attention.leave_own(query);
      AttentionSums<D> own;
      own.clear();
      NO_UNROLL
      for (; start < item.end; start += WholeKeys::STEP) {
        if (!is_there) take(start);
        is_there = false;
        if (start + ahead < item.end) attention.add(own, tile, query, start + ahead, item.end, factor);
      }
      own.finish();
      attention.leave(own);
      whole_barrier();
      attention.join(item.share, has_own, factor);
    }
  }

  DEVICE void token() {
    if (warp() >= WHOLE_WARPS) {
#ifdef HAS_GROUP_PRODUCTS
      registers_give<56>();
#endif
      return bring_weights<D>(args, shares, keys, warp() - WHOLE_WARPS);
    }
#ifdef HAS_GROUP_PRODUCTS
    registers_take<216>();
#endif
    start();
    WholeRing ring(args, warp() % WHOLE_BRINGING);
    if (args.embedding.bytes) embed();
    arrive();
    Addresses at(args.products[0], shares[0].which);
    NO_UNROLL
    for (int i = 0; i < args.count; ++i) {
      const WholeShare& share = shares[i];
      with_whole_format(share.format, [&](auto format) { run<decltype(format)>(ring, share, i, at); });
      if (share.kind == WHOLE_LOGITS) return;
      if (share.kind == WHOLE_QKV) {
        attend(ring);
        at = Addresses();
      }
      arrive();
    }
  }
};

KERNEL(decode_whole_d64, WholeArgs, 384, 1) { Whole<64>(args).token(); }
KERNEL(decode_whole_d128, WholeArgs, 384, 1) { Whole<128>(args).token(); }

#endif
