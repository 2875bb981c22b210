// What the operator library asks of the CPU kernels. No torch header: pointers, sizes and strides in elements.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace eap {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class Dtype { f64, f32, bf16, f16 };
enum class MaskDtype { f64, f32, bf16, f16, boolean };

constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
// What sums are kept in.
constexpr Dtype accumulation(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// A strided [rows, tokens, features] array.
struct View {
  const void* data;
  int64_t size[3];
  int64_t stride[3];
};

// An array of up to four dimensions in a dtype of its own; of one with fewer the last count.
struct Strided {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t stride[4] = {};

  int64_t at(int64_t m, int64_t n, int64_t h, int64_t k) const {
    return m * stride[0] + n * stride[1] + h * stride[2] + k * stride[3];
  }
};

// A rectangle of the result, receivers by senders, that one task works on: what "tile" means everywhere here. Its
// partial sums of one chunk of the inner dimension are kept at `offset`.
struct Tile { int64_t row, rows, column, columns, offset; };

// out[segment(n), u, v] += sum_d delta[u, n, d] * grad[v, n, d]   for u < reach[v]
struct EdgeScores {
  View delta;               // [S, N, D]
  View grad;                // [R, N, D]
  Dtype dtype;              // of delta and grad; out is fp64 for fp64, else fp32
  const int64_t* reach;     // [R]
  const int64_t* segments;  // [N], or null for one segment
  void* out;                // [segments, S, R]
  int64_t out_stride[3];

  void plan();
  int64_t tasks() const { return int64_t(tiles.size()) * chunks; }
  void run(int64_t task) const;  // one tile over one chunk of the inner dimension, or of the segments
  int64_t merges() const { return chunks > 1 && !segments ? int64_t(tiles.size()) : 0; }
  void merge(int64_t tile) const;  // adds a tile's chunks to out, in their order

  // Set by plan(). Rows of tiles are receivers in this order, columns are senders.
  std::vector<int64_t> order{};  // receivers, those that see least first
  std::vector<Tile> tiles{};     // those with edges in them
  int64_t chunks = 1;
  std::vector<int64_t> by_segment{}, starts{};  // tokens in the order of their segments; where each begins, and the end
  bool in_parts = false;                        // whether fp32 values are multiplied as parts, by AMX
  // [tiles, chunks, rows, columns] of out's type, with more than one chunk.
  std::unique_ptr<void, decltype(&std::free)> partial{nullptr, std::free};
};

// Consecutive nodes in head space, as the rows first, first + 1, ... of what they expand to.
struct Nodes {
  int64_t first;
  View values;             // [h, N, K]
  View weight{};           // [g, K, D], or no data: values are residual rows and K is D
  int64_t per_weight = 1;  // h / g
  View coefficients{};     // [h, M, N]
  View normalised{};       // [M, N, D]
};

// Their rows in the residual stream at some tokens and features, in the accumulation type: [nodes, tokens, features].
struct Expand {
  const Nodes* groups;
  int64_t n_groups;
  Dtype dtype;  // of all operands
  int64_t token, tokens, feature, features;
  void* out;
  int64_t out_stride;  // elements from one node to the next

  int64_t rows() const;
  int64_t tasks() const;
  void run(int64_t task) const;  // some consecutive nodes
};

// out[v, n, d] = base[v, n, d] + sum_i weight[i] * delta[sender[i], n, d]   for i in [first[v], first[v + 1])
struct MaskedRead {
  View delta;             // [S, N, D]
  View base;              // [R, N, D]; receivers share it when stride[0] is 0
  Dtype dtype;            // of base, delta and out
  const int64_t* first;   // [R + 1]
  const int64_t* sender;  // kept edges, grouped by receiver
  const double* weight;   // kept edges
  void* out;              // [R, N, D] contiguous
  int64_t chunk = 0;      // elements of a token row handled at once
  int64_t receivers_per_task = 0;
  bool past_caches = false;  // whether the result is written past the caches

  int64_t tasks() const;
  void plan(int64_t threads);
  void run(int64_t task) const;
};

// r[m, n] = 1 / sqrt(mean(y^2) + eps) and out[m, n] = y r, where y = x[m, rows[n]], less its mean where centred
struct NormaliseRows {
  View x;  // [M, N, D]
  Dtype dtype;
  const int64_t* rows;  // [n], or null for all tokens
  int64_t count;        // n
  double eps;
  bool centred;
  void* r;    // [M, n] contiguous, fp64 for fp64, else fp32
  void* out;  // [M, n, D], or null
  Dtype out_dtype;
  int64_t out_stride[3];
  int64_t rows_per_task;

  int64_t tasks() const;
  void run(int64_t task) const;
};

// out[n, h] += sum_m s[m, n] g[m, n, h] and c[h, m, n] = s[m, n] <g[m, n, h], gain (y[m, n, h] - constant[h])> /
// features
struct Collapse {
  Strided gradient, values;  // [M, N, h, K], read at tokens rows[n]; values [M, n, h, K] where gathered
  Strided constant, gain;    // [h, K] and [K], or no data
  bool gathered;
  const int64_t* rows;   // [n], or null for all tokens
  const double* scales;  // [M, n]
  int64_t points, count, heads, width, features;
  Dtype dtype;  // of what is written: fp32 or fp64
  void *out, *coefficients;
  int64_t out_stride[3], c_stride[3];
  int64_t tokens_per_task;

  int64_t tasks() const;
  void run(int64_t task) const;
};

}  // namespace eap
