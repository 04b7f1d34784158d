#pragma once

#include "../launch.h"
#include "levels.h"

namespace fused_momentum {

// Runs a launch: on the calling thread where it is small, else on torch's threads.
void run_cpu(const Launch& launch);

// The measuring pass, and what is settled by it; `updates`: a launch follows. Writes kept numbers,
// and kTensor numbers per segment to tensor_scalars. tile_sums: scratch, kSums numbers per tile.
void measure_cpu(const Launch& launch, bool updates, double* tile_sums, double* tensor_scalars);

// Both, a few tensors at a time, so that the update finds them in the cache.
void measure_and_run_cpu(const Launch& launch, double* tile_sums, double* tensor_scalars);

// The instruction-set level in use: the best that the processor has, unless set (by a test).
const cpu::Level* cpu_level();
void set_cpu_level(const cpu::Level* level);

}  // namespace fused_momentum
