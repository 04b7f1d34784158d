// The pass for what every processor of the architecture has (SSE2 on x86-64, NEON on Arm).
#include <cmath>
#include <cstring>
#include <utility>

#include "../rule_info.h"
#include "../tiles.h"
#include "levels.h"

namespace fused_momentum::cpu {
namespace {
#include "pass.h"
}  // namespace

void run_tiles_baseline(const Launch& launch, int64_t tile, int64_t tile_end) {
  run_tiles_here(launch, tile, tile_end);
}

void measure_tiles_baseline(const Launch& launch, int64_t tile, int64_t tile_end,
                            double* tile_sums) {
  measure_tiles_here(launch, tile, tile_end, tile_sums);
}

}  // namespace fused_momentum::cpu
