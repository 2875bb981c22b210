// Edge scores: a matrix product whose inner dimension (tokens x features) is strided and whose shape is a staircase.
// Both operands are packed block by block into fp32 (fp64) panels, which is where strides and low precision end;
// a register tile of dot products then runs over the panels. The copy never exceeds the panels.
#include <algorithm>
#include <cstring>

#include "dispatch.h"

namespace eap {
namespace {

constexpr int64_t kReceivers = 64;  // of one task, at most
constexpr int64_t kSenders = 192;   // of one task, at most
constexpr int64_t kInner = 1024;    // elements of the inner dimension packed at once
constexpr int64_t kRow = kInner + 64;  // rows are padded: a power of two apart they would share cache sets

template <int BYTES> struct Tile { static constexpr int M = 2, N = 4; };
template <> struct Tile<32> { static constexpr int M = 3, N = 4; };
template <> struct Tile<64> { static constexpr int M = 6, N = 4; };

template <class A, int BYTES> struct Vec { typedef A type __attribute__((vector_size(BYTES))); };

template <class A, int BYTES> EAP_INLINE double sum(const typename Vec<A, BYTES>::type& x) {
  if constexpr (BYTES > 16) {
    typename Vec<A, BYTES / 2>::type half[2];
    std::memcpy(half, &x, BYTES);
    const typename Vec<A, BYTES / 2>::type folded = half[0] + half[1];
    return sum<A, BYTES / 2>(folded);
  } else {
    A lane[BYTES / sizeof(A)], total = 0;
    std::memcpy(lane, &x, BYTES);
    for (A value : lane) total += value;
    return double(total);
  }
}

// c[m, n] += <a[m], b[n]> for one register tile; rows of a and b are `ld` apart, `inner` is a multiple of the vector.
template <class A, int BYTES, int M, int N>
EAP_INLINE void dots(const A* a, const A* b, int64_t ld, int64_t inner, double* c) {
  using V = typename Vec<A, BYTES>::type;
  V acc[M][N] = {};
  for (int64_t k = 0; k < inner; k += BYTES / sizeof(A)) {
    V row[M];
    for (int m = 0; m < M; ++m) std::memcpy(&row[m], a + m * ld + k, BYTES);
    for (int n = 0; n < N; ++n) {
      V column;
      std::memcpy(&column, b + n * ld + k, BYTES);
      for (int m = 0; m < M; ++m) acc[m][n] += row[m] * column;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) c[m * kReceivers + n] += sum<A, BYTES>(acc[m][n]);
}

struct Block { int64_t token, tokens, feature, features; };

// Rows [row, row + rows) of one block of x, as [padded_rows, ld] with zeros where there is no data.
template <class T>
EAP_INLINE void pack(const View& x, int64_t row, int64_t rows, int64_t padded_rows, Block block, acc_t<T>* to,
                     int64_t ld) {
  const bool flat = x.stride[2] == 1 && x.stride[1] == block.features;
  const int64_t pieces = flat ? 1 : block.tokens, length = flat ? block.tokens * block.features : block.features;
  for (int64_t r = 0; r < padded_rows; ++r, to += ld) {
    int64_t filled = 0;
    if (r < rows) {
      const T* from = static_cast<const T*>(x.data) + (row + r) * x.stride[0] + block.token * x.stride[1] +
                      block.feature * x.stride[2];
      for (int64_t p = 0; p < pieces; ++p, from += x.stride[1], filled += length) {
        acc_t<T>* __restrict dst = to + filled;
        if (x.stride[2] == 1)
          for (int64_t i = 0; i < length; ++i) dst[i] = load(from[i]);
        else
          for (int64_t i = 0; i < length; ++i) dst[i] = load(from[i * x.stride[2]]);
      }
    }
    std::fill(to + filled, to + ld, acc_t<T>(0));
  }
}

template <class T, int BYTES> struct Body {
  using A = acc_t<T>;
  static constexpr int M = Tile<BYTES>::M, N = Tile<BYTES>::N;

  EAP_INLINE static void run(const EdgeScores& p, int64_t task) {
    const int64_t S = p.delta.size[0], R = p.grad.size[0], tokens = p.delta.size[1], D = p.delta.size[2];
    const int64_t columns = divide_up(R, p.receivers_per_task);
    const int64_t v0 = task % columns * p.receivers_per_task, vs = std::min(p.receivers_per_task, R - v0);
    const int64_t u0 = task / columns * p.senders_per_task;
    const int64_t deepest = *std::max_element(p.reach + v0, p.reach + v0 + vs);
    const int64_t us = std::min({p.senders_per_task, S - u0, deepest - u0});
    if (us <= 0) return;

    double* const total = scratch<double>(kSenders * kReceivers + (M + kReceivers) * kRow);
    A* const a = reinterpret_cast<A*>(total + kSenders * kReceivers);
    A* const b = a + M * kRow;
    const int64_t features = std::min(D, kInner), per_block = std::max<int64_t>(1, kInner / std::max<int64_t>(D, 1));
    for (int64_t n = 0; n < tokens;) {
      const int64_t segment = p.segments ? p.segments[n] : 0;
      std::fill(total, total + us * kReceivers, 0.0);
      for (bool same = true; same;) {
        int64_t end = n + 1;
        while (end < tokens && end < n + per_block && (!p.segments || p.segments[end] == segment)) ++end;
        for (int64_t d = 0; d < D; d += features)
          block(p, Block{n, end - n, d, std::min(features, D - d)}, u0, us, v0, vs, a, b, total);
        n = end;
        same = n < tokens && (!p.segments || p.segments[n] == segment);
      }
      add(p, segment, u0, us, v0, vs, total);
    }
  }

  EAP_INLINE static void block(const EdgeScores& p, Block block, int64_t u0, int64_t us, int64_t v0, int64_t vs, A* a,
                               A* b, double* total) {
    constexpr int64_t lanes = BYTES / sizeof(A);
    const int64_t inner = divide_up(block.tokens * block.features, lanes) * lanes, ld = inner + lanes;
    pack<T>(p.grad, v0, vs, vs, block, b, ld);
    for (int64_t u = 0; u < us; u += M) {
      pack<T>(p.delta, u0 + u, std::min<int64_t>(M, us - u), M, block, a, ld);
      for (int64_t v = 0; v < vs; v += N) {
        const int64_t width = std::min<int64_t>(N, vs - v);
        if (*std::max_element(p.reach + v0 + v, p.reach + v0 + v + width) <= u0 + u) continue;
        double* const c = total + u * kReceivers + v;
        if (width == 4) dots<A, BYTES, M, 4>(a, b + v * ld, ld, inner, c);
        else if (width == 3) dots<A, BYTES, M, 3>(a, b + v * ld, ld, inner, c);
        else if (width == 2) dots<A, BYTES, M, 2>(a, b + v * ld, ld, inner, c);
        else dots<A, BYTES, M, 1>(a, b + v * ld, ld, inner, c);
      }
    }
  }

  EAP_INLINE static void add(const EdgeScores& p, int64_t segment, int64_t u0, int64_t us, int64_t v0, int64_t vs,
                             const double* total) {
    A* const out = static_cast<A*>(p.out) + segment * p.out_stride[0] + u0 * p.out_stride[1] + v0 * p.out_stride[2];
    for (int64_t u = 0; u < us; ++u)
      for (int64_t v = 0; v < vs; ++v)
        if (u0 + u < p.reach[v0 + v]) out[u * p.out_stride[1] + v * p.out_stride[2]] += A(total[u * kReceivers + v]);
  }
};

}  // namespace

void EdgeScores::plan(int64_t threads) {
  const int64_t S = delta.size[0], R = grad.size[0], columns = std::max<int64_t>(1, divide_up(R, kReceivers));
  receivers_per_task = std::max<int64_t>(4, divide_up(divide_up(R, columns), 4) * 4);
  // Four tasks a thread even out the staircase; with fewer than 24 senders a task would mostly pack receivers.
  const int64_t rows = threads == 1 ? divide_up(S, kSenders) : divide_up(4 * threads, columns);
  const int64_t share = divide_up(divide_up(S, std::max<int64_t>(rows, 1)), 6) * 6;
  senders_per_task = std::clamp(share, int64_t(24), kSenders);
}

int64_t EdgeScores::tasks() const {
  return divide_up(delta.size[0], senders_per_task) * divide_up(grad.size[0], receivers_per_task);
}

void EdgeScores::run(int64_t task) const { dispatch<Body>(dtype, *this, task); }

}  // namespace eap
