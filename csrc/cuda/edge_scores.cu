// Edge scores on any GPU from compute capability 8.0 on: the plan, the portable kernel and the reduction. 16-bit types,
// and fp32 where tf32 is allowed, use the tensor cores; the others use the plain units, exactly. All load their
// operands through one pipeline of asynchronous copies into shared memory. Receivers are gathered in the order of their
// reach.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "edge_scores.h"
#include "layout.h"
#include "numbers.h"
#include "ptx.h"

namespace eap::cuda {
namespace {

constexpr const char* kOp = "edge_scores";
constexpr int kThreads = 256;
constexpr int kStages = 4;
constexpr int kSlabs = 2;              // of a tile, at most
constexpr int kColumns = 2 * kSlab;    // receivers of a tile
constexpr int kRows = kSlabs * kSlab;  // of either operand in a stage; a row is 64 bytes
constexpr int kSharedBytes = kStages * 2 * kRows * 64;
static_assert(kRows == kColumns, "a stage holds as many rows of senders as of receivers");
static_assert(kThreads == 2 * kRows, "a thread loads four of the 2 * kRows rows of four pieces in a stage");

// Load: copies the next 64 bytes of every row of a piece into a stage, step after step. A thread copies one piece of
// four rows.
template <class T, bool kPieces> struct Loader {
  static constexpr int kElements = 16 / sizeof(T);  // of a piece
  static constexpr int kStep = 4 * kElements;       // features of a step

  const Plan& plan;
  const Operand& delta;
  const Operand& grad;
  int32_t features;
  Walk walk;
  const T* row[4];  // two of delta, two of grad; null beyond the tile
  uint32_t to;      // the first row's piece within a stage; the other rows lie a slab's bytes apart

  __device__ Loader(const Plan& plan_, const Operand& delta_, const Operand& grad_, int32_t senders, int32_t features_,
                    const Tile& tile, const Piece& piece)
      : plan(plan_), delta(delta_), grad(grad_), features(features_), walk(piece, plan_.blocks) {
    to = row64(threadIdx.x / 4, threadIdx.x % 4);
    for (int i = 0; i < 2; ++i) {
      const int r = threadIdx.x / 4 + kSlab * i, u = tile.sender + r, v = plan.receiver[tile.column + r];
      row[i] = i < tile.slabs && u < senders ? static_cast<const T*>(delta.data) + u * delta.stride[0] : nullptr;
      row[2 + i] = v >= 0 ? static_cast<const T*>(grad.data) + v * grad.stride[0] : nullptr;
    }
  }

  __device__ void load(uint32_t stage) {
    walk.next();
    const int32_t token = plan.token_at(walk.piece.token + walk.token);
    const int64_t d = int64_t(walk.block) * kStep + threadIdx.x % 4 * kElements;
    const int inside = int(max(int64_t(0), min(int64_t(kElements), features - d)));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Operand& x = i < 2 ? delta : grad;
      const int count = row[i] == nullptr ? 0 : inside;
      const T* const from = row[i] + token * x.stride[1] + d * x.stride[2];
      const uint32_t at = stage + to + i * (kSlab * 64);
      if constexpr (kPieces) {
        // A copy of zero bytes reads nothing, but its address must be in global memory.
        cp_async(at, count ? static_cast<const void*>(from) : plan.tile, count * int(sizeof(T)));
      } else {
        alignas(16) T piece[kElements];
#pragma unroll
        for (int e = 0; e < kElements; ++e) piece[e] = e < count ? from[e * x.stride[2]] : T(0.0f);
        uint4 bits;
        memcpy(&bits, piece, 16);
        store_shared(at, bits);
      }
    }
  }
};

// Multiply: adds the products of one stage to sums in registers. This one is for fp32 and fp64; a thread owns the rows
// ty + 16 i and the columns tx + 16 j.
template <class T> struct Core {
  static constexpr int kElements = 16 / sizeof(T);
  struct alignas(16) Piece { T x[kElements]; };
  T c[8][8] = {};

  __device__ void step(uint32_t stage, const Tile&) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll 1  // more at once would not fit in registers
    for (int piece = 0; piece < 4; ++piece) {
      Piece a[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) a[i] = load_shared<Piece>(stage + row64(ty + 16 * i, piece));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const Piece b = load_shared<Piece>(stage + row64(kRows + tx + 16 * j, piece));
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int e = 0; e < kElements; ++e) c[i][j] += a[i].x[e] * b.x[e];
      }
    }
  }

  // Store: adds the sums to the target, for the first or the last time or between, and starts again from zero.
  __device__ void drain(const Target<T, kColumns>& target, bool first, bool last) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // The second slab of a low tile is another tile's: nothing was loaded for it, and it may not be touched.
      if (16 * i >= target.tile.slabs * kSlab) break;
      target.template put<8>((ty + 16 * i) * kColumns + tx, [&](int j) { return c[i][j]; },
                             [](int j) { return 16 * j; }, first);
