// What csrc/cuda/ptx_sm90.h does. Registers that warpgroups hand over, and fences, mean nothing here.
#pragma once
#include "ptx.h"

namespace eap::cuda {

inline void barrier_init(uint32_t barrier, uint32_t arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void barrier_init_fence() {}
inline void barrier_arrive_in(int block, uint32_t barrier) { emulator::barrier_arrive_in(unsigned(block), barrier); }
inline void cluster_sync() { emulator::meet(emulator::kCluster, nullptr, [](void**) {}); }
inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) { emulator::barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { emulator::barrier_wait(barrier, parity); }
inline void tma_load(uint32_t to, const CUtensorMap* map, int x, int y, int z, uint32_t barrier) {
  emulator::tma_load(to, map, x, y, z, barrier, 0);
}
inline void tma_load_in(int blocks, uint32_t to, const CUtensorMap* map, int x, int y, int z, uint32_t barrier) {
  emulator::tma_load(to, map, x, y, z, barrier, uint32_t(blocks));
}
inline void count_up(int32_t* counter) { ++*counter; }
inline int32_t count_of(const int32_t* counter) { return *counter; }
inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::commit_wgmma(); }
template <int kPending> void wgmma_wait() { emulator::wait_wgmma(kPending); }
template <int kRegisters> void give_registers() {}
template <int kRegisters> void take_registers() {}
template <int kCount> void wgmma_settle(float (&)[kCount]) {}
template <class T, int kSlabs> void wgmma(float (&c)[32 * kSlabs], uint64_t a, uint64_t b) {
  emulator::wgmma({c, a, b, 64 * kSlabs, int(sizeof(T)), emulator::value<T>});
}

}  // namespace eap::cuda
