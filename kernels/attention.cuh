// The core of all attention kernels: an online softmax over tiles of keys, on tensor cores.
//
// Computes  out[i] = sum_j softmax_j(query[i] . key[j] * scale) value[j]  over the keys that query i sees.
// Queries, keys and values come from up to two streams (text and picture) that are never
// concatenated: rows of stream 0 come before those of stream 1. Queries may be normalised and
// rotated on their way in (`Prepare`).
//
// Rows of a tile are pairs (token, head within its group), so that the query heads that share a
// key head are computed together: row r is token r / group, head r % group.
//
// A block of WARPS warps owns WARPS * ROW_TILES * 16 rows, keeps them in shared memory, and walks
// over tiles of KEYS keys. While scores are computed from one tile of keys, its values arrive, and
// while these are summed, the next keys do. Scores, sums and the output stay in registers, in
// float32; the weights are rounded to bf16 for the second product. Scores are never stored and
// every offset has 64 bits.
//
// Tried for joint attention on an H200, 24 heads of 128, TFLOP/s at 8704 tokens, 8704 twice, and 16896:
//   WARPS 4: ROW_TILES 2, KEYS 64    240 258 268, which is used: two rows of products for each read of
//                                    shared memory, in 255 registers
//            ROW_TILES 2, KEYS 32    215 233 247
//            ROW_TILES 1, KEYS 64    178 185 189; KEYS 128: 193 197 203
//   WARPS 8: ROW_TILES 2, KEYS 64    238 257 277; KEYS 32: 213 231 250
//            ROW_TILES 1, KEYS 64    190 198 204; KEYS 128: 209 219 225; KEYS 32: 151 157 160
#pragma once
#include "device.cuh"
#include "rotary.cuh"

struct AttentionStream {
  const bf16* query;     // [b][query_rows][heads][D], tokens `query_stride` elements apart
  const bf16* key;       // [b][key_rows][key_heads][D]
  const bf16* value;     // [b][key_rows][key_heads][D]
  bf16* out;             // [b][query_rows][heads][D], without gaps
  int64_t query_rows, query_stride, query_batch;
  int64_t key_rows, key_stride, key_batch;
  int64_t value_stride, value_batch;
  Preparation prepare;   // of the queries
};

// What one block of the grid's first axis works on, in tokens of stream 0 (segments).
struct AttentionPiece {
  int64_t query_first, query_end, key_first, key_end;
};

struct AttentionArgs {
  AttentionStream stream[2];
  int64_t heads, group;           // query heads; query heads that share a key head
  const int64_t* lengths;         // keys of stream 0 in each batch entry, or null for all
  const AttentionPiece* pieces;   // one for each block of the first axis, or null
  int64_t causal, offset;         // whether token i sees keys 0..=i + offset only
  int64_t splits;                 // blocks that share the keys of a tile of rows
  float* partial;                 // [split][b][key head][rows][D] where splits > 1
  float* partial_stats;           // [split][b][key head][rows][maximum, sum]
  double scale;                   // positive
};

// Rows of D numbers in shared memory, in chunks of 16 bytes whose places are mixed so that eight
// rows of a matrix lie in different banks.
template <int D>
struct SharedRows {
  static constexpr int CHUNKS = D / 8;
  static constexpr int STRIDE = CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : CHUNKS;
  static constexpr int ROW_BYTES = 16 * STRIDE;
  DEVICE static unsigned char* at(unsigned char* rows, int row, int chunk) {
    return rows + 16 * (row * STRIDE + (chunk ^ (row & 7)));
  }
};

template <int D, int WARPS, int ROW_TILES, int KEYS>
struct AttentionTile {
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int ROWS = 16 * WARPS * ROW_TILES;
  static constexpr int SHARED_BYTES = (ROWS + 2 * KEYS) * SharedRows<D>::ROW_BYTES;
};

// Which rows and keys a block owns.
struct AttentionWork {
  int stream;
  int64_t row_first, row_end;  // rows are pairs of token and head
  int key_first, key_end;      // tokens are fewer than 2^31; what is addressed with them is not
  int64_t split;
};

