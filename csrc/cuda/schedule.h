// What edge_scores does on a GPU, decided on the host from shapes, reach, segments and the number of workers only:
// tiles that follow the staircase, and an even cut of all their work. Plain C++, so that it is tested without a GPU.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "../cpu/kernels.h"
#include "layout.h"

namespace eap::cuda {

constexpr int kSlab = 64;  // senders, and receivers, are counted in these where tiles follow the staircase

// A rectangle of the result: senders [sender, sender + slabs * kSlab) against receivers at the positions from `column`
// on. Byte g of `depths`: how many of the slabs some receiver of the g-th 64 sees.
struct Tile {
  int32_t sender, slabs, column;
  uint32_t depths;

  EAP_BOTH int depth(int group) const { return int(depths >> 8 * group & 255); }
};

// A mark in the steps of a tile, which are cut into periods: so many steps after the beginning of each period, one more
// in the first `more` of them. Marks add up to any number of steps, whatever the number of periods.
struct Mark {
  int32_t each, more;

  EAP_BOTH int32_t in(int32_t period) const { return each + (period < more); }
};

// Workers that go through the same periods at the same time, each through its own steps, wait for one another. `first`:
// the counter of the first period, of those who have come to its end. No workers: a piece goes alone.
struct Pace { int32_t first, workers, periods; };

// A worker's share of a tile over one segment: in every period the steps from one mark to another. Where the tile is
// cut among workers, each leaves a partial tile in its slot; otherwise the worker adds to the scores directly.
struct Piece {
  int32_t tile, segment;
  int32_t token;  // the segment's first, in the schedule's order
  int32_t slot, count;
  Mark from, to, all;  // `all`: the period's end
  Pace pace;
};
constexpr int32_t kDirect = -1;

// Slots [first, first + count) add up to a tile of a segment's scores.
struct Split { int32_t tile, segment, first, count; };

// The steps of a piece one after the other: one token's next features each.
struct Walk {
  const Piece& piece;
  int32_t blocks;  // steps of a token
  int32_t period = -1, start = 0, left = 0, token = 0, block = 0;

  EAP_BOTH Walk(const Piece& piece_, int32_t blocks_) : piece(piece_), blocks(blocks_) {}
  EAP_BOTH void next() {
    if (left > 0) {
      if (++block == blocks) {
        block = 0;
        ++token;
      }
    } else {
      do {
        if (period >= 0) start += piece.all.in(period);
        ++period;
        left = piece.to.in(period) - piece.from.in(period);
      } while (left == 0);
      const int32_t step = start + piece.from.in(period);
      token = step / blocks;
      block = step - token * blocks;
    }
    --left;
  }
};

// How a kernel takes its operands.
struct Kind {
  int64_t columns;    // receivers of a tile
  int64_t max_slabs;  // of a tile
  // Whether receivers are gathered one by one; else `box` consecutive ones at a time, at least 8 of them.
  bool gathers;
  int64_t row_bytes;  // of a sender or receiver in a step
};

struct Schedule {
  int64_t box = 1;                       // receivers that stay together, in memory and in a tile
  std::vector<int32_t> receiver, reach;  // by position; a receiver of -1, with reach 0, fills up
  std::vector<Tile> tiles;
  std::vector<int32_t> token;  // tokens grouped by segment; empty for their order in memory
  std::vector<Piece> pieces;   // by worker
  std::vector<int32_t> begin;  // each worker's first piece, and the end
  std::vector<Split> splits;
  std::vector<int32_t> counters;  // of paces: zeros
  int32_t slots = 0;

