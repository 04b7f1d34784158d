// The passes over float32 and float64 parameters.
#include "kernels.cuh"

const void* fused_momentum::cuda::single_pass(int rule, const DType* dtype, bool large) {
  return pass_of<Singles>(rule, dtype, large);
}