template <int ROWS, int KEYS>
DEVICE AttentionWork attention_work(const AttentionArgs& args) {
  AttentionWork work;
  const int64_t length =
      args.lengths ? args.lengths[block_z()] : args.stream[0].key_rows;
  work.key_first = 0;
  work.key_end = int(length + args.stream[1].key_rows);
  work.split = block_x() % args.splits;
  int64_t tile = block_x() / args.splits;
  if (args.pieces) {
    const AttentionPiece piece = args.pieces[block_x()];
    work.stream = 0;
    work.row_first = piece.query_first * args.group;
    work.row_end = piece.query_end * args.group;
    work.key_first = int(piece.key_first);
    work.key_end = int(piece.key_end);
    return work;
  }
  // Tiles that see the most keys start first.
  if (args.causal) tile = grid_x() / args.splits - 1 - tile;
  const int64_t rows_0 = args.stream[0].query_rows * args.group;
  const int64_t tiles_0 = (rows_0 + ROWS - 1) / ROWS;
  work.stream = tile < tiles_0 ? 0 : 1;
  const int64_t rows = work.stream == 0 ? rows_0 : args.stream[1].query_rows * args.group;
  work.row_first = (work.stream == 0 ? tile : tile - tiles_0) * ROWS;
  work.row_end = min64(work.row_first + ROWS, rows);
  if (args.causal) {
    const int64_t last = (work.row_end - 1) / args.group;
    work.key_end = int(min64(work.key_end, last + args.offset + 1));
  }
  if (args.splits > 1) {
    const int64_t tiles = (work.key_end + KEYS - 1) / KEYS;
    const int64_t each = (tiles + args.splits - 1) / args.splits * KEYS;
    work.key_first = int(min64(work.split * each, work.key_end));
    work.key_end = int(min64(work.key_first + each, work.key_end));
  }
  return work;
}

// The keys or values of one head, in both streams: rows before `split` are the first one's.
struct KeyRows {
  const bf16* first;
  const bf16* second;
  int first_stride, second_stride, split;
};

template <int D>
DEVICE KeyRows keys_of(const AttentionArgs& args, int64_t batch, int64_t key_head) {
  const AttentionStream &text = args.stream[0], &image = args.stream[1];
  return {text.key + batch * text.key_batch + key_head * D,
          image.key + batch * image.key_batch + key_head * D, int(text.key_stride),
          int(image.key_stride), int(args.lengths ? args.lengths[batch] : text.key_rows)};
}

template <int D>
DEVICE KeyRows values_of(const AttentionArgs& args, int64_t batch, int64_t key_head) {
  const AttentionStream &text = args.stream[0], &image = args.stream[1];
  return {text.value + batch * text.value_batch + key_head * D,
          image.value + batch * image.value_batch + key_head * D, int(text.value_stride),
          int(image.value_stride), int(args.lengths ? args.lengths[batch] : text.key_rows)};
}

// Brings rows `start..start + KEYS` to the places in shared memory that Shared says, zeros after `end`.
template <class Shared, int KEYS, int THREADS>
DEVICE void load_key_rows(unsigned char* to, const KeyRows& rows, int start, int end) {
  constexpr int CHUNKS = Shared::CHUNKS;
  for (int i = thread_index(); i < KEYS * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const bool there = start + row < end;
    const int key = there ? start + row : end - 1;
    const bf16* from = key < rows.split
                           ? rows.first + int64_t(key) * rows.first_stride
                           : rows.second + int64_t(key - rows.split) * rows.second_stride;
    copy_async(Shared::at(to, row, chunk), from + 8 * chunk, there);
  }
  copy_commit();
}

