#include "levels.h"

namespace fused_momentum::cpu {

const Level* levels(int* count) {
#ifdef FM_X86_LEVELS
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  static const Level table[] = {
      {"baseline", baseline, true},
#ifdef FM_X86_LEVELS
      {"avx2", avx2, bool(__builtin_cpu_supports("avx2"))},
      {"avx512", avx512, has_avx512},
#endif
#ifdef FM_X86_BF16_LEVEL
      {"avx512_bf16", avx512_bf16, has_avx512 && __builtin_cpu_supports("avx512bf16")},
#endif
  };
  *count = sizeof(table) / sizeof(table[0]);
  return table;
}

}  // namespace fused_momentum::cpu