  int64_t workers() const { return std::max<int64_t>(0, int64_t(begin.size()) - 1); }
};

namespace detail {

// A tile is not cut closer to its ends than this many steps: starting and finishing a piece costs about as much.
constexpr int64_t kLeast = 8;
// Workers go through a tile's steps period by period, all at about the same place, so that the L2 cache serves them all
// what one has fetched. What a period's steps read fits in this many bytes, a fraction of the cache.
constexpr int64_t kPeriodBytes = 4 << 20;

// What a step of a tile costs. Products follow the tile's slabs; bytes read, those and its receivers; and what waits
// for memory costs the same for all. This lies between.
inline int64_t cost(const Tile& tile) { return tile.slabs + 2; }

// Receivers in the order of their reach, as far as boxes allow; those without senders are left out. What fills up the
// first column comes first, where the staircase is lowest.
inline void order_receivers(Schedule& s, const int64_t* reach, int64_t receivers, int64_t box, int64_t columns) {
  struct Box { int64_t first, deepest; };
  std::vector<Box> boxes;
  for (int64_t v = 0; v < receivers; v += box) {
    const int64_t deepest = *std::max_element(reach + v, reach + std::min(receivers, v + box));
    if (deepest > 0) boxes.push_back({v, deepest});
  }
  std::stable_sort(boxes.begin(), boxes.end(), [](const Box& a, const Box& b) { return a.deepest < b.deepest; });
  const int64_t used = int64_t(boxes.size()) * box;
  s.box = box;
  s.receiver.assign(divide_up(used, columns) * columns - used, -1);
  for (const Box& x : boxes)
    for (int64_t v = x.first; v < x.first + box; ++v) s.receiver.push_back(v < receivers ? int32_t(v) : -1);
  s.reach.clear();
  for (const int32_t v : s.receiver) s.reach.push_back(v < 0 ? 0 : int32_t(reach[v]));
}

// Every column of tiles is as deep as its deepest receiver, cut into tiles of nearly equal height.
inline void add_tiles(Schedule& s, const Kind& kind) {
  const auto deepest = [&](int64_t first, int64_t count) {
    return divide_up(*std::max_element(s.reach.begin() + first, s.reach.begin() + first + count), kSlab);
  };
  s.tiles.clear();
  for (int64_t column = 0; column < int64_t(s.reach.size()); column += kind.columns) {
    const int64_t slabs = deepest(column, kind.columns), tiles = divide_up(slabs, kind.max_slabs);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t first = slabs * i / tiles, last = slabs * (i + 1) / tiles;
      Tile tile{int32_t(first * kSlab), int32_t(last - first), int32_t(column), 0};
      for (int64_t group = 0; group < kind.columns / kSlab; ++group) {
        const int64_t seen = deepest(column + group * kSlab, kSlab) - first;
        tile.depths |= uint32_t(std::min(std::max<int64_t>(seen, 0), last - first)) << 8 * group;
      }
      s.tiles.push_back(tile);
    }
  }
}

inline int64_t cost_of_tiles(const Schedule& s) {
  int64_t sum = 0;
  for (const Tile& tile : s.tiles) sum += cost(tile);
  return sum;
}

struct Segment { int64_t number, first, count; };

inline std::vector<Segment> group_tokens(Schedule& s, const int64_t* segments, int64_t tokens) {
  if (segments == nullptr) return {{0, 0, tokens}};
  for (int64_t n = 0; n < tokens; ++n) s.token.push_back(int32_t(n));
  std::stable_sort(s.token.begin(), s.token.end(), [&](int32_t a, int32_t b) { return segments[a] < segments[b]; });
  std::vector<Segment> found;
  for (int64_t n = 0; n < tokens; ++n) {
    const int64_t number = segments[s.token[n]];
    if (found.empty() || found.back().number != number) found.push_back({number, n, 0});
    ++found.back().count;
  }
  return found;
}

// Over one segment, all workers go through their first whole tile together, and so on through these rounds. Then go
// those together that have one more piece: of two, each is gone through faster, in a part of the time.
inline void set_pace(Schedule& s, std::vector<std::vector<Piece>>& pieces, size_t rounds, int32_t periods) {
  if (periods < 2) return;
  for (size_t round = 0; round <= rounds; ++round) {
    std::vector<Piece*> together;
    for (auto& some : pieces)
      if (round < rounds || some.size() == rounds + 1) together.push_back(&some[round]);
    for (Piece* piece : together) piece->pace = {int32_t(s.counters.size()), int32_t(together.size()), periods};
    s.counters.resize(s.counters.size() + periods, 0);
  }
}

// Deals the work of all tiles over all segments evenly. First whole tiles, as long as there are at least two for each
// worker and nobody gets more than an even share; then all others, one after the other, are cut where the shares end.
// So a worker has at most two pieces that are not whole tiles.
inline void deal(Schedule& s, const std::vector<Segment>& segments, int64_t steps_per_token, int64_t most_workers,
                 const Kind& kind) {
  struct Unit {
    int64_t tile, steps, cost;
    const Segment* segment;
  };
  std::vector<Unit> units;
  units.reserve(segments.size() * s.tiles.size());
  int64_t total = 0;
  for (const Segment& segment : segments)
    for (int64_t t = 0; t < int64_t(s.tiles.size()); ++t) {
      units.push_back({t, segment.count * steps_per_token, cost(s.tiles[t]), &segment});
      total += units.back().steps * units.back().cost;
      if (units.back().steps > INT32_MAX)
        throw std::runtime_error("edge_scores: expected fewer than 2^31 tokens x blocks of features, got more");
    }
  const int64_t least = kLeast * (kind.max_slabs + 2);
  const int64_t workers = std::min(most_workers, divide_up(total, least)), count = int64_t(units.size());
  const int64_t share = total / workers;

  std::vector<std::vector<Piece>> pieces(workers);
  const int64_t rows = int64_t(s.receiver.size()) + *std::max_element(s.reach.begin(), s.reach.end());
  const int64_t longest = std::max<int64_t>(1, kPeriodBytes / (kind.row_bytes * rows));  // period, in steps
  // Steps [from, to) of a unit.
  const auto add = [&](int64_t worker, const Unit& unit, int64_t from, int64_t to, int32_t slot) {
    const int64_t periods = divide_up(unit.steps, longest);
    const auto mark = [&](int64_t x) { return Mark{int32_t(x / periods), int32_t(x % periods)}; };
    pieces[worker].push_back({int32_t(unit.tile),
                              int32_t(unit.segment->number),
                              int32_t(unit.segment->first),
                              slot,
                              int32_t(to - from),
                              mark(from),
                              mark(to),
                              mark(unit.steps),
                              {}});
  };

  std::vector<int64_t> load(workers, 0);
  int64_t whole = 0;
  for (; whole + 2 * workers <= count; whole += workers) {
    bool fits = true;
    for (int64_t w = 0; w < workers; ++w)
      fits = fits && load[w] + units[whole + w].steps * units[whole + w].cost <= share;
    if (!fits) break;
    for (int64_t w = 0; w < workers; ++w) {
      const Unit& unit = units[whole + w];
      load[w] += unit.steps * unit.cost;
      add(w, unit, 0, unit.steps, kDirect);
    }
  }

  // `left`: what the worker still takes. Shares differ by one where they do not come out even.
  int64_t worker = 0, left = share + (total % workers > 0) - load[0];
  const auto next_worker = [&] {
    ++worker;
    left = share + (worker < total % workers) - load[worker];
  };
  struct Cut { int64_t worker, from, to; };
  std::vector<Cut> cuts;  // of a unit
  for (int64_t u = whole; u < count; ++u) {
    const Unit& unit = units[u];
    cuts.clear();
    const int64_t work = unit.steps * unit.cost;
    for (int64_t done = 0, from = 0; done < work;) {
      while (left == 0) next_worker();
      const int64_t taken = std::min(left, work - done);
      done += taken;
      left -= taken;
      int64_t to = done / unit.cost;
      if (to < kLeast) to = 0;
      if (done == work || unit.steps - to < kLeast) to = unit.steps;
      if (to > from) cuts.push_back({worker, from, to});
      from = to;
    }
    if (cuts.size() > 1) {
      s.splits.push_back({int32_t(unit.tile), int32_t(unit.segment->number), s.slots, int32_t(cuts.size())});
      for (const Cut& cut : cuts) add(cut.worker, unit, cut.from, cut.to, s.slots++);
    } else {
      add(cuts[0].worker, unit, 0, unit.steps, kDirect);
    }
  }

  if (segments.size() == 1) set_pace(s, pieces, size_t(whole / workers), int32_t(divide_up(units[0].steps, longest)));
  s.pieces.reserve(units.size() + size_t(s.slots));
  for (const auto& some : pieces) {
    s.begin.push_back(int32_t(s.pieces.size()));
    s.pieces.insert(s.pieces.end(), some.begin(), some.end());
  }
  s.begin.push_back(int32_t(s.pieces.size()));
}

}  // namespace detail

// reach[receivers]; segments[tokens] or null; `workers` that run at once; `steps_per_token` of every tile.
inline Schedule schedule(const int64_t* reach, int64_t receivers, const int64_t* segments, int64_t tokens,
                         const Kind& kind, int64_t workers, int64_t steps_per_token) {
  Schedule s;
  // The widest box with which nearly as little is computed as with the narrowest.
  Schedule wider;
  for (int64_t box = kind.gathers ? 1 : 8; box <= (kind.gathers ? 1 : kSlab); box *= 2) {
    detail::order_receivers(wider, reach, receivers, box, kind.columns);
    detail::add_tiles(wider, kind);
    if (box > 8 && detail::cost_of_tiles(wider) * 100 > detail::cost_of_tiles(s) * 102) break;
    s = wider;
  }
  if (s.tiles.empty() || tokens == 0 || steps_per_token == 0) return s;
  detail::deal(s, detail::group_tokens(s, segments, tokens), steps_per_token, workers, kind);
  return s;
}

}  // namespace eap::cuda
