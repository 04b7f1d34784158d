// The pass for x86-64 with AVX-512.
#include "levels.h"

#ifdef FM_X86_LEVELS
// The standard headers come before the target is set: their inline functions are shared with files
// that must run on any processor.
#include <cstddef>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif

#include "../rules.h"
#include "../tiles.h"

namespace fused_momentum::cpu {
namespace {
#include "pass.h"
}  // namespace

void run_tiles_avx512(const Launch& launch, int64_t tile, int64_t tile_end) {
  run_tiles_here(launch, tile, tile_end);
}

}  // namespace fused_momentum::cpu

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif  // FM_X86_LEVELS
