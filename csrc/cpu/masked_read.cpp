// Masked read: each receiver sums the senders it keeps, so cost follows the kept edges, not the size of the graph.
#include <algorithm>
#include <cstring>
#include <type_traits>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "dispatch.h"

namespace eap {
namespace {

// Elements of a token row handled at once: whole pages, since senders lie far apart. The longer one is for receivers
// with few edges on average: few of them read the same sender, so it need not stay in cache.
constexpr int64_t kLong = 2048, kShort = 1024, kFewEdges = 16;
constexpr int64_t kLargeBytes = 4 << 20;  // of a result that its reader will not find in a core's own cache

template <class T, class A>
EAP_INLINE void axpy(A* __restrict acc, const T* x, int64_t step, A weight, int64_t count) {
  if (step == 1)
    for (int64_t i = 0; i < count; ++i) acc[i] += weight * load(x[i]);
  else
    for (int64_t i = 0; i < count; ++i) acc[i] += weight * load(x[i * step]);
}

// Four senders at once: one load and one store of the accumulator for four products.
template <class T, class A>
EAP_INLINE void axpy4(A* __restrict acc, const T* const* x, const A* weight, int64_t count) {
  const T *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
  const A w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
  for (int64_t i = 0; i < count; ++i)
    acc[i] += w0 * load(x0[i]) + w1 * load(x1[i]) + w2 * load(x2[i]) + w3 * load(x3[i]);
}

// Past the caches: what is written is not read first, and senders stay in the cache.
template <int BYTES, class A> EAP_INLINE void stream(A* to, const A* from, int64_t count) {
  typedef A V __attribute__((vector_size(BYTES)));
  constexpr int64_t lanes = BYTES / int64_t(sizeof(A));
  int64_t i = 0;
#ifdef EAP_X86_LEVELS
  for (; BYTES > 16 && i + lanes <= count; i += lanes) {
    V v;
    std::memcpy(&v, from + i, BYTES);
    asm("vmovntps %1, %0" : "=m"(*reinterpret_cast<V*>(to + i)) : "v"(v));
  }
#endif
  std::copy_n(from + i, count - i, to + i);
}

// Asks for pages of 2 MiB where the system has them: a large result is new memory, and it comes a page at a time.
void in_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(page - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // refused, all is as it was
#endif
}

template <class T, int BYTES> struct Body {
  using A = acc_t<T>;

  EAP_INLINE static void run(const MaskedRead& p, int64_t task) {
    const int64_t R = p.base.size[0], D = p.delta.size[2];
    const int64_t chunks = divide_up(D, p.chunk), groups = divide_up(R, p.receivers_per_task);
    const int64_t v0 = task % groups * p.receivers_per_task, v1 = std::min(R, v0 + p.receivers_per_task);
    const int64_t d = task / groups % chunks * p.chunk, n = task / groups / chunks;
    for (int64_t v = v0; v < v1; ++v) receiver(p, v, n, d, std::min(p.chunk, D - d));
#ifdef EAP_X86_LEVELS
    asm volatile("sfence" ::: "memory");
#endif
  }

  EAP_INLINE static void receiver(const MaskedRead& p, int64_t v, int64_t n, int64_t d, int64_t count) {
    const int64_t N = p.delta.size[1], D = p.delta.size[2], step = p.delta.stride[2];
    const T* const delta = static_cast<const T*>(p.delta.data) + n * p.delta.stride[1] + d * step;
    const T* const base = static_cast<const T*>(p.base.data) + v * p.base.stride[0] + n * p.base.stride[1] +
                          d * p.base.stride[2];
    // Load: the base, into sums that stay in the cache.
    A acc[kLong];
    widen(base, p.base.stride[2], count, acc);
    // Multiply: adds the kept senders, four at a time.
    int64_t e = p.first[v];
    const int64_t end = p.first[v + 1];
    for (; step == 1 && e + 4 <= end; e += 4) {
      const T* rows[4];
      A weights[4];
      for (int j = 0; j < 4; ++j) {
        rows[j] = delta + p.sender[e + j] * p.delta.stride[0];
        weights[j] = A(p.weight[e + j]);
      }
      axpy4(acc, rows, weights, count);
    }
    for (; e < end; ++e) axpy(acc, delta + p.sender[e] * p.delta.stride[0], step, A(p.weight[e]), count);
    // Store: past the caches where the result is large, else rounded to T.
    T* const out = static_cast<T*>(p.out) + (v * N + n) * D + d;
    if constexpr (std::is_same_v<T, A>)
      if (p.past_caches && reinterpret_cast<uintptr_t>(out) % BYTES == 0) return stream<BYTES>(out, acc, count);
    for (int64_t i = 0; i < count; ++i) store(out[i], acc[i]);
  }
};

}  // namespace

void MaskedRead::plan(int64_t threads) {
  const int64_t D = delta.size[2];
  if (delta.stride[2] == 1 && base.stride[2] == 1 && delta.stride[1] == D && base.stride[1] == D) {
    // Tokens follow each other without gaps: one long row, so that small D does not mean short loops.
    for (View* x : {&delta, &base}) {
      x->size[2] *= x->size[1];
      x->stride[1] *= x->size[1];
      x->size[1] = 1;
    }
  }
  const int64_t row = delta.size[2], tokens = delta.size[1], R = base.size[0];
  const int64_t bytes = R * tokens * row * bytes_of(dtype);
  chunk = first[R] <= kFewEdges * R ? kLong : kShort;
  past_caches = bytes >= kLargeBytes;
  if (past_caches) in_huge_pages(out, bytes);
  const int64_t blocks = std::max<int64_t>(1, tokens * divide_up(row, chunk));
  const int64_t groups = std::clamp(divide_up(4 * threads, blocks), int64_t(1), std::max<int64_t>(R, 1));
  receivers_per_task = std::max<int64_t>(1, divide_up(R, groups));
}

int64_t MaskedRead::tasks() const {
  return delta.size[1] * divide_up(delta.size[2], chunk) * divide_up(base.size[0], receivers_per_task);
}

void MaskedRead::run(int64_t task) const { dispatch<Body>(dtype, *this, task); }

}  // namespace eap
