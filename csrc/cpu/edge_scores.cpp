// Edge scores: a matrix product whose inner dimension (tokens x features) is strided and whose shape is a staircase.
// A task owns a tile of the result, receivers by senders, and a chunk of the inner dimension. For each block of the
// chunk it packs the senders into panels, then packs the receivers strip by strip and multiplies each strip by the
// panels that hold its edges. The sums are stored last. Packing removes strides and low precision.
#include <algorithm>
#include <numeric>

#include "dispatch.h"
#include "pack.h"

namespace eap {
namespace {

constexpr int64_t kRows = 480;          // of a tile, at most: panels and sums of a task share the second-level cache
constexpr int64_t kColumns = 256;       // of a tile, at most
constexpr int64_t kFlush = 4;           // blocks after which sums are added to those in double
constexpr int64_t kEdgesPerRow = 16;    // at least, for AMX in parts: fewer products would not pay for packing
constexpr int64_t kTasks = 48;          // wanted, so that threads end together
constexpr int64_t kBlocksPerChunk = 6;  // at least: each chunk leaves partial sums to be added up

// How the inner dimension is cut: several tokens to a block, or several blocks to a token.
struct Blocks {
  const int64_t* order;  // as in Block
  int64_t tokens, features, inner, per_block, per_token;
  // A token's values are packed in multiples of `multiple`.
  Blocks(const int64_t* order, int64_t tokens, int64_t features, int64_t inner, int64_t multiple = 1)
      : order(order), tokens(tokens), features(features), inner(inner),
        per_block(std::max<int64_t>(1, inner / std::max<int64_t>(divide_up(features, multiple) * multiple, 1))),
        per_token(divide_up(features, inner)) {}
  int64_t count() const { return divide_up(tokens, per_block) * per_token; }
  Block operator[](int64_t i) const {
    const int64_t token = i / per_token * per_block, feature = i % per_token * inner;
    return {token, std::min(per_block, tokens - token), feature, std::min(inner, features - feature), order};
  }
};

// Adds row(i)[j] of every edge of a tile to out.
template <class O, class Row>
void write(const EdgeScores& p, const Tile& t, int64_t segment, const Row& row) {
  O* const out = static_cast<O*>(p.out) + segment * p.out_stride[0] + t.column * p.out_stride[1];
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t v = p.order[t.row + i], count = std::min(t.columns, p.reach[v] - t.column);
    const auto from = row(i);
    for (int64_t j = 0; j < count; ++j) out[j * p.out_stride[1] + v * p.out_stride[2]] += O(from(j));
  }
}

// Rows of a tile that are multiplied together, and how many vectors of columns they meet.
struct Strip { int64_t row, rows, vectors; };

template <class T, class E, int BYTES> class TileTask {
  using Pack = Packer<T, E, BYTES, kColumns>;
  using A = typename Pack::A;
  static constexpr int64_t lanes = BYTES / sizeof(E), width = Pack::width, height = strip_rows<E>(BYTES);

  const EdgeScores& p;
  const Tile& t;
  const Rows rows, columns;
  const int64_t padded;  // rows, in whole strips where the microkernel writes those
  A* const sums;         // [panels, padded, width]
  double* const total;   // [panels, padded, width], used from the first flush on
  bool deep = false;     // whether `total` is in use
  Pack pack;
  std::vector<Strip> strips;
  std::vector<const char*> ahead;  // rows to be packed next

 public:
  EAP_INLINE static void run(const EdgeScores& p, int64_t task) {
    const AmxScope scope(uses_amx<E>);
    TileTask work(p, p.tiles[task / p.chunks]);
    if (p.segments) work.segments(task % p.chunks);
    else work.one_chunk(task % p.chunks);
  }

 private:
  EAP_INLINE TileTask(const EdgeScores& p, const Tile& t)
      : p(p), t(t), rows{p.grad, p.order.data(), t.row, t.rows}, columns{p.delta, nullptr, t.column, t.columns},
        padded(uses_amx<E> ? divide_up(t.rows, height) * height : t.rows),
        sums(reinterpret_cast<A*>(scratch<double>(2 * kRows * kColumns + Pack::elements))),
        total(reinterpret_cast<double*>(sums) + kRows * kColumns),
        pack(reinterpret_cast<E*>(total + kRows * kColumns)) {
    std::fill_n(sums, size(), A(0));
    const auto vectors = [&](int64_t i) {
      return divide_up(std::min(p.reach[p.order[t.row + i]] - t.column, t.columns), lanes);
    };
    for (int64_t row = 0, end; row < t.rows; row = end) {
      // AMX takes 16 rows in the time of one: better some products outside the staircase than low strips.
      if constexpr (uses_amx<E>) {
        end = std::min(row + height, t.rows);
        strips.push_back({row, end - row, vectors(end - 1)});
      } else {
        for (end = row + 1; end < t.rows && vectors(end) == vectors(row);) ++end;
        for_strips<BYTES, E>(end - row,
                             [&](int64_t r, int64_t rows) { strips.push_back({row + r, rows, vectors(row)}); });
      }
    }
    if (Pack::splits) return;
    // Short and long strips in turns, so that there is always time to fetch what comes next.
    const std::vector<Strip> sorted = strips;
    for (size_t i = 0; i < sorted.size(); ++i) strips[i] = sorted[i % 2 ? sorted.size() - 1 - i / 2 : i / 2];
  }

  int64_t size() const { return padded * divide_up(t.columns, width) * width; }

  EAP_INLINE void one_chunk(int64_t chunk) {
    const Blocks blocks(nullptr, p.delta.size[1], p.delta.size[2], Pack::inner, Pack::values);
    const int64_t count = blocks.count();
    add_blocks(blocks, chunk * count / p.chunks, (chunk + 1) * count / p.chunks);
    if (p.chunks == 1) return deliver(0);
    // Store: the chunk's partial sums, for `merge`.
    A* const kept = static_cast<A*>(p.partial.get()) + t.offset + chunk * t.rows * t.columns;
    for (int64_t c = 0; c < t.columns; c += width)
      for (int64_t i = 0; i < t.rows; ++i)
        std::copy_n(sums + c * padded + i * width, std::min(width, t.columns - c), kept + i * t.columns + c);
  }

  EAP_INLINE void segments(int64_t chunk) {
    const int64_t count = p.starts.size() - 1, end = (chunk + 1) * count / p.chunks;
    for (int64_t s = chunk * count / p.chunks; s < end; ++s) {
      const int64_t* const tokens = p.by_segment.data() + p.starts[s];
      const Blocks blocks(tokens, p.starts[s + 1] - p.starts[s], p.delta.size[2], Pack::inner, Pack::values);
      add_blocks(blocks, 0, blocks.count());
      deliver(p.segments[*tokens]);
      std::fill_n(sums, size(), A(0));
    }
  }

  // Store: adds the sums to the result.
  EAP_INLINE void deliver(int64_t segment) {
    write<A>(p, t, segment, [&](int64_t i) {
      return [=, this](int64_t j) { return sums[(j / width * padded + i) * width + j % width]; };
    });
  }

  // Packs and multiplies blocks [begin, end).
  EAP_INLINE void add_blocks(const Blocks& blocks, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      add_block(blocks[i], i + 1 < end ? blocks[i + 1] : Block{});
      if ((i + 1 - begin) % kFlush == 0 && i + 1 < end) flush();
    }
    if (!deep) return;
    for (int64_t i = 0; i < size(); ++i) sums[i] = A(total[i] + double(sums[i]));
    deep = false;
  }

