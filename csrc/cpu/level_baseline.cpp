// The pass for what every processor of the architecture has (SSE2 on x86-64, NEON on Arm).
#include <cmath>
#include <cstring>
#include <utility>

#include "../rule_info.h"
#include "../tiles.h"
#include "levels.h"

namespace fused_momentum::cpu {
namespace {
#include "measure.h"
#include "pass.h"
}  // namespace

const Passes baseline = {run_tiles_here, measure_tiles_here};

}  // namespace fused_momentum::cpu
