// Calls to the CUDA runtime, each with its error turned into an exception.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace eap::cuda {

inline void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that is reported is not left behind for somebody else's call
  throw std::runtime_error(std::string(op) + ": expected CUDA to run it, got: " + cudaGetErrorString(error));
}

inline int device_attribute(const char* op, cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(op, cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// `cluster`: of this many blocks, which run at the same time and reach each other's shared memory.
template <class... Parameters, class... Arguments>
void launch_clusters(const char* op, int cluster, void (*kernel)(Parameters...), dim3 grid, int threads,
                     int shared_bytes, CUstream_st* stream, const Arguments&... arguments) {
  if (shared_bytes > 48 << 10)
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;
  check(op, cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
            CUstream_st* stream, const Arguments&... arguments) {
  launch_clusters(op, 1, kernel, grid, threads, shared_bytes, stream, arguments...);
}

// Arrays of a workspace begin at multiples of this many bytes, as allocations do.
inline int64_t padded(int64_t bytes) { return divide_up(bytes, 256) * 256; }

// Whether rows of features lie in aligned pieces of 16 bytes.
inline bool in_pieces(const View& x, int element_bytes) {
  const int64_t piece = 16 / element_bytes;
  return x.stride[2] == 1 && x.stride[0] % piece == 0 && x.stride[1] % piece == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

}  // namespace eap::cuda
