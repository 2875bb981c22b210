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

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
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
__device__ __forceinline__ void wgmma_settle(float (&c)[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// c [64, 128] = a [64, k] . b [128, k]^T, k being 32 bytes, plus c itself where `add` is not 0.
template <class T> __device__ __forceinline__ void wgmma(float (&c)[64], uint64_t a, uint64_t b, int add) {
#define EAP_C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define EAP_C16(i) EAP_C4(i), EAP_C4(i + 4), EAP_C4(i + 8), EAP_C4(i + 12)
#define EAP_WGMMA(K, TYPE, ORDER)                                                                                  \
  asm volatile(                                                                                                    \
      "{\n"                                                                                                        \
      ".reg .pred p;\n"                                                                                            \
      "setp.ne.b32 p, %66, 0;\n"                                                                                   \
      "wgmma.mma_async.sync.aligned.m64n128k" K ".f32." TYPE "." TYPE                                              \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "     \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, "  \
      "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "%64, %65, p, 1, 1" ORDER ";\n"                                                                              \
      "}\n"                                                                                                        \
      : EAP_C16(0), EAP_C16(16), EAP_C16(32), EAP_C16(48)                                                          \
      : "l"(a), "l"(b), "r"(add)                                                                                   \
      : "memory")
  // 16-bit types take flags for the operands' order; 32-bit types have only one order, which is ours.
  if constexpr (std::is_same_v<T, tf32>) EAP_WGMMA("8", "tf32", "");
  else if constexpr (std::is_same_v<T, __half>) EAP_WGMMA("16", "f16", ", 0, 0");
  else EAP_WGMMA("16", "bf16", ", 0, 0");
#undef EAP_WGMMA
#undef EAP_C16
#undef EAP_C4
}

}  // namespace eap::cuda
