// Packing: copies the rows of a block into the order that the microkernels read, without strides and low precision.
#pragma once
#include <algorithm>
#include <cstring>

#include "product.h"
#include "split.h"

namespace eap {

constexpr int64_t kInner = 512;      // values of the inner dimension packed at once
constexpr int64_t kAmxInner = 1024;  // for pairs on AMX, which waits for memory: long pieces of it are read faster
constexpr int64_t kRowsAhead = 2;    // how many rows ahead of the one that is split are fetched

// Some features of some tokens, which `order` names in ascending order, or which follow each other.
struct Block {
  int64_t token, tokens, feature, features;
  const int64_t* order;

  EAP_INLINE int64_t at(int64_t i) const { return order ? order[token + i] : token + i; }
  EAP_INLINE bool consecutive() const { return at(tokens - 1) - at(0) == tokens - 1; }
};

// Pairs of neighbours as they lie in memory; the last of an odd number is paired with zero.
EAP_INLINE void copy_pairs(const bf16* from, int64_t count, bf16x2* to) {
  std::memcpy(to, from, count * sizeof(bf16));
  if (count % 2) to[count / 2].bits = from[count - 1].bits;
}

// Which rows of an operand: `order` names them, or they follow each other.
struct Rows {
  const View& x;
  const int64_t* order;
  int64_t first, count;

  template <class T> EAP_INLINE const T* at(int64_t i, const Block& block) const {
    return static_cast<const T*>(x.data) + (order ? order[first + i] : first + i) * x.stride[0] +
           block.at(0) * x.stride[1] + block.feature * x.stride[2];
  }
  Rows part(int64_t from, int64_t size) const { return {x, order, first + from, size}; }
};

// One block of rows as contiguous elements E: [rows, ld], followed by zeros up to a multiple of `lanes`.
template <class T, class E> struct Packed {
  static constexpr int64_t values = Group<E>::values;  // of an element
  // Values of a block, at most.
  static constexpr int64_t inner = std::is_same_v<E, amx_pair> ? kAmxInner : kInner;
  // Elements of it. Rows are padded: a power of two apart they would share cache sets.
  static constexpr int64_t depth = inner / values, ld = depth + 16;
  int64_t pieces, length, piece, width;

  EAP_INLINE Packed(const View& x, const Block& block, int64_t lanes) {
    // Tokens of an odd number of values end in half a pair, whether or not the other operand is flat as well.
    const bool flat = x.stride[2] == 1 && x.stride[1] == block.features && block.features % values == 0 &&
                      block.consecutive();
    pieces = flat ? 1 : block.tokens;
    length = flat ? block.tokens * block.features : block.features;
    piece = divide_up(length, values);
    width = divide_up(pieces * piece, lanes) * lanes;
  }

  EAP_INLINE void copy_rows(const Rows& rows, const Block& block, E* to) const {
    for (int64_t r = 0; r < rows.count; ++r, to += ld) {
      const T* const from = rows.at<T>(r, block);
      for (int64_t i = 0; i < pieces; ++i) {
        const T* const some = from + (block.at(i) - block.at(0)) * rows.x.stride[1];
        if constexpr (values == 2) copy_pairs(some, length, to + i * piece);
        else widen(some, rows.x.stride[2], length, to + i * piece);
      }
      std::fill(to + pieces * piece, to + width, E{});
    }
  }

  // Whether a row lies in memory as it would be copied.
  bool in_place(const View& x) const {
    return sizeof(T) * values == sizeof(E) && x.stride[2] == 1 && pieces == 1 && length == width * values;
  }
};

// Packs a strip of rows at a time into `a`, [rows, ld], and columns into `b`, panels of [depth, width].
template <class T, class E, int BYTES, int64_t COLUMNS> class Packer {
 public:
  static constexpr bool splits = std::is_same_v<E, amx_split>;

 private:
  using Row = std::conditional_t<splits, float, E>;  // elements of a row before it is split
  using Panel = Packed<T, Row>;
  static constexpr int64_t lanes = BYTES / sizeof(E), height = strip_rows<E>(BYTES);
  static constexpr int64_t multiple = splits ? Group<E>::values : lanes;

  Row* const staged;
  float row_scales[height], column_scales[COLUMNS + lanes];  // what values were divided by before they were split
  bool columns_scaled = false, rows_scaled = false;

 public:
  using A = acc_t<E>;
  static constexpr int64_t inner = Panel::inner, values = Panel::values, width = panel_columns<E, BYTES>;
  static constexpr int64_t depth = splits ? inner / Group<E>::values * Group<E>::elements : Panel::depth;
  static constexpr int64_t ld = depth + 16;
  static constexpr int64_t elements = COLUMNS * depth + 2 * height * ld;  // of its memory

  E *const a, *const b;

  EAP_INLINE explicit Packer(E* memory)
      : staged(reinterpret_cast<Row*>(memory + COLUMNS * depth + height * ld)), a(memory + COLUMNS * depth), b(memory) {
  }

  // Elements of a packed row of a block.
  EAP_INLINE static int64_t length(const Rows& rows, const Block& block) {
    return Panel(rows.x, block, multiple).width * depth / Panel::depth;
  }

  // Packs `count` rows from `first` on, at most a strip's. `next` is the block that follows.
  EAP_INLINE void pack_strip(const Rows& rows, int64_t first, int64_t count, const Block& block, const Block& next) {
    const Panel packed(rows.x, block, multiple);
    const Rows part = rows.part(first, count);
    if constexpr (splits) {
      const Row* from[height];
      const bool in_place = find(packed, part, block, from, count);
      rows_scaled = false;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t i = first + r + kRowsAhead;
        const T* const later = i < rows.count ? rows.at<T>(i, block) : rows.at<T>(i % rows.count, next);
        row_scales[r] = split_row(from[r], packed.width, a + r * ld,
                                  in_place ? reinterpret_cast<const Row*>(later) : from[r]);
        rows_scaled |= row_scales[r] != 1;
      }
    } else {
      packed.copy_rows(part, block, a);
    }
  }

