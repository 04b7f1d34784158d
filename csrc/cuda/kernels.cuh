// The kernels of the updates, for the files that compile them.
#pragma once

#include "kernels.h"
#include "pass.cuh"
#include "signatures.cuh"

namespace fused_momentum::cuda {

template <class Pass, class A>
__global__ void __launch_bounds__(kThreads, Pass::kBlocksPerProcessor)
    pass_kernel(const __grid_constant__ A args) {
  Pass::run(args, blockIdx.x, threadIdx.x);
  if (args.header.ticket == nullptr) return;
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(args.header.ticket, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last) clear_first(args, threadIdx.x);
}

template <class Signatures>
const void* pass_of(int rule, const DType* dtype, bool large) {
  const void* kernel = nullptr;
  Signatures::with_types(rule, dtype, [&](auto types) {
    using P = Pass<decltype(types)>;
    kernel = large ? reinterpret_cast<const void*>(pass_kernel<P, LargeArgs>)
                   : reinterpret_cast<const void*>(pass_kernel<P, SmallArgs>);
  });
  return kernel;
}

}  // namespace fused_momentum::cuda
