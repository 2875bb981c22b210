// Register tiles on Intel's AMX units, whose tiles of 16 rows of 16 pairs lie in memory as edge_scores packs them.
#include "product.h"

#ifdef EAP_AMX
#include <immintrin.h>

#include <array>

namespace eap {
namespace {

constexpr int kSide = 16;  // rows of a tile, and pairs or sums of its rows, at most

// What the tiles hold: 0 to 3 the sums, 4 and 5 the two halves of the rows, 6 and 7 the columns.
struct Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

constexpr Config config(int upper, int lower) {
  Config c;
  for (int i = 0; i < 8; ++i) c.bytes[i] = 64, c.rows[i] = uint8_t(kSide);
  c.rows[0] = c.rows[1] = c.rows[4] = uint8_t(upper);
  c.rows[2] = c.rows[3] = c.rows[5] = uint8_t(lower);
  return c;
}

template <int M, int W>
EAP_TARGET_AMX void tile(const tile_pair* a, int64_t lda, const tile_pair* b, int64_t ldb, int64_t inner, float* c,
                         int64_t ldc, bool add, const Ahead& ahead) {
  constexpr int upper = M < kSide ? M : kSide, lower = M - upper;
  alignas(64) static constexpr Config shape = config(upper, lower > 0 ? lower : 1);
  // It also sets every tile to zero.
  _tile_loadconfig(&shape);
  for (int64_t k = 0; k < inner; k += kSide) {
    for (int64_t i = 0; i < ahead.count; ++i) __builtin_prefetch(ahead.rows[i] + k * ahead.element, 0, 2);
    _tile_loadd(6, b + k * ldb, 4 * ldb);
    _tile_loadd(4, a + k, 4 * lda);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (W == 2) _tile_loadd(7, b + k * ldb + kSide, 4 * ldb);
    if constexpr (W == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (lower > 0) {
      _tile_loadd(5, a + kSide * lda + k, 4 * lda);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (W == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float sums[M][W * kSide];
  _tile_stored(0, sums[0], sizeof(sums[0]));
  if constexpr (W == 2) _tile_stored(1, sums[0] + kSide, sizeof(sums[0]));
  if constexpr (lower > 0) _tile_stored(2, sums[kSide], sizeof(sums[0]));
  if constexpr (lower > 0 && W == 2) _tile_stored(3, sums[kSide] + kSide, sizeof(sums[0]));
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < W * kSide; ++n) c[m * ldc + n] = add ? c[m * ldc + n] + sums[m][n] : sums[m][n];
}

template <int W, int... M>
constexpr std::array<TileKernel<tile_pair>, sizeof...(M)> table(std::integer_sequence<int, M...>) {
  return {tile<M + 1, W>...};
}

}  // namespace

template <> TileKernel<tile_pair> tile_kernel<tile_pair, 64>(int64_t rows, int64_t vectors) {
  constexpr auto heights = std::make_integer_sequence<int, tile_rows<tile_pair>(64)>{};
  static constexpr std::array narrow = table<1>(heights), wide = table<2>(heights);
  return (vectors == 1 ? narrow : wide)[rows - 1];
}

EAP_TARGET_AMX void release_tiles() { _tile_release(); }

}  // namespace eap
#endif
