// Matrix products of a strip of rows and a panel of columns, whose sums stay in registers: rows of `a` are broadcast,
// columns of `b` lie in vectors.
#pragma once
#include <cstring>
#include <type_traits>
#include <utility>

#include "convert.h"
#include "kernels.h"

namespace eap {

template <class A, int BYTES> struct Vector { typedef A type __attribute__((vector_size(BYTES))); };
template <class A, int BYTES> using vector_t = typename Vector<A, BYTES>::type;

// Two neighbouring bf16 values of a row, multiplied and summed by one instruction (AVX512-BF16).
struct bf16x2 { uint32_t bits; };
template <> struct Accumulate<bf16x2> { using type = float; };
// The same for AMX, whose registers (Intel's tiles) hold 16 rows of 16 pairs: one multiplies 16 rows by 16 columns.
struct amx_pair : bf16x2 {};
template <> struct Accumulate<amx_pair> { using type = float; };
// The same for fp32, each value the sum of three bf16 parts: 32 values of a row become 16 pairs of their largest parts,
// then 16 of their middle and 16 of their smallest parts.
struct amx_split : bf16x2 {};
template <> struct Accumulate<amx_split> { using type = float; };
template <class E> constexpr bool uses_amx = std::is_same_v<E, amx_pair> || std::is_same_v<E, amx_split>;

// This many values of a row take this many elements.
template <class E> struct Group { static constexpr int64_t values = 1, elements = 1; };
template <> struct Group<bf16x2> { static constexpr int64_t values = 2, elements = 1; };
template <> struct Group<amx_pair> { static constexpr int64_t values = 2, elements = 1; };
template <> struct Group<amx_split> { static constexpr int64_t values = 32, elements = 48; };

// Rows of a strip, at most: accumulators, vectors of b and a broadcast fit into 32 (AVX-512) or 16 registers.
template <class E = float> constexpr int strip_rows(int bytes) { return uses_amx<E> ? 32 : bytes == 64 ? 12 : 6; }
// Vectors of columns of a panel, at most.
constexpr int kVectors = 2;
template <class E, int BYTES> constexpr int64_t panel_columns = kVectors * BYTES / int64_t(sizeof(E));

// What to bring into the cache while a strip is multiplied: `count` rows as long as its own, in elements of
// `element` bytes.
struct Ahead {
  const char* const* rows = nullptr;
  int64_t count = 0, element = 0;
};

// c[m, n] = sum_k a[m, k] * b[k, n] over a strip and a panel, or += with `add`; rows of a, b and c are lda, ldb and ldc
// apart.
template <class E>
using Microkernel = void (*)(const E* a, int64_t lda, const E* b, int64_t ldb, int64_t inner, acc_t<E>* c, int64_t ldc,
                             bool add, const Ahead& ahead);

// The microkernel of this many rows and vectors of columns, in product.cpp.
template <class E, int BYTES> Microkernel<E> microkernel(int64_t rows, int64_t vectors);
#ifdef EAP_AMX
// In product_amx.cpp. They write rows in multiples of 16, also past the last row.
template <> Microkernel<amx_pair> microkernel<amx_pair, 64>(int64_t rows, int64_t vectors);
template <> Microkernel<amx_split> microkernel<amx_split, 64>(int64_t rows, int64_t vectors);
void set_up_amx();
void release_amx();
#endif

// Where `used`, the thread's AMX registers are set up while this lives: other libraries set up their own.
class AmxScope {
  [[maybe_unused]] const bool used;

