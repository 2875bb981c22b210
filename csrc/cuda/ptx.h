// Instructions that C++ cannot express, one function each, and shared memory by its 32-bit address.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "numbers.h"

namespace eap::cuda {

__device__ __forceinline__ uint32_t shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return uint32_t(__cvta_generic_to_shared(memory));
}

template <class V> __device__ __forceinline__ V load_shared(uint32_t address) {
  return *static_cast<const V*>(__cvta_shared_to_generic(address));
}

template <class V> __device__ __forceinline__ void store_shared(uint32_t address, const V& value) {
  *static_cast<V*>(__cvta_shared_to_generic(address)) = value;
}

// Copies 16 bytes: the first `bytes` from memory, then zeros.
__device__ __forceinline__ void cp_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ uint32_t rounded_to_tf32(uint32_t x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(x)));
  return rounded;
}

// c [16, 8] += a [16, k] . b [8, k]^T, k being 32 bytes
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define EAP_MMA(K, TYPE)                                                              \
  asm volatile("mma.sync.aligned.m16n8k" K ".row.col.f32." TYPE "." TYPE              \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, tf32>) EAP_MMA("8", "tf32");
  else if constexpr (std::is_same_v<T, __half>) EAP_MMA("16", "f16");
  else EAP_MMA("16", "bf16");
#undef EAP_MMA
}

}  // namespace eap::cuda
