// Kernels that lack what would order their accesses to memory if `faulty`, to see that it is found (src/ops/cuda/races.rs).
#pragma once

struct FaultArgs {
  uint32_t* to;  // [64]
  int64_t faulty;
};

DEVICE uint32_t* shared_numbers() { return reinterpret_cast<uint32_t*>(shared_memory()); }

// Reads a neighbour's number before the barrier that it was written for.
KERNEL(fault_of_block_barrier, FaultArgs, 64, 1) {
  shared_numbers()[thread_index()] = uint32_t(thread_index());
  if (!args.faulty) block_barrier();
  args.to[thread_index()] = shared_numbers()[thread_index() ^ 32];
}
KERNEL(fault_of_warp_barrier, FaultArgs, 64, 1) {
  shared_numbers()[thread_index()] = uint32_t(thread_index());
  if (!args.faulty) warp_barrier();
  args.to[thread_index()] = shared_numbers()[thread_index() ^ 1];
}
// Writes over numbers that others may still read.
KERNEL(fault_of_reuse, FaultArgs, 64, 1) {
  shared_numbers()[thread_index()] = uint32_t(thread_index());
  block_barrier();
  args.to[thread_index()] = shared_numbers()[thread_index() ^ 32];
  if (!args.faulty) block_barrier();
  shared_numbers()[thread_index()] = 0;
}
// Arrives at a barrier where it should wait.
KERNEL(fault_of_named_barrier, FaultArgs, 64, 1) {
  shared_numbers()[thread_index()] = uint32_t(thread_index());
  if (args.faulty && thread_index() < 32) {
    named_barrier_arrive(1, 64);
  } else {
    named_barrier(1, 64);
  }
  args.to[thread_index()] = shared_numbers()[thread_index() ^ 32];
}
// Two blocks write the same bytes, though with the same numbers; halves of a word are no fault.
KERNEL(fault_of_blocks, FaultArgs, 64, 1) {
  const int64_t at = args.faulty ? 0 : block_x();
  reinterpret_cast<uint16_t*>(args.to)[64 * at + thread_index()] = uint16_t(thread_index());
}
// The last block to count reads what all have written, without a fence before they counted.
KERNEL(fault_of_fence, FaultArgs, 64, 1) {
  if (thread_index() == 0) args.to[1 + block_x()] = uint32_t(block_x());
  block_barrier();
  if (thread_index() > 0) return;
  if (!args.faulty) memory_fence();
  const uint32_t before = atomic_turn(args.to, uint32_t(grid_x()));
  memory_fence();
  if (before + 1 < grid_x()) return;
  for (int i = 0; i < grid_x(); ++i) args.to[32] = args.to[1 + i];
}
// Has a row copied over numbers of threads that were not published to the copy engine.
KERNEL(fault_of_publishing, FaultArgs, 64, 1) {
  CopyBarrier* arrived = reinterpret_cast<CopyBarrier*>(shared_memory() + 1024);
  if (thread_index() == 0) barrier_start(arrived);
  shared_numbers()[thread_index()] = 0;
  if (!args.faulty) publish_shared();
  block_barrier();
  if (thread_index() == 0) {
    barrier_expect(arrived, 256);
    copy_row(shared_memory(), args.to, 256, arrived);
  }
  barrier_wait(arrived, 0);
}
// Reads what the kernel before wrote before it is known to have ended.
KERNEL(fault_of_early_start, FaultArgs, 64, 1) {
  const uint32_t* from = args.to + (thread_index() ^ 1);
  uint32_t number = args.faulty ? *from : 0;
  wait_for_last_kernel();
  if (!args.faulty) number = *from;
  block_barrier();
  args.to[thread_index()] = number + 1;
}
