// Residual-space rows of nodes that are kept in head space, one slice of tokens x features at a time:
// row(i)[n, d] = sum_k values[i, n, k] * weight[i / per_weight, k, d]
//                - sum_m coefficients[i, m, n] * normalised[m, n, d].
#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "product.h"

namespace eap {
namespace {

constexpr int64_t kNodes = 8;  // of a task, one after another, so that each brings the next one's weight into the cache

template <class T> EAP_INLINE const T* at(const View& x, int64_t i, int64_t j, int64_t k) {
  return static_cast<const T*>(x.data) + i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
}

#ifdef EAP_AMX
// The product of bf16 values and weights by AMX: pairs of neighbours in a row meet pairs of rows of the weight.
EAP_INLINE void project_pairs(const Expand& p, const Nodes& g, int64_t i, float* to) {
  using E = amx_pair;
  constexpr int64_t height = strip_rows<E>(64), width = panel_columns<E, 64>, side = width / kVectors, kAhead = 4;
  const int64_t inner = g.values.size[2], depth = divide_up(inner, 2 * side) * side, ld = depth + side;
  const int64_t step = g.weight.stride[1], panels = divide_up(p.features, width);
  E* const a = scratch<E>(height * ld + panels * width * depth + height * width);
  E* const b = a + height * ld;  // [panels, depth, width]
  float* const edge = reinterpret_cast<float*>(b + panels * width * depth);
  const bf16* const weight = at<bf16>(g.weight, i / g.per_weight, 0, p.feature);
  // Pack: the weight, two rows to a row of pairs.
  for (int64_t k = 0; k < depth; ++k) {
    const bf16 *const first = weight + 2 * k * step, *const second = first + step;
    for (int64_t d = 0; d < p.features; d += width) {
      const int64_t count = std::min(width, p.features - d);
      E* const line = b + d * depth + k * width;
      for (const bf16* row : {first, second}) __builtin_prefetch(row + kAhead * step + d, 0, 2);
      for (int64_t c = 0; c < count; ++c)
        line[c].bits = 2 * k + 1 < inner ? uint32_t(first[d + c].bits) | uint32_t(second[d + c].bits) << 16
                       : 2 * k < inner   ? uint32_t(first[d + c].bits)
                                         : 0;
      std::fill(line + count, line + width, E{});
    }
  }
  for (int64_t n = 0; n < p.tokens; n += height) {
    const int64_t rows = std::min(height, p.tokens - n);
    // Pack: a strip of values.
    for (int64_t r = 0; r < rows; ++r) {
      const bf16* const from = at<bf16>(g.values, i, p.token + n + r, 0);
      const int64_t step = g.values.stride[2];
      for (int64_t k = 0; k < depth; ++k)
        a[r * ld + k].bits = (2 * k < inner ? uint32_t(from[2 * k * step].bits) : 0) |
                             (2 * k + 1 < inner ? uint32_t(from[(2 * k + 1) * step].bits) : 0) << 16;
    }
    // Multiply and store: whole results go to their place, others are copied from `edge`.
    for (int64_t d = 0; d < p.features; d += width) {
      const int64_t columns = std::min(width, p.features - d);
      const bool whole = rows % side == 0 && columns % side == 0;
      float* const c = to + n * p.features + d;
      microkernel<E, 64>(rows, divide_up(columns, side))(a, ld, b + d * depth, width, depth, whole ? c : edge,
                                                         whole ? p.features : width, false, {});
      if (whole) continue;
      for (int64_t r = 0; r < rows; ++r) std::copy_n(edge + r * width, columns, c + r * p.features);
    }
  }
}
#endif

template <class T, int BYTES> struct Body {
  using A = acc_t<T>;
  static constexpr int64_t width = panel_columns<A, BYTES>;

  EAP_INLINE static void run(const Expand& p, int64_t task) {
    const int64_t end = std::min((task + 1) * kNodes, p.rows());
    std::vector<const char*> ahead;
    const bool on_amx = std::is_same_v<T, bf16> && isa() == Isa::v4_amx;
    const AmxScope scope(on_amx);
    for (int64_t node = task * kNodes; node < end; ++node) {
      const Nodes& g = group(p, node);
      const int64_t i = node - g.first;
      A* const to = static_cast<A*>(p.out) + node * p.out_stride;
      if (g.values.size[2] == 0) {  // heads of no width
        std::fill_n(to, p.tokens * p.features, A(0));
      } else if (!g.weight.data) {
        rows(p, g, i, to);
#ifdef EAP_AMX
      } else if (on_amx && g.weight.stride[2] == 1) {
        project_pairs(p, g, i, reinterpret_cast<float*>(to));
#endif
      } else {
        ahead.clear();
        if (node + 1 < end) look_ahead(p, g, node + 1, ahead);
        project(p, g, i, to, ahead);
      }
      int64_t m = 0;
      for (; m + 4 <= g.normalised.size[0]; m += 4) subtract<4>(p, g, i, m, to);
      for (; m < g.normalised.size[0]; ++m) subtract<1>(p, g, i, m, to);
    }
  }

  EAP_INLINE static const Nodes& group(const Expand& p, int64_t node) {
    return *std::find_if(p.groups, p.groups + p.n_groups,
                         [&](const Nodes& x) { return node < x.first + x.values.size[0]; });
  }

  // The weight of the next node, in pieces as long as a row of this node's values.
  EAP_INLINE static void look_ahead(const Expand& p, const Nodes& now, int64_t node, std::vector<const char*>& ahead) {
    const Nodes& g = group(p, node);
    const int64_t i = (node - g.first) / g.per_weight, piece = now.values.size[2];
    const bool shared = &g == &now && i == (node - 1 - g.first) / g.per_weight;
    if (!g.weight.data || g.weight.stride[2] != 1 || shared) return;
    for (int64_t k = 0; k < g.weight.size[1]; ++k)
      for (int64_t d = 0; d < p.features; d += piece)
        ahead.push_back(reinterpret_cast<const char*>(at<T>(g.weight, i, k, p.feature + d)));
  }

  EAP_INLINE static void rows(const Expand& p, const Nodes& g, int64_t i, A* to) {
    for (int64_t n = 0; n < p.tokens; ++n)
      widen(at<T>(g.values, i, p.token + n, p.feature), g.values.stride[2], p.features, to + n * p.features);
  }

  EAP_INLINE static void project(const Expand& p, const Nodes& g, int64_t i, A* to,
                                 const std::vector<const char*>& ahead) {
    const int64_t inner = g.values.size[2], count = ahead.size();
    const int64_t products = divide_up(p.features, width) * divide_up(p.tokens, strip_rows(BYTES));
    int64_t fetched = 0;
    const int64_t padded = divide_up(p.features, width) * width;
    A* const a = scratch<A>((p.tokens + padded) * inner + strip_rows(BYTES) * width);
    A* const b = a + p.tokens * inner;  // [panels, inner, width]
    A* const edge = b + padded * inner;
    // Pack: the node's values and its weight.
    for (int64_t n = 0; n < p.tokens; ++n)
      widen(at<T>(g.values, i, p.token + n, 0), g.values.stride[2], inner, a + n * inner);
    pack(p, g.weight, i / g.per_weight, b);
    // Multiply and store: whole results go to their place, others are copied from `edge`.
    for (int64_t d = 0; d < p.features; d += width) {
      const int64_t columns = std::min(width, p.features - d);
      for_strips<BYTES>(p.tokens, [&](int64_t row, int64_t M) EAP_INLINE_LAMBDA {
        const auto kernel = microkernel<A, BYTES>(M, kVectors);
        A* const c = to + row * p.features + d;
        const Ahead next{ahead.data() + fetched, std::min(divide_up(count, products), count - fetched), sizeof(T)};
        fetched += next.count;
        const bool whole = columns == width;
        kernel(a + row * inner, inner, b + d * inner, width, inner, whole ? c : edge, whole ? p.features : width, false,
               next);
        if (whole) return;
        for (int64_t r = 0; r < M; ++r) std::copy_n(edge + r * width, columns, c + r * p.features);
      });
    }
  }

  // Packs a weight by whole rows and fetches rows ahead: the processor does not foresee the short rows of a panel.
  EAP_INLINE static void pack(const Expand& p, const View& weight, int64_t i, A* b) {
    constexpr int64_t kAhead = 8;
    const int64_t inner = weight.size[1], step = weight.stride[2];
    for (int64_t k = 0; k < inner; ++k) {
      const T* const row = at<T>(weight, i, k, p.feature);
      if (step == 1 && k + kAhead < inner)
        for (int64_t d = 0; d < p.features; d += 64 / sizeof(T))
          __builtin_prefetch(row + kAhead * weight.stride[1] + d);
      for (int64_t d = 0; d < p.features; d += width) {
        const int64_t columns = std::min(width, p.features - d);
        A* const panel = b + d * inner + k * width;
        widen(row + d * step, step, columns, panel);
        std::fill(panel + columns, panel + width, A(0));
      }
    }
  }

  // M points at once: one load and one store of the row for all of them.
  template <int M> EAP_INLINE static void subtract(const Expand& p, const Nodes& g, int64_t i, int64_t m, A* to) {
    for (int64_t n = 0; n < p.tokens; ++n) {
      A c[M];
      const T* x[M];
      for (int j = 0; j < M; ++j) {
        c[j] = load(*at<T>(g.coefficients, i, m + j, p.token + n));
        x[j] = at<T>(g.normalised, m + j, p.token + n, p.feature);
      }
      subtract<M>(to + n * p.features, c, x, g.normalised.stride[2], p.features);
    }
  }

  template <int M>
  EAP_INLINE static void subtract(A* __restrict row, const A* c, const T* const* x, int64_t step, int64_t count) {
    const auto sum = [&](int64_t at) EAP_INLINE_LAMBDA {
      A total = 0;
      for (int j = 0; j < M; ++j) total += c[j] * load(x[j][at]);
      return total;
    };
    if (step == 1)
      for (int64_t d = 0; d < count; ++d) row[d] -= sum(d);
    else
      for (int64_t d = 0; d < count; ++d) row[d] -= sum(d * step);
  }
};

}  // namespace

int64_t Expand::rows() const { return groups[n_groups - 1].first + groups[n_groups - 1].values.size[0]; }

int64_t Expand::tasks() const { return divide_up(rows(), kNodes); }

void Expand::run(int64_t task) const { dispatch<Body>(dtype, *this, task); }

}  // namespace eap
