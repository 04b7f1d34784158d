// What every rule has. FM_RULE marks functions that the host and the device compile.
#pragma once

#include <array>
#include <cmath>

#ifdef __CUDACC__
#define FM_RULE __host__ __device__ __forceinline__ static
#else
#define FM_RULE static inline __attribute__((always_inline))
#endif

namespace fused_momentum {

using std::sqrt;

// Of a pass: scalars that may be 0, where something is then left out. A CPU has a loop for each set
// of those that are not 0.
struct NoSwitches {
  template <class Scalars>
  static constexpr std::array<float Scalars::*, 0> switches(Scalars*) {
    return {};
  }
};

// What a rule has, unless it says otherwise.
struct Elementwise : NoSwitches {
  // kHyper hyper-parameters, kTensor scalars per tensor, kStates states; kKept numbers per tensor,
  // stored as Kept, that begin as `initial` says.
  static constexpr int kTensor = 1, kKept = 0;
  using Kept = float;
  FM_RULE double initial(int) { return 0.0; }
  // The streams p, g, states that `update` looks at (bit s): which of them may depend on switches
  // alone. And the states that it writes (bit k), if it looks at them.
  template <class Scalars>
  FM_RULE unsigned reads(const Scalars&) {
    return ~0u;
  }
  static constexpr unsigned kWrites = ~0u;
  // The pass before the update, or void.
  using Measure = void;
};

// Every rule has a name, kHyper, kStates; Scalars<T>; derive (float64 in, each scalar rounded once
// to T); update (elementwise). A Measure has kSums, kSettles, kWrites, reads, terms, settle and
// settled: see rules/table.py. And switches, and how many of its sums are used: `sums`.

}  // namespace fused_momentum
