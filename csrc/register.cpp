// The operators for CPU tensors: checks, pointers for the kernels, tasks spread over torch's threads. LibTorch stable
// ABI, so one build serves every torch from 2.10 on.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/convert.h"
#include "cpu/kernels.h"
#include "tensors.h"

namespace eap {
namespace {

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

// Nothing is rounded to tf32 here: the last argument is for GPUs.
void edge_scores(Tensor delta, Tensor grad, Tensor reach, Tensor out, std::optional<Tensor> segments, bool) {
  const char* op = "edge_scores";
  const EdgeScoresRest rest = check_edge_scores(op, delta, grad, reach, out, segments);
  EdgeScores kernel{view(delta),
                    view(grad),
                    rest.dtype,
                    rest.reach.data(),
                    rest.segment_data(),
                    out.mutable_data_ptr(),
                    {rest.out_stride[0], rest.out_stride[1], rest.out_stride[2]}};
  run(kernel);
}

// What a slice of expanded rows may fill: it is written once and read a few times, so it should stay in cache.
constexpr int64_t kSliceBytes = 48 << 20;

// Tokens and features of a slice of about `elements` per row: nearly square, since expanding reads both sides. Every
// slice reads the weights, however few its tokens are, so all are of equal size.
std::pair<int64_t, int64_t> slice_shape(int64_t elements, int64_t N, int64_t D) {
  constexpr int64_t kFewest = 64, kMost = 384;  // features: short rows are read slowly, long ones crowd the cache
  const auto part = [](int64_t size, int64_t most) { return divide_up(size, divide_up(size, most)); };
  int64_t side = 1;
  while (side * side < elements) ++side;
  const int64_t wanted = std::clamp(elements / part(N, side), kFewest, kMost) / 32 * 32;
  const int64_t width = std::min(D, divide_up(part(D, wanted), 32) * 32);
  return {part(N, std::max<int64_t>(1, elements / width)), width};
}

Nodes nodes(const char* op, const Tensor& values, const Tensor& weight, const Tensor& coefficients,
            const Tensor& normalised, const Tensor& like, int64_t first, int64_t N, int64_t D) {
  STD_TORCH_CHECK(values.dim() == 3 && values.size(0) == N, op, ": expected values [N, h, K] of ", N, " tokens");
  const int64_t h = values.size(1), K = values.size(2);
  const bool direct = weight.dim() != 3;
  for (const Tensor* x : {&values, &weight, &coefficients, &normalised})
    STD_TORCH_CHECK(x->is_cpu() && (x->numel() == 0 || x->scalar_type() == like.scalar_type()), op,
                    ": expected all operands on the CPU and of one dtype");
  STD_TORCH_CHECK(direct ? K == D
                         : weight.size(0) > 0 && h % weight.size(0) == 0 && weight.size(1) == K && weight.size(2) == D,
                  op, ": expected weight [g, K, D] with g a divisor of h, or values [N, h, D] without it");
  Nodes g{first, {values.const_data_ptr(), {h, N, K}, {values.stride(1), values.stride(0), values.stride(2)}}};
  if (!direct) {
    g.weight = view(weight);
    g.per_weight = h / weight.size(0);
  }
  if (normalised.dim() == 3) {
    STD_TORCH_CHECK(normalised.size(1) == N && normalised.size(2) == D && coefficients.dim() == 3 &&
                        coefficients.size(0) == h && coefficients.size(1) == normalised.size(0) &&
                        coefficients.size(2) == N,
                    op, ": expected coefficients [h, M, N] and normalised [M, N, D]");
    g.coefficients = view(coefficients);
    g.normalised = view(normalised);
  }
  return g;
}

void head_space_scores(std::vector<Tensor> values, std::vector<Tensor> weights, std::vector<Tensor> coefficients,
                       std::vector<Tensor> normalised, int64_t sender_groups, int64_t features, Tensor reach,
                       Tensor out, int64_t workspace) {
  const char* op = "head_space_scores";
  const size_t count = values.size();
  STD_TORCH_CHECK(count > 0 && weights.size() == count && coefficients.size() == count && normalised.size() == count &&
                      0 < sender_groups && sender_groups < int64_t(count),
                  op, ": expected one weight, coefficients and normalised for each of the groups of both sides");
  STD_TORCH_CHECK(values[0].dim() == 3, op, ": expected values [N, h, K]");
  const int64_t N = values[0].size(0), D = features;
  const Dtype dtype = dtype_of(op, values[0]);
  std::vector<Nodes> groups;
  int64_t rows = 0, S = 0;
  for (size_t i = 0; i < count; ++i) {
    groups.push_back(nodes(op, values[i], weights[i], coefficients[i], normalised[i], values[0], rows, N, D));
    rows += values[i].size(1);
    if (int64_t(i) + 1 == sender_groups) S = rows;
  }
  const int64_t R = rows - S;
  const auto reach_values = indices(op, "reach", reach, R, S);
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == S && out.size(1) == R &&
                      out.scalar_type() == accumulation_type(dtype),
                  op, ": expected out [S, R] in the accumulation dtype");
  if (rows == 0 || N == 0 || D == 0) return;

