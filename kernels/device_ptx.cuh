// The machine's side of device.cuh for the CUDA compiler, compute capability 8.0 and later.
// PTX ISA: https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
// A kernel `name(args)`; its arguments are one struct of 8-byte fields. At least `blocks` of its blocks
// are to fit a multiprocessor, as far as registers go.
#define KERNEL(name, Args, threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) \
      name(const __grid_constant__ Args args)

// The block's dynamic shared memory, aligned to 1024 bytes.
DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  return shared_bytes;
}

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_threads() { return blockDim.x; }
DEVICE int lane() { return threadIdx.x & 31; }
DEVICE int warp() { return threadIdx.x >> 5; }
DEVICE int64_t block_x() { return blockIdx.x; }
DEVICE int64_t block_y() { return blockIdx.y; }
DEVICE int64_t block_z() { return blockIdx.z; }
DEVICE int64_t grid_x() { return gridDim.x; }
DEVICE int64_t grid_z() { return gridDim.z; }

DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }
// A barrier of `threads` threads with a number from 1 to 15; whoever only arrives goes on.
DEVICE void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
DEVICE void named_barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE float shuffle(float x, int from) { return __shfl_sync(0xffffffffu, x, from); }
// Counts to `count` and begins anew; returns what was there before.
DEVICE uint32_t atomic_turn(uint32_t* at, uint32_t count) { return atomicInc(at, count - 1); }
// What this thread wrote, or what other threads wrote before a barrier that it has passed, is seen by other blocks before what
// this thread writes after this.
DEVICE void memory_fence() { __threadfence(); }

// A count in global memory that all blocks of a grid add to, where all of them run at a time. What a block wrote before
// its barrier and `grid_arrive` by one of its threads is seen by blocks of which one thread has waited for that.
DEVICE uint64_t grid_count(const uint64_t* count) {
  uint64_t found;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];"
               : "=l"(found)
               : "l"(__cvta_generic_to_global(count))
               : "memory");
  return found;
}
DEVICE void grid_arrive(uint64_t* count) {
  asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(__cvta_generic_to_global(count)) : "memory");
}
DEVICE void grid_wait(const uint64_t* count, uint64_t target) {
  while (grid_count(count) < target) {
  }
}

// Four bytes that are handed to other blocks with a tag beside them, as one number of eight: who finds the tag has the bytes.
DEVICE void store_tagged(uint64_t* to, uint32_t bits, uint32_t tag) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)),
               "l"(uint64_t(tag) << 32 | bits)
               : "memory");
}
// Two of them side by side, from a multiple of 16 on.
DEVICE void load_tagged(uint64_t (&two)[2], const uint64_t* from) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(two[0]), "=l"(two[1])
               : "l"(__cvta_generic_to_global(from))
               : "memory");
}
// Before what was not there is looked for again.
DEVICE void let_others_go_on() {}

// Kernels that are queued to overlap (compute capability 9.0): the next one may start, and waits there
// until all before it have ended and their writes are seen.
DEVICE void release_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_last_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// 2 to the power of x, within 2 units in the last place.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x, within one unit in the last place; 0 where it would be subnormal.
DEVICE float inverse_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float inverse_root(float x) { return rsqrtf(x); }
// Not a number where one of them is not.
DEVICE float max_or_nan(float x, float y) {
  float to;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(to) : "f"(x), "f"(y));
  return to;
}

// Two numbers rounded to nearest even; `low` comes to the lower address.
DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define HAS_E4M3
// Two numbers of e4m3, to nearest even and no further than the largest.
DEVICE uint32_t convert_to_e4m3(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif

// 16 bytes to global memory in one piece, which the compiler may otherwise split.
DEVICE void write_words(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// A pair of bf16 times another, each rounded once.
DEVICE uint32_t scale_bf16(uint32_t pair, uint32_t by) {
  uint32_t scaled;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(scaled) : "r"(pair), "r"(by), "r"(0x80008000u));
  return scaled;
}

// The difference of two pairs of bf16, each rounded once.
DEVICE uint32_t subtract_bf16(uint32_t from, uint32_t what) {
  uint32_t pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(what), "r"(0xbf80bf80u), "r"(from));
  return pair;
}

// Loads that pass by the multiprocessor's own cache, which may hold what was there before.
DEVICE float load_fresh(const float* from) { return __ldcg(from); }
DEVICE void load_fresh(uint32_t (&to)[4], const void* from) {
  const uint4 words = __ldcg(static_cast<const uint4*>(from));
  to[0] = words.x;
  to[1] = words.y;
  to[2] = words.z;
  to[3] = words.w;
}

// The sums of two pairs of bf16.
DEVICE uint32_t add_bf16_pairs(uint32_t a, uint32_t b) {
  uint32_t sums;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sums) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return sums;
}

