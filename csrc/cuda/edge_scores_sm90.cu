// Edge scores on compute capability 9.0: clusters of two blocks, one a processor, walk over their pieces of the
// schedule. In each block one thread loads operands by TMA into a ring of stages (`produce`); two warpgroups multiply
// them from there with wgmma and store the sums (`consume`). Barriers with phases tell when a stage is full and when it
// is empty again.
//
// A stage is 128 bytes of features of one token: up to four slabs of 64 senders, and 128 receivers of the tile's 256,
// swizzled. Both blocks need the same senders: each loads half of every slab, into both. So a stage is loaded once the
// consumers of both have left it. A warpgroup multiplies 64 receivers by as many slabs as they see, all slabs with one
// instruction. A three-dimensional tensor map (feature, token, row) with the tensor's own strides serves buffers with
// tokens first and gathers the tokens of a segment; beyond the tensor's sizes it delivers zeros.
#include "edge_scores.h"
#include "layout.h"
#include "ptx_sm90.h"

namespace eap::cuda {
namespace {

constexpr const char* kOp = "edge_scores";
constexpr int kReceivers = kHopperColumns / kHopperBlocks;  // of a block
constexpr int kGroups = kReceivers / kSlab;                 // consumer warpgroups, 64 receivers each
constexpr int kConsumers = kGroups * 128;
constexpr int kThreads = kConsumers + 128;  // registers are handed over by whole warpgroups
constexpr int kStages = 4;
constexpr int kRowBytes = 128;  // the width of the swizzle
constexpr int kSlabBytes = kSlab * kRowBytes;
constexpr int kSendersBytes = kHopperSlabs * kSlabBytes;
constexpr int kReceiversBytes = kReceivers * kRowBytes;
constexpr int kShare = kSlab / kHopperBlocks;  // of a slab's senders, which a block loads
constexpr int kStageBytes = kSendersBytes + kReceiversBytes;
constexpr int kAlignment = 1024;  // of what is swizzled: slabs of senders and blocks of receivers
template <class T> constexpr int kFeatures = kRowBytes / int(sizeof(T));  // of a stage
constexpr int kSharedBytes = kStages * kStageBytes + kAlignment + 2 * kStages * 8;
static_assert(kHopperBlocks == 2 && kGroups == 2, "each block takes one group from either end of a tile");
static_assert(kHopperSlabs <= 4, "a warpgroup keeps the sums of at most four slabs in its registers");
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

// Which 64 of a tile's receivers a warpgroup multiplies. Those further on see more senders: a block takes some of the
// first and some of the last, so that both blocks multiply about as much.
constexpr __device__ int tile_group(int block, int group) {
  return group == 0 ? block : kHopperBlocks * kGroups - 1 - block;
}

// In step: so that what one worker loads is still in the L2 cache when others need it, none gets more than kAhead
// periods ahead of the slowest. It asks a few times only, and from then on no more: others may run later, and results
// are the same in any case. Without it the operands of an 8B model came from memory three and a half times (H200).
constexpr int kAhead = 2;     // periods
constexpr int kAsked = 1000;  // times
struct InStep {
  int32_t* counters;
  Pace pace;
  int32_t period = 0;

