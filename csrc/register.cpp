// The operator library: checks tensors, hands pointers to the kernels, spreads tasks over torch's threads.
// The only file with torch headers; LibTorch stable ABI, so one build serves every torch from 2.10 on.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/convert.h"
#include "cpu/kernels.h"

namespace eap {
namespace {

Dtype dtype_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, op, ": expected float64, float32, bfloat16 or float16, got another dtype");
  }
}

View view(const Tensor& x) {
  return {x.const_data_ptr(), {x.size(0), x.size(1), x.size(2)}, {x.stride(0), x.stride(1), x.stride(2)}};
}

// Tasks differ in cost (staircase, sparsity), so threads draw them one by one; which thread runs one changes no result.
template <class Run> void run_tasks(int64_t tasks, const Run& run) {
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(task);
  });
}

void run(EdgeScores& kernel) {
  kernel.plan();
  run_tasks(kernel.tasks(), [&](int64_t task) { kernel.run(task); });
  run_tasks(kernel.merges(), [&](int64_t tile) { kernel.merge(tile); });
}

std::vector<int64_t> indices(const char* op, const char* name, const Tensor& x, int64_t count, int64_t high) {
  check_index(op, name, x, count);
  const int64_t* data = static_cast<const int64_t*>(x.const_data_ptr());
  std::vector<int64_t> values(count);
  for (int64_t i = 0; i < count; ++i) check_range(op, name, values[i] = data[i * x.stride(0)], 0, high);
  return values;
}

void edge_scores(Tensor delta, Tensor grad, Tensor reach, Tensor out, std::optional<Tensor> segments) {
  const char* op = "edge_scores";
  STD_TORCH_CHECK(delta.dim() == 3 && grad.dim() == 3, op, ": expected delta [S, N, D] and grad [R, N, D]");
  check_same(op, "grad", grad, delta, grad.size(0));
  const int64_t S = delta.size(0), R = grad.size(0), rank = segments ? 3 : 2;
  const Dtype dtype = dtype_of(op, delta);
  STD_TORCH_CHECK(out.dim() == rank && out.size(rank - 2) == S && out.size(rank - 1) == R,
                  op, ": expected out [S, R], or [segments, S, R] with segments");
  STD_TORCH_CHECK(out.scalar_type() == (dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float),
                  op, ": expected out in the accumulation dtype");
  const auto reach_values = indices(op, "reach", reach, R, S);
  std::vector<int64_t> segment_values;
  if (segments) segment_values = indices(op, "segments", *segments, delta.size(1), out.size(0) - 1);

  EdgeScores kernel{view(delta), view(grad), dtype, reach_values.data(), segments ? segment_values.data() : nullptr,
                    out.mutable_data_ptr(),
                    {segments ? out.stride(0) : 0, out.stride(rank - 2), out.stride(rank - 1)}, {}, {}, {}, {}, {}};
  run(kernel);
}

// The non-zeros of a mask [S, R], grouped by receiver.
struct Kept {
  std::vector<int64_t> first, sender;
  std::vector<double> weight;
  int64_t senders_used = 0;
};

template <class T> double value(const void* data, int64_t i) {
  if constexpr (std::is_class_v<T>) return load(static_cast<const T*>(data)[i]);
  else return static_cast<double>(static_cast<const T*>(data)[i]);
}

template <class T> Kept kept(const Tensor& mask) {
  const int64_t S = mask.size(0), R = mask.size(1), s0 = mask.stride(0), s1 = mask.stride(1);
  const void* data = mask.const_data_ptr();
  Kept k;
  k.first.assign(R + 1, 0);
  for (int64_t u = 0; u < S; ++u) {
    bool used = false;
    for (int64_t v = 0; v < R; ++v)
      if (value<T>(data, u * s0 + v * s1) != 0) ++k.first[v + 1], used = true;
    k.senders_used += used;
  }
  for (int64_t v = 0; v < R; ++v) k.first[v + 1] += k.first[v];
  k.sender.resize(k.first[R]);
  k.weight.resize(k.first[R]);
  std::vector<int64_t> next(k.first.begin(), k.first.end() - 1);
  for (int64_t u = 0; u < S; ++u)
    for (int64_t v = 0; v < R; ++v)
      if (const double w = value<T>(data, u * s0 + v * s1); w != 0) {
        k.sender[next[v]] = u;
        k.weight[next[v]++] = w;
      }
  return k;
}

Kept kept(const char* op, const Tensor& mask) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool: return kept<bool>(mask);
    case ScalarType::Double: return kept<double>(mask);
    case ScalarType::Float: return kept<float>(mask);
    case ScalarType::BFloat16: return kept<bf16>(mask);
    case ScalarType::Half: return kept<f16>(mask);
    default: STD_TORCH_CHECK(false, op, ": expected a bool or floating mask, got another dtype");
  }
}

Tensor masked_read(Tensor base, Tensor delta, Tensor mask) {
  const char* op = "masked_read";
  STD_TORCH_CHECK(delta.dim() == 3 && mask.dim() == 2 && mask.size(0) == delta.size(0),
                  op, ": expected delta [S, N, D] and mask [S, R]");
  const int64_t R = mask.size(1), N = delta.size(1), D = delta.size(2);
  const Dtype dtype = dtype_of(op, delta);
  STD_TORCH_CHECK(base.dim() == 2 || base.dim() == 3, op, ": expected base [N, D] or [R, N, D]");
  const bool shared = base.dim() == 2;
  STD_TORCH_CHECK((shared || base.size(0) == R) && base.size(!shared) == N && base.size(1 + !shared) == D &&
                      base.scalar_type() == delta.scalar_type(),
                  op, ": expected base [N, D] or [R, N, D] of delta's dtype");
  const View base_view{base.const_data_ptr(), {R, N, D},
                       {shared ? 0 : base.stride(0), base.stride(!shared), base.stride(1 + !shared)}};

  const Kept k = kept(op, mask);
  Tensor out = torch::stable::new_empty(delta, {R, N, D});
  MaskedRead kernel{view(delta), base_view, dtype, k.first.data(), k.sender.data(), k.weight.data(),
                    k.senders_used, out.mutable_data_ptr(), 0, 0};
  kernel.plan(torch::stable::get_num_threads());
  run_tasks(kernel.tasks(), [&](int64_t task) { kernel.run(task); });
  return out;
}

}  // namespace
}  // namespace eap

STABLE_TORCH_LIBRARY_IMPL(eap_kernels, CPU, m) {
  m.impl("edge_scores", TORCH_BOX(&eap::edge_scores));
  m.impl("masked_read", TORCH_BOX(&eap::masked_read));
}

// An empty module, so that importing it loads the library.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
