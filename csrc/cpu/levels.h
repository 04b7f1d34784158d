// The generic passes compiled for several instruction-set levels; one is chosen when the program
// runs, so an installed build needs no -march and every level gives the same bits.
#pragma once

#include "../launch.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FM_X86_LEVELS 1
#if defined(__clang__) || __GNUC__ >= 10
#define FM_X86_BF16_LEVEL 1
#endif
#endif

namespace fused_momentum::cpu {

struct Passes {
  void (*run_tiles)(const Launch& launch, int64_t tile, int64_t tile_end);
  // The measuring pass: sums of tile t go to tile_sums[k * tiles + t].
  void (*measure_tiles)(const Launch& launch, int64_t tile, int64_t tile_end, double* tile_sums);
};

extern const Passes baseline;
#ifdef FM_X86_LEVELS
extern const Passes avx2, avx512;
#endif
#ifdef FM_X86_BF16_LEVEL
extern const Passes avx512_bf16;
#endif

struct Level {
  const char* name;
  const Passes& passes;
  bool supported;
};

// Worst first.
const Level* levels(int* count);

}  // namespace fused_momentum::cpu
