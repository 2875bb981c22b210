// Edge scores: a matrix product whose inner dimension (tokens x features) is strided and whose shape is a staircase.
// A task owns a tile of the result and a chunk of the inner dimension. Block by block it packs both operands into
// panels, which is where strides and low precision end, and multiplies those register tiles that hold an edge.
#include <algorithm>
#include <numeric>

#include "dispatch.h"
#include "product.h"

namespace eap {
namespace {

constexpr int64_t kRows = 240;     // of a tile, at most: panels and sums of a task share the second-level cache
constexpr int64_t kColumns = 192;  // of a tile, at most
constexpr int64_t kInner = 384;    // elements of the inner dimension packed at once
constexpr int64_t kLd = kInner + 16;  // rows are padded: a power of two apart they would share cache sets
constexpr int64_t kTasks = 48;     // wanted, so that threads end together; cutting tiles smaller would pack more
constexpr int64_t kBlocksPerChunk = 8;

struct Block { int64_t token, tokens, feature, features; };

// How the inner dimension is cut: several tokens to a block, or several blocks to a token.
struct Blocks {
  int64_t tokens, features, per_block, per_token;
  Blocks(int64_t tokens, int64_t features)
      : tokens(tokens), features(features), per_block(std::max<int64_t>(1, kInner / std::max<int64_t>(features, 1))),
        per_token(divide_up(features, kInner)) {}
  int64_t count() const { return divide_up(tokens, per_block) * per_token; }
  Block operator[](int64_t i) const {
    const int64_t token = i / per_token * per_block, feature = i % per_token * kInner;
    return {token, std::min(per_block, tokens - token), feature, std::min(kInner, features - feature)};
  }
};

EAP_INLINE void copy(double* to, const double* from, int64_t step, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
}
template <class T> EAP_INLINE void copy(float* to, const T* from, int64_t step, int64_t count) {
  if (step == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = load(from[i * step]);
}
// Pairs of neighbours as they lie in memory; the last of an odd number is paired with zero.
EAP_INLINE void copy(bf16x2* to, const bf16* from, int64_t, int64_t count) {
  std::memcpy(to, from, count * sizeof(bf16));
  if (count % 2) to[count / 2].bits = from[count - 1].bits;
}

// Some rows of one block of x as [rows, kLd], followed by zeros up to a multiple of `lanes`. Returns that width.
template <class T, class E>
EAP_INLINE int64_t pack(const View& x, const int64_t* order, int64_t row, int64_t rows, Block block, int64_t lanes, E* to) {
  constexpr int64_t per_element = std::is_same_v<E, bf16x2> ? 2 : 1;
  const bool flat = x.stride[2] == 1 && x.stride[1] == block.features;
  const int64_t pieces = flat ? 1 : block.tokens, length = flat ? block.tokens * block.features : block.features;
  const int64_t piece = divide_up(length, per_element), width = divide_up(pieces * piece, lanes) * lanes;
  for (int64_t r = row; r < row + rows; ++r, to += kLd) {
    const T* from = static_cast<const T*>(x.data) + (order ? order[r] : r) * x.stride[0] + block.token * x.stride[1] +
                    block.feature * x.stride[2];
    for (int64_t p = 0; p < pieces; ++p, from += x.stride[1]) copy(to + p * piece, from, x.stride[2], length);
    std::fill(to + pieces * piece, to + width, E{});
  }
  return width;
}

// Adds sum(i, j) of every edge of a tile to out.
template <class O, class Sum>
void write(const EdgeScores& p, const Tile& t, int64_t segment, const Sum& sum) {
  O* const out = static_cast<O*>(p.out) + segment * p.out_stride[0];
  for (int64_t i = 0; i < t.rows; ++i)
    for (int64_t j = 0; j < t.columns; ++j) {
      const int64_t u = p.swapped ? t.column + j : t.row + i, v = p.order[p.swapped ? t.row + i : t.column + j];
      if (u < p.reach[v]) out[u * p.out_stride[1] + v * p.out_stride[2]] += O(sum(i, j));
    }
}

template <class T, class E, int BYTES> struct Tiles {
  using A = acc_t<E>;
  static constexpr int64_t lanes = BYTES / sizeof(E), width = tile_columns<E, BYTES>;

  EAP_INLINE static void run(const EdgeScores& p, int64_t task) {
    const Tile& tile = p.tiles[task / p.chunks];
    const int64_t chunk = task % p.chunks, tokens = p.delta.size[1];
    const Blocks blocks(tokens, p.delta.size[2]);
    double* const total = scratch<double>(kRows * kColumns + (kRows + 2 * width) * kLd);
    std::fill_n(total, tile.rows * kColumns, 0.0);
    if (p.segments == nullptr) {
      const int64_t count = blocks.count(), end = (chunk + 1) * count / p.chunks;
      for (int64_t i = chunk * count / p.chunks; i < end; ++i) add_block(p, tile, blocks[i], total);
      if (p.chunks == 1) return deliver(p, tile, 0, total);
      double* const kept = p.partial.get() + tile.offset + chunk * tile.rows * tile.columns;
      for (int64_t i = 0; i < tile.rows; ++i)
        std::copy_n(total + i * kColumns, tile.columns, kept + i * tile.columns);
      return;
    }
    for (int64_t n = 0; n < tokens;) {
      const int64_t segment = p.segments[n];
      int64_t end = n + 1;
      while (end < tokens && p.segments[end] == segment) ++end;
      const Blocks run(end - n, p.delta.size[2]);
      for (int64_t i = 0; i < run.count(); ++i) {
        Block block = run[i];
        block.token += n;
        add_block(p, tile, block, total);
      }
      deliver(p, tile, segment, total);
      std::fill_n(total, tile.rows * kColumns, 0.0);
      n = end;
    }
  }

  EAP_INLINE static void add_block(const EdgeScores& p, const Tile& t, Block block, double* total) {
    E* const a = reinterpret_cast<E*>(total + kRows * kColumns);
    E* const b = a + kRows * kLd;
    E* const rows = b + width * kLd;
    const View &x = p.swapped ? p.grad : p.delta, &y = p.swapped ? p.delta : p.grad;
    const int64_t *of_rows = p.swapped ? p.order.data() : nullptr, *of_columns = p.swapped ? nullptr : p.order.data();
    const int64_t inner = pack<T>(x, of_rows, t.row, t.rows, block, lanes, a);
    for (int64_t c = 0; c < t.columns; c += width) {
      const int64_t columns = std::min(width, t.columns - c);
      pack<T>(y, of_columns, t.column + c, columns, block, lanes, rows);
      for (int64_t r = columns; r < width; ++r) std::fill_n(rows + r * kLd, inner, E{});
      transpose<E, BYTES>(rows, kLd, inner, b);
      const int64_t deepest = p.swapped ? 0 : p.reach[p.order[t.column + c + columns - 1]] - t.row;
      const int64_t height = p.swapped ? t.rows : std::min(t.rows, deepest);
      for_tiles<BYTES>(height, [&](auto m, int64_t row) EAP_INLINE_LAMBDA {
        constexpr int M = decltype(m)::value;
        if (p.swapped && p.reach[p.order[t.row + row + M - 1]] <= t.column + c) return;
        vector_t<A, BYTES> sums[M][2] = {};
        multiply<E, BYTES, M>(a + row * kLd, kLd, b, width, inner, sums);
        A values[M][width];
        std::memcpy(values, sums, sizeof(sums));
        for (int i = 0; i < M; ++i)
          for (int64_t j = 0; j < width; ++j) total[(row + i) * kColumns + c + j] += double(values[i][j]);
      });
    }
  }

  EAP_INLINE static void deliver(const EdgeScores& p, const Tile& tile, int64_t segment, const double* total) {
    write<A>(p, tile, segment, [&](int64_t i, int64_t j) { return total[i * kColumns + j]; });
  }
};

template <class T, int BYTES> struct Body {
  EAP_INLINE static void run(const EdgeScores& p, int64_t task) {
    if constexpr (std::is_same_v<T, bf16> && BYTES == 64)
      if (isa() == Isa::v4_bf16 && p.delta.stride[2] == 1 && p.grad.stride[2] == 1)
        return Tiles<T, bf16x2, BYTES>::run(p, task);
    Tiles<T, acc_t<T>, BYTES>::run(p, task);
  }
};

// Parts of nearly equal size, multiples of `step` but for the last.
int64_t part(int64_t size, int64_t limit, int64_t step) {
  return divide_up(divide_up(size, divide_up(size, limit)), step) * step;
}

}  // namespace

void EdgeScores::plan() {
  const int64_t S = delta.size[0], R = grad.size[0];
  const auto flat = [](const View& x) { return x.stride[2] == 1 && (x.stride[1] == x.size[2] || x.size[1] == 1); };
  if (segments == nullptr && flat(delta) && flat(grad))
    for (View* x : {&delta, &grad}) x->size[2] *= x->size[1], x->size[1] = x->size[2] > 0, x->stride[1] = x->size[2];
  order.resize(R);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return reach[a] < reach[b]; });
  order.erase(order.begin(), std::find_if(order.begin(), order.end(), [&](int64_t v) { return reach[v] > 0; }));

