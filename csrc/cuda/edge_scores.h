// What the two edge_scores kernels and the reduction share on the device: the schedule, and where results go.
#pragma once
#include "launch.h"

namespace eap::cuda {

// A run of accumulators is added to memory after this many products: matrix units round each step towards zero, so the
// error of one long sum grows faster than that of one rounded to nearest.
constexpr int kRun = 4096;

// The schedule in device memory.
struct Plan {
  const Tile* tile;
  const Chunk* chunk;
  const Split* split;
  const int32_t* token;  // null: tokens in memory order
  const int32_t *receiver, *reach;
  int32_t tiles, chunks, splits, slots, positions;

  __device__ uint32_t units() const { return uint32_t(tiles) * chunks; }
  __device__ int32_t token_at(int32_t i) const { return token ? token[i] : i; }
};

struct Operand {
  const void* data;
  int64_t stride[3];
};

template <class A> struct Scores {
  A* out;
  int64_t stride[3];
  A* partial;  // [slots x tiles, then one for every block][tile_rows][kColumns]
  int32_t tile_rows;

  __device__ A* tile(int64_t index) const { return partial + index * tile_rows * kColumns; }
  __device__ void add(const Plan& plan, int64_t segment, int64_t u, int position, A value) const {
    if (position < plan.positions && u < plan.reach[position])
      out[segment * stride[0] + u * stride[1] + plan.receiver[position] * stride[2]] += value;
  }
};

// Where one unit of work leaves its results: in the partial tile of its slot or, where it is its segment's only one, in
// the block's own tile and from there in the scores. Every entry belongs to one warp of one unit: nothing can race.
template <class A> struct Target {
  const Plan& plan;
  const Scores<A>& scores;
  Tile tile;
  Chunk chunk;
  A* results;

  __device__ Target(const Plan& plan_, const Scores<A>& scores_, uint32_t unit)
      : plan(plan_), scores(scores_), tile(plan_.tile[unit % plan_.tiles]), chunk(plan_.chunk[unit / plan_.tiles]) {
    results = scores_.tile(chunk.slot == kDirect ? int64_t(plan_.slots) * plan_.tiles + blockIdx.x
                                                 : int64_t(chunk.slot) * plan_.tiles + unit % plan_.tiles);
  }
  // Adds value(e) to the tile's entry `start` + at(e), e < kCount. `first`: of the unit's runs, which finds nothing
  // there yet. All loads come before the first store, or each would wait for the store before it.
  template <int kCount, class Value, class At>
  __device__ void put(int start, const Value& value, const At& at, bool first) const {
    A* const to = results + start;
    A before[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) before[e] = first ? A(0) : to[at(e)];
#pragma unroll
    for (int e = 0; e < kCount; ++e) to[at(e)] = before[e] + value(e);
  }
  // A warp has put its last results, those of this rectangle. A loop instead of registers: addresses are many here.
  __device__ void finish(int row, int rows, int column, int columns) const {
    if (chunk.slot != kDirect) return;
    __syncwarp();
#pragma unroll 2
    for (int i = threadIdx.x % 32; i < rows * columns; i += 32) {
      const int r = row + i / columns, c = column + i % columns;
      scores.add(plan, chunk.segment, int64_t(tile.sender) + r, tile.column + c, results[r * kColumns + c]);
    }
    __syncwarp();  // the next unit writes to the same tile
  }
};

// The TMA and wgmma kernel: whether it can run these operands here, and the run.
bool hopper_can_run(const EdgeScores& call);
constexpr int kHopperSlabs = 4;
void hopper_run(const EdgeScores& call, const Plan& plan, const Scores<float>& scores, CUstream_st* stream);

}  // namespace eap::cuda
