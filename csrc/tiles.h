// The tile map: which tile of which tensor a worker (a CPU thread, a CUDA block) works on. A tensor
// of n elements has ceil(n / kTile) tiles; tiles are numbered through all tensors of a launch.
#pragma once

#include <vector>

#include "launch.h"

namespace fused_momentum {

inline int64_t tiles_of(int64_t numel) {
  return (numel + kTile - 1) / kTile;
}

// What a tensor costs a CPU thread, in elements: a constant besides its own.
constexpr int64_t kSegmentCost = 32;
static_assert(kSegmentCost < kTile, "the last elements of a tensor lie in its last tile");
inline int64_t cost_of(int64_t numel) {
  return numel == 0 ? 0 : numel + kSegmentCost;
}

struct Tiles {
  std::vector<int64_t> ends;  // per segment: number of tiles up to and including it
  int64_t cost = 0;           // of all segments
};

inline void count_tiles(const std::vector<Segment>& segments, Tiles* tiles) {
  tiles->ends.resize(segments.size());
  tiles->cost = 0;
  int64_t end = 0;
  for (size_t i = 0; i < segments.size(); i++) {
    tiles->ends[i] = end += tiles_of(segments[i].numel);
    tiles->cost += cost_of(segments[i].numel);
  }
}

// The segment that tile belongs to: the first whose tile_ends exceeds it.
inline int64_t segment_of(const int64_t* tile_ends, int64_t segment_count, int64_t tile) {
  int64_t low = 0, high = segment_count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (tile_ends[middle] > tile)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Deals the tiles out to `parts` workers so that each gets the same cost: writes parts + 1 tile
// numbers to `bounds`, where worker k takes the tiles from bounds[k] up to bounds[k + 1].
inline void split_tiles(const Segment* segments, const int64_t* tile_ends, int64_t segment_count,
                        int64_t total_cost, int parts, int64_t* bounds) {
  int64_t cost = 0;
  int part = 0;
  bounds[part++] = 0;
  for (int64_t i = 0; i < segment_count && part < parts; i++) {
    const int64_t first_tile = i == 0 ? 0 : tile_ends[i - 1];
    const int64_t end = cost + cost_of(segments[i].numel);
    for (; part < parts; part++) {
      const int64_t target = total_cost * part / parts;
      if (target >= end) break;
      bounds[part] = first_tile + (target - cost) / kTile;
    }
    cost = end;
  }
  const int64_t total = segment_count == 0 ? 0 : tile_ends[segment_count - 1];
  for (; part <= parts; part++) bounds[part] = total;
}

}  // namespace fused_momentum
