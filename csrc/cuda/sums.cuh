// Sums over each tensor in float64, in a fixed order. 1024 values are summed by halving:
// x[i] += x[i + h] for h = 512, 256, ... 1. So is each tile (zero padded); then lane j of 1024 adds
// the sums of a tensor's tiles j, j + 1024, ... in that order to 0, and the lanes are halved.
//
// A thread halves its own values, then the block halves one value per thread, with a barrier after
// each step: h = kThreads / 2, ... 1.
#pragma once

#include "machine.cuh"

namespace fused_momentum::cuda {

// One value of each sum per thread.
template <int kSums>
struct Lanes {
  double x[kSums][kThreads];

  FM_DEVICE void halve(int h, int thread) {
    if (thread >= h) return;
#pragma unroll
    for (int t = 0; t < kSums; t++) x[t][thread] += x[t][thread + h];
  }
};

// The values of a thread are those at thread + kThreads * k. They come with the bits of k in
// reverse order: so those that belong together meet at once, and few must be held.
FM_HOST_DEVICE constexpr int reversed(int j) {
  return (j & 1) << 2 | (j & 2) | j >> 2;
}

template <int kSums>
struct Halving {
  static_assert(kPerThread == 8);
  double held[3][kSums], sum[kSums];

  // Adds the values at k = reversed(j), j = 0, 1, ... 7; after the last, `sum` is that of all.
  FM_DEVICE void add(int j, const double* values) {
#pragma unroll
    for (int t = 0; t < kSums; t++) {
      sum[t] = values[t];
      bool pairs = true;
#pragma unroll
      for (int level = 0; level < 3; level++) {
        const bool second = (j >> level & 1) != 0;
        if (pairs && second) sum[t] = held[level][t] + sum[t];
        if (pairs && !second) held[level][t] = sum[t];
        pairs &= second;
      }
    }
  }
};

}  // namespace fused_momentum::cuda
