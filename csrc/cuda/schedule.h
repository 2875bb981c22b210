// What edge_scores does on a GPU, decided on the host from shapes, reach and segments only: tiles that follow the
// staircase, tokens cut into chunks, and which chunks share a result. Plain C++, so that it is tested without a GPU.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace eap::cuda {

constexpr int kSlab = 64;      // senders: tiles are cut along the staircase in these
constexpr int kColumns = 128;  // receivers of a tile

// A rectangle of the result: senders [sender, sender + slabs * kSlab) against
// receivers at positions [column, column + kColumns).
struct Tile { int32_t sender, slabs, column; };

// Tokens number [first, first + count) in the schedule's order, all of one segment. A chunk that is its segment's only
// one adds to the scores directly, others leave partial tiles in their slot.
struct Chunk { int32_t first, count, segment, slot; };
constexpr int32_t kDirect = -1;

// Slots [first, first + count) add up to a segment's scores.
struct Split { int32_t segment, first, count; };

// A unit of work is one tile over one chunk.
struct Schedule {
  std::vector<int32_t> receiver, reach;  // by position
  std::vector<Tile> tiles;
  std::vector<int32_t> token;  // tokens grouped by segment; empty for their order in memory
  std::vector<Chunk> chunks;
  std::vector<Split> splits;
  int64_t slots = 0;

  int64_t units() const { return int64_t(tiles.size()) * int64_t(chunks.size()); }
};

namespace detail {

constexpr int64_t kUnitSteps = 32;  // what starting and finishing a unit costs, in steps; not yet measured
constexpr int64_t kWaves = 4;       // units per worker at most, which also bounds the memory of partial tiles

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Every column of tiles is as deep as its deepest receiver, cut into tiles of nearly equal height.
inline void add_tiles(Schedule& s, int64_t max_slabs) {
  const int64_t positions = int64_t(s.reach.size());
  for (int64_t column = 0; column < positions; column += kColumns) {
    const int64_t end = std::min(positions, column + kColumns);
    const int64_t slabs = ceil_div(*std::max_element(s.reach.begin() + column, s.reach.begin() + end), kSlab);
    const int64_t tiles = ceil_div(slabs, max_slabs);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t first = slabs * i / tiles, last = slabs * (i + 1) / tiles;
      s.tiles.push_back({int32_t(first * kSlab), int32_t(last - first), int32_t(column)});
    }
  }
}

// Into how many parts to cut all tokens so that the last wave of units is nearly full.
inline int64_t parts(int64_t tiles, int64_t tokens, int64_t steps_per_token, int64_t workers) {
  int64_t best = 1, best_cost = 0;
  for (int64_t n = 1; n <= std::min(tokens, std::max<int64_t>(1, kWaves * workers / tiles)); ++n) {
    const int64_t cost = ceil_div(tiles * n, workers) * (ceil_div(tokens, n) * steps_per_token + kUnitSteps);
    if (n > 1 && cost >= best_cost) continue;
    best = n;
    best_cost = cost;
  }
  return best;
}

inline void add_chunks(Schedule& s, int64_t first, int64_t count, int64_t segment, int64_t longest) {
  const int64_t chunks = ceil_div(count, longest);
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t a = first + count * i / chunks, b = first + count * (i + 1) / chunks;
    s.chunks.push_back({int32_t(a), int32_t(b - a), int32_t(segment), chunks == 1 ? kDirect : int32_t(s.slots + i)});
  }
  if (chunks == 1) return;
  s.splits.push_back({int32_t(segment), int32_t(s.slots), int32_t(chunks)});
  s.slots += chunks;
}

}  // namespace detail

// reach[receivers]; segments[tokens] or null; `sorted`: receivers in the order of their reach, which wastes least, else
// in memory order; `workers`: units that run at once; `steps_per_token`: how long a tile takes for one token.
inline Schedule schedule(const int64_t* reach, int64_t receivers, const int64_t* segments, int64_t tokens,
                         int64_t max_slabs, bool sorted, int64_t workers, int64_t steps_per_token) {
  Schedule s;
  s.receiver.resize(receivers);
  std::iota(s.receiver.begin(), s.receiver.end(), 0);
  if (sorted) {
    s.receiver.erase(std::remove_if(s.receiver.begin(), s.receiver.end(), [&](int32_t v) { return reach[v] == 0; }),
                     s.receiver.end());
    std::stable_sort(s.receiver.begin(), s.receiver.end(), [&](int32_t a, int32_t b) { return reach[a] < reach[b]; });
  }
  for (const int32_t v : s.receiver) s.reach.push_back(int32_t(reach[v]));
  detail::add_tiles(s, max_slabs);
  if (s.tiles.empty() || tokens == 0) return s;

  const int64_t parts = detail::parts(int64_t(s.tiles.size()), tokens, steps_per_token, workers);
  const int64_t longest = detail::ceil_div(tokens, parts);
  if (segments == nullptr) {
    detail::add_chunks(s, 0, tokens, 0, longest);
  } else {
    s.token.resize(tokens);
    std::iota(s.token.begin(), s.token.end(), 0);
    std::stable_sort(s.token.begin(), s.token.end(), [&](int32_t a, int32_t b) { return segments[a] < segments[b]; });
    for (int64_t first = 0, end; first < tokens; first = end) {
      const int64_t segment = segments[s.token[first]];
      for (end = first + 1; end < tokens && segments[s.token[end]] == segment;) ++end;
      detail::add_chunks(s, first, end - first, segment, longest);
    }
  }
  if (s.units() > INT32_MAX) throw std::runtime_error("edge_scores: expected fewer than 2^31 tiles x chunks, got more");
  return s;
}

}  // namespace eap::cuda
