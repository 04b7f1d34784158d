// The pass for x86-64 with AVX-512.
#include "levels.h"

#ifdef FM_X86_LEVELS
// What is shared with files that must run on any processor comes before the target is set.
#include <cmath>
#include <cstring>
#include <utility>

#include "../rule_info.h"
#include "../tiles.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif

namespace fused_momentum::cpu {
namespace {
#include "measure.h"
#include "pass.h"
}  // namespace

const Passes avx512 = {run_tiles_here, measure_tiles_here};

}  // namespace fused_momentum::cpu

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif  // FM_X86_LEVELS
