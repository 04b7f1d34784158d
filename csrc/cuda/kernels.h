// Where to find a kernel; nullptr where a file has none for these types. large: for LargeArgs.
#pragma once

#include "../launch.h"

namespace fused_momentum::cuda {

const void* single_pass(int rule, const DType* dtype, bool large);
const void* half_pass(int rule, const DType* dtype, bool large);
const void* other_pass(int rule, const DType* dtype, bool large);

// The kernels of a measuring pass.
const void* tile_pass(int rule, const DType* dtype, bool large);
const void* tensor_pass(int rule, bool large);

}  // namespace fused_momentum::cuda
