// The machine's side of hopper.cu for compute capability 9.0 with its own instructions: products of four
// warps, copies of whole tiles, and barriers that count what arrives.
// PTX ISA: https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once
#define HAS_GROUP_PRODUCTS 1

// The number of the warpgroup, known to be the same in all its lanes.
DEVICE int warp_group() { return __shfl_sync(0xffffffffu, threadIdx.x >> 7, 0); }

// Registers of the four warps' threads: fewer for those that only copy, more for those that multiply.
template <int count>
DEVICE void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
DEVICE void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// How a tensor with rows of heads lies in memory, and which tiles are copied: what cuTensorMapEncodeTiled made.
// Axes: 64 columns, rows, pieces of 64 columns, batch entries.
struct alignas(64) TileMap {
  uint64_t opaque[16];
};

// Copies a tile from row `row` and piece `piece` on, zeros where there are no rows, with the 128-byte
// swizzle. The barrier learns of the bytes.
DEVICE void copy_tile(void* to_shared, const TileMap& map, CountingBarrier* arrived, int row, int piece,
                      int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to_shared)),
      "l"(&map), "r"(shared_address(arrived)), "r"(0), "r"(row), "r"(piece), "r"(batch)
      : "memory");
}

// Where an operand of a warpgroup lies in shared memory, with rows of 128 bytes mixed as SharedRows<64> does
// (the 128-byte swizzle). `stride` is the distance of groups of eight rows; `leading` that of pieces of
// 64 columns, where columns are the longer side.
using SharedOperand = uint64_t;
DEVICE SharedOperand shared_operand(const void* at, int leading_bytes, int stride_bytes) {
  return uint64_t((shared_address(at) & 0x3ffff) >> 4) | uint64_t(leading_bytes >> 4) << 16 |
         uint64_t(stride_bytes >> 4) << 32 | uint64_t(1) << 62;
}

// What threads and asynchronous copies wrote to shared memory becomes visible to the products.
DEVICE void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Products that follow see what was written to their registers before.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `pending` of the group's commits are still under way.
template <int pending>
DEVICE void products_wait_for() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Nothing after this reads or changes `d` before this.
template <int N>
DEVICE void settle(float (&d)[N][4]) {
  UNROLL
  for (int n = 0; n < N; ++n) {
    UNROLL
    for (int part = 0; part < 4; ++part) asm volatile("" : "+f"(d[n][part])::"memory");
  }
}

#define SUMS_4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define SUMS_16(d, n) SUMS_4(d, n), SUMS_4(d, n + 1), SUMS_4(d, n + 2), SUMS_4(d, n + 3)
#define SUMS_64(d) SUMS_16(d, 0), SUMS_16(d, 4), SUMS_16(d, 8), SUMS_16(d, 12)
#define PLACES_48                                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                         \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define PLACES_64                                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                         \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "               \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PLACES_96                                                                                  \
  PLACES_64                                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

// d (+)= a · b, a: 64×16 by rows, b: 16×192 by columns, both in shared memory; a warp holds 16 rows of d
// as multiply_add lays them out. The products replace d unless `add`.
DEVICE void multiply_scores(float (&d)[24][4], SharedOperand a, SharedOperand b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" PLACES_96
      "}, %96, %97, p, 1, 1, 0, 0;\n}\n"
      : SUMS_64(d), SUMS_16(d, 16), SUMS_16(d, 20)
      : "l"(a), "l"(b), "r"(int(add)));
}

// The same with b: 16×96.
DEVICE void multiply_scores(float (&d)[12][4], SharedOperand a, SharedOperand b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {" PLACES_48
      "}, %48, %49, p, 1, 1, 0, 0;\n}\n"
      : SUMS_16(d, 0), SUMS_16(d, 4), SUMS_16(d, 8)
      : "l"(a), "l"(b), "r"(int(add)));
}

// d += a · b, a: 64×16 in registers, b: 16×128 by rows in shared memory.
DEVICE void multiply_values(float (&d)[16][4], const uint32_t (&a)[4], SharedOperand b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" PLACES_64
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
               : SUMS_64(d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
