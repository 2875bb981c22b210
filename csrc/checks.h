// What the kernels rely on for memory safety. The Python wrappers report the same mistakes earlier, in one sentence.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace eap {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_same(const char* op, const char* name, const Tensor& x, const Tensor& delta, int64_t size0) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == size0 && x.size(1) == delta.size(1) && x.size(2) == delta.size(2), op,
                  ": expected ", name, " to agree with delta in tokens and features, got another shape");
  STD_TORCH_CHECK(x.scalar_type() == delta.scalar_type(), op, ": expected ", name, " of delta's dtype, got another");
}

inline void check_index(const char* op, const char* name, const Tensor& x, int64_t count) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 1 && x.size(0) == count && x.scalar_type() == ScalarType::Long, op,
                  ": expected ", name, " to be an int64 vector of ", count, " values on the CPU");
}

inline void check_range(const char* op, const char* name, int64_t value, int64_t low, int64_t high) {
  STD_TORCH_CHECK(low <= value && value <= high, op, ": expected ", name, " within [", low, ", ", high, "], got ",
                  value);
}

}  // namespace eap
