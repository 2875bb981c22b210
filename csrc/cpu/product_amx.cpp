// The microkernels of Intel's AMX units, whose registers are loaded from memory as edge_scores packs it: 16 rows of 16
// pairs.
#include "product.h"

#ifdef EAP_AMX
#include <immintrin.h>

namespace eap {
namespace {

constexpr int kSide = 16;  // rows of a register, and pairs or sums of each

struct Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

constexpr Config config() {
  Config c;
  for (int i = 0; i < 8; ++i) {
    c.bytes[i] = 4 * kSide;
    c.rows[i] = uint8_t(kSide);
  }
  return c;
}

// Registers 0 to 3 hold the sums, 4 and 5 the two halves of the rows, 6 and 7 those of the columns.
template <class E, int M, int W>
EAP_TARGET_AMX void multiply(const E* a, int64_t lda, const E* b, int64_t ldb, int64_t inner, float* c, int64_t ldc,
                             bool add, const Ahead& ahead) {
  // Macros, not functions: instructions name registers by constants.
#define EAP_EACH_SUM(DO)                        \
  DO(0, c);                                     \
  if constexpr (W == 2) DO(1, c + kSide);       \
  if constexpr (M == 2) DO(2, c + kSide * ldc); \
  if constexpr (M == 2 && W == 2) DO(3, c + kSide * ldc + kSide);
#define EAP_LOAD(SUMS, FROM) _tile_loadd(SUMS, FROM, 4 * ldc)
#define EAP_ZERO(SUMS, FROM) _tile_zero(SUMS)
#define EAP_STORE(SUMS, TO) _tile_stored(SUMS, TO, 4 * ldc)
#define EAP_ROWS(PART)                           \
  _tile_loadd(4, a + k + PART * kSide, 4 * lda); \
  if constexpr (M == 2) _tile_loadd(5, a + kSide * lda + k + PART * kSide, 4 * lda);
#define EAP_COLUMNS(PART)                                \
  _tile_loadd(6, b + (k + PART * kSide) * ldb, 4 * ldb); \
  if constexpr (W == 2) _tile_loadd(7, b + (k + PART * kSide) * ldb + kSide, 4 * ldb);
#define EAP_MULTIPLY                             \
  _tile_dpbf16ps(0, 4, 6);                       \
  if constexpr (W == 2) _tile_dpbf16ps(1, 4, 7); \
  if constexpr (M == 2) _tile_dpbf16ps(2, 5, 6); \
  if constexpr (M == 2 && W == 2) _tile_dpbf16ps(3, 5, 7);
  // Load: the sums.
  if (add) {
    EAP_EACH_SUM(EAP_LOAD)
  } else {
    EAP_EACH_SUM(EAP_ZERO)
  }
  if constexpr (std::is_same_v<E, amx_split>) {
    for (int64_t k = 0; k < inner; k += 3 * kSide) {
      // Multiply: all parts, except the smallest with each other and with the middle ones.
      // clang-format off
      EAP_ROWS(0) EAP_COLUMNS(2) EAP_MULTIPLY
      EAP_COLUMNS(1) EAP_MULTIPLY
      EAP_COLUMNS(0) EAP_MULTIPLY
      EAP_ROWS(2) EAP_MULTIPLY
      EAP_ROWS(1) EAP_MULTIPLY
      EAP_COLUMNS(1) EAP_MULTIPLY
      // clang-format on
    }
  } else {
    for (int64_t k = 0; k < inner; k += kSide) {
      for (int64_t i = 0; i < ahead.count; ++i) __builtin_prefetch(ahead.rows[i] + k * ahead.element, 0, 2);
      // Multiply: the pairs.
      EAP_ROWS(0) EAP_COLUMNS(0) EAP_MULTIPLY
    }
  }
  // Store: the sums.
  EAP_EACH_SUM(EAP_STORE)
}

template <class E> Microkernel<E> kernel(int64_t rows, int64_t vectors) {
  if (rows > kSide) return vectors == 1 ? multiply<E, 2, 1> : multiply<E, 2, 2>;
  return vectors == 1 ? multiply<E, 1, 1> : multiply<E, 1, 2>;
}

}  // namespace

template <> Microkernel<amx_pair> microkernel<amx_pair, 64>(int64_t rows, int64_t vectors) {
  return kernel<amx_pair>(rows, vectors);
}
template <> Microkernel<amx_split> microkernel<amx_split, 64>(int64_t rows, int64_t vectors) {
  return kernel<amx_split>(rows, vectors);
}

EAP_TARGET_AMX void set_up_amx() {
  alignas(64) static constexpr Config whole = config();
  _tile_loadconfig(&whole);
}

EAP_TARGET_AMX void release_amx() { _tile_release(); }

}  // namespace eap
#endif