  // Sums of many blocks go on in double.
  EAP_INLINE void flush() {
    if (!deep) std::fill_n(total, size(), 0.0);
    deep = true;
    for (int64_t i = 0; i < size(); ++i) total[i] += double(sums[i]);
    std::fill_n(sums, size(), A(0));
  }

  EAP_INLINE void add_block(const Block& block, const Block& next) {
    const int64_t inner = Pack::length(rows, block), count = strips.size();
    // Pack: senders, all panels of the tile.
    pack.pack_columns(columns, block);
    for (int64_t s = 0; s < count; ++s) {
      const Strip& strip = strips[s];
      // Pack: receivers, one strip.
      pack.pack_strip(rows, strip.row, strip.rows, block, next);
      look_ahead(s, block, next);
      // Multiply: the strip by each panel that it meets, and fetch what is packed next meanwhile.
      const int64_t panels = divide_up(strip.vectors, kVectors), all = ahead.size();
      for (int64_t i = 0; i < panels; ++i)
        pack.multiply(strip.rows, i, std::min<int64_t>(kVectors, strip.vectors - i * kVectors), inner,
                      sums + (i * padded + strip.row) * width,
                      {ahead.data() + i * all / panels, (i + 1) * all / panels - i * all / panels,
                       sizeof(T) * Pack::values});
    }
  }

  // What to fetch while a strip is multiplied: the next strip's rows, and a share of the next block's columns.
  EAP_INLINE void look_ahead(int64_t s, const Block& block, const Block& next) {
    ahead.clear();
    if (Pack::splits) return;  // packing fetches for itself
    const int64_t count = strips.size();
    const bool last = s + 1 == count;
    const auto add = [&](const Rows& side, int64_t begin, int64_t end, const Block& block) {
      if (side.x.stride[2] == 1 && block.tokens)
        for (int64_t r = begin; r < end; ++r)
          ahead.push_back(reinterpret_cast<const char*>(side.template at<T>(r, block)));
    };
    const Strip& strip = strips[last ? 0 : s + 1];
    add(rows, strip.row, strip.row + strip.rows, last ? next : block);
    add(columns, s * t.columns / count, (s + 1) * t.columns / count, next);
  }
};

// Whether `level` is in use, which multiplies pairs of neighbouring values, and the operands hold such pairs.
bool in_pairs(const EdgeScores& p, Isa level) {
  return isa() == level && p.dtype == Dtype::bf16 && p.delta.stride[2] == 1 && p.grad.stride[2] == 1;
}

