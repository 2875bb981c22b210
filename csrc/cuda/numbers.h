// Element types: what sums are kept in, and conversion from and to that.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

namespace eap::cuda {

// fp32 in memory; the tensor cores multiply 10 bits of its mantissa.
struct tf32 {
  float bits;
  tf32() = default;
  __device__ explicit tf32(float x) : bits(x) {}
};

template <class T> using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double load(double x) { return x; }
__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ float load(__half x) { return __half2float(x); }
__device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void store(double& to, double x) { to = x; }
__device__ __forceinline__ void store(float& to, float x) { to = x; }
__device__ __forceinline__ void store(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

}  // namespace eap::cuda
