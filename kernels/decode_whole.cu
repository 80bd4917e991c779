// One token through the language model as one kernel. Its blocks, one a multiprocessor, stay until the logits are
// there and wait for each other between products. Weights depend on nothing, so half of a block's warps do nothing but
// ask for them, in the order in which the other half multiplies them, each warp for one: through a ring in shared memory
// that goes on from product to product (decode_whole.cuh). While blocks wait, convert the row or attend, memory is read.
//
// decode_whole_dD: embedding; for each layer: norm with queries, keys and values, attention (decode_whole_attention.cuh), the
//   product after it, norm with gate and up, the product after these; norm and logits. Formats, arithmetic and sums of a unit are those of
//   few_bytes.cuh; outputs end as in decode_bytes.cuh. Shares of attention are handed on in bf16.
// Grid: (multiprocessors, 1, 1), all of it running at a time; 512 threads. `ops/cuda/decode/whole.rs` computes places in shared
// memory and what each product is.
//
// What blocks hand on to each other goes without fences, which take 2000 to 4000 clock ticks while memory is busy: a count says that
// it is likely there, and each word whether it is. Queries and the token's own key and value have a tag beside them; numbers of the
// residual stream their turn in the lowest bit; gated numbers and shares of attention replace a NaN that no sum comes to, and
// their block puts that back when all have read them. Only that has to be seen in order: once a layer, and while others attend.
//
// Measured (H200): a barrier of 132 blocks takes 1.0 us, with 14 KB that each reads after it 1.5 us. One warp that asks
// for boxes of 16 rows by 288 bytes reads 4320 to 4470 GB/s; a copy moves 4240. From shared memory alone 8 warps multiply
// 40 bytes of Q4_K a clock tick, 12 warps 47 and 15 warps 41; memory gives 19. A token of 7B in Q4_K took 1.43 to 1.45 ms with
// fences, and 1.33 to 1.35 when they were left out and nothing was looked at, which gave wrong numbers now and then. docs/CUDA.md says
// where the time goes.
// Tried, in ms at a time when this took 1.64 to 1.77: rows copied one by one 1.77 instead of 1.68; 16 warps that ask for
// their own weights 2.19; asking the cache of the second level for weights ahead of the rings, 2 units of a warp 1.86, 8
// and more 2.4 to 2.5, by the copy engine as by other instructions. When it took 1.55: 14 warps that multiply and
// 2 that bring 1.66, 12 and 4 1.61, 15 and 1 1.65 (shorter rings, and registers do for attention only where the warps
// that bring give theirs away); the residual stream with a tag beside each number, so that it needs no barriers, 1.64
// (all blocks ask for the whole row again and again); one loop that converts the row, instead of ten copies of its
// instructions, takes 7700 ticks and not 5500. When it took 1.41 to 1.45: weights of the next unit in registers while one is
// multiplied, 1 % slower, and a unit that is held there across a stop 3 %; asking the cache of the second level for 2, 4 or 6
// units of gate and up while others attend 1.5, 3 and 5 % slower; pairs of blocks that convert half a row each and store
// it in both, as fast; reading back what was stored instead of a fence, 1.52; 256 keys of a share instead of 128, 2 % slower; only
// the instructions of Q4_K, half of all, as fast.
#include "decode_whole_inputs.cuh"

#ifdef HAS_COUNTING_BARRIERS

template <int D>
struct Whole : WholeInputs<D> {
  // What outputs of queries, keys and values end with.
  struct Aid {
    int row;  // the first of the pair
    float cos, sin, bias[2];
  };
  // Addresses of a product, read from global memory a product ahead.
  struct Addresses {
    const void* norm;
    const bf16* bias;
    bf16 *keys, *values;
    // Of the product after attention, which needs none: so attention has the registers.
    DEVICE Addresses() : norm(nullptr), bias(nullptr), keys(nullptr), values(nullptr) {}
    DEVICE Addresses(const WholeProduct& product, int which)
        : norm(product.norm), bias(product.matrix[which].bias), keys(product.matrix[1].to), values(product.matrix[2].to) {}
  };
  // What products are computed from.
  using Inputs = WholeInputs<D>;
  using Attention = typename Inputs::Attention;
  using Inputs::args, Inputs::shares, Inputs::target, Inputs::past, Inputs::key_shares, Inputs::keys_each, Inputs::factor;
  using Inputs::arrive, Inputs::tag, Inputs::stream, Inputs::with_turn, Inputs::scratch;