#pragma unroll
      for (int j = 0; j < 8; ++j) c[i][j] = 0;
      if (last) target.finish(ty / 2 * 2 + 16 * i, 2, 0, kColumns);
    }
  }
};

// bf16, fp16 and tf32: eight warps of 64 x 32 results, a slab high each, as far as their receivers see. An instruction
// multiplies two pieces of 16 bytes of each row, whatever the type.
template <class T> struct TensorCore {
  float c[4][4][4] = {};  // [16 rows][8 columns][fragment]

  __device__ static void load(uint32_t (&r)[4], uint32_t address) {
    ldmatrix(r, address);
    if constexpr (std::is_same_v<T, tf32>)
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = rounded_to_tf32(r[i]);
  }

  __device__ void step(uint32_t stage, const Tile& tile) {
    const int lane = threadIdx.x % 32, slab = threadIdx.x / 32 % 2, columns = int(threadIdx.x) / 64 * 32;
    if (slab >= tile.depth(columns / kSlab)) return;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t b[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j)
        load(b[j], stage + row64(kRows + columns + 16 * j + b_row(lane), 2 * k + b_piece(lane)));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t a[4];
        load(a, stage + row64(slab * kSlab + 16 * i + a_row(lane), 2 * k + a_piece(lane)));
#pragma unroll
        for (int j = 0; j < 4; ++j) mma<T>(c[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  __device__ void drain(const Target<float, kColumns>& target, bool first, bool last) {
    const int lane = threadIdx.x % 32, slab = threadIdx.x / 32 % 2, columns = int(threadIdx.x) / 64 * 32;
    if (slab >= target.tile.depth(columns / kSlab)) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int start = (slab * kSlab + 16 * i + c_row(lane, 0)) * kColumns + columns + c_column(lane, 0);
      target.put<16>(
          start, [&](int n) { return c[i][n / 4][n % 4]; },
          [](int n) { return c_row(0, n % 4) * kColumns + 8 * (n / 4) + c_column(0, n % 4); }, first);
#pragma unroll
      for (int n = 0; n < 16; ++n) c[i][n / 4][n % 4] = 0;
    }
    if (last) target.finish(slab * kSlab, kSlab, columns, 32);
  }
};
template <> struct Core<__half> : TensorCore<__half> {};
template <> struct Core<__nv_bfloat16> : TensorCore<__nv_bfloat16> {};
template <> struct Core<tf32> : TensorCore<tf32> {};

template <class T, bool kPieces>
__global__ void __launch_bounds__(kThreads, kPieces && sizeof(T) < 8 ? 2 : 1)
    portable(const __grid_constant__ Plan plan, const __grid_constant__ Operand delta,
             const __grid_constant__ Operand grad, const __grid_constant__ Scores<acc_t<T>> scores, int32_t senders,
             int32_t features) {
  using Load = Loader<T, kPieces>;
  constexpr int kSteps = kRun / Load::kStep;
  const uint32_t shared = shared_memory();
  const auto stage = [&](int32_t step) { return shared + uint32_t(step % kStages) * (2 * kRows * 64); };
  Core<T> core;
  for (int32_t i = plan.begin[blockIdx.x]; i < plan.begin[blockIdx.x + 1]; ++i) {
    const Target<acc_t<T>, kColumns> target(plan, scores, plan.piece[i], blockIdx.x);
    const int32_t steps = target.piece.count;
    Load loader(plan, delta, grad, senders, features, target.tile, target.piece);
    __syncthreads();  // everybody has left the stages of the piece before
    // Load: fill all stages but one of the ring.
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) loader.load(stage(step));
      cp_async_commit();
    }
    for (int32_t step = 0; step < steps; ++step) {
      // One group is committed per step: all but the last kStages - 2 being done means that this step's has arrived.
      cp_async_wait<kStages - 2>();
      __syncthreads();  // for everybody; and everybody has left the stage that is loaded next
      // Load the stage that has become free, and multiply this step's meanwhile.
      if (step + kStages - 1 < steps) loader.load(stage(step + kStages - 1));
      cp_async_commit();
      core.step(stage(step), target.tile);
      // Store: after every run of kRun products, and at the end.
      const bool last = step == steps - 1;
      if (last || step % kSteps == kSteps - 1) core.drain(target, step < kSteps, last);
    }
  }
}

