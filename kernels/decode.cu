// One token through the language model, with nothing between the kernels but their results: 5 kernels a
// layer. Nothing in their arguments changes from token to token; what does lies in `DecodeState`, so the
// kernels of a step can be recorded once and started together.
//
// decode_embed: x = the token's row of the embedding. Grid: (hidden / 8 / 128, 1, 1); 128 threads.
// decode_qkv: RMS norm, the three products with their biases, rotation of queries and keys; keys and
//   values go to their place in the cache.
// decode_attention_dD: a block owns a key head and a share of the keys, which four warps divide; the last
//   block of a head to finish joins the shares. Grid: (at most 32 shares, key heads, 1); 128 threads.
// decode_add: x += the product of a row in bf16. Attention's output and the end of the MLP.
// decode_gate_up: RMS norm, both products, silu(gate) * up. A tile has eight rows of each.
// decode_logits: RMS norm and the product with the head, in float32.
// Products: see decode.cuh. Grid: (blocks, 1, 1), each walks over tiles; 32 threads a warp that shares
//   the depth.
// decode_qkv_bytes, decode_add_F, decode_gate_up_F, decode_logits_F: the same for q4_k, q6_k, q8_0, see
//   decode_bytes.cuh. Grid: (multiprocessors, 1, 1).
//
// The residual stream x is float32. The factor of the norm multiplies the sums, so that products start
// before it is known. Weights are asked for before the kernel before has ended.
#include "attention.cuh"
#include "decode.cuh"

struct DecodeState {
  int64_t token, past;  // tokens in the cache before this one
};
// Cosines [D / 2] and sines [D / 2] of the token's position follow it.
DEVICE const float* decode_angles(const DecodeState* state) {
  return reinterpret_cast<const float*>(state + 1);
}

#include "decode_bytes.cuh"

struct StoredRows {
  const uint8_t* bytes;  // starts at a multiple of 16
  int64_t format, outs;
};

struct ProductInput {
  const float* x;      // [depth], normalised with `norm`; or null
  const bf16* narrow;  // [depth], as it is
  const void* norm;    // [depth] in bf16 or float32
  int64_t norm_is_float;
  double eps;
  int64_t depth;
  int64_t stage_bytes;  // of a ring's place
};