  // Of attention: where keys and values are, and a warp's first ones, of earlier tokens: these do not depend on other blocks and are
  // asked for before the query is there.
  struct Ahead {
    const bf16 *keys, *values;
    bool is_there;
    typename Attention::Tile tile;
    // All is written, or it would take registers from one product to the next.
    DEVICE Ahead() : keys(nullptr), values(nullptr), is_there(false), tile{} {}
    DEVICE Ahead(const Whole& whole, const Addresses& at) : keys(at.keys), values(at.values), is_there(false), tile{} {
      const int heads = int(whole.args.key_heads), item = int(block_x()), share = item / heads;
      if (!WHOLE_HAS_REGISTERS || share >= whole.key_shares) return;
      const Attention attention{whole.args, keys, values, item - share * heads, {}};
      attention.load(tile, whole.first_of(share), whole.end_of(share));
      is_there = true;
    }
  };
  // Keys of earlier tokens of a share: a warp's first one, and where all end.
  DEVICE int first_of(int share) const { return share * keys_each + Attention::KEYS * warp(); }
  DEVICE int end_of(int share) const { return (share + 1) * keys_each < past ? (share + 1) * keys_each : past; }

  DEVICE explicit Whole(const WholeArgs& args) : Inputs(args) {
    for (int i = thread_index(); i < args.count; i += block_threads()) {
      const WholeProduct& product = args.products[i];
      shares.shapes[i] = uint16_t(product.shape);
      if (product.is_first) shares.of_shapes[product.shape] = share_of_block(product);
    }
    if (warp() < WHOLE_WARPS && lane() == 0) WholeRing(args, warp()).start();
    block_barrier();
    for (int i = thread_index(); i < args.count; i += block_threads()) {
      const WholeMatrix& matrix = args.products[i].matrix[shares[i].which];
      map_ready(matrix.map);
      map_ready(matrix.second_map);
    }
    block_barrier();
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
    // Gated outputs are handed on two at a time.
    const int each = product.kind == WHOLE_GATE_UP ? 2 : 1;
    Share share = {0, 0};
    if (block < matrix.blocks) share = ::share_of(matrix.outs / each, block, matrix.blocks);
    to.first = each * share.first;
    to.outs = each * share.outs;
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
    return to;
  }

