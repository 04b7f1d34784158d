#pragma once

#include "../launch.h"
#include "levels.h"

namespace fused_momentum {

// Runs a launch: on the calling thread where it is small, else on torch's threads.
void run_cpu(const Launch& launch);

// The instruction-set level in use: the best that the processor has, unless set (by a test).
const cpu::Level* cpu_level();
void set_cpu_level(const cpu::Level* level);

}  // namespace fused_momentum