  const Dtype wide = accumulation(dtype);
  const int64_t element = bytes_of(wide), budget = std::min(workspace, kSliceBytes);
  const auto [tokens, width] = slice_shape(std::max<int64_t>(64, budget / (rows * element)), N, D);
  Tensor space = torch::stable::new_empty(out, {rows, tokens * width});
  char* const data = static_cast<char*>(space.mutable_data_ptr());
  const int64_t row = tokens * width;
  for (int64_t d = 0; d < D; d += width)
    for (int64_t n = 0; n < N; n += tokens) {
      const Expand expand{.groups = groups.data(),
                          .n_groups = int64_t(count),
                          .dtype = dtype,
                          .token = n,
                          .tokens = std::min(tokens, N - n),
                          .feature = d,
                          .features = std::min(width, D - d),
                          .out = data,
                          .out_stride = row};
      run_tasks(expand.tasks(), [&](int64_t task) { expand.run(task); });
      const int64_t inner = expand.tokens * expand.features;
      EdgeScores kernel{{data, {S, 1, inner}, {row, inner, 1}},
                        {data + S * row * element, {R, 1, inner}, {row, inner, 1}},
                        wide,
                        reach_values.data(),
                        nullptr,
                        out.mutable_data_ptr(),
                        {0, out.stride(0), out.stride(1)}};
      run(kernel);
    }
}

// The non-zeros of a mask [S, R], grouped by receiver.
struct Kept {
  std::vector<int64_t> first, sender;
  std::vector<double> weight;
};

template <class T> double value(const void* data, int64_t i) {
  if constexpr (std::is_class_v<T>) return load(static_cast<const T*>(data)[i]);
  else return static_cast<double>(static_cast<const T*>(data)[i]);
}

// The numbers of a small tensor of one or two dimensions.
std::vector<double> numbers(const char* op, const Tensor& x) {
  const int64_t rows = x.dim() == 2 ? x.size(0) : 1, columns = x.size(x.dim() - 1);
  const int64_t s0 = x.dim() == 2 ? x.stride(0) : 0, s1 = x.stride(x.dim() - 1);
  const void* const data = x.const_data_ptr();
  const Dtype dtype = dtype_of(op, x);
  std::vector<double> found(rows * columns);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0, at = i * s0; j < columns; ++j, at += s1) {
      double& to = found[i * columns + j];
      switch (dtype) {
        case Dtype::f64: to = value<double>(data, at); break;
        case Dtype::f32: to = value<float>(data, at); break;
        case Dtype::bf16: to = value<bf16>(data, at); break;
        case Dtype::f16: to = value<f16>(data, at); break;
      }
    }
  return found;
}

template <class T> Kept kept(const Tensor& mask) {
  const int64_t S = mask.size(0), R = mask.size(1), s0 = mask.stride(0), s1 = mask.stride(1);
  const void* data = mask.const_data_ptr();
  Kept k;
  k.first.assign(R + 1, 0);
  for (int64_t u = 0; u < S; ++u)
    for (int64_t v = 0; v < R; ++v)
      if (value<T>(data, u * s0 + v * s1) != 0) ++k.first[v + 1];
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

Kept kept(const Tensor& mask, MaskDtype dtype) {
  switch (dtype) {
    case MaskDtype::f64: return kept<double>(mask);
    case MaskDtype::f32: return kept<float>(mask);
    case MaskDtype::bf16: return kept<bf16>(mask);
    case MaskDtype::f16: return kept<f16>(mask);
    default: return kept<bool>(mask);
  }
}

Tensor masked_read(Tensor base, Tensor delta, Tensor mask) {
  const MaskedReadRest rest = check_masked_read("masked_read", base, delta, mask);
  const Kept k = kept(mask, rest.mask_dtype);
  Tensor out = torch::stable::new_empty(delta, {mask.size(1), delta.size(1), delta.size(2)});
  void* const to = out.mutable_data_ptr();
  MaskedRead kernel{view(delta), rest.base, rest.dtype, k.first.data(), k.sender.data(), k.weight.data(), to};
  kernel.plan(torch::stable::get_num_threads());
  run_tasks(kernel.tasks(), [&](int64_t task) { kernel.run(task); });
  return out;
}

// The last dimensions of a tensor of up to four.
Strided strided(const char* op, const Tensor& x) {
  Strided found{x.const_data_ptr(), dtype_of(op, x), {}};
  for (int64_t i = 0, first = 4 - x.dim(); i < x.dim(); ++i) found.stride[first + i] = x.stride(i);
  return found;
}

bool has_shape(const Tensor& x, std::initializer_list<int64_t> shape) {
  if (!x.is_cpu() || x.dim() != int64_t(shape.size())) return false;
  int64_t i = 0;
  for (int64_t size : shape)
    if (x.size(i++) != size) return false;
  return true;
}

// The tokens that are wanted of N, checked; all without `rows`.
struct Wanted {
  std::vector<int64_t> values;
  const int64_t* data = nullptr;
  int64_t count;

  Wanted(const char* op, const std::optional<Tensor>& rows, int64_t N) : count(N) {
    if (!rows) return;
    values = indices(op, "rows", *rows, count = rows->numel(), N - 1);
    data = values.data();
  }
};

constexpr int64_t kElementsPerTask = 1 << 14;  // fewer cost less than another thread takes to begin

Tensor normalise_rows(Tensor x, double eps, bool centred, std::optional<Tensor> rows, std::optional<Tensor> out) {
  const char* op = "normalise_rows";
  STD_TORCH_CHECK(x.dim() == 3 && x.is_cpu(), op, ": expected x [M, N, D] on the CPU");
  const int64_t M = x.size(0), D = x.size(2);
  const Wanted wanted(op, rows, x.size(1));
  STD_TORCH_CHECK(!out || has_shape(*out, {M, wanted.count, D}), op, ": expected out [M, n, D] on the CPU");
  const Dtype dtype = dtype_of(op, x);
  Tensor r = torch::stable::new_empty(x, {M, wanted.count}, accumulation_type(dtype));
  NormaliseRows kernel{.x = view(x),
                       .dtype = dtype,
                       .rows = wanted.data,
                       .count = wanted.count,
                       .eps = eps,
                       .centred = centred,
                       .r = r.mutable_data_ptr(),
                       .out = out ? out->mutable_data_ptr() : nullptr,
                       .out_dtype = out ? dtype_of(op, *out) : Dtype::f32,
                       .out_stride = {},
                       .rows_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, D))};
  for (int i = 0; out && i < 3; ++i) kernel.out_stride[i] = out->stride(i);
  run_tasks(kernel.tasks(), [&](int64_t task) { kernel.run(task); });
  return r;
}

