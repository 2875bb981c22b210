// Tensors as the kernels take them: pointers, sizes, strides, and small index tensors as values. What memory safety
// rests on is checked; the Python wrappers report the same mistakes earlier, in one sentence.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "cpu/kernels.h"

namespace eap {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, op, ": expected float64, float32, bfloat16 or float16, got another dtype");
  }
}

inline ScalarType accumulation_type(Dtype dtype) {
  return accumulation(dtype) == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
}

inline MaskDtype mask_dtype_of(const char* op, const Tensor& mask) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool: return MaskDtype::boolean;
    case ScalarType::Double: return MaskDtype::f64;
    case ScalarType::Float: return MaskDtype::f32;
    case ScalarType::BFloat16: return MaskDtype::bf16;
    case ScalarType::Half: return MaskDtype::f16;
    default: STD_TORCH_CHECK(false, op, ": expected a bool or floating mask, got another dtype");
  }
}

inline View view(const Tensor& x) {
  return {x.const_data_ptr(), {x.size(0), x.size(1), x.size(2)}, {x.stride(0), x.stride(1), x.stride(2)}};
}

inline std::vector<int64_t> indices(const char* op, const char* name, const Tensor& x, int64_t count, int64_t high) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 1 && x.size(0) == count && x.scalar_type() == ScalarType::Long, op,
                  ": expected ", name, " to be an int64 vector of ", count, " values on the CPU");
  const int64_t* data = static_cast<const int64_t*>(x.const_data_ptr());
  std::vector<int64_t> values(count);
  for (int64_t i = 0; i < count; ++i) {
    values[i] = data[i * x.stride(0)];
    STD_TORCH_CHECK(0 <= values[i] && values[i] <= high, op, ": expected ", name, " within [0, ", high, "], got ",
                    values[i]);
  }
  return values;
}

// What edge_scores takes besides its two operands, checked.
struct EdgeScoresRest {
  Dtype dtype;
  std::vector<int64_t> reach, segments;
  int64_t out_stride[3];  // segment, sender, receiver

  const int64_t* segment_data() const { return segments.empty() ? nullptr : segments.data(); }
};

inline EdgeScoresRest check_edge_scores(const char* op, const Tensor& delta, const Tensor& grad, const Tensor& reach,
                                        const Tensor& out, const std::optional<Tensor>& segments) {
  STD_TORCH_CHECK(delta.dim() == 3 && grad.dim() == 3 && grad.size(1) == delta.size(1) &&
                      grad.size(2) == delta.size(2) && grad.scalar_type() == delta.scalar_type(),
                  op, ": expected delta [S, N, D] and grad [R, N, D] of one dtype");
  const int64_t S = delta.size(0), R = grad.size(0), rank = segments ? 3 : 2;
  const Dtype dtype = dtype_of(op, delta);
  STD_TORCH_CHECK(out.dim() == rank && out.size(rank - 2) == S && out.size(rank - 1) == R, op,
                  ": expected out [S, R], or [segments, S, R] with segments");
  STD_TORCH_CHECK(out.scalar_type() == accumulation_type(dtype), op, ": expected out in the accumulation dtype");
  auto reach_values = indices(op, "reach", reach, R, S);
  std::vector<int64_t> segment_values;
  if (segments) segment_values = indices(op, "segments", *segments, delta.size(1), out.size(0) - 1);
  return {dtype,
          std::move(reach_values),
          std::move(segment_values),
          {segments ? out.stride(0) : 0, out.stride(rank - 2), out.stride(rank - 1)}};
}

// What masked_read takes besides delta, checked.
struct MaskedReadRest {
  Dtype dtype;
  MaskDtype mask_dtype;
  View base;  // [R, N, D]; receivers share it when stride[0] is 0
};

inline MaskedReadRest check_masked_read(const char* op, const Tensor& base, const Tensor& delta, const Tensor& mask) {
  STD_TORCH_CHECK(delta.dim() == 3 && mask.dim() == 2 && mask.size(0) == delta.size(0), op,
                  ": expected delta [S, N, D] and mask [S, R]");
  STD_TORCH_CHECK(base.dim() == 2 || base.dim() == 3, op, ": expected base [N, D] or [R, N, D]");
  const int64_t R = mask.size(1), N = delta.size(1), D = delta.size(2);
  const bool shared = base.dim() == 2;
  STD_TORCH_CHECK((shared || base.size(0) == R) && base.size(!shared) == N && base.size(1 + !shared) == D &&
                      base.scalar_type() == delta.scalar_type(),
                  op, ": expected base [N, D] or [R, N, D] of delta's dtype");
  return {dtype_of(op, delta),
          mask_dtype_of(op, mask),
          {base.const_data_ptr(),
           {R, N, D},
           {shared ? 0 : base.stride(0), base.stride(!shared), base.stride(1 + !shared)}}};
}

}  // namespace eap
