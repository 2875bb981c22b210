// What the operator library asks of the CUDA kernels. No torch and no CUDA header: pointers, sizes, strides in
// elements, and a stream. Both operators are planned first, then run in a workspace of the size that the plan asks for.
#pragma once
#include <cstdint>
#include <vector>

#include "schedule.h"

struct CUstream_st;

namespace eap::cuda {

// out[segment(n), u, v] += sum_d delta[u, n, d] * grad[v, n, d]   for u < reach[v]
struct EdgeScores {
  View delta;               // [S, N, D]
  View grad;                // [R, N, D]
  Dtype dtype;              // of delta and grad; out is fp64 for fp64, else fp32
  bool tf32;                // fp32 may be rounded to what the tensor cores multiply
  const int64_t* reach;     // [R], on the host
  const int64_t* segments;  // [N], on the host, or null for one segment
  void* out;                // [segments, S, R]
  int64_t out_stride[3];
  int device;

  bool tensor_memory = false;  // TMA and wgmma, else the portable kernel
  Schedule schedule{};
  std::vector<char> header{};  // the schedule as the device reads it

  Kind kind() const;
  int64_t steps_per_token() const;
  void plan();
  int64_t workspace() const;  // bytes
  void run(void* workspace, CUstream_st* stream) const;
};

// out[v, n, d] = base[v, n, d] + sum_u mask[u, v] * delta[u, n, d]
struct MaskedRead {
  View delta;        // [S, N, D]
  View base;         // [R, N, D]; receivers share it when stride[0] is 0
  Dtype dtype;       // of base, delta and out
  const void* mask;  // [S, R]
  MaskDtype mask_dtype;
  int64_t mask_stride[2];
  void* out;  // [R, N, D] contiguous
  int device;

  void plan() const {}        // only the device knows which edges are kept
  int64_t workspace() const;  // bytes
  void run(void* workspace, CUstream_st* stream) const;
};

}  // namespace eap::cuda