  // A vector's width of columns: few receivers would leave most of it empty.
  swapped = R < 24 && S > R;
  const int64_t seen = order.size(), deepest = seen ? reach[order.back()] : 0;
  int64_t offset = 0;
  const auto add = [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
    tiles.push_back({row, rows, column, columns, offset});
    offset += rows * columns;
  };
  const int64_t columns = swapped ? deepest : seen;
  const int64_t across = columns ? part(columns, kColumns, 32) : 1;
  for (int64_t c = 0; c < columns; c += across) {
    const int64_t width = std::min(across, columns - c);
    const int64_t height = swapped ? seen : reach[order[c + width - 1]], down = part(height, kRows, 12);
    for (int64_t r = 0; r < height; r += down) add(r, std::min(down, height - r), c, width);
  }
  const int64_t blocks = Blocks(delta.size[1], delta.size[2]).count(), wanted = divide_up(kTasks, tiles.size() + 1);
  chunks = segments ? 1 : std::max<int64_t>(1, std::min(wanted, blocks / kBlocksPerChunk));
  for (Tile& tile : tiles) tile.offset *= chunks;
  if (chunks > 1) partial.reset(new double[offset * chunks]);
}

void EdgeScores::run(int64_t task) const { dispatch<Body>(dtype, *this, task); }

void EdgeScores::merge(int64_t index) const {
  const Tile& tile = tiles[index];
  const int64_t size = tile.rows * tile.columns;
  const double* const kept = partial.get() + tile.offset;
  const auto sum = [&](int64_t i, int64_t j) {
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += kept[c * size + i * tile.columns + j];
    return total;
  };
  if (dtype == Dtype::f64) write<double>(*this, tile, 0, sum);
  else write<float>(*this, tile, 0, sum);
}

}  // namespace eap
