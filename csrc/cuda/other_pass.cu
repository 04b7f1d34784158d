// The passes over every other combination of types.
#include "kernels.cuh"

const void* fused_momentum::cuda::other_pass(int rule, const DType* dtype, bool large) {
  return pass_of<Others>(rule, dtype, large);
}