  __device__ void end_before(int32_t next) {
    for (; period < next; ++period) count_up(counters + period);
  }
  __device__ void enter(int32_t next) {
    end_before(next);
    if (next < kAhead) return;
    for (int asked = 0; count_of(counters + next - kAhead) < pace.workers; ++asked)
      if (asked == kAsked) {
        pace.workers = 0;
        return;
      }
  }
};

// Load: waits for an empty stage, then asks TMA to fill it. Unused on other architectures, where the kernel is empty.
[[maybe_unused]] __device__ void produce(const Plan& plan, const CUtensorMap* delta, const CUtensorMap* grad, int box,
                                         int features, Ring ring) {
  const int worker = blockIdx.x / kHopperBlocks, block = blockIdx.x % kHopperBlocks;
  for (int32_t i = plan.begin[worker]; i < plan.begin[worker + 1]; ++i) {
    const Piece piece = plan.piece[i];
    const Tile tile = plan.tile[piece.tile];
    Walk walk(piece, plan.blocks);
    InStep in_step{plan.counters + piece.pace.first, piece.pace};
    const bool paced = block == 0 && piece.pace.workers > 0;
    for (int32_t step = 0; step < piece.count; ++step) {
      walk.next();
      if (paced && walk.period > in_step.period) in_step.enter(walk.period);
      const int token = plan.token_at(piece.token + walk.token), feature = walk.block * features;
      barrier_wait(ring.empty(), ring.parity ^ 1);
      barrier_arrive_expect(ring.full(), tile.slabs * kSlabBytes + kReceiversBytes);
      for (int row = 0; row < kReceivers; row += box) {
        const int from = tile_group(block, row / kSlab) * kSlab + row % kSlab;
        const int receiver = plan.receiver[tile.column + from];
        // What fills up lies before the tensor: zeros.
        tma_load(ring.receivers() + row * kRowBytes, grad, feature, token, receiver < 0 ? -kSlab : receiver,
                 ring.full());
      }
      for (int slab = 0; slab < tile.slabs; ++slab)
        tma_load_in((1 << kHopperBlocks) - 1, ring.senders() + slab * kSlabBytes + block * kShare * kRowBytes, delta,
                    feature, token, tile.sender + slab * kSlab + block * kShare, ring.full());
      ring.next();
    }
    if (paced) in_step.end_before(piece.pace.periods);
  }
}

// Multiply and store: a warpgroup's share of a piece, 64 receivers by the slabs of senders that they see.
template <class T, int kSlabs>
__device__ void consume(const Target<float, kHopperColumns>& target, Ring& ring) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  const int column = tile_group(blockIdx.x % kHopperBlocks, group) * kSlab + warp % 4 * 16;  // of this warp's 16
  constexpr int kSteps = kRun / kFeatures<T>;
  const int steps = target.piece.count;
  float c[kSlabs ? kSlabs * 32 : 1];
#pragma unroll 1
  for (int start = 0; start < steps; start += kSteps) {
    const int count = min(kSteps, steps - start);
    // From zero: sums that a product ignored would still take up registers, in every branch of the caller.
#pragma unroll
    for (float& sum : c) sum = 0;
    uint32_t used = 0;  // the stage before, whose products may still be running
#pragma unroll 1
    for (int step = 0; step < count; ++step) {
      // Multiply: a full stage, while the products of the one before may still run.
      barrier_wait(ring.full(), ring.parity);
      if constexpr (kSlabs > 0) {
        wgmma_fence();
        const uint64_t a = descriptor(ring.receivers() + group * kSlabBytes), b = descriptor(ring.senders());
#pragma unroll
        for (int k = 0; k < kRowBytes / 32; ++k) wgmma<T, kSlabs>(c, a + k * kDescriptorStep, b + k * kDescriptorStep);
        wgmma_commit();
        wgmma_wait<1>();
      }
      // Release: the stage before is empty once every warp has said that its own products are done.
      __syncwarp();
      if (step > 0 && lane < kHopperBlocks) barrier_arrive_in(lane, used);
      used = ring.empty();
      ring.next();
    }
    if constexpr (kSlabs > 0) wgmma_wait<0>();
    __syncwarp();
    if (lane < kHopperBlocks) barrier_arrive_in(lane, used);
    // Store: the run's sums. Rows of a product are receivers here, columns of a tile.
    if constexpr (kSlabs > 0) {
      wgmma_settle(c);
#pragma unroll
      for (int part = 0; part < kSlabs * 32; part += 16)
        target.template put<16>(
            c_column(lane, part) * kHopperColumns + column + c_row(lane, 0), [&](int e) { return c[part + e]; },
            [](int e) { return c_column(0, e) * kHopperColumns + c_row(0, e); }, start == 0);
      if (start + count == steps) target.finish(0, kSlabs * kSlab, column, 16);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    hopper(const __grid_constant__ Plan plan, const __grid_constant__ CUtensorMap delta,
           const __grid_constant__ CUtensorMap grad, const __grid_constant__ Scores<float> scores, int32_t box) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  Ring ring{(shared_memory() + kAlignment - 1) / kAlignment * kAlignment};
  if (threadIdx.x == 0) {
    for (Ring r = ring; r.parity == 0; r.next()) {
      barrier_init(r.full(), 1);                                 // the producer
      barrier_init(r.empty(), kHopperBlocks * kConsumers / 32);  // both blocks' consumers' warps
    }
    barrier_init_fence();
  }
  cluster_sync();

  if (threadIdx.x >= kConsumers) {
    give_registers<56>();
    if (threadIdx.x == kConsumers) produce(plan, &delta, &grad, box, kFeatures<T>, ring);
  } else {
    take_registers<224>();  // 2 x 224 + 56 is three times the 168 that a thread starts with
    const int worker = blockIdx.x / kHopperBlocks, group = tile_group(blockIdx.x % kHopperBlocks, threadIdx.x / 128);
    for (int32_t i = plan.begin[worker]; i < plan.begin[worker + 1]; ++i) {
      const Target<float, kHopperColumns> target(plan, scores, plan.piece[i], worker);
      switch (target.tile.depth(group)) {
        case 4: consume<T, 4>(target, ring); break;
        case 3: consume<T, 3>(target, ring); break;
        case 2: consume<T, 2>(target, ring); break;
        case 1: consume<T, 1>(target, ring); break;
        default: consume<T, 0>(target, ring);
      }
    }
  }
  cluster_sync();  // the other block may still write to this one's shared memory
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
  launch_clusters(kOp, kHopperBlocks, kernel, dim3(unsigned(call.schedule.workers()) * kHopperBlocks), kThreads,
                  kSharedBytes, stream, plan, tensor_map(call.delta, call.dtype, kShare),
                  tensor_map(call.grad, call.dtype, uint32_t(call.schedule.box)), scores, int32_t(call.schedule.box));
}

}  // namespace eap::cuda