// Brings the block's rows of queries to shared memory, prepared. D / 8 neighbouring lanes share a row.
template <class Shared, int D, int ROWS, int THREADS, bool PREPARE>
DEVICE void load_query_rows(unsigned char* to, const AttentionStream& own, const AttentionWork& work,
                            int64_t batch, int64_t key_head, int64_t group) {
  for (int i = thread_index(); i < ROWS * Shared::CHUNKS; i += THREADS) {
    const int row = i / Shared::CHUNKS, chunk = i % Shared::CHUNKS;
    const int64_t r = work.row_first + row;
    const bool there = r < work.row_end;
    const int64_t token = (there ? r : work.row_first) / group;
    const int64_t head = key_head * group + (there ? r : work.row_first) % group;
    Words words = load_words(own.query + batch * own.query_batch + token * own.query_stride +
                             head * D + 8 * chunk);
    if constexpr (PREPARE) words = prepared_chunk<D>(words, own.prepare, token, chunk);
    if (!there) words = {{0, 0, 0, 0}};
    store_words(Shared::at(to, row, chunk), words);
  }
}

// A tile of 16 rows of a warp: two rows of a thread, as mma lays them out.
template <int D>
struct AttentionSums {
  float out[D / 8][4], maximum[2], sum[2];

  DEVICE void clear() {
    UNROLL
    for (int n = 0; n < D / 8; ++n) {
      UNROLL
      for (int part = 0; part < 4; ++part) out[n][part] = 0.0f;
    }
    maximum[0] = maximum[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  // Turns scores into weights and brings what was summed before to the new maximum.
  template <int KEYS>
  DEVICE void soften(float (&scores)[KEYS / 8][4], float factor) {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      float largest = -INFINITY;
      UNROLL
      for (int n = 0; n < KEYS / 8; ++n) {
        largest = fmaxf(largest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      }
      largest = fmaxf(maximum[half], max_lanes(largest, 4));
      // A row that sees nothing yet has minus infinity, which must not be subtracted from itself.
      const float base = largest == -INFINITY ? 0.0f : largest * factor;
      const float keep = exp2_fast(maximum[half] * factor - base);
      maximum[half] = largest;
      float added = 0.0f;
      UNROLL
      for (int n = 0; n < KEYS / 8; ++n) {
        UNROLL
        for (int part = 2 * half; part < 2 * half + 2; ++part) {
          scores[n][part] = exp2_fast(scores[n][part] * factor - base);
          added += scores[n][part];
        }
      }
      sum[half] = sum[half] * keep + added;
      UNROLL
      for (int n = 0; n < D / 8; ++n) {
        out[n][2 * half] *= keep;
        out[n][2 * half + 1] *= keep;
      }
    }
  }

  DEVICE void finish() {
    UNROLL
    for (int half = 0; half < 2; ++half) sum[half] = sum_lanes(sum[half], 4);
  }

  // Writes the 16 rows from `row` on to shared memory in bf16.
  template <class Shared>
  DEVICE void place(unsigned char* to, int row) const {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      const float share = sum[half] == 0.0f ? 0.0f : 1.0f / sum[half];
      UNROLL
      for (int n = 0; n < D / 8; ++n) {
        const uint32_t pair = pack_bf16(out[n][2 * half] * share, out[n][2 * half + 1] * share);
        unsigned char* at = Shared::at(to, row + 8 * half + (lane() >> 2), n);
        *reinterpret_cast<uint32_t*>(at + 4 * (lane() & 3)) = pair;
      }
    }
  }
};

// What sums with a largest score `maximum` count for in sums with `largest`.
DEVICE float part_of(float maximum, float largest, float factor) {
  return exp2_fast(maximum * factor - (largest == -INFINITY ? 0.0f : largest * factor));
}

// The weights of keys 16 * k .. 16 * k + 16 as the left operand of a product.
template <int KEYS>
DEVICE void weights_operand(uint32_t (&to)[4], const float (&scores)[KEYS / 8][4], int k) {
  const float(&left)[4] = scores[2 * k];
  const float(&right)[4] = scores[2 * k + 1];
  to[0] = pack_bf16(left[0], left[1]);
  to[1] = pack_bf16(left[2], left[3]);
  to[2] = pack_bf16(right[0], right[1]);
  to[3] = pack_bf16(right[2], right[3]);
}

// Copies a warp's `rows` rows from `first_row` on from shared memory to the output, in whole lines.
template <class Shared, int D>
DEVICE void write_rows(unsigned char* from, int first_row, int rows, const AttentionArgs& args,
                       const AttentionWork& work, int64_t batch, int64_t key_head, int64_t group) {
  const AttentionStream& own = args.stream[work.stream];
  for (int i = lane(); i < rows * Shared::CHUNKS; i += 32) {
    const int row = first_row + i / Shared::CHUNKS, chunk = i % Shared::CHUNKS;
    const int64_t r = work.row_first + row;
    if (r >= work.row_end) continue;
    const int64_t token = r / group, head = key_head * group + r % group;
    bf16* to = own.out + ((batch * own.query_rows + token) * args.heads + head) * D + 8 * chunk;
    store_words(to, load_words(Shared::at(from, row, chunk)));
  }
}

// Leaves sums in float32 for `attention_join`.
template <int D>
DEVICE void write_partial(const AttentionSums<D>& sums, int row, const AttentionArgs& args,
                          const AttentionWork& work, int64_t batch, int64_t key_head) {
  const int64_t rows = args.stream[work.stream].query_rows * args.group;
  const int64_t entry = (work.split * grid_z() + batch) * (args.heads / args.group) + key_head;
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t r = work.row_first + row + 8 * half + (lane() >> 2);
    if (r >= work.row_end) continue;
    float* to = args.partial + (entry * rows + r) * D;
    UNROLL
    for (int n = 0; n < D / 8; ++n) {
      to[8 * n + 2 * (lane() & 3)] = sums.out[n][2 * half];
      to[8 * n + 2 * (lane() & 3) + 1] = sums.out[n][2 * half + 1];
    }
    if ((lane() & 3) == 0) {
      args.partial_stats[2 * (entry * rows + r)] = sums.maximum[half];
      args.partial_stats[2 * (entry * rows + r) + 1] = sums.sum[half];
    }
  }
}

