// One parallel region over all tiles of all tensors, and what a measuring pass settles after it.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../rule_info.h"
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

// Deals the tiles of a launch out to threads: f(tile, end of tiles).
template <class F>
void for_all_tiles(const Launch& launch, F&& f) {
  const int64_t tiles = launch.tile_ends[launch.segment_count - 1];
  const int parts =
      int(std::clamp<int64_t>(launch.cost / kElementsPerThread, 1, int64_t(at::get_num_threads())));
  if (parts == 1) return f(0, tiles);
  std::vector<int64_t> bounds(parts + 1);
  split_tiles(launch.segments, launch.tile_ends, launch.segment_count, launch.cost, parts,
              bounds.data());
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++) f(bounds[k], bounds[k + 1]);
  });
}

// The sum of one tensor from those of its tiles, in the order of reference.tensor_sum: over kTile
// lanes, of which those beyond the number of tiles are 0 and add nothing (no lane is -0).
double tensor_sum(const double* tile_sums, int64_t tiles) {
  double lanes[kTile];
  int width = 1;
  while (width < tiles && width < kTile) width *= 2;
  std::fill_n(lanes, width, 0.0);
  for (int64_t t = 0; t < tiles; t++) lanes[t % width] += tile_sums[t];
  for (int h = width / 2; h > 0; h /= 2)
    for (int j = 0; j < h; j++) lanes[j] += lanes[j + h];
  return lanes[0];
}

template <class Rule>
void settle(const Launch& launch, bool updates, const double* tile_sums, double* tensor_scalars) {
  using Measure = typename Rule::Measure;
  const int64_t tiles = launch.tile_ends[launch.segment_count - 1];
  for (int64_t i = 0; i < launch.segment_count; i++) {
    const Segment& segment = launch.segments[i];
    double* tensor = tensor_scalars + i * Rule::kTensor;
    std::fill_n(tensor, Rule::kTensor, 0.0);
    tensor[0] = segment.first;
    const double* hyper = launch.hyper + int64_t(segment.row) * launch.hyper_stride;
    double kept[Rule::kKept + 1], sums[Measure::kSums];
    load_kept<Rule>(segment.kept, kept);
    if (segment.numel == 0 || Measure::settled(hyper, kept)) continue;
    const int64_t first = i == 0 ? 0 : launch.tile_ends[i - 1];
    for (int k = 0; k < Measure::kSums; k++)
      sums[k] = tensor_sum(tile_sums + k * tiles + first, launch.tile_ends[i] - first);
    Measure::settle(hyper, double(segment.numel), updates, sums, tensor, kept);
    for (int k = 0; k < Rule::kKept; k++)
      if (segment.kept[k]) *static_cast<typename Rule::Kept*>(segment.kept[k]) = kept[k];
  }
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
  const auto run_tiles = cpu_level()->passes.run_tiles;
  for_all_tiles(launch, [&](int64_t tile, int64_t end) { run_tiles(launch, tile, end); });
}

void measure_cpu(const Launch& launch, bool updates, double* tile_sums, double* tensor_scalars) {
  const auto measure_tiles = cpu_level()->passes.measure_tiles;
  for_all_tiles(launch,
                [&](int64_t tile, int64_t end) { measure_tiles(launch, tile, end, tile_sums); });
  int index = 0;
  for_each_rule([&](auto rule) {
    using Rule = decltype(rule);
    if constexpr (!std::is_void_v<typename Rule::Measure>)
      if (index == launch.rule) settle<Rule>(launch, updates, tile_sums, tensor_scalars);
    index++;
  });
}

void measure_and_run_cpu(const Launch& launch, double* tile_sums, double* tensor_scalars) {
  const int stride = rule_infos()[launch.rule].tensor_scalars;
  // For each thread as many elements as are worth one: with up to seven streams under 1 MiB.
  const int64_t resident = kElementsPerThread * at::get_num_threads();
  std::vector<int64_t> tile_ends(launch.segment_count);
  for (int64_t begin = 0, end = 0; begin < launch.segment_count; begin = end) {
    Launch part = launch;
    part.segments += begin;
    part.tile_ends = tile_ends.data();
    part.cost = 0;
    int64_t elements = 0, tiles = 0;
    for (; end < launch.segment_count; end++) {
      const int64_t numel = launch.segments[end].numel;
      if (end > begin && elements + numel > resident) break;
      elements += numel;
      part.cost += cost_of(numel);
      tile_ends[end - begin] = tiles += tiles_of(numel);
    }
    part.segment_count = end - begin;
    measure_cpu(part, true, tile_sums, tensor_scalars + begin * stride);
    part.tensor_scalars = tensor_scalars + begin * stride;
    run_cpu(part);
  }
}

}  // namespace fused_momentum
