#include "levels.h"

namespace fused_momentum::cpu {

const Level* levels(int* count) {
  static const Level table[] = {
      {"baseline", run_tiles_baseline, measure_tiles_baseline, true},
#ifdef FM_X86_LEVELS
      {"avx2", run_tiles_avx2, measure_tiles_avx2, bool(__builtin_cpu_supports("avx2"))},
      {"avx512", run_tiles_avx512, measure_tiles_avx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
#endif
  };
  *count = sizeof(table) / sizeof(table[0]);
  return table;
}

}  // namespace fused_momentum::cpu
