// The passes over 16-bit parameters.
#include "kernels.cuh"

const void* fused_momentum::cuda::half_pass(int rule, const DType* dtype, bool large) {
  return pass_of<Halves>(rule, dtype, large);
}
