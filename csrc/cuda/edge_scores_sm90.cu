// Edge scores on compute capability 9.0: one block per processor walks over the units of the schedule. One thread loads
// operands by TMA into a ring of stages (`produce`); two warpgroups multiply them from there with wgmma and store
// the sums (`consume`). Barriers with phases tell when a stage is full and when it is empty again.
//
// A stage is 128 bytes of features of one token: up to four slabs of 64 senders and one block of 128 receivers,
// swizzled. A three-dimensional tensor map (feature, token, row) with the tensor's own strides serves buffers with
// tokens first and gathers the tokens of a segment; beyond the tensor's sizes it delivers zeros.
#include "edge_scores.h"
#include "layout.h"
#include "ptx_sm90.h"

namespace eap::cuda {
namespace {

constexpr const char* kOp = "edge_scores";
constexpr int kGroups = 2;  // consumer warpgroups; group g takes the slabs g, g + 2
constexpr int kConsumers = kGroups * 128;
constexpr int kThreads = kConsumers + 128;  // registers are handed over by whole warpgroups
constexpr int kStages = 4;
constexpr int kRowBytes = 128;  // the width of the swizzle
constexpr int kSlabBytes = kSlab * kRowBytes;
constexpr int kSendersBytes = kHopperSlabs * kSlabBytes;
constexpr int kReceiversBytes = kColumns * kRowBytes;
constexpr int kStageBytes = kSendersBytes + kReceiversBytes;
constexpr int kAlignment = 1024;  // of what is swizzled: slabs of senders and blocks of receivers
template <class T> constexpr int kFeatures = kRowBytes / int(sizeof(T));  // of a stage
constexpr int kSharedBytes = kStages * kStageBytes + kAlignment + 2 * kStages * 8;
static_assert(kHopperSlabs == 2 * kGroups, "a warpgroup keeps the sums of at most two slabs in its registers");
static_assert(kSharedBytes <= 227 << 10, "the ring fits in the shared memory that a block can have");

// Ring: a position in the stages between producer and consumers. A stage's n-th use ends with the barriers' phase of
// parity n % 2.
struct Ring {
  uint32_t memory;
  int stage = 0;
  uint32_t parity = 0;

