// One parallel region over all tiles of all tensors.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../tiles.h"
#include "levels.h"
#include "run.h"

namespace fused_momentum {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 15;

std::atomic<const cpu::Level*> chosen{nullptr};

const cpu::Level* best_level() {
  int count;
  const cpu::Level* table = cpu::levels(&count);
  while (!table[count - 1].supported) count--;
  return &table[count - 1];
}

}  // namespace

const cpu::Level* cpu_level() {
  const cpu::Level* level = chosen.load();
  if (level == nullptr) chosen.store(level = best_level());
  return level;
}

void set_cpu_level(const cpu::Level* level) {
  chosen.store(level);
}

void run_cpu(const Launch& launch) {
  const auto run_tiles = cpu_level()->run_tiles;
  const int64_t tiles = launch.tile_ends[launch.segment_count - 1];
  if (tiles == 0) return;
  int64_t elements = 0, tensors = 0;
  for (int64_t i = 0; i < launch.segment_count; i++) {
    elements += launch.segments[i].numel;
    tensors += launch.segments[i].numel != 0;
  }
  const int64_t cost = elements + tensors * kSegmentCost;
  const int parts =
      int(std::clamp<int64_t>(elements / kElementsPerThread, 1, int64_t(at::get_num_threads())));
  if (parts == 1) return run_tiles(launch, 0, tiles);
  std::vector<int64_t> bounds(parts + 1);
  split_tiles(launch.segments, launch.tile_ends, launch.segment_count, cost, parts, bounds.data());
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++)
      if (bounds[k] < bounds[k + 1]) run_tiles(launch, bounds[k], bounds[k + 1]);
  });
}

}  // namespace fused_momentum
