// The rows that products of decode_whole.cu multiply: what other blocks have handed on, as soon as it is there, as bytes in shared memory.
#pragma once
#include "decode_whole_attention.cuh"

#ifdef HAS_COUNTING_BARRIERS

// Of the warps that multiply.
template <int D>
struct WholeInputs {
  using Attention = WholeAttention<D>;
  const WholeArgs& args;
  const WholeShares shares;
  uint64_t target;
  int past;                   // keys of earlier tokens
  int key_shares, keys_each;  // how keys are shared out
  int idle_from;              // the first block that does not attend; the first one of all, if all do
  uint32_t by_group;
  float factor;               // of scores, for powers of two

  DEVICE explicit WholeInputs(const WholeArgs& args) : args(args), shares(args) {}

  // What warps that multiply know of the token.
  DEVICE void start() {
    // Before this block has arrived anywhere, less than one launch's has been added.
    const uint64_t all = uint64_t(args.count) * uint64_t(grid_x());
    target = grid_count(args.arrived) / all * all;
    by_group = reciprocal(int(args.group));
    constexpr int EACH = 128, STEP = WHOLE_WARPS * Attention::KEYS;
    past = int(args.state->past);
    const int length = past + 1, wanted = (length + EACH - 1) / EACH;
    const int most = wanted < Attention::SHARES ? wanted : Attention::SHARES;
    keys_each = ((length + most - 1) / most + STEP - 1) / STEP * STEP;
    key_shares = (length + keys_each - 1) / keys_each;
    factor = float(args.scale * 1.4426950408889634);
    const int64_t items = args.key_heads * key_shares;
    idle_from = items < grid_x() ? int(items) : 0;
  }

  // Barriers of all blocks, in two halves: what comes between does not depend on other blocks. In order: what was written before is
  // seen after `wait`. Otherwise that is likely, and the numbers themselves tell.
  DEVICE void arrive(bool in_order) {
    whole_barrier();
    target += uint64_t(grid_x());
    if (thread_index() != 0) return;
    if (in_order) {
      grid_arrive(args.arrived, 1);
    } else {
      grid_arrive_unordered(args.arrived, 1);
    }
  }
  // Of what is handed on before the next of them; another one for each layer and token.
  DEVICE uint32_t tag() const { return uint32_t(target); }
  DEVICE void wait() const {
    if (thread_index() == 0) grid_wait(args.arrived, target);
    whole_barrier();
  }
  template <class Take>
  DEVICE static void until_there(const Take& take) {
    while (!take()) let_others_go_on();
    warp_barrier();  // lanes look each by itself
  }

  // The lowest bit of a number of the residual stream tells which product it comes after, WHOLE_ATTENDED or not: so who reads it
  // knows whether it is the next one or still the last. All read every number in turn.
  DEVICE static uint32_t turn_before(int kind) { return kind == WHOLE_GATE_UP; }
  DEVICE static uint32_t with_turn(float x, uint32_t turn) { return (float_to_bits(x) & ~1u) | turn; }
  DEVICE uint32_t* stream() const { return reinterpret_cast<uint32_t*>(args.x); }

  DEVICE void embed() const {
    const int chunk = int(block_x()) * WHOLE_THREADS + thread_index();
    if (8 * int64_t(chunk) >= args.width) return;
    if (args.embedding.bytes) embed_chunk(args.embedding, args.state->token, args.width, chunk, args.x);
    UNROLL
    for (int i = 0; i < 8; ++i) stream()[8 * chunk + i] = with_turn(args.x[8 * chunk + i], 0);
  }

