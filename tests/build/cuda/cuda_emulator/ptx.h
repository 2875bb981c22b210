// What csrc/cuda/ptx.h does, by the description of each instruction in the PTX ISA.
#pragma once
#include <type_traits>

#include "numbers.h"

namespace eap::cuda {

inline uint32_t shared_memory() { return emulator::kBase; }

template <class V> V load_shared(uint32_t address) {
  emulator::require(address % std::min<size_t>(16, sizeof(V)) == 0, "a load from shared memory is not aligned");
  V value;
  memcpy(&value, emulator::shared(address, sizeof(V)), sizeof(V));
  return value;
}

template <class V> void store_shared(uint32_t address, const V& value) {
  emulator::require(address % std::min<size_t>(16, sizeof(V)) == 0, "a store to shared memory is not aligned");
  memcpy(emulator::shared(address, sizeof(V)), &value, sizeof(V));
}

inline void cp_async(uint32_t to, const void* from, int bytes) { emulator::copy_async(to, from, bytes); }
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kPending> void cp_async_wait() { emulator::wait_copies(kPending); }

// Lanes 8 m to 8 m + 7 give the rows of matrix m; lane l receives elements 2 (l % 4) and the next of row l / 4.
inline void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  struct Lane { uint32_t address; uint32_t* r; } mine{address, r};
  emulator::meet_warp<Lane>(mine, [](Lane* const* lanes) {
    for (int m = 0; m < 4; ++m)
      for (int lane = 0; lane < 32; ++lane) {
        const uint32_t row = lanes[8 * m + lane / 4]->address;
        emulator::require(row % 16 == 0, "a row of ldmatrix is not aligned");
        memcpy(&lanes[lane]->r[m], emulator::shared(row, 16) + lane % 4 * 4, 4);
      }
  });
}

inline uint32_t rounded_to_tf32(uint32_t x) { return emulator::rounded_to_tf32(x); }

// Fragments of m16n8k16, with g = lane / 4 and t = lane % 4. A: rows g (a0 a1 a4 a5) and g + 8, columns 2 t, 2 t + 1
// and, from a4 on, 8 more. B: rows 2 t, 2 t + 1 and, from b2 on, 8 more; column g. C: rows g and, from c2 on, g + 8.
// Of m16n8k8: A: rows g (a0 a2) and g + 8, columns t and, from a2 on, t + 4. B: rows t and, b1, t + 4; column g.
template <class T> void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr int kPacked = 4 / sizeof(T), K = 8 * kPacked;
  struct Lane { float* c; const uint32_t* a; uint32_t b[2]; } mine{c, a, {b0, b1}};
  emulator::meet_warp<Lane>(mine, [](Lane* const* lanes) {
    float A[16][K], B[K][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r)
        for (int i = 0; i < kPacked; ++i) {
          const int k = kPacked * t + i;
          A[g + r % 2 * 8][k + r / 2 * 4 * kPacked] = emulator::value<T>(lanes[lane]->a[r], i);
          if (r < 2) B[k + r * 4 * kPacked][g] = emulator::value<T>(lanes[lane]->b[r], i);
        }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < K; ++k) lanes[lane]->c[i] += A[lane / 4 + i / 2 * 8][k] * B[k][lane % 4 * 2 + i % 2];
  });
}

}  // namespace eap::cuda