// Hides the keys of a tile from `seen` on, which each of a lane's two rows has its own of.
template <int KEYS>
DEVICE void hide_from(float (&scores)[KEYS / 8][4], const int (&seen)[2]) {
  UNROLL
  for (int half = 0; half < 2; ++half) {
    UNROLL
    for (int n = 0; n < KEYS / 8; ++n) {
      UNROLL
      for (int part = 0; part < 2; ++part) {
        if (8 * n + 2 * (lane() & 3) + part >= seen[half]) scores[n][2 * half + part] = -INFINITY;
      }
    }
  }
}

// Hides keys `start..start + KEYS` that rows from `first_row` on do not see.
template <int KEYS>
DEVICE void hide(float (&scores)[KEYS / 8][4], int start, int end, int64_t first_row, int64_t group,
                 bool causal, int64_t offset) {
  int seen[2];
  UNROLL
  for (int half = 0; half < 2; ++half) {
    seen[half] = end;
    const int64_t r = first_row + 8 * half + (lane() >> 2);
    if (causal) seen[half] = int(min64(end, r / group + offset + 1));
    seen[half] -= start;
  }
  hide_from<KEYS>(scores, seen);
}

template <int D, int WARPS, int ROW_TILES, int KEYS, bool PREPARE>
DEVICE void attention_block(const AttentionArgs& args) {
  using Tile = AttentionTile<D, WARPS, ROW_TILES, KEYS>;
  using Shared = SharedRows<D>;
  constexpr int ROWS = Tile::ROWS, THREADS = Tile::THREADS;
  unsigned char* query_rows = shared_memory();
  unsigned char* key_rows = query_rows + ROWS * Shared::ROW_BYTES;
  unsigned char* value_rows = key_rows + KEYS * Shared::ROW_BYTES;

  const AttentionWork work = attention_work<ROWS, KEYS>(args);
  const int64_t batch = block_z(), key_head = block_y();
  // Joint attention has neither groups nor a causal mask, nor shares of keys.
  const int64_t group = PREPARE ? 1 : args.group;
  const bool causal = !PREPARE && args.causal;
  const KeyRows keys = keys_of<D>(args, batch, key_head);
  const KeyRows values = values_of<D>(args, batch, key_head);
  if (work.key_first < work.key_end) {
    load_key_rows<Shared, KEYS, THREADS>(key_rows, keys, work.key_first, work.key_end);
  }
  load_query_rows<Shared, D, ROWS, THREADS, PREPARE>(query_rows, args.stream[work.stream], work,
                                                     batch, key_head, group);

  const int row_of_warp = warp() * ROW_TILES * 16;
  const float factor = float(args.scale * 1.4426950408889634);  // exp(x) = exp2(x / ln 2)
  AttentionSums<D> sums[ROW_TILES];
  UNROLL
  for (int m = 0; m < ROW_TILES; ++m) sums[m].clear();

  for (int start = work.key_first; start < work.key_end; start += KEYS) {
    copy_wait<0>();
    block_barrier();  // the keys are there, and nobody reads the last values any more
    load_key_rows<Shared, KEYS, THREADS>(value_rows, values, start, work.key_end);

    float scores[ROW_TILES][KEYS / 8][4];
    UNROLL
    for (int m = 0; m < ROW_TILES; ++m) {
      UNROLL
      for (int n = 0; n < KEYS / 8; ++n) {
        UNROLL
        for (int part = 0; part < 4; ++part) scores[m][n][part] = 0.0f;
      }
    }
    UNROLL
    for (int k = 0; k < D / 16; ++k) {
      uint32_t a[ROW_TILES][4];
      UNROLL
      for (int m = 0; m < ROW_TILES; ++m) {
        const int row = row_of_warp + 16 * m + (lane() & 15);
        load_matrices(a[m], Shared::at(query_rows, row, 2 * k + (lane() >> 4)));
      }
      UNROLL
      for (int n = 0; n < KEYS / 16; ++n) {
        uint32_t b[4];
        const int row = 16 * n + (lane() & 7) + 8 * (lane() >> 4);
        load_matrices(b, Shared::at(key_rows, row, 2 * k + ((lane() >> 3) & 1)));
        UNROLL
        for (int m = 0; m < ROW_TILES; ++m) {
          multiply_add(scores[m][2 * n], a[m], b[0], b[1]);
          multiply_add(scores[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }

    const int64_t first_token = (work.row_first + row_of_warp) / group;
    if (start + KEYS > work.key_end || (causal && start + KEYS > first_token + args.offset + 1)) {
      UNROLL
      for (int m = 0; m < ROW_TILES; ++m) {
        const int64_t first_row = work.row_first + row_of_warp + 16 * m;
        hide<KEYS>(scores[m], start, work.key_end, first_row, group, causal, args.offset);
      }
    }
    UNROLL
    for (int m = 0; m < ROW_TILES; ++m) sums[m].template soften<KEYS>(scores[m], factor);

    copy_wait<0>();
    block_barrier();  // the values are there, and nobody reads these keys any more
    if (start + KEYS < work.key_end) {
      load_key_rows<Shared, KEYS, THREADS>(key_rows, keys, start + KEYS, work.key_end);
    }
    UNROLL
    for (int k = 0; k < KEYS / 16; ++k) {
      uint32_t a[ROW_TILES][4];
      UNROLL
      for (int m = 0; m < ROW_TILES; ++m) weights_operand<KEYS>(a[m], scores[m], k);
      UNROLL
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        const int row = 16 * k + (lane() & 15);
        load_matrices_transposed(b, Shared::at(value_rows, row, 2 * n + (lane() >> 4)));
        UNROLL
        for (int m = 0; m < ROW_TILES; ++m) {
          multiply_add(sums[m].out[2 * n], a[m], b[0], b[1]);
          multiply_add(sums[m].out[2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  UNROLL
  for (int m = 0; m < ROW_TILES; ++m) sums[m].finish();
  if (!PREPARE && args.splits > 1) {
    UNROLL
    for (int m = 0; m < ROW_TILES; ++m) {
      write_partial<D>(sums[m], row_of_warp + 16 * m, args, work, batch, key_head);
    }
    return;
  }
  // The queries' place takes the output; a warp needs its own rows only. Without keys, others may
  // still write queries there.
  block_barrier();
  UNROLL
  for (int m = 0; m < ROW_TILES; ++m) {
    sums[m].template place<Shared>(query_rows, row_of_warp + 16 * m);
  }
  warp_barrier();
  write_rows<Shared, D>(query_rows, row_of_warp, 16 * ROW_TILES, args, work, batch, key_head, group);
}
