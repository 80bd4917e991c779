// Attention of text and picture tokens to each other, for diffusion transformers.
//
// attention_joint_dD for D of 64 and 128, and 16 and 32 for small models: see attention.cuh. Queries are normalised and rotated
//   as they are loaded. Grid: (tiles of both streams' rows, key heads, b); 128 threads.
// prepare_keys_dD: RMS norm and rotation of rows [b][rows][heads][D], written
//   without gaps. Each key is read by every tile of queries, so preparing it once costs 2 passes over
//   the keys, where preparing it in each tile would cost a quarter of the attention.
//   Grid: (chunks of 128 threads that cover rows * heads * D / 8, 1, b).
#include "attention.cuh"

struct PrepareArgs {
  const bf16* from;
  bf16* to;
  int64_t rows, heads, stride, batch_stride;  // between tokens and batch entries of `from`
  int64_t to_batch_stride;
  Preparation prepare;
};

template <int D>
DEVICE void prepare_keys(const PrepareArgs& args) {
  constexpr int CHUNKS = D / 8;
  const int64_t chunks = args.rows * args.heads * CHUNKS;
  const int64_t i = block_x() * block_threads() + thread_index();
  const bool there = i < chunks;
  const int64_t row = (there ? i : 0) / CHUNKS;
  const int chunk = int(i % CHUNKS);
  const int64_t token = row / args.heads, head = row % args.heads;
  const bf16* from = args.from + block_z() * args.batch_stride + token * args.stride + head * D;
  const Words words = prepared_chunk<D>(load_words(from + 8 * chunk), args.prepare, token, chunk);
  if (there) store_words(args.to + block_z() * args.to_batch_stride + row * D + 8 * chunk, words);
}

KERNEL(attention_joint_d16, AttentionArgs, 128, 1) { attention_block<16, 4, 2, 64, true>(args); }
KERNEL(attention_joint_d32, AttentionArgs, 128, 1) { attention_block<32, 4, 2, 64, true>(args); }
KERNEL(attention_joint_d64, AttentionArgs, 128, 1) { attention_block<64, 4, 2, 64, true>(args); }
KERNEL(attention_joint_d128, AttentionArgs, 128, 1) { attention_block<128, 4, 2, 64, true>(args); }
KERNEL(prepare_keys_d16, PrepareArgs, 128, 1) { prepare_keys<16>(args); }
KERNEL(prepare_keys_d32, PrepareArgs, 128, 1) { prepare_keys<32>(args); }
KERNEL(prepare_keys_d64, PrepareArgs, 128, 1) { prepare_keys<64>(args); }
KERNEL(prepare_keys_d128, PrepareArgs, 128, 1) { prepare_keys<128>(args); }