// Brings the row to shared memory; returns the factor of the norm.
DEVICE float prepare_row(const ProductInput& input, const ProductMemory& memory) {
  const int chunks = int((input.depth + PADDED_TO - 1) / PADDED_TO * PADDED_TO / 8);
  float squares = 0.0f;
  for (int chunk = thread_index(); chunk < chunks; chunk += block_threads()) {
    Words words = {{0, 0, 0, 0}};
    if (8 * int64_t(chunk) < input.depth) {
      if (input.narrow) {
        words = load_words_fresh(input.narrow + 8 * chunk);
      } else {
        float x[8];
        UNROLL
        for (int half = 0; half < 2; ++half) {
          const Words four = load_words_fresh(input.x + 8 * chunk + 4 * half);
          UNROLL
          for (int i = 0; i < 4; ++i) x[4 * half + i] = bits_to_float(four.at[i]);
        }
        UNROLL
        for (int i = 0; i < 8; ++i) {
          squares += x[i] * x[i];
          x[i] *= input.norm_is_float ? static_cast<const float*>(input.norm)[8 * chunk + i]
                                      : to_float(static_cast<const bf16*>(input.norm)[8 * chunk + i]);
        }
        UNROLL
        for (int i = 0; i < 4; ++i) words.at[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
      }
    }
    place_chunk(memory.x, chunk, words);
  }
  if (input.narrow) {
    block_barrier();
    return 1.0f;
  }
  return inverse_root(sum_block(squares, memory.squares) / float(input.depth) + float(input.eps));
}

// Eight numbers of a token's row.
DEVICE void embed_chunk(const StoredRows& rows, int64_t token, int64_t width, int chunk, float* x) {
  with_format(rows.format, [&](auto format) {
    using Format = decltype(format);
    const uint8_t* row = rows.bytes + token * (width / Format::NUMBERS * Format::BYTES);
    float numbers[8];
    widen_chunk<Format>(row, chunk, numbers);
    UNROLL
    for (int i = 0; i < 8; ++i) x[8 * chunk + i] = numbers[i];
  });
}

struct EmbedArgs {
  const DecodeState* state;
  StoredRows rows;
  float* x;  // [width]
  int64_t width;
};

KERNEL(decode_embed, EmbedArgs, 128, 1) {
  release_next_kernel();
  const int64_t chunk = block_x() * block_threads() + thread_index();
  if (8 * chunk >= args.width) return;
  embed_chunk(args.rows, args.state->token, args.width, int(chunk), args.x);
}

struct QkvArgs {
  ProductInput input;
  StoredRows matrix[3];    // of queries, keys, values
  const bf16* bias[3];     // [outs], or null
  bf16* query;             // [heads][D]
  bf16* cache[2];          // keys and values: [token][key heads][D]
  const DecodeState* state;
  int64_t width;           // of a head
};

KERNEL(decode_qkv, QkvArgs, 256, 1) {
  release_next_kernel();
  const ProductMemory memory = product_memory(args.input.depth, int(args.input.stage_bytes));
  const int half = int(args.width / 2), parts = half / 8;
  float factor = 0.0f;
  int turn = 0;
  bool prepared = false;
  int tiles_before = 0;
  const int grid = int(grid_x()), block = int(block_x());
  NO_UNROLL
  for (int which = 0; which < 3; ++which) {
    const StoredRows& matrix = args.matrix[which];
    const int tiles = int(matrix.outs / TILE_ROWS);
    // Tiles are dealt out to blocks across the matrices.
    const int first = (block + grid - tiles_before % grid) % grid;
    tiles_before += tiles;
    with_format(matrix.format, [&](auto format) {
      using Format = decltype(format);
      const int64_t row_bytes = args.input.depth / Format::NUMBERS * Format::BYTES;
      auto rows = [&](int tile) -> TileRows {
        const int64_t row = tile / parts * args.width + tile % parts * 8;
        return {matrix.bytes + row * row_bytes, matrix.bytes + (row + half) * row_bytes, 8, 8};
      };
      auto prepare = [&] {
        if (prepared) return;
        prepared = true;
        wait_for_last_kernel();
        factor = prepare_row(args.input, memory);
      };
      auto finish = [&](int tile, int at, float sum) {
        const int64_t head_row = tile / parts * args.width;
        const int row = int(tile % parts) * 8 + (at & 7), column = row + (at >= 8 ? half : 0);
        float value = sum * factor;
        if (args.bias[which]) value += to_float(args.bias[which][head_row + column]);
        const float other = shuffle_xor(value, 8);
        if (which < 2) {
          const float* angles = decode_angles(args.state);
          const float cos = angles[row], sin = angles[half + row];
          value = at < 8 ? value * cos - other * sin : value * cos + other * sin;
        }
        bf16* to = which == 0 ? args.query : args.cache[which - 1] + args.state->past * matrix.outs;
        if (lane() < TILE_ROWS) to[head_row + column] = from_float<bf16>(value);
      };
      multiply_tiles<Format>(memory, first, grid, tiles, turn, rows, prepare, finish);
    });
  }
}

struct AddArgs {
  ProductInput input;
  StoredRows matrix;
  float* x;  // [outs]
};

// Sixteen neighbouring rows a tile.
template <class Format>
DEVICE TileRows neighbouring_rows(const StoredRows& matrix, int64_t depth, int tile) {
  const int64_t row_bytes = depth / Format::NUMBERS * Format::BYTES;
  const int left = int(min64(TILE_ROWS, matrix.outs - int64_t(tile) * TILE_ROWS));
  const uint8_t* first = matrix.bytes + int64_t(tile) * TILE_ROWS * row_bytes;
  if (left <= 8) return {first, first, left, left};
  return {first, first + 8 * row_bytes, 8, left - 8};
}

KERNEL(decode_add, AddArgs, 512, 1) {
  release_next_kernel();
  const ProductMemory memory = product_memory(args.input.depth, int(args.input.stage_bytes));
  int turn = 0;
  with_format(args.matrix.format, [&](auto format) {
    using Format = decltype(format);
    auto rows = [&](int tile) {
      return neighbouring_rows<Format>(args.matrix, args.input.depth, tile);
    };
    auto prepare = [&] {
      wait_for_last_kernel();
      prepare_row(args.input, memory);
    };
    auto finish = [&](int tile, int at, float sum) {
      const int64_t row = int64_t(tile) * TILE_ROWS + at;
      if (lane() < TILE_ROWS && row < args.matrix.outs) {
        args.x[row] = load_fresh(args.x + row) + sum;
      }
    };
    const int tiles = int((args.matrix.outs + TILE_ROWS - 1) / TILE_ROWS);
    multiply_tiles<Format>(memory, int(block_x()), int(grid_x()), tiles, turn, rows, prepare, finish);
  });
}

struct GateUpArgs {
  ProductInput input;
  StoredRows gate;
  const uint8_t* up;  // of the gate's format and size
  bf16* out;          // [outs]
};

KERNEL(decode_gate_up, GateUpArgs, 512, 1) {
  release_next_kernel();
  const ProductMemory memory = product_memory(args.input.depth, int(args.input.stage_bytes));
  float factor = 0.0f;
  int turn = 0;
  with_format(args.gate.format, [&](auto format) {
    using Format = decltype(format);
    const int64_t row_bytes = args.input.depth / Format::NUMBERS * Format::BYTES;
    auto rows = [&](int tile) -> TileRows {
      const int64_t row = int64_t(tile) * 8;
      const int left = int(min64(8, args.gate.outs - row));
      return {args.gate.bytes + row * row_bytes, args.up + row * row_bytes, left, left};
    };
    auto prepare = [&] {
      wait_for_last_kernel();
      factor = prepare_row(args.input, memory);
    };
    auto finish = [&](int tile, int, float sum) {
      const float gate = sum * factor, up = shuffle_xor(gate, 8);
      const int64_t row = int64_t(tile) * 8 + lane();
      if (lane() < 8 && row < args.gate.outs) {
        const float sigmoid = 1.0f / (1.0f + exp2_fast(-1.4426950408889634f * gate));
        args.out[row] = from_float<bf16>(gate * sigmoid * up);
      }
    };
    const int tiles = int((args.gate.outs + 7) / 8);
    multiply_tiles<Format>(memory, int(block_x()), int(grid_x()), tiles, turn, rows, prepare, finish);
  });
}

struct LogitsArgs {
  ProductInput input;
  StoredRows head;
  float* logits;  // [outs]
};

KERNEL(decode_logits, LogitsArgs, 512, 1) {
  release_next_kernel();
  const ProductMemory memory = product_memory(args.input.depth, int(args.input.stage_bytes));
  float factor = 0.0f;
  int turn = 0;
  with_format(args.head.format, [&](auto format) {
    using Format = decltype(format);
    auto rows = [&](int tile) {
      return neighbouring_rows<Format>(args.head, args.input.depth, tile);
    };
    auto prepare = [&] {
      wait_for_last_kernel();
      factor = prepare_row(args.input, memory);
    };
    auto finish = [&](int tile, int at, float sum) {
      const int64_t row = int64_t(tile) * TILE_ROWS + at;
      if (lane() < TILE_ROWS && row < args.head.outs) args.logits[row] = sum * factor;
    };
    const int tiles = int((args.head.outs + TILE_ROWS - 1) / TILE_ROWS);
    multiply_tiles<Format>(memory, int(block_x()), int(grid_x()), tiles, turn, rows, prepare, finish);
  });
}

KERNEL(decode_qkv_bytes, QkvBytesArgs, 512, 1) { qkv_bytes_of_each(args); }
KERNEL(decode_add_q4_k, AddBytesArgs, 512, 1) { add_bytes<BytesQ4K, 2>(args); }
KERNEL(decode_add_q6_k, AddBytesArgs, 384, 1) { add_bytes<BytesQ6K, 1>(args); }
KERNEL(decode_add_q8_0, AddBytesArgs, 512, 1) { add_bytes<BytesQ8_0, 2>(args); }
KERNEL(decode_gate_up_q4_k, GateUpBytesArgs, 512, 1) { gate_up_bytes<BytesQ4K, 2>(args); }
KERNEL(decode_gate_up_q6_k, GateUpBytesArgs, 384, 1) { gate_up_bytes<BytesQ6K, 1>(args); }
KERNEL(decode_gate_up_q8_0, GateUpBytesArgs, 512, 1) { gate_up_bytes<BytesQ8_0, 2>(args); }
KERNEL(decode_logits_q4_k, LogitsBytesArgs, 512, 1) { logits_bytes<BytesQ4K, 2>(args); }
KERNEL(decode_logits_q6_k, LogitsBytesArgs, 384, 1) { logits_bytes<BytesQ6K, 1>(args); }
KERNEL(decode_logits_q8_0, LogitsBytesArgs, 512, 1) { logits_bytes<BytesQ8_0, 2>(args); }

struct DecodeAttentionArgs {
  const bf16* query;        // [heads][D]
  const bf16* keys;         // [token][key heads][D]
  const bf16* values;
  bf16* out;                // [heads][D]
  float* partial;           // [key head][share][16][D]
  float* stats;             // [key head][share][16][maximum, sum]
  uint32_t* arrived;        // [key heads], zero between launches
  const DecodeState* state;
  int64_t group, key_heads;  // query heads that share a key head, at most 16
  int64_t keys_each;         // keys of a share, a multiple of 64
  double scale;              // positive
};

template <int D>
struct DecodeAttention {
  using Shared = SharedRows<D>;
  static constexpr int KEYS = 64, WARPS = 4, THREADS = 32 * WARPS, ROWS = 16, SHARES = 32;
  static constexpr int TILE_BYTES = KEYS * Shared::ROW_BYTES;

  const DecodeAttentionArgs& args;
  unsigned char* query_rows = shared_memory();
  unsigned char* key_rows = query_rows + ROWS * Shared::ROW_BYTES;
  unsigned char* value_rows = key_rows + TILE_BYTES;
  float* stats = reinterpret_cast<float*>(value_rows + TILE_BYTES);  // [warp][16][2]
  // The warps' sums [warp][16][D] take the place of keys and values.
  float* sums = reinterpret_cast<float*>(key_rows);

  // Brings keys and values `start .. start + KEYS` to shared memory, zeros from `end` on; leaves out that
  // of `newest`.
  DEVICE void load(int start, int end, int newest) const {
    for (int i = thread_index(); i < KEYS * Shared::CHUNKS; i += THREADS) {
      const int row = i / Shared::CHUNKS, chunk = i % Shared::CHUNKS;
      if (start + row != newest) load_chunk(start, row, chunk, start + row < end);
    }
    copy_commit();
  }

  DEVICE void load_one(int start, int key) const {
    if (thread_index() < Shared::CHUNKS) load_chunk(start, key - start, thread_index(), true);
    copy_commit();
  }

  DEVICE void load_chunk(int start, int row, int chunk, bool there) const {
    const int64_t key = there ? start + row : start;
    const int64_t from = (key * args.key_heads + block_y()) * D + 8 * chunk;
    copy_async(Shared::at(key_rows, row, chunk), args.keys + from, there);
    copy_async(Shared::at(value_rows, row, chunk), args.values + from, there);
  }

  DEVICE void load_queries() const {
    for (int i = thread_index(); i < ROWS * Shared::CHUNKS; i += THREADS) {
      const int row = i / Shared::CHUNKS, chunk = i % Shared::CHUNKS;
      Words words = {{0, 0, 0, 0}};
      if (row < args.group) {
        words = load_words_fresh(args.query + (block_y() * args.group + row) * D + 8 * chunk);
      }
      store_words(Shared::at(query_rows, row, chunk), words);
    }
  }

  // A warp's 16 keys of the tile that starts at `start`.
  DEVICE void add_tile(AttentionSums<D>& own, int start, int end, float factor) const {
    const int first = 16 * warp();
    float scores[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    UNROLL
    for (int k = 0; k < D / 16; ++k) {
      uint32_t a[4], b[4];
      load_matrices(a, Shared::at(query_rows, lane() & 15, 2 * k + (lane() >> 4)));
      const int row = first + (lane() & 7) + 8 * (lane() >> 4);
      load_matrices(b, Shared::at(key_rows, row, 2 * k + ((lane() >> 3) & 1)));
      multiply_add(scores[0], a, b[0], b[1]);
      multiply_add(scores[1], a, b[2], b[3]);
    }
    hide<16>(scores, start + first, end, 0, 1, false, 0);
    own.template soften<16>(scores, factor);
    uint32_t a[4];
    weights_operand<16>(a, scores, 0);
    UNROLL
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b,
                               Shared::at(value_rows, first + (lane() & 15), 2 * n + (lane() >> 4)));
      multiply_add(own.out[2 * n], a, b[0], b[1]);
      multiply_add(own.out[2 * n + 1], a, b[2], b[3]);
    }
  }

  // Leaves the warp's sums in shared memory.
  DEVICE void leave(const AttentionSums<D>& own) const {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * warp() + 8 * half + (lane() >> 2);
      UNROLL
      for (int n = 0; n < D / 8; ++n) {
        float* to = sums + row * D + 8 * n + 2 * (lane() & 3);
        to[0] = own.out[n][2 * half];
        to[1] = own.out[n][2 * half + 1];
      }
      if ((lane() & 3) == 0) {
        stats[2 * row] = own.maximum[half];
        stats[2 * row + 1] = own.sum[half];
      }
    }
  }

  DEVICE void run() const {
    const int past = int(args.state->past), length = past + 1, each = int(args.keys_each);
    const int first = int(block_x()) * each, end = first + each < length ? first + each : length;
    if (first >= length) return;
    const int shares = (length + each - 1) / each;
    const float factor = float(args.scale * 1.4426950408889634);
    // Only the newest key and value come from the kernel before.
    load(first, end, past);
    wait_for_last_kernel();
    if (past >= first && past < first + KEYS) load_one(first, past);
    load_queries();
    AttentionSums<D> own;
    own.clear();
    for (int start = first; start < end; start += KEYS) {
      copy_wait<0>();
      block_barrier();
      add_tile(own, start, end, factor);
      block_barrier();
      if (start + KEYS < end) load(start + KEYS, end, -1);
    }
    own.finish();
    leave(own);
    block_barrier();
    join_warps(shares, factor);
    if (shares > 1 && is_last(shares)) join_shares(shares, factor);
  }

  DEVICE void write(int item, const float (&out)[4], float by) const {
    const uint64_t low = pack_bf16(out[0] * by, out[1] * by), high = pack_bf16(out[2] * by, out[3] * by);
    *reinterpret_cast<uint64_t*>(args.out + block_y() * args.group * D + 4 * item) = low | high << 32;
  }

  // Four neighbouring sums a thread.
  DEVICE void join_warps(int shares, float factor) const {
    const int64_t place = (block_y() * grid_x() + block_x()) * ROWS;
    for (int item = thread_index(); item < args.group * (D / 4); item += THREADS) {
      const int row = item / (D / 4), column = 4 * (item % (D / 4));
      float largest = -INFINITY, total = 0.0f, out[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      UNROLL
      for (int i = 0; i < WARPS; ++i) largest = fmaxf(largest, stats[2 * (16 * i + row)]);
      UNROLL
      for (int i = 0; i < WARPS; ++i) {
        const float share = part_of(stats[2 * (16 * i + row)], largest, factor);
        const Words four = load_words(sums + (16 * i + row) * D + column);
        total += share * stats[2 * (16 * i + row) + 1];
        UNROLL
        for (int j = 0; j < 4; ++j) out[j] += share * bits_to_float(four.at[j]);
      }
      if (shares == 1) {
        write(item, out, 1.0f / total);
        continue;
      }
      Words four;
      UNROLL
      for (int j = 0; j < 4; ++j) four.at[j] = float_to_bits(out[j]);
      store_words(args.partial + (place + row) * D + column, four);
      if (column == 0) {
        args.stats[2 * (place + row)] = largest;
        args.stats[2 * (place + row) + 1] = total;
      }
    }
  }

  // Whether all other shares of this key head are written.
  DEVICE bool is_last(int shares) const {
    block_barrier();
    uint32_t* before = reinterpret_cast<uint32_t*>(stats);
    // Of the thread that counts, since fences order what a barrier has shown it, too.
    if (thread_index() == 0) {
      memory_fence();
      *before = atomic_turn(args.arrived + block_y(), uint32_t(shares));
      memory_fence();
    }
    block_barrier();
    return *before + 1 == uint32_t(shares);
  }

  DEVICE void join_shares(int shares, float factor) const {
    constexpr int TOGETHER = 16;
    const int64_t first = block_y() * grid_x() * ROWS;
    // A lane weighs a share.
    float* parts = sums;  // [16][SHARES]
    for (int row = warp(); row < args.group; row += WARPS) {
      const bool there = lane() < shares;
      const float* own = args.stats + 2 * (first + ROWS * (there ? lane() : 0) + row);
      const float maximum = there ? load_fresh(own) : -INFINITY, sum = there ? load_fresh(own + 1) : 0.0f;
      const float share = part_of(maximum, max_lanes(maximum, 32), factor);  // 0 beyond the shares
      parts[row * SHARES + lane()] = share / sum_lanes(share * sum, 32);
    }
    block_barrier();
    for (int item = thread_index(); item < args.group * (D / 4); item += THREADS) {
      const int row = item / (D / 4), column = 4 * (item % (D / 4));
      const float* from = args.partial + (first + row) * D + column;
      float out[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int base = 0; base < shares; base += TOGETHER) {
        Words held[TOGETHER];
        UNROLL
        for (int i = 0; i < TOGETHER; ++i) {
          held[i] = {{0, 0, 0, 0}};
          if (base + i < shares) held[i] = load_words_fresh(from + int64_t(ROWS) * D * (base + i));
        }
        UNROLL
        for (int i = 0; i < TOGETHER; ++i) {
          const float share = parts[row * SHARES + base + i];
          UNROLL
          for (int j = 0; j < 4; ++j) out[j] += share * bits_to_float(held[i].at[j]);
        }
      }
      write(item, out, 1.0f);
    }
  }
};

template <int D>
DEVICE void decode_attention(const DecodeAttentionArgs& args) {
  release_next_kernel();
  DecodeAttention<D>{args}.run();
}

KERNEL(decode_attention_d16, DecodeAttentionArgs, 128, 1) { decode_attention<16>(args); }
KERNEL(decode_attention_d32, DecodeAttentionArgs, 128, 1) { decode_attention<32>(args); }
KERNEL(decode_attention_d64, DecodeAttentionArgs, 128, 1) { decode_attention<64>(args); }
KERNEL(decode_attention_d128, DecodeAttentionArgs, 128, 1) { decode_attention<128>(args); }
