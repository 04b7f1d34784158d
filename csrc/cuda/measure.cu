// The kernels of the measuring passes.
#include "measure.cuh"

#include "kernels.h"
#include "signatures.cuh"

namespace fused_momentum::cuda {
namespace {

// From one value per thread to one value.
template <int kSums>
__device__ __forceinline__ void halve_block(Lanes<kSums>& lanes) {
  constexpr int kWarp = 32;
#pragma unroll
  for (int h = kThreads / 2; h >= kWarp; h /= 2) {
    __syncthreads();
    lanes.halve(h, threadIdx.x);
  }
  if (threadIdx.x >= kWarp) return;
#pragma unroll
  for (int h = kWarp / 2; h > 0; h /= 2) {
    __syncwarp();
    lanes.halve(h, threadIdx.x);
  }
}

template <class Pass, class A>
__global__ void __launch_bounds__(kThreads, Pass::kBlocksPerProcessor)
    tile_kernel(const __grid_constant__ A args) {
  // Warps that are done with a tile fill one set of lanes while the first still halves the other.
  __shared__ Lanes<Pass::kSums> lanes[2];
  if (is_skipped(args.header)) return;
  const Tiles tiles = tiles_of_block(args.header, blockIdx.x);
  Pass pass(args, tiles.begin, threadIdx.x);
  int turn = 0;
#pragma unroll 1
  for (uint32_t tile = tiles.begin; tile < tiles.end; tile++) {
    if (!pass.gather(args, tile, lanes[turn])) continue;
    halve_block(lanes[turn]);
    if (threadIdx.x == 0) Pass::store(args, tile, lanes[turn]);
    turn ^= 1;
  }
}

template <class Pass, class A>
__global__ void __launch_bounds__(kThreads) tensor_kernel(const __grid_constant__ A args) {
  __shared__ Lanes<Pass::kSums> lanes;
  const bool measured = Pass::gather(args, blockIdx.x, threadIdx.x, lanes);
  if (measured) halve_block(lanes);
  if (threadIdx.x == 0) Pass::settle(args, blockIdx.x, measured, lanes);
}

}  // namespace

const void* tile_pass(int rule, const DType* dtype, bool large) {
  const void* kernel = nullptr;
  const auto find = [&](auto types) {
    using Types = decltype(types);
    if constexpr (!std::is_void_v<typename Types::Rule::Measure>) {
      using P = TilePass<Types>;
      kernel = large ? reinterpret_cast<const void*>(tile_kernel<P, LargeArgs>)
                     : reinterpret_cast<const void*>(tile_kernel<P, SmallArgs>);
    }
  };
  Measured::with_types(rule, dtype, find) || Others::with_types(rule, dtype, find);
  return kernel;
}

const void* tensor_pass(int rule, bool large) {
  const void* kernel = nullptr;
  int index = 0;
  for_each_rule([&](auto example) {
    using Rule = decltype(example);
    if constexpr (!std::is_void_v<typename Rule::Measure>) {
      using P = TensorPass<Rule>;
      if (index == rule)
        kernel = large ? reinterpret_cast<const void*>(tensor_kernel<P, LargeArgs>)
                       : reinterpret_cast<const void*>(tensor_kernel<P, SmallArgs>);
    }
    index++;
  });
  return kernel;
}

}  // namespace fused_momentum::cuda
