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
  const Piece* piece;
  const int32_t* begin;
  const Split* split;
  const int32_t* token;  // null: tokens in memory order
  const int32_t *receiver, *reach;
  int32_t* counters;
  int32_t slots;
  int32_t blocks;  // steps of a token

  __device__ int32_t token_at(int32_t i) const { return token ? token[i] : i; }
};

struct Operand {
  const void* data;
  int64_t stride[3];
};

template <class A> struct Scores {
  A* out;
  int64_t stride[3];
  A* partial;  // [slots, then one for every worker][rows][columns]
  int32_t rows, columns;

  __device__ A* tile(int64_t index) const { return partial + index * rows * columns; }
};

// Where a worker's piece leaves its results: in the partial tile of its slot or, where it is a whole tile, in the
// worker's own and from there in the scores. Every entry belongs to one warp of one worker: nothing can race.
template <class A, int kColumns> struct Target {
  const Plan& plan;
  const Scores<A>& scores;
  const Piece& piece;
  Tile tile;
  A* results;

  __device__ Target(const Plan& plan_, const Scores<A>& scores_, const Piece& piece_, uint32_t worker)
      : plan(plan_), scores(scores_), piece(piece_), tile(plan_.tile[piece_.tile]) {
    results = scores_.partial +
              int64_t(piece.slot == kDirect ? plan_.slots + worker : piece.slot) * scores_.rows * kColumns;
  }
  // Adds value(e) to the tile's entry `start` + at(e), e < kCount. `first`: of the piece's runs, which finds nothing
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
    if (piece.slot != kDirect) return;
    __syncwarp();
#pragma unroll 2
    for (int i = threadIdx.x % 32; i < rows * columns; i += 32) {
      const int r = row + i / columns, c = column + i % columns, position = tile.column + c;
      const int64_t u = int64_t(tile.sender) + r;
      if (u < plan.reach[position])
        scores.out[piece.segment * scores.stride[0] + u * scores.stride[1] +
                   plan.receiver[position] * scores.stride[2]] += results[r * kColumns + c];
    }
    __syncwarp();  // the next piece writes to the same tile
  }
};

// The TMA and wgmma kernel: whether it can run these operands here, and the run.
bool hopper_can_run(const EdgeScores& call);
constexpr int kHopperSlabs = 4;      // of a tile, at most
constexpr int kHopperBlocks = 2;     // of a cluster, which is one worker
constexpr int kHopperColumns = 256;  // of a tile: half of them are each block's
void hopper_run(const EdgeScores& call, const Plan& plan, const Scores<float>& scores, CUstream_st* stream);

}  // namespace eap::cuda
