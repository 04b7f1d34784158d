// The pass for x86-64 with AVX-512 and its conversion to bfloat16.
#include "levels.h"

#ifdef FM_X86_BF16_LEVEL
// What is shared with files that must run on any processor comes before the target is set.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <utility>

#include "../rule_info.h"
#include "../tiles.h"

#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

namespace fused_momentum::cpu {
namespace {
#define FM_BF16_LANES 1
#include "measure.h"
#include "pass.h"
}  // namespace

const Passes avx512_bf16 = {run_tiles_here, measure_tiles_here};

}  // namespace fused_momentum::cpu

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif  // FM_X86_BF16_LEVEL
