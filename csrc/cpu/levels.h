// The generic pass compiled for several instruction-set levels; one is chosen when the program
// runs, so an installed build needs no -march and every level gives the same bits.
#pragma once

#include "../launch.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FM_X86_LEVELS 1
#endif

namespace fused_momentum::cpu {

using RunTiles = void (*)(const Launch& launch, int64_t tile, int64_t tile_end);
// The measuring pass: sums of tile t go to tile_sums[k * tiles + t].
using MeasureTiles = void (*)(const Launch& launch, int64_t tile, int64_t tile_end,
                              double* tile_sums);

void run_tiles_baseline(const Launch& launch, int64_t tile, int64_t tile_end);
void measure_tiles_baseline(const Launch& launch, int64_t tile, int64_t tile_end,
                            double* tile_sums);
#ifdef FM_X86_LEVELS
void run_tiles_avx2(const Launch& launch, int64_t tile, int64_t tile_end);
void measure_tiles_avx2(const Launch& launch, int64_t tile, int64_t tile_end, double* tile_sums);
void run_tiles_avx512(const Launch& launch, int64_t tile, int64_t tile_end);
void measure_tiles_avx512(const Launch& launch, int64_t tile, int64_t tile_end, double* tile_sums);
#endif

struct Level {
  const char* name;
  RunTiles run_tiles;
  MeasureTiles measure_tiles;
  bool supported;
};

// Worst first.
const Level* levels(int* count);

}  // namespace fused_momentum::cpu
