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

// Switches are scalars of a pass whose zero leaves something out (momentum 0: no buffer). The CPU
// has one compiled loop for each set of switches that are not 0.
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
  // Bit s: `update` reads stream s of p, g, states. May depend on nothing but the switches.
  template <class Scalars>
  FM_RULE unsigned reads(const Scalars&) {
    return ~0u;
  }
  static constexpr unsigned kWrites = ~0u;  // bit k: it writes state k, where it reads that
  // The pass before the update, or void.
  using Measure = void;
};

// Every rule has a name, kHyper, kStates; Scalars<T>; derive (float64 in, each scalar rounded once
// to T); update (elementwise). A Measure has kSums, kSettles, kWrites, reads, terms, settle and
// settled: see rules/table.py. And switches, and how many of its sums are used: `sums`.

}  // namespace fused_momentum
