// Attention with grouped queries: causal for the language model, in segments for the vision tower,
// and with the keys shared out to many blocks for a single token.
//
// attention_dD: see attention.cuh. Grid: (tiles of rows, key heads, b), or with segments (pieces, key
//   heads, b); 128 threads. D = 384 is the autoencoder's, with tiles of 32 keys: 2.6 ms for 16384 tokens on
//   an H200.
// attention_split_dD: one warp owns 16 rows (a token's query heads of one key head) and a share of the
//   keys, and leaves float32 sums behind. Grid: (tiles of rows * splits, key heads, b); 32 threads.
// attention_join: brings the shares together; rows [b][token][head][D].
//   Grid: (tokens * heads, 1, b); D threads rounded up to 32.
#include "attention.cuh"

KERNEL(attention_d16, AttentionArgs, 128, 1) { attention_block<16, 4, 1, 64, false>(args); }
KERNEL(attention_d32, AttentionArgs, 128, 1) { attention_block<32, 4, 1, 64, false>(args); }
KERNEL(attention_d64, AttentionArgs, 128, 1) { attention_block<64, 4, 1, 64, false>(args); }
KERNEL(attention_d80, AttentionArgs, 128, 1) { attention_block<80, 4, 1, 64, false>(args); }
KERNEL(attention_d128, AttentionArgs, 128, 1) { attention_block<128, 4, 1, 64, false>(args); }
KERNEL(attention_d384, AttentionArgs, 128, 1) { attention_block<384, 4, 1, 32, false>(args); }
KERNEL(attention_split_d16, AttentionArgs, 32, 1) { attention_block<16, 1, 1, 64, false>(args); }
KERNEL(attention_split_d32, AttentionArgs, 32, 1) { attention_block<32, 1, 1, 64, false>(args); }
KERNEL(attention_split_d64, AttentionArgs, 32, 1) { attention_block<64, 1, 1, 64, false>(args); }
KERNEL(attention_split_d80, AttentionArgs, 32, 1) { attention_block<80, 1, 1, 64, false>(args); }
KERNEL(attention_split_d128, AttentionArgs, 32, 1) { attention_block<128, 1, 1, 64, false>(args); }

struct JoinArgs {
  const float* partial;        // [split][b][key head][rows][D]
  const float* partial_stats;  // [split][b][key head][rows][2]
  bf16* out;                   // [b][token][head][D]
  int64_t splits, batches, tokens, heads, group, width;
  double scale;
};

KERNEL(attention_join, JoinArgs, 256, 1) {
  const int64_t token = block_x() / args.heads, head = block_x() % args.heads;
  const int64_t key_head = head / args.group, row = token * args.group + head % args.group;
  const int64_t key_heads = args.heads / args.group, rows = args.tokens * args.group;
  const float factor = float(args.scale * 1.4426950408889634);
  auto entry = [&](int64_t split) {
    return ((split * args.batches + block_z()) * key_heads + key_head) * rows + row;
  };
  float largest = -INFINITY;
  for (int64_t split = 0; split < args.splits; ++split) {
    largest = fmaxf(largest, args.partial_stats[2 * entry(split)]);
  }
  const float base = largest == -INFINITY ? 0.0f : largest * factor;
  if (thread_index() >= args.width) return;
  float sum = 0.0f, out = 0.0f;
  for (int64_t split = 0; split < args.splits; ++split) {
    const float share = exp2_fast(args.partial_stats[2 * entry(split)] * factor - base);
    sum += share * args.partial_stats[2 * entry(split) + 1];
    out += share * args.partial[entry(split) * args.width + thread_index()];
  }
  const int64_t at = ((block_z() * args.tokens + token) * args.heads + head) * args.width;
  args.out[at + thread_index()] = from_float<bf16>(sum == 0.0f ? 0.0f : out / sum);
}