// Adds the partial tiles of a tile to the scores, slot after slot. The grid: (parts of a tile, splits).
template <class A>
__global__ void __launch_bounds__(kThreads)
    reduce(const __grid_constant__ Plan plan, const __grid_constant__ Scores<A> scores) {
  const Split split = plan.split[blockIdx.y];
  const Tile tile = plan.tile[split.tile];
  const int entry = int(blockIdx.x * kThreads + threadIdx.x), position = tile.column + entry % scores.columns;
  const int64_t u = int64_t(tile.sender) + entry / scores.columns;
  if (entry / scores.columns >= tile.slabs * kSlab || u >= plan.reach[position]) return;
  A sum = 0;
#pragma unroll 8
  for (int slot = split.first; slot < split.first + split.count; ++slot) sum += scores.tile(slot)[entry];
  scores.out[split.segment * scores.stride[0] + u * scores.stride[1] + plan.receiver[position] * scores.stride[2]] +=
      sum;
}

Operand operand(const View& x) { return {x.data, {x.stride[0], x.stride[1], x.stride[2]}}; }

template <class T>
void run_portable(const EdgeScores& call, const Plan& plan, const Scores<acc_t<T>>& scores, CUstream_st* stream) {
  const bool pieces = in_pieces(call.delta, sizeof(T)) && in_pieces(call.grad, sizeof(T));
  launch(kOp, pieces ? portable<T, true> : portable<T, false>, dim3(unsigned(call.schedule.workers())), kThreads,
         kSharedBytes, stream, plan, operand(call.delta), operand(call.grad), scores, int32_t(call.delta.size[0]),
         int32_t(call.delta.size[2]));
}

template <class A, class Run>
void run_all(const EdgeScores& call, const Plan& plan, void* partial, CUstream_st* stream, const Run& run) {
  const int64_t* stride = call.out_stride;
  const Kind kind = call.kind();
  const int rows = int(kind.max_slabs) * kSlab, columns = int(kind.columns);
  const Scores<A> scores{
      static_cast<A*>(call.out), {stride[0], stride[1], stride[2]}, static_cast<A*>(partial), rows, columns};
  run(scores);
  // A grid's second dimension has a limit, and splits, less than two a worker, are few.
  if (call.schedule.splits.empty()) return;
  launch(kOp, reduce<A>, dim3(rows * columns / kThreads, unsigned(call.schedule.splits.size())), kThreads, 0, stream,
         plan, scores);
}

// The arrays of a schedule one after the other, in the order in which `plan_at` finds them.
template <class Visit> void each_array(const Schedule& s, const Visit& visit) {
  visit(s.tiles);
  visit(s.pieces);
  visit(s.begin);
  visit(s.splits);
  visit(s.token);
  visit(s.receiver);
  visit(s.reach);
  visit(s.counters);
}

Plan plan_at(const EdgeScores& call, char* memory) {
  void* array[8];
  int i = 0;
  each_array(call.schedule, [&](const auto& x) {
    array[i++] = x.empty() ? nullptr : memory;
    memory += padded(int64_t(x.size() * sizeof(x[0])));
  });
  return {static_cast<const Tile*>(array[0]),
          static_cast<const Piece*>(array[1]),
          static_cast<const int32_t*>(array[2]),
          static_cast<const Split*>(array[3]),
          static_cast<const int32_t*>(array[4]),
          static_cast<const int32_t*>(array[5]),
          static_cast<const int32_t*>(array[6]),
          static_cast<int32_t*>(array[7]),
          call.schedule.slots,
          int32_t(call.steps_per_token())};
}

