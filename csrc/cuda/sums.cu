// The sums of g and g * g over each tensor.
#include "sums.cuh"

#include "kernels.h"

namespace fused_momentum::cuda {
namespace {

using GradSums = Sums<GradTerms>;

__device__ __forceinline__ void halve_block(Lanes<GradSums::kSums>& lanes) {
#pragma unroll
  for (int h = kThreads / 2; h > 0; h /= 2) {
    __syncthreads();
    GradSums::halve_lanes(h, threadIdx.x, lanes);
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads, 8) tile_sums(const __grid_constant__ A args) {
  __shared__ Lanes<GradSums::kSums> lanes;
  GradSums::gather_tile(args, blockIdx.x, threadIdx.x, lanes);
  halve_block(lanes);
  if (threadIdx.x == 0) GradSums::store_tile(args, blockIdx.x, lanes);
}

template <class A>
__global__ void __launch_bounds__(kThreads, 8) tensor_sums(const __grid_constant__ A args) {
  __shared__ Lanes<GradSums::kSums> lanes;
  GradSums::gather_tensor(args, blockIdx.x, threadIdx.x, lanes);
  halve_block(lanes);
  if (threadIdx.x == 0) GradSums::store_tensor(args, blockIdx.x, lanes);
}

}  // namespace

const void* tile_sums_kernel(bool large) {
  return large ? reinterpret_cast<const void*>(tile_sums<LargeArgs>)
               : reinterpret_cast<const void*>(tile_sums<SmallArgs>);
}

const void* tensor_sums_kernel(bool large) {
  return large ? reinterpret_cast<const void*>(tensor_sums<LargeArgs>)
               : reinterpret_cast<const void*>(tensor_sums<SmallArgs>);
}

}  // namespace fused_momentum::cuda
