// Instructions that only compute capability 9.0 has: memory barriers with a byte count, TMA, wgmma.
#pragma once
#include "ptx.h"

namespace eap::cuda {

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the units that copy asynchronously; a __syncthreads follows.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}

// Arrives at the barrier in the same place of the shared memory of a block of the cluster.
__device__ __forceinline__ void barrier_arrive_in(int block, uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(barrier),
      "r"(block) : "memory");
}

// All threads of all blocks of the cluster meet.
__device__ __forceinline__ void cluster_sync() {
  __syncwarp();  // for .aligned
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Returns once the phase of this parity is over. A new barrier is in its phase 0, so parity 1 counts as over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity) : "memory");
}

// One box of a three-dimensional tensor; what lies outside the tensor arrives as zeros, and counts as bytes.
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, int x, int y, int z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier) : "memory");
}

// The same into each of these blocks of the cluster (bit i: block i), in the same place as here, and for the barrier in
// the same place.
__device__ __forceinline__ void tma_load_in(int blocks, uint32_t to, const CUtensorMap* map, int x, int y, int z,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(uint16_t(blocks)) : "memory");
}

// A counter in device memory, for all blocks; orders nothing else.
__device__ __forceinline__ void count_up(int32_t* counter) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
}
__device__ __forceinline__ int32_t count_of(const int32_t* counter) {
  int32_t count;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(__cvta_generic_to_global(counter)) : "memory");
  return count;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// A warpgroup gives registers back, down to this number a thread, or waits for them to become free.
template <int kRegisters> __device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Keeps the compiler from moving reads of accumulators above the wait that completes them.
template <int kCount> __device__ __forceinline__ void wgmma_settle(float (&c)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// c [64, 64 kSlabs] += a [64, k] . b [64 kSlabs, k]^T, k being 32 bytes
template <class T, int kSlabs>
__device__ __forceinline__ void wgmma(float (&c)[32 * kSlabs], uint64_t a, uint64_t b) {
#define EAP_C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define EAP_C16(i) EAP_C4(i), EAP_C4(i + 4), EAP_C4(i + 8), EAP_C4(i + 12)
#define EAP_SUMS1 EAP_C16(0), EAP_C16(16)
#define EAP_SUMS2 EAP_SUMS1, EAP_C16(32), EAP_C16(48)
#define EAP_SUMS3 EAP_SUMS2, EAP_C16(64), EAP_C16(80)
#define EAP_SUMS4 EAP_SUMS3, EAP_C16(96), EAP_C16(112)
#define EAP_REGISTERS1 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define EAP_REGISTERS2 EAP_REGISTERS1 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define EAP_REGISTERS3 EAP_REGISTERS2 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, " \
  "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define EAP_REGISTERS4 EAP_REGISTERS3 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
  // `A`, `B`: the places of the operands after the sums.
#define EAP_WGMMA(SLABS, N, A, B, K, TYPE, ORDER)                                             \
  asm volatile(                                                                               \
      "{\n"                                                                                   \
      ".reg .pred p;\n"                                                                       \
      "setp.ne.b32 p, 1, 0;\n"                                                                \
      "wgmma.mma_async.sync.aligned.m64n" N "k" K ".f32." TYPE "." TYPE " {" EAP_REGISTERS##SLABS \
      "}, %" A ", %" B ", p, 1, 1" ORDER ";\n"                                                 \
      "}\n"                                                                                   \
      : EAP_SUMS##SLABS                                                                       \
      : "l"(a), "l"(b)                                                                        \
      : "memory")
#define EAP_WGMMA_OF(K, TYPE, ORDER)                                                        \
  do {                                                                                      \
    if constexpr (kSlabs == 1) EAP_WGMMA(1, "64", "32", "33", K, TYPE, ORDER);        \
    else if constexpr (kSlabs == 2) EAP_WGMMA(2, "128", "64", "65", K, TYPE, ORDER);  \
    else if constexpr (kSlabs == 3) EAP_WGMMA(3, "192", "96", "97", K, TYPE, ORDER);  \
    else EAP_WGMMA(4, "256", "128", "129", K, TYPE, ORDER);                          \
  } while (0)
  // 16-bit types take flags for the operands' order; 32-bit types have only one order, which is ours.
  if constexpr (std::is_same_v<T, tf32>) EAP_WGMMA_OF("8", "tf32", "");
  else if constexpr (std::is_same_v<T, __half>) EAP_WGMMA_OF("16", "f16", ", 0, 0");
  else EAP_WGMMA_OF("16", "bf16", ", 0, 0");
#undef EAP_WGMMA_OF
#undef EAP_WGMMA
#undef EAP_REGISTERS4
#undef EAP_REGISTERS3
#undef EAP_REGISTERS2
#undef EAP_REGISTERS1
#undef EAP_SUMS4
#undef EAP_SUMS3
#undef EAP_SUMS2
#undef EAP_SUMS1
#undef EAP_C16
#undef EAP_C4
}

}  // namespace eap::cuda