  // Where attention of a layer hands its sums on: layers take turns.
  DEVICE WholeSums sums_of(int product) const {
    const int64_t places = args.key_heads * WHOLE_GROUP * Attention::SHARES, before = product / WHOLE_LAYER % 2 * places;
    return {args.partial + before * (D / 4), args.stats + before};
  }
  // What was handed on in the layer before and all have read is ABSENT again. Blocks that do not attend say so, since only they arrive
  // in order then; before it is handed on again all have waited for them.
  DEVICE bool is_idle() const { return block_x() >= idle_from; }
  DEVICE void take_back(int product) const {
    if (product < WHOLE_LAYER || !is_idle()) return;
    const int blocks = int(grid_x()) - idle_from, all = blocks * WHOLE_THREADS;
    const int own = (int(block_x()) - idle_from) * WHOLE_THREADS + thread_index();
    const int gated = shares[product - 1].blocks * 128, places = int(args.key_heads) * WHOLE_GROUP * Attention::SHARES;
    const WholeSums sums = sums_of(product - WHOLE_LAYER);
    for (int i = own; i < gated; i += all) hand_on(args.gated + i, ABSENT);
    for (int i = own; i < places * (D / 4); i += all) hand_on(sums.partial + i, ABSENT_WORDS);
    for (int i = own; i < places; i += all) hand_on(sums.stats + i, ABSENT_WORDS);
  }

  DEVICE float* scratch() const { return reinterpret_cast<float*>(shared_memory() + args.scratch_at); }

  // Places eight numbers of each lane: of the warp's i-th block of 256 of the row from `block` on.
  template <class Row>
  DEVICE static void place(const float (&numbers)[8], int block, int i, int blocks) {
    unsigned char* to = shared_memory() + block * Row::X_BYTES + i * WHOLE_WARPS * Row::X_BYTES;
    place_row_bytes<Row>(to, numbers, block + i * WHOLE_WARPS < blocks);
  }

  // Whether eight numbers of the residual stream are there.
  DEVICE bool take_x(NormedRow::Held& held, int chunk, uint32_t turn) const {
    held.x[0] = held.x[1] = {{0, 0, 0, 0}};
    if (8 * int64_t(chunk) >= args.width) return true;
    uint32_t other = 0;
    UNROLL
    for (int half = 0; half < 2; ++half) {
      load_handed(held.x[half].at, stream() + 8 * chunk + 4 * half);
      UNROLL
      for (int i = 0; i < 4; ++i) other |= held.x[half].at[i] ^ turn;
    }
    return (other & 1) == 0;
  }

  // Places the row: the residual stream with the weight of a norm whose factor comes later.
  template <class Row>
  DEVICE void prepare_normed(const WholeShare& share, const void* weight) const {
    constexpr int TOGETHER = 2;
    const int blocks = share.blocks;
    const uint32_t turn = turn_before(share.kind);
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
        if (block >= WHOLE_WARPS) source.load_weight(held[i], 32 * (block + i * WHOLE_WARPS) + lane());
      }
      until_there([&] {
        bool there = true;
        UNROLL
        for (int i = 0; i < TOGETHER; ++i) there &= take_x(held[i], 32 * (block + i * WHOLE_WARPS) + lane(), turn);
        return there;
      });
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

  // Places the row: what gate and up come to.
  template <class Row>
  DEVICE void prepare_gated(const WholeShare& share) const {
    // That many are asked for, and of these so many converted, together.
    constexpr int TOGETHER = 10, CONVERTED = 5;
    const int blocks = share.blocks;
    wait();
    for (int block = warp(); block - warp() < blocks; block += TOGETHER * WHOLE_WARPS) {
      PlainRows::Held held[TOGETHER];
      until_there([&] {
        bool there = true;
        UNROLL
        for (int i = 0; i < TOGETHER; ++i) {
          held[i] = {{{0, 0, 0, 0}}};
          if (block + i * WHOLE_WARPS >= blocks) continue;
          load_handed(held[i].words.at, args.gated + 4 * (32 * (block + i * WHOLE_WARPS) + lane()));
          UNROLL
          for (int word = 0; word < 4; ++word) there &= held[i].words.at[word] != ABSENT;
        }
        return there;
      });
      UNROLL
      for (int i = 0; i < TOGETHER; ++i) {
        if (i % CONVERTED == 0 && block - warp() + i * WHOLE_WARPS >= blocks) break;
        float numbers[8];
        PlainRows::widen(held[i], numbers);
        place<Row>(numbers, block, i, blocks);
      }
    }
  }