  // Packs the columns of all panels.
  EAP_INLINE void pack_columns(const Rows& columns, const Block& block) {
    const Panel packed(columns.x, block, multiple);
    columns_scaled = false;
    for (int64_t c = 0; c < columns.count; c += lanes) {
      const Row* from[lanes];
      find(packed, columns.part(c, std::min(lanes, columns.count - c)), block, from, lanes);
      E* const to = b + c / width * width * depth + c % width;
      if constexpr (splits) columns_scaled |= split_columns(from, packed.width, to, width, column_scales + c);
      else transpose<E, BYTES>(from, packed.width, to, width);
    }
  }

  // Adds the products of a strip and a panel to c, [rows, width].
  EAP_INLINE void multiply(int64_t rows, int64_t panel, int64_t vectors, int64_t inner, A* c, const Ahead& ahead) {
    const auto kernel = microkernel<E, BYTES>(rows, vectors);
    const E* const columns = b + panel * width * depth;
    if (!rows_scaled && !columns_scaled) return kernel(a, ld, columns, width, inner, c, width, true, ahead);
    alignas(64) A apart[height * width] = {};
    kernel(a, ld, columns, width, inner, apart, width, true, ahead);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < vectors * lanes; ++i)
        c[r * width + i] += apart[r * width + i] * (row_scales[r] * column_scales[panel * width + i]);
  }

 private:
  // Points `from` at `count` rows: in memory where they can be read there, else at copies; missing rows are zero.
  // Returns whether they are read in memory.
  EAP_INLINE bool find(const Panel& packed, const Rows& part, const Block& block, const Row** from, int64_t count) {
    const bool in_place = packed.in_place(part.x);
    if (!in_place) packed.copy_rows(part, block, staged);
    for (int64_t r = 0; r < count; ++r) {
      from[r] = staged + r * Panel::ld;
      if (r >= part.count) std::fill_n(staged + r * Panel::ld, packed.width, Row{});
      else if (in_place) from[r] = reinterpret_cast<const Row*>(part.template at<T>(r, block));
    }
    return in_place;
  }
};

}  // namespace eap