void collapse(Tensor gradient, Tensor values, Tensor r, Tensor weights, Tensor out, Tensor coefficients,
              int64_t features, bool gathered, std::optional<Tensor> rows, std::optional<Tensor> constant,
              std::optional<Tensor> gain) {
  const char* op = "collapse";
  STD_TORCH_CHECK(gradient.dim() == 4 && gradient.is_cpu(), op, ": expected gradient [M, N, h, K] on the CPU");
  const int64_t M = gradient.size(0), N = gradient.size(1), h = gradient.size(2), K = gradient.size(3);
  const Wanted wanted(op, rows, N);
  const int64_t n = wanted.count;
  STD_TORCH_CHECK(has_shape(values, {M, gathered ? n : N, h, K}) && has_shape(r, {M, n}) && has_shape(weights, {M}) &&
                      has_shape(out, {n, h, K}) && has_shape(coefficients, {h, M, n}) &&
                      (!constant || has_shape(*constant, {h, K})) && (!gain || has_shape(*gain, {K})),
                  op, ": expected operands of one problem on the CPU");
  const Dtype dtype = dtype_of(op, out);
  STD_TORCH_CHECK((dtype == Dtype::f32 || dtype == Dtype::f64) && dtype_of(op, coefficients) == dtype, op,
                  ": expected out and coefficients both in float32 or both in float64");
  const std::vector<double> scale = numbers(op, r), weight = numbers(op, weights);
  std::vector<double> scales(M * n);
  for (int64_t i = 0; i < M * n; ++i) scales[i] = scale[i] * weight[i / n];
  Collapse kernel{.gradient = strided(op, gradient),
                  .values = strided(op, values),
                  .constant = constant ? strided(op, *constant) : Strided{},
                  .gain = gain ? strided(op, *gain) : Strided{},
                  .gathered = gathered,
                  .rows = wanted.data,
                  .scales = scales.data(),
                  .points = M,
                  .count = n,
                  .heads = h,
                  .width = K,
                  .features = features,
                  .dtype = dtype,
                  .out = out.mutable_data_ptr(),
                  .coefficients = coefficients.mutable_data_ptr(),
                  .out_stride = {out.stride(0), out.stride(1), out.stride(2)},
                  .c_stride = {coefficients.stride(0), coefficients.stride(1), coefficients.stride(2)},
                  .tokens_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, M * h * K))};
  run_tasks(kernel.tasks(), [&](int64_t task) { kernel.run(task); });
}

}  // namespace
}  // namespace eap

STABLE_TORCH_LIBRARY_IMPL(eap_kernels, CPU, m) {
  m.impl("edge_scores", TORCH_BOX(&eap::edge_scores));
  m.impl("masked_read", TORCH_BOX(&eap::masked_read));
  m.impl("head_space_scores", TORCH_BOX(&eap::head_space_scores));
  m.impl("normalise_rows", TORCH_BOX(&eap::normalise_rows));
  m.impl("collapse", TORCH_BOX(&eap::collapse));
}

// An empty module, so that importing it loads the library.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