 public:
  explicit AmxScope(bool set_up) : used(set_up) {
#ifdef EAP_AMX
    if (used) set_up_amx();
#endif
  }
  ~AmxScope() {
#ifdef EAP_AMX
    if (used) release_amx();
#endif
  }
  AmxScope(const AmxScope&) = delete;
};

// Calls `visit(row, height)` over `rows` rows, in strips of nearly equal height: low ones would leave the units idle.
template <int BYTES, class E = float, class Visit> EAP_INLINE void for_strips(int64_t rows, const Visit& visit) {
  const int64_t strips = divide_up(rows, strip_rows<E>(BYTES));
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t row = i * rows / strips;
    visit(row, (i + 1) * rows / strips - row);
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define EAP_SHUFFLES 1
#endif
#endif

#ifdef EAP_SHUFFLES
// Joins the 16-byte lanes at element k of rows[0], rows[step], rows[2 * step], ... into one vector. By hand, since
// compilers join lanes through memory.
template <class E, int BYTES>
EAP_INLINE void load_lanes(const E* const* rows, int64_t step, int64_t k, vector_t<acc_t<E>, BYTES>& loaded) {
  // A local vector: g++ 12 would store `loaded` after each lane.
  vector_t<acc_t<E>, BYTES> to;
#ifdef EAP_X86_LEVELS
  struct Lane { char bytes[16]; };
  const auto lane = [&](int64_t i) -> const Lane& { return *reinterpret_cast<const Lane*>(rows[i * step] + k); };
  if constexpr (BYTES > 16) asm("vmovups %1, %x0" : "=v"(to) : "m"(lane(0)));
  if constexpr (BYTES == 32) asm("vinsertf128 $1, %1, %0, %0" : "+x"(to) : "m"(lane(1)));
  if constexpr (BYTES == 64) {
    asm("vinsertf32x4 $1, %1, %0, %0" : "+v"(to) : "m"(lane(1)));
    asm("vinsertf32x4 $2, %1, %0, %0" : "+v"(to) : "m"(lane(2)));
    asm("vinsertf32x4 $3, %1, %0, %0" : "+v"(to) : "m"(lane(3)));
  }
#endif
  if constexpr (BYTES == 16) std::memcpy(&to, rows[0] + k, 16);
  loaded = to;
}

// Within each 16-byte lane of L elements: elements of a and b in turns, of their first halves or of their second.
template <int L, bool HIGH, class V, int... I>
EAP_INLINE void interleave(const V& a, const V& b, V& to, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  to = __builtin_shufflevector(a, b, (I % 2 * n + I / L * L + (HIGH ? L / 2 : 0) + I % L / 2)...);
}
#endif

// to[k * ld + r] = rows[r][k] for a vector's width of rows; `inner` is a multiple of that width.
template <class E, int BYTES> EAP_INLINE void transpose(const E* const* rows, int64_t inner, E* to, int64_t ld) {
  constexpr int lanes = BYTES / int(sizeof(E));
#ifdef EAP_SHUFFLES
  using V = vector_t<acc_t<E>, BYTES>;
  constexpr int L = 16 / int(sizeof(E)), pieces = BYTES / 16;
  constexpr auto all = std::make_integer_sequence<int, lanes>{};
  for (int64_t k = 0; k < inner; k += lanes) {
    V x[pieces][L], y[L];
    for (int r = 0; r < L; ++r)
      for (int q = 0; q < pieces; ++q) load_lanes<E, BYTES>(rows + r, L, k + q * L, x[q][r]);
    for (int q = 0; q < pieces; ++q) {
      // Each pass interleaves row i with row i + L / 2; log2(L) passes transpose every lane.
      for (int step = 1; step < L; step *= 2) {
        for (int r = 0; r < L / 2; ++r) {
          interleave<L, false>(x[q][r], x[q][r + L / 2], y[2 * r], all);
          interleave<L, true>(x[q][r], x[q][r + L / 2], y[2 * r + 1], all);
        }
        for (int r = 0; r < L; ++r) x[q][r] = y[r];
      }
      for (int r = 0; r < L; ++r) std::memcpy(to + (k + q * L + r) * ld, &x[q][r], BYTES);
    }
  }
#else
  for (int r = 0; r < lanes; ++r)
    for (int64_t k = 0; k < inner; ++k) to[k * ld + r] = rows[r][k];
#endif
}

}  // namespace eap