  __device__ uint32_t senders() const { return memory + stage * kStageBytes; }
  __device__ uint32_t receivers() const { return senders() + kSendersBytes; }
  __device__ uint32_t full() const { return memory + kStages * kStageBytes + stage * 8; }
  __device__ uint32_t empty() const { return full() + kStages * 8; }
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Load: waits for an empty stage, then asks TMA to fill it. Unused on other architectures, where the kernel is empty.
[[maybe_unused]] __device__ void produce(const Plan& plan, const CUtensorMap* delta, const CUtensorMap* grad,
                                         int blocks, int features, Ring ring) {
  for (uint32_t unit = blockIdx.x; unit < plan.units(); unit += gridDim.x) {
    const Tile tile = plan.tile[unit % plan.tiles];
    const Chunk chunk = plan.chunk[unit / plan.tiles];
    for (int32_t i = 0; i < chunk.count; ++i) {
      const int token = int(plan.token_at(chunk.first + i));
      for (int block = 0; block < blocks; ++block) {
        barrier_wait(ring.empty(), ring.parity ^ 1);
        barrier_arrive_expect(ring.full(), tile.slabs * kSlabBytes + kReceiversBytes);
        const int feature = block * features;
        tma_load(ring.receivers(), grad, feature, token, tile.column, ring.full());
        for (int slab = 0; slab < tile.slabs; ++slab)
          tma_load(ring.senders() + slab * kSlabBytes, delta, feature, token, tile.sender + slab * kSlab, ring.full());
        ring.next();
      }
    }
  }
}

// Multiply and store: one unit's work of a warpgroup that owns kMine slabs.
template <class T, int kMine>
__device__ void consume(const Target<float>& target, int64_t steps, Ring& ring) {
  const int thread = threadIdx.x % 128, group = threadIdx.x / 128, lane = threadIdx.x % 32;
  constexpr int kSteps = kRun / kFeatures<T>;
  float c[kMine ? kMine : 1][64];
#pragma unroll 1
  for (int64_t start = 0; start < steps; start += kSteps) {
    const int count = int(min(int64_t(kSteps), steps - start));
    uint32_t used = 0;  // the stage before, whose products may still be running
#pragma unroll 1
    for (int step = 0; step < count; ++step) {
      // Multiply: a full stage, while the products of the one before may still run.
      barrier_wait(ring.full(), ring.parity);
      if constexpr (kMine > 0) {
        wgmma_fence();
        const uint64_t b = descriptor(ring.receivers());
#pragma unroll
        for (int k = 0; k < kRowBytes / 32; ++k)
#pragma unroll
          for (int i = 0; i < kMine; ++i)
            wgmma<T>(c[i], descriptor(ring.senders() + (group + kGroups * i) * kSlabBytes) + k * kDescriptorStep,
                     b + k * kDescriptorStep, step > 0 || k > 0);
        wgmma_commit();
        wgmma_wait<1>();
      }
      // Release: the stage before is empty once every warp has said that its own products are done.
      __syncwarp();
      if (step > 0 && lane == 0) barrier_arrive(used);
      used = ring.empty();
      ring.next();
    }
    if constexpr (kMine > 0) wgmma_wait<0>();
    __syncwarp();
    if (lane == 0) barrier_arrive(used);
    // Store: the run's sums.
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      wgmma_settle(c[i]);
      const int row = (group + kGroups * i) * kSlab + thread / 32 * 16;
#pragma unroll
      for (int part = 0; part < 64; part += 16)
        target.put<16>((row + c_row(lane, 0)) * kColumns + c_column(lane, 0), [&](int e) { return c[i][part + e]; },
                       [&](int e) { return c_row(0, part + e) * kColumns + c_column(0, part + e); }, start == 0);
      if (start + count == steps) target.finish(row, 16, 0, kColumns);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    hopper(const __grid_constant__ Plan plan, const __grid_constant__ CUtensorMap delta,
           const __grid_constant__ CUtensorMap grad, const __grid_constant__ Scores<float> scores, int32_t features) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  Ring ring{(shared_memory() + kAlignment - 1) / kAlignment * kAlignment};
  if (threadIdx.x == 0) {
    for (Ring r = ring; r.parity == 0; r.next()) {
      barrier_init(r.full(), 1);                 // the producer
      barrier_init(r.empty(), kConsumers / 32);  // the consumers' warps
    }
    barrier_init_fence();
  }
  __syncthreads();

  const int blocks = (features - 1) / kFeatures<T> + 1;
  if (threadIdx.x >= kConsumers) {
    give_registers<24>();
    if (threadIdx.x == kConsumers) produce(plan, &delta, &grad, blocks, kFeatures<T>, ring);
    return;
  }
  take_registers<240>();  // 2 x 240 + 24 is three times the 168 that a thread starts with
  for (uint32_t unit = blockIdx.x; unit < plan.units(); unit += gridDim.x) {
    const Target<float> target(plan, scores, unit);
    const int64_t steps = int64_t(target.chunk.count) * blocks;
    const int mine = (target.tile.slabs - int(threadIdx.x) / 128 + 1) / kGroups;
    if (mine == 2) consume<T, 2>(target, steps, ring);
    else if (mine == 1) consume<T, 1>(target, steps, ring);
    else consume<T, 0>(target, steps, ring);
  }
#else
  __trap();  // an empty kernel would leave scores as they are
#endif
}

// A size-1 dimension may have any stride in torch; it is never stepped along.
int64_t byte_stride(const View& x, int dim, int bytes) { return x.size[dim] == 1 ? 16 : x.stride[dim] * bytes; }

bool fits(const View& x, int bytes) {
  for (int dim = 0; dim < 2; ++dim) {
    const int64_t stride = byte_stride(x, dim, bytes);
    if (stride <= 0 || stride % 16 != 0 || stride >> 40 != 0) return false;
  }
  return x.stride[2] == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// The driver's encoder, found by the first call: the library must load where there is no driver.
auto find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  check(kOp, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
  check(kOp, cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
  if (found != cudaDriverEntryPointSuccess)
    throw std::runtime_error("edge_scores: expected a driver that knows tensor maps, got an older one");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

CUtensorMap tensor_map(const View& x, Dtype dtype, uint32_t rows) {
  CUtensorMap map;
  const int bytes = bytes_of(dtype);
  // TFLOAT32 rounds fp32 values as it copies them.
  const CUtensorMapDataType type = dtype == Dtype::f32    ? CU_TENSOR_MAP_DATA_TYPE_TFLOAT32
                                   : dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                          : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t size[3] = {cuuint64_t(x.size[2]), cuuint64_t(x.size[1]), cuuint64_t(x.size[0])};
  const cuuint64_t stride[2] = {cuuint64_t(byte_stride(x, 1, bytes)), cuuint64_t(byte_stride(x, 0, bytes))};
  const cuuint32_t box[3] = {cuuint32_t(kRowBytes / bytes), 1, rows}, step[3] = {1, 1, 1};
  static const auto encode = find_encoder();
  const CUresult result = encode(&map, type, 3, const_cast<void*>(x.data), size, stride, box, step,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("edge_scores: expected the driver to encode a tensor map, got error " +
                             std::to_string(result));
  return map;
}

}  // namespace

bool hopper_can_run(const EdgeScores& call) {
#if defined(__CUDACC__) && !defined(EAP_SM90A)
  return false;  // compiled for other cards only: the kernel is empty
#endif
  const int bytes = bytes_of(call.dtype);
  return (bytes == 2 || (call.dtype == Dtype::f32 && call.tf32)) && fits(call.delta, bytes) && fits(call.grad, bytes) &&
         device_attribute(kOp, cudaDevAttrComputeCapabilityMajor, call.device) == 9 &&
         device_attribute(kOp, cudaDevAttrComputeCapabilityMinor, call.device) == 0;
}

void hopper_run(const EdgeScores& call, const Plan& plan, const Scores<float>& scores, CUstream_st* stream) {
  const auto kernel = call.dtype == Dtype::f32    ? hopper<tf32>
                      : call.dtype == Dtype::bf16 ? hopper<__nv_bfloat16>
                                                  : hopper<__half>;
  launch(kOp, kernel, dim3(call.blocks), kThreads, kSharedBytes, stream, plan,
         tensor_map(call.delta, call.dtype, kSlab), tensor_map(call.grad, call.dtype, kColumns), scores,
         int32_t(call.delta.size[2]));
}

}  // namespace eap::cuda