  // Places the row: what attention's shares come to.
  template <class Row>
  DEVICE void prepare_attended(const WholeShare& share, WholeSums from) const {
    constexpr int SHARES = Attention::SHARES, TOGETHER = WHOLE_HAS_REGISTERS ? 2 : 1;
    const int blocks = share.blocks, group = int(args.group);
    wait();
    for (int block = warp(); block - warp() < blocks; block += TOGETHER * WHOLE_WARPS) {
      // Of eight numbers the sums of each share, and of each share its maximum and sum.
      uint64_t held[TOGETHER][SHARES][2], stats[TOGETHER][SHARES];
      until_there([&] {
        bool there = true;
        UNROLL
        for (int n = 0; n < TOGETHER; ++n) {
          const int chunk = 32 * (block + n * WHOLE_WARPS) + lane(), own = chunk < 32 * blocks ? chunk : 0;
          const int query = own / (D / 8), head = quotient(query, by_group), row = query - head * group;
          const int64_t place = SHARES * (int64_t(head) * WHOLE_GROUP + row);
          there &= take_shares(held[n], stats[n], from.partial + place * (D / 4) + 2 * (own % (D / 8)), from.stats + place);
        }
        return there;
      });
      UNROLL
      for (int n = 0; n < TOGETHER; ++n) {
        float numbers[8];
        join_shares(numbers, held[n], stats[n]);
        place<Row>(numbers, block, n, blocks);
      }
    }
  }

  // Whether the shares' sums of eight numbers of a query are there.
  template <int SHARES>
  DEVICE bool take_shares(uint64_t (&held)[SHARES][2], uint64_t (&stats)[SHARES], const uint64_t* partial_at,
                          const uint64_t* stats_at) const {
    // All are written, or they would take registers from one product to the next.
    UNROLL
    for (int i = 0; i < SHARES; ++i) held[i][0] = held[i][1] = stats[i] = 0;
    UNROLL
    for (int i = 0; i < SHARES; i += 2) {
      if (i >= key_shares) break;
      uint64_t two[2];
      load_handed(two, stats_at + i);
      stats[i] = two[0];
      stats[i + 1] = i + 1 < key_shares ? two[1] : 0;
    }
    UNROLL
    for (int i = 0; i < SHARES; ++i) {
      if (i >= key_shares) break;
      load_handed(held[i], partial_at + i * (D / 4));
    }
    bool there = true;
    UNROLL
    for (int i = 0; i < SHARES; ++i) {
      there &= uint32_t(stats[i]) != ABSENT && uint32_t(held[i][0]) != ABSENT && uint32_t(held[i][1]) != ABSENT;
    }
    return there;
  }

  // What the shares' sums come to; `stats` holds the maximum and the sum of each.
  template <int SHARES>
  DEVICE void join_shares(float (&numbers)[8], const uint64_t (&held)[SHARES][2], const uint64_t (&stats)[SHARES]) const {
    float largest = -INFINITY, total = 0.0f;
    UNROLL
    for (int i = 0; i < SHARES; ++i) {
      if (i >= key_shares) break;
      largest = fmaxf(largest, bits_to_float(uint32_t(stats[i])));
    }
    UNROLL
    for (int j = 0; j < 8; ++j) numbers[j] = 0.0f;
    UNROLL
    for (int i = 0; i < SHARES; ++i) {
      if (i >= key_shares) break;
      const float by = part_of(bits_to_float(uint32_t(stats[i])), largest, factor);
      total += bits_to_float(uint32_t(stats[i] >> 32)) * by;
      UNROLL
      for (int j = 0; j < 8; j += 2) {
        const uint32_t pair = uint32_t(held[i][j / 4] >> (j & 2 ? 32 : 0));
        numbers[j] += by * low_float(pair);
        numbers[j + 1] += by * high_float(pair);
      }
    }
    const float inverse = 1.0f / total;
    UNROLL
    for (int j = 0; j < 8; ++j) numbers[j] *= inverse;
  }
};

#endif
