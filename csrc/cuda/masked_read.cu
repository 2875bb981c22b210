// Masked read. `list` lists the senders that each receiver keeps, then `add_up` does the sums, so that cost follows the
// kept edges. Where many are kept, the library's matrix product is faster (eap_kernels/cuda).
#include <algorithm>

#include "launch.h"
#include "numbers.h"

namespace eap::cuda {
namespace {

constexpr const char* kOp = "masked_read";
constexpr int kThreads = 256;

// A pointer-and-strides copy of MaskedRead, with what the first kernel finds.
template <class T> struct Call {
  const T *delta, *base;
  T* out;
  const void* mask;
  MaskDtype mask_dtype;
  int32_t senders, receivers;
  int64_t tokens, features;
  int64_t delta_stride[3], base_stride[3], mask_stride[2];
  int32_t* count;    // [R]
  int32_t* sender;   // [R, S]: the first count[v] of row v are filled, in order
  acc_t<T>* weight;  // like sender

  __device__ acc_t<T> mask_at(int64_t u, int64_t v) const {
    using A = acc_t<T>;
    const int64_t i = u * mask_stride[0] + v * mask_stride[1];
    switch (mask_dtype) {
      case MaskDtype::f64: return A(static_cast<const double*>(mask)[i]);
      case MaskDtype::f32: return A(static_cast<const float*>(mask)[i]);
      case MaskDtype::bf16: return A(load(static_cast<const __nv_bfloat16*>(mask)[i]));
      case MaskDtype::f16: return A(load(static_cast<const __half*>(mask)[i]));
      default: return A(static_cast<const uint8_t*>(mask)[i] != 0);
    }
  }
};

// A warp per receiver. A weight of a wider type that rounds to 0 counts as not kept.
template <class T> __global__ void __launch_bounds__(kThreads) list(const __grid_constant__ Call<T> call) {
  const int64_t v = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (v >= call.receivers) return;
  int32_t* const sender = call.sender + v * call.senders;
  acc_t<T>* const weight = call.weight + v * call.senders;
  int count = 0;
  for (int first = 0; first < call.senders; first += 32) {
    const int u = first + lane;
    const acc_t<T> w = u < call.senders ? call.mask_at(u, v) : acc_t<T>(0);
    const unsigned keep = __ballot_sync(0xFFFFFFFFu, w != 0);
    if (w != 0) {
      const int at = count + __popc(keep & ((1u << lane) - 1));
      sender[at] = u;
      weight[at] = w;
    }
    count += __popc(keep);
  }
  if (lane == 0) call.count[v] = count;
}

template <class T, int kWidth> struct alignas(sizeof(T) * kWidth) Piece { T x[kWidth]; };

// A block makes kThreads pieces of one receiver's row; neighbouring blocks the same pieces of the next receivers, which
// find most senders in the L2 cache.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) add_up(const __grid_constant__ Call<T> call) {
  using A = acc_t<T>;
  const int64_t pieces = call.tokens * call.features / kWidth, row = call.features / kWidth;
  const int64_t jobs = (pieces + kThreads - 1) / kThreads * call.receivers;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const int64_t v = job % call.receivers, i = job / call.receivers * kThreads + threadIdx.x;
    if (i >= pieces) continue;
    const int64_t n = i / row, d = i % row * kWidth;
    const auto piece = [&](const T* from, const int64_t* stride) {
      return *reinterpret_cast<const Piece<T, kWidth>*>(from + n * stride[1] + d * stride[2]);
    };
    // Load: the base.
    A sum[kWidth];
    const auto start = piece(call.base + v * call.base_stride[0], call.base_stride);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum[k] = load(start.x[k]);
    // Multiply: the kept senders, by their weights.
    const int count = call.count[v];
#pragma unroll 4
    for (int e = 0; e < count; ++e) {
      const int64_t at = v * call.senders + e;
      const A weight = call.weight[at];
      const auto x = piece(call.delta + call.sender[at] * call.delta_stride[0], call.delta_stride);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum[k] += weight * load(x.x[k]);
    }
    // Store.
    Piece<T, kWidth> result;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) store(result.x[k], sum[k]);
    reinterpret_cast<Piece<T, kWidth>*>(call.out)[v * pieces + i] = result;
  }
}

// What the first kernel writes.
struct Workspace {
  int64_t counts, senders, weights;
  explicit Workspace(const MaskedRead& call) {
    const int64_t S = call.delta.size[0], R = call.base.size[0];
    counts = padded(R * 4);
    senders = padded(R * S * 4);
    weights = padded(R * S * bytes_of(accumulation(call.dtype)));
  }
};

template <class T> void run_typed(const MaskedRead& m, char* memory, CUstream_st* stream) {
  const Workspace space(m);
  Call<T> call{static_cast<const T*>(m.delta.data),
               static_cast<const T*>(m.base.data),
               static_cast<T*>(m.out),
               m.mask,
               m.mask_dtype,
               int32_t(m.delta.size[0]),
               int32_t(m.base.size[0]),
               m.delta.size[1],
               m.delta.size[2],
               {m.delta.stride[0], m.delta.stride[1], m.delta.stride[2]},
               {m.base.stride[0], m.base.stride[1], m.base.stride[2]},
               {m.mask_stride[0], m.mask_stride[1]},
               reinterpret_cast<int32_t*>(memory),
               reinterpret_cast<int32_t*>(memory + space.counts),
               reinterpret_cast<acc_t<T>*>(memory + space.counts + space.senders)};
  launch(kOp, list<T>, dim3(uint32_t(divide_up(call.receivers, kThreads / 32))), kThreads, 0, stream, call);

  const int64_t processors = device_attribute(kOp, cudaDevAttrMultiProcessorCount, m.device);
  const int64_t width = call.tokens * call.features;
  constexpr int kWidth = 16 / sizeof(T);
  const bool pieces = in_pieces(m.delta, sizeof(T)) && in_pieces(m.base, sizeof(T)) && call.features % kWidth == 0;
  const int64_t jobs = divide_up(width / (pieces ? kWidth : 1), kThreads) * call.receivers;
  launch(kOp, pieces ? add_up<T, kWidth> : add_up<T, 1>, dim3(uint32_t(std::min(jobs, processors * 8))), kThreads, 0,
         stream, call);
}

}  // namespace

int64_t MaskedRead::workspace() const {
  const Workspace space(*this);
  return space.counts + space.senders + space.weights;
}

void MaskedRead::run(void* workspace, CUstream_st* stream) const {
  if (base.size[0] == 0 || delta.size[1] == 0 || delta.size[2] == 0) return;
  if (delta.size[0] > INT32_MAX || base.size[0] > INT32_MAX)
    throw std::runtime_error("masked_read: expected fewer than 2^31 senders and receivers, got more");
  check(kOp, cudaSetDevice(device));
  char* const memory = static_cast<char*>(workspace);
  switch (dtype) {
    case Dtype::f64: return run_typed<double>(*this, memory, stream);
    case Dtype::f32: return run_typed<float>(*this, memory, stream);
    case Dtype::bf16: return run_typed<__nv_bfloat16>(*this, memory, stream);
    case Dtype::f16: return run_typed<__half>(*this, memory, stream);
  }
}

}  // namespace eap::cuda