DEVICE uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Four 8×8 matrices of bf16. Lane i gives the address of row i % 8 of matrix i / 8, and gets
// elements 2 (i % 4) and 2 (i % 4) + 1 of row i / 4 of each.
DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed: rows 2 (i % 4) and 2 (i % 4) + 1 of column i / 4.
DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a · b with a: 16×16 (rows), b: 16×8 (columns), d: 16×8, as mma.sync m16n8k16 lays them out.
DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a · b with a: 16×32 bytes (rows), b: 32×8 signed bytes (columns), d: 16×8, as mma.sync m16n8k32 lays
// them out; the bytes of `a` are signed or not.
template <bool is_signed>
DEVICE void multiply_add_bytes(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if (is_signed) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}
// Four of the eight bytes of `low` and `high`: those that the four lower digits of `which` name.
DEVICE uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t which) {
  return __byte_perm(low, high, which);
}
// The lower half of a word as an IEEE half, widened.
DEVICE float widen_half(uint32_t word) {
  float y;
  asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(y) : "r"(word));
  return y;
}
// 16 bytes that nothing writes while the kernel runs and that are read once; what follows is asked for too.
DEVICE void load_once(uint32_t (&to)[4], const void* from) {
  asm volatile("ld.global.nc.L1::evict_first.L2::256B.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(__cvta_generic_to_global(from)));
}

// Copies of whole rows, by the copy engine where there is one (compute capability 9.0): `barrier` is done
// when one thread has said how many bytes it expects and they have come. Elsewhere by the threads.
using CopyBarrier = uint64_t;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
DEVICE void barrier_start(CopyBarrier* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.proxy.async.shared::cta;" ::"r"(
                   shared_address(barrier))
               : "memory");
}
DEVICE void barrier_expect(CopyBarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
DEVICE void copy_row(void* to_shared, const void* from, int bytes, CopyBarrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to_shared)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
DEVICE void barrier_wait(CopyBarrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}

#define HAS_COUNTING_BARRIERS
// True in one lane of the warp, of which the compiler knows that it is one.
DEVICE bool elected() {
  uint32_t is_it;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(is_it));
  return is_it != 0;
}
// A number that would otherwise be read again where it comes from.
DEVICE void keep_in_register(int& number) { asm volatile("" : "+r"(number)); }
// A barrier in shared memory. A phase ends when `count` threads have arrived and all announced bytes have.
using CountingBarrier = uint64_t;
DEVICE void barrier_start(CountingBarrier* at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(count)
               : "memory");
}
// After this and a barrier of the block, all barriers are known to all threads and to copies.
DEVICE void barriers_started() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void barrier_arrive(CountingBarrier* at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}
DEVICE void barrier_arrive_expecting(CountingBarrier* at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)),
               "r"(bytes)
               : "memory");
}
// Waits for the end of a phase of the given parity; the first phase has parity 0, and the one before it
// counts as ended.
DEVICE void barrier_wait(CountingBarrier* at, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nwait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni ended;\nbra.uni wait;\nended:\n}\n" ::"r"(shared_address(at)),
      "r"(parity)
      : "memory");
}

// How a matrix lies in memory and which boxes of it are copied, what cuTensorMapEncodeTiled made of words of 4 bytes: in global memory,
// at a multiple of 64.
struct alignas(64) BoxMap {
  uint64_t opaque[16];
};
// For one thread of each block before a barrier of the block, after which its threads copy.
DEVICE void map_ready(const BoxMap* map) {
  if (map) asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}
DEVICE void prefetch_map(const BoxMap* map) {
  if (map) asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Copies a box from a word of a row on, zeros where the matrix has nothing; the barrier learns of the bytes.
DEVICE void copy_box(void* to_shared, const BoxMap* map, int word, int row, CountingBarrier* arrived) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared_address(to_shared)),
      "l"(map), "r"(shared_address(arrived)), "r"(word), "r"(row)
      : "memory");
}

// Whether waiting would take no time.
DEVICE bool barrier_ready(CountingBarrier* at, int parity) {
  uint32_t ready;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}\n"
      : "=r"(ready)
      : "r"(shared_address(at)), "r"(parity)
      : "memory");
  return ready != 0;
}
#else
DEVICE void barrier_start(CopyBarrier*) {}
DEVICE void barrier_expect(CopyBarrier*, int) {}
DEVICE void copy_row(void* to_shared, const void* from, int bytes, CopyBarrier*) {
  for (int at = 0; at < bytes; at += 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to_shared) + at),
                 "l"(__cvta_generic_to_global(from) + at)
                 : "memory");
  }
}
DEVICE void barrier_wait(CopyBarrier*, uint32_t) {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}
#endif

// Copies 16 bytes from global to shared memory behind the thread's back, zeros if not `there`;
// `from` must be a valid address all the same.
DEVICE void copy_async(void* to_shared, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)),
               "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
               : "memory");
}
// Copies the first `bytes` of 16, and zeros for the rest.
DEVICE void copy_async_some(void* to_shared, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are still under way.
template <int pending>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "device_hopper_ptx.cuh"
#endif
