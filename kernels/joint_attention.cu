// Attention of text and picture tokens to each other, for diffusion transformers.
//
// attention_joint_dD for D of 64 and 128, and 16 and 32 for small models: see attention.cuh. Queries are normalised and rotated
//   as they are loaded. Grid: (tiles of both streams' rows, key heads, b); 128 threads.
// prepare_keys_dD: RMS norm and rotation of rows [b][rows][heads][D], written
//   without gaps. Each key is read by every tile of queries, so preparing it once costs 2 passes over
//   the keys, where preparing it in each tile would cost a quarter of the attention.
//   Both streams' rows come one after the other: blocks before `blocks` have the first one's.
//   Grid: (chunks of 128 threads that cover rows * heads * D / 8 of each stream, 1, b).
#include "attention.cuh"

struct PrepareStream {
  const bf16* from;
  bf16* to;
  int64_t rows, stride, batch_stride;  // between tokens and batch entries of `from`
  Preparation prepare;
};

struct PrepareArgs {
  int64_t heads, blocks;  // of the first stream
  PrepareStream streams[2];
};

template <int D>
DEVICE void prepare_keys(const PrepareArgs& args) {
  constexpr int CHUNKS = D / 8;
  const bool second = block_x() >= args.blocks;
  const PrepareStream& own = args.streams[second ? 1 : 0];
  const int64_t chunks = own.rows * args.heads * CHUNKS;
  const int64_t i = (block_x() - (second ? args.blocks : 0)) * block_threads() + thread_index();
  const bool there = i < chunks;
  const int64_t row = (there ? i : 0) / CHUNKS;
  const int chunk = int(i % CHUNKS);
  const int64_t token = row / args.heads, head = row % args.heads;
  const bf16* from = own.from + block_z() * own.batch_stride + token * own.stride + head * D;
  const Words words = prepared_chunk<D>(load_words(from + 8 * chunk), own.prepare, token, chunk);
  if (there) store_words(own.to + (block_z() * own.rows * args.heads + row) * D + 8 * chunk, words);
}

KERNEL(attention_joint_d16, AttentionArgs, 128, 1) { attention_block<16, 4, 2, 64, true>(args); }
KERNEL(attention_joint_d32, AttentionArgs, 128, 1) { attention_block<32, 4, 2, 64, true>(args); }
KERNEL(attention_joint_d64, AttentionArgs, 128, 1) { attention_block<64, 4, 2, 64, true>(args); }
KERNEL(attention_joint_d128, AttentionArgs, 128, 1) { attention_block<128, 4, 2, 64, true>(args); }
KERNEL(prepare_keys_d16, PrepareArgs, 128, 1) { prepare_keys<16>(args); }
KERNEL(prepare_keys_d32, PrepareArgs, 128, 1) { prepare_keys<32>(args); }
KERNEL(prepare_keys_d64, PrepareArgs, 128, 1) { prepare_keys<64>(args); }
KERNEL(prepare_keys_d128, PrepareArgs, 128, 1) { prepare_keys<128>(args); }
