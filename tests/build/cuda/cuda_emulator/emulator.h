// Runs the CUDA kernels on the CPU, one block, or cluster of blocks, after the other, every thread a fiber. Included
// before everything else: the words of CUDA C++ that the kernels use, and what ptx.h and ptx_sm90.h are replaced by.
//
// Fibers stop where threads meet or wait, and go on in random order. What a GPU does in the background happens as late
// as allowed (cp.async, wgmma: when waited for) or at a random time (TMA), so that a missing wait shows.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
using std::max;
using std::min;

namespace emulator {

struct Index { unsigned x, y, z; };

// The device that the kernels see.
struct Device { int capability, processors; bool capturing; };
extern Device device;
// Called after each block or cluster, if set.
extern std::function<void()> after_block;

[[noreturn]] void fail(const char* what);
inline void require(bool condition, const char* what) { if (!condition) fail(what); }

// Lets other fibers run until the condition holds.
void wait_until(std::function<bool()> ready);
// Where all threads of a warp, block or cluster meet: the last one runs `together` on what each has brought.
enum Group { kWarp, kBlock, kCluster };
void meet(Group group, void* mine, const std::function<void(void**)>& together);
template <class V> void meet_warp(V& mine, void (*together)(V* const*)) {
  meet(kWarp, &mine, [&](void** all) { together(reinterpret_cast<V* const*>(all)); });
}

// Shared memory by its 32-bit address.
char* shared(uint32_t address, size_t bytes);
constexpr uint32_t kBase = 0x480;

void copy_async(uint32_t to, const void* from, int bytes);
void commit_copies();
void wait_copies(int pending);

void barrier_init(uint32_t address, uint32_t arrivals);
void barrier_arrive(uint32_t address, uint32_t expected_bytes);
void barrier_arrive_in(unsigned block, uint32_t address);
void barrier_wait(uint32_t address, uint32_t parity);
// Into the shared memory of each of these blocks of the cluster; 0: of the calling thread's.
void tma_load(uint32_t to, const CUtensorMap* map, int x, int y, int z, uint32_t barrier, uint32_t in_blocks);

struct Wgmma { float* c; uint64_t a, b; int columns, bytes; float (*value)(uint32_t, int); };
void wgmma(const Wgmma& product);
void commit_wgmma();
void wait_wgmma(int pending);

// To 10 bits of mantissa, to nearest, ties away from zero.
inline uint32_t rounded_to_tf32(uint32_t x) {
  if ((x & 0x7F800000) != 0x7F800000) x += 0x1000;
  return x & ~uint32_t(0x1FFF);
}

// Number i of the values in a register, as the matrix units see it: of 32 bits they ignore the last 13.
template <class T> float value(uint32_t bits, int i) {
  if constexpr (sizeof(T) == 4) {
    bits &= ~uint32_t(0x1FFF);
    float x;
    memcpy(&x, &bits, 4);
    return x;
  } else {
    T x;
    memcpy(static_cast<void*>(&x), reinterpret_cast<const char*>(&bits) + 2 * i, 2);
    return float(x);
  }
}

void run(dim3 grid, unsigned cluster_size, int threads, size_t shared_bytes, const std::function<void()>& kernel);

template <class... Parameters, class... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
  run(config->gridDim, cluster, int(config->blockDim.x), config->dynamicSmemBytes,
      [&] { kernel(Parameters(arguments)...); });
  return cudaSuccess;
}

}  // namespace emulator

extern emulator::Index threadIdx, blockIdx, gridDim;

#define cudaLaunchKernelEx emulator::launch
template <class... P> cudaError_t cudaFuncSetAttribute(void (*)(P...), cudaFuncAttribute, int) { return cudaSuccess; }
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

inline void __syncthreads() { emulator::meet(emulator::kBlock, nullptr, [](void**) {}); }
inline void __syncwarp() { emulator::meet(emulator::kWarp, nullptr, [](void**) {}); }
inline unsigned __ballot_sync(unsigned, bool predicate) {
  struct Vote { bool mine; unsigned all; } vote{predicate, 0};
  emulator::meet_warp<Vote>(vote, [](Vote* const* votes) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= unsigned(votes[lane]->mine) << lane;
    for (int lane = 0; lane < 32; ++lane) votes[lane]->all = all;
  });
  return vote.all;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