template <class T, int BYTES> struct Body {
  EAP_INLINE static void run(const EdgeScores& p, int64_t task) {
    if constexpr (BYTES == 64 && std::is_same_v<T, bf16>) {
#ifdef EAP_AMX
      if (in_pairs(p, Isa::v4_amx)) return TileTask<T, amx_pair, BYTES>::run(p, task);
#endif
      if (in_pairs(p, Isa::v4_bf16)) return TileTask<T, bf16x2, BYTES>::run(p, task);
    }
#ifdef EAP_AMX
    if constexpr (BYTES == 64 && !std::is_same_v<T, double>)
      if (p.in_parts) return TileTask<T, amx_split, BYTES>::run(p, task);
#endif
    TileTask<T, acc_t<T>, BYTES>::run(p, task);
  }
};

// The size of nearly equal parts of at most about `limit`, a multiple of `step`.
int64_t part(int64_t size, int64_t limit, int64_t step) {
  return divide_up(divide_up(size, divide_up(size, limit)), step) * step;
}

// Puts the tokens in the order of their segments; returns how many segments there are.
int64_t group_tokens(EdgeScores& p) {
  const int64_t tokens = p.delta.size[1];
  p.by_segment.resize(tokens);
  std::iota(p.by_segment.begin(), p.by_segment.end(), 0);
  std::stable_sort(p.by_segment.begin(), p.by_segment.end(),
                   [&](int64_t a, int64_t b) { return p.segments[a] < p.segments[b]; });
  for (int64_t n = 0; n < tokens; ++n)
    if (n == 0 || p.segments[p.by_segment[n]] != p.segments[p.by_segment[n - 1]]) p.starts.push_back(n);
  p.starts.push_back(tokens);
  return p.starts.size() - 1;
}

}  // namespace

void EdgeScores::plan() {
  if (delta.size[1] * delta.size[2] == 0) return;  // and there may be no segment
  const int64_t R = grad.size[0];
  const auto flat = [](const View& x) { return x.stride[2] == 1 && (x.stride[1] == x.size[2] || x.size[1] == 1); };
  if (segments == nullptr && flat(delta) && flat(grad))
    for (View* x : {&delta, &grad}) {
      x->size[2] *= x->size[1];
      x->size[1] = x->size[2] > 0;
      x->stride[1] = x->size[2];
    }
  order.resize(R);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return reach[a] < reach[b]; });
  order.erase(order.begin(), std::find_if(order.begin(), order.end(), [&](int64_t v) { return reach[v] > 0; }));

  const int64_t seen = order.size(), deepest = seen ? reach[order.back()] : 0;
  int64_t edges = 0;
  for (int64_t v : order) edges += reach[v];
  in_parts = isa() == Isa::v4_amx && dtype != Dtype::f64 && edges >= kEdgesPerRow * (seen + deepest);
  int64_t offset = 0, first = 0;
  const int64_t across = deepest ? part(deepest, kColumns, 32) : 1;
  for (int64_t c = 0; c < deepest; c += across) {
    while (reach[order[first]] <= c) ++first;
    const int64_t down = part(seen - first, kRows, 96);  // whole strips, of 12 rows and of 32
    for (int64_t r = first; r < seen; r += down) {
      tiles.push_back({r, std::min(down, seen - r), c, std::min(across, deepest - c), offset});
      offset += tiles.back().rows * tiles.back().columns;
    }
  }
  const int64_t blocks = Blocks(nullptr, delta.size[1], delta.size[2], kInner).count();
  const int64_t wanted = divide_up(kTasks, tiles.size() + 1);
  // AMX multiplies a block faster, but adds partial sums no faster.
  const int64_t least = in_pairs(*this, Isa::v4_amx) ? 2 * kBlocksPerChunk : kBlocksPerChunk;
  chunks = std::max<int64_t>(1, std::min(wanted, segments ? group_tokens(*this) : blocks / least));
  if (chunks > 4) chunks = chunks / 4 * 4;
  for (Tile& tile : tiles) tile.offset *= chunks;
  // The last tiles reach deepest and take longest, so they come first.
  std::reverse(tiles.begin(), tiles.end());
  if (merges()) partial.reset(std::malloc(offset * chunks * bytes_of(accumulation(dtype))));
  if (merges() && !partial) throw std::bad_alloc();
}

void EdgeScores::run(int64_t task) const { dispatch<Body>(dtype, *this, task); }

template <class A> static void add_chunks(const EdgeScores& p, const Tile& tile) {
  const int64_t size = tile.rows * tile.columns;
  const A* const kept = static_cast<const A*>(p.partial.get()) + tile.offset;
  std::vector<double> total(tile.columns);
  write<A>(p, tile, 0, [&](int64_t i) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t c = 0; c < p.chunks; ++c)
      for (int64_t j = 0; j < tile.columns; ++j) total[j] += double(kept[c * size + i * tile.columns + j]);
    return [&](int64_t j) { return total[j]; };
  });
}

void EdgeScores::merge(int64_t tile) const {
  if (dtype == Dtype::f64) add_chunks<double>(*this, tiles[tile]);
  else add_chunks<float>(*this, tiles[tile]);
}

}  // namespace eap