  // This warp's units of a product.
  template <class Format>
  DEVICE void multiply(WholeRing& ring, const WholeShare& share, WholeUnits own) const {
    using Row = typename Format::Row;
    const int g = lane() >> 2, t = lane() & 3;
    const unsigned char* x = shared_memory();
    float* sums_at = reinterpret_cast<float*>(shared_memory() + share.sums_at);
    typename Row::Columns columns = Row::columns(x, g, t);
    const int units = share.units, blocks = share.blocks;
    auto& [left, tile, unit] = own;
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
    const float* angles = decode_angles(args.state);
    const int row = share.row_of(out), pair = row & (D - 1);
    Aid aid = {row, 1.0f, 0.0f, {0.0f, 0.0f}};
    if (share.which < 2) {
      aid.cos = angles[pair];
      aid.sin = angles[D / 2 + pair];
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
    bf16* cache = (share.which == 1 ? at.keys : at.values) + int64_t(past) * 2 * share.all;
    finish(share, [&](int out, float sum, float second) {
      const Aid aid = out == thread_index() ? held : aid_of(share, at.bias, out);
      const float a = sum * by + aid.bias[0], b = second * by + aid.bias[1];
      const float one = a * aid.cos - b * aid.sin, other = b * aid.cos + a * aid.sin;
      const int pair = (before + aid.row / D) * (D / 2) + aid.row % D;
      hand_on(args.handed + pair, uint64_t(tag()) << 32 | pack_bf16(one, other));
      if (share.which == 0) return;
      cache[aid.row] = from_float<bf16>(one);
      cache[aid.row + D / 2] = from_float<bf16>(other);
    });
  }
  DEVICE void finish_add(const WholeShare& share, float held) const {
    const float* x = args.x + share.first;
    finish(share, [&](int out, float sum, float) {
      const float all = (out == thread_index() ? held : load_fresh(x + out)) + sum;
      hand_on(stream() + share.first + out, with_turn(all, share.kind == WHOLE_ATTENDED));
    });
  }
  DEVICE void finish_gate_up(const WholeShare& share, float by) const {
    for (int out = 2 * thread_index(); out < share.outs; out += 2 * WHOLE_THREADS) {
      float gated[2];
      UNROLL
      for (int i = 0; i < 2; ++i) {
        float sum, up;
        output(share, out + i, sum, up);
        const float gate = sum * by;
        gated[i] = gate * sigmoid(gate) * (up * by);
      }
      hand_on(args.gated + (share.first + out) / 2, pack_bf16(gated[0], gated[1]));
    }
  }
  DEVICE void finish_logits(const WholeShare& share, float by) const {
    float* to = args.logits + share.first;
    finish(share, [&](int out, float sum, float) { to[out] = sum * by; });
  }

  // A product from its row to its outputs. `at` is of the next product afterwards, and `ahead` of attention after queries, keys and
  // values.
  template <class Format>
  DEVICE void run(WholeRing& ring, const WholeShare& share, int product, Addresses& at, Ahead& ahead) const {
    using Row = typename Format::Row;
    const int kind = share.kind, own = thread_index() < share.outs ? thread_index() : 0;
    const WholeUnits units(share, warp());
    if (kind == WHOLE_DOWN) {
      this->template prepare_gated<Row>(share);
    } else if (kind == WHOLE_ATTENDED) {
      this->template prepare_attended<Row>(share, this->sums_of(product));
    } else {
      this->template prepare_normed<Row>(share, at.norm);
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
    if (kind == WHOLE_QKV || kind == WHOLE_LOGITS) this->take_back(product);
    multiply<Format>(ring, share, units);
    ahead = kind == WHOLE_QKV ? Ahead(*this, at) : Ahead();
    whole_barrier();
    if (kind == WHOLE_QKV) {
      finish_qkv(share, at, aid, by);
    } else if (adds) {
      finish_add(share, held);
    } else if (kind == WHOLE_GATE_UP) {
      finish_gate_up(share, by);
    } else {
      finish_logits(share, by);
    }
    at = next;
  }

  // From queries, keys and values that this block has handed on to its shares of attention.
  DEVICE void attend(Ahead& ahead, WholeSums to) const {
    const int heads = int(args.key_heads), items = heads * key_shares;
    whole_barrier();  // sums are read where attention leaves its own
    Attention attention{args, ahead.keys, ahead.values, 0, to};
    constexpr int STEP = WHOLE_WARPS * Attention::KEYS;
    int item = int(block_x()), share = item / heads;
    while (item < items) {
      attention.head = item - share * heads;
      const int end = end_of(share);
      attention.take_queries(tag());
      warp_barrier();  // lanes look for what is handed on each by itself
      whole_barrier();
      Words query[Attention::CHUNKS];
      attention.query_of(query);
      // In the warp that has the fewest other keys.
      const bool has_own = share == key_shares - 1;
      if (has_own && warp() == WHOLE_WARPS - 1) attention.leave_own(query, tag());
      warp_barrier();
      AttentionSums<D> own;
      own.clear();
      NO_UNROLL
      for (int start = first_of(share); start < end; start += STEP) {
        if (!ahead.is_there) attention.load(ahead.tile, start, end);
        ahead.is_there = false;
        attention.add(own, ahead.tile, query, start, end, factor);
      }
      ahead.is_there = false;
      own.finish();
      attention.leave(own);
      whole_barrier();
      attention.join(share, has_own, factor);
      whole_barrier();
      item += int(grid_x());
      share = item / heads;
    }
  }

  DEVICE void token() {
    if (warp() >= WHOLE_WARPS) {
#ifdef HAS_GROUP_PRODUCTS
      registers_give<48>();
#endif
      return bring_weights<D>(args, shares, warp() - WHOLE_WARPS);
    }
#ifdef HAS_GROUP_PRODUCTS
    registers_take<208>();
#endif
    Inputs::start();
    WholeRing ring(args, warp());
    Inputs::embed();
    arrive(true);
    Addresses at(args.products[0], shares[0].which);
    NO_UNROLL
    for (int i = 0; i < args.count; ++i) {
      const WholeShare& share = shares[i];
      Ahead ahead;
      with_whole_format(share.format, [&](auto format) { run<decltype(format)>(ring, share, i, at, ahead); });
      if (share.kind == WHOLE_LOGITS) return;
      if (share.kind == WHOLE_QKV) {
        attend(ahead, this->sums_of(i));
        at = Addresses();
      }
      arrive(share.kind == WHOLE_QKV && this->is_idle());
    }
  }
};

KERNEL(decode_whole_d64, WholeArgs, 512, 1) { Whole<64>(args).token(); }
KERNEL(decode_whole_d128, WholeArgs, 512, 1) { Whole<128>(args).token(); }

#endif