// Calls with a value of the type that the products are computed in.
template <class Visit> auto with_type(const EdgeScores& call, const Visit& visit) {
  switch (call.dtype) {
    case Dtype::f64: return visit(double());
    case Dtype::f32: return call.tf32 ? visit(tf32()) : visit(float());
    case Dtype::bf16: return visit(__nv_bfloat16());
    default: return visit(__half());
  }
}

template <class T> int blocks_per_processor(int device) {
  // Asked once for each card: the driver takes longer to answer than to launch.
  static std::array<std::atomic<int>, 64> known;
  if (size_t(device) < known.size() && known[device] > 0) return known[device];
  int blocks = 0;
  check(kOp, cudaFuncSetAttribute(portable<T, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  check(kOp, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, portable<T, true>, kThreads, kSharedBytes));
  blocks = std::max(blocks, 1);
  if (size_t(device) < known.size()) known[device] = blocks;
  return blocks;
}

}  // namespace

Kind EdgeScores::kind() const {
  if (tensor_memory) return {kHopperColumns, kHopperSlabs, false, 128};
  return {kColumns, kSlabs, true, 64};
}

int64_t EdgeScores::steps_per_token() const { return divide_up(delta.size[2], kind().row_bytes / bytes_of(dtype)); }

void EdgeScores::plan() {
  check(kOp, cudaSetDevice(device));
  for (const View* x : {&delta, &grad})
    for (const int64_t size : x->size)
      if (size > INT32_MAX) throw std::runtime_error("edge_scores: expected sizes below 2^31, got a larger one");
  tensor_memory = hopper_can_run(*this);
  const int64_t processors = device_attribute(kOp, cudaDevAttrMultiProcessorCount, device);
  const int64_t workers = tensor_memory
                              ? std::max<int64_t>(1, processors / kHopperBlocks)
                              : processors *
                                    with_type(*this, [&](auto x) { return blocks_per_processor<decltype(x)>(device); });
  schedule = cuda::schedule(reach, grad.size[0], segments, delta.size[1], kind(), workers, steps_per_token());
  each_array(schedule, [&](const auto& x) {
    const char* const bytes = reinterpret_cast<const char*>(x.data());
    header.insert(header.end(), bytes, bytes + x.size() * sizeof(x[0]));
    header.resize(padded(int64_t(header.size())));
  });
}

int64_t EdgeScores::workspace() const {
  const int64_t tiles = schedule.slots + schedule.workers(), entries = kind().max_slabs * kSlab * kind().columns;
  return int64_t(header.size()) + tiles * entries * bytes_of(accumulation(dtype));
}

void EdgeScores::run(void* workspace, CUstream_st* stream) const {
  if (schedule.workers() == 0) return;
  check(kOp, cudaSetDevice(device));
  cudaStreamCaptureStatus capture;
  check(kOp, cudaStreamIsCapturing(stream, &capture));
  if (capture != cudaStreamCaptureStatusNone)  // a graph would copy the header at each replay, when it is gone
    throw std::runtime_error("edge_scores: expected a stream that runs its work, got one that is captured in a graph");
  // From pageable memory: the bytes have left `header` when the call returns.
  check(kOp, cudaMemcpyAsync(workspace, header.data(), header.size(), cudaMemcpyHostToDevice, stream));
  const Plan plan = plan_at(*this, static_cast<char*>(workspace));
  void* const partial = static_cast<char*>(workspace) + header.size();
  if (tensor_memory)
    return run_all<float>(*this, plan, partial, stream,
                          [&](const auto& scores) { hopper_run(*this, plan, scores, stream); });
  with_type(*this, [&](auto x) {
    using T = decltype(x);
    run_all<acc_t<T>>(*this, plan, partial, stream,
                      [&](const auto& scores) { run_portable<T>(*this, plan, scores, stream); });
  });
}

}  // namespace eap::cuda
