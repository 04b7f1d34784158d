// Which combinations of types have a kernel of their own; AnyCodec takes all others. Updates are
// compiled in three groups, each for every rule; measuring passes have less to gain.
#pragma once

#include "elements.cuh"

namespace fused_momentum::cuda {

template <class T_, class P_, class G_, class S_>
struct Signature {
  using T = T_;
  using P = P_;
  using G = G_;
  using S = S_;

  // dtype: of the parameter, the gradient and each of the states.
  static bool matches(const DType* dtype, int states) {
    bool all = P::matches(dtype[0]) && G::matches(dtype[1]);
    all &= (sizeof(T) == 8) == (dtype[0] == DType::f64);
    for (int s = 0; s < states; s++) all &= S::matches(dtype[2 + s]);
    return all;
  }
};

template <class... S>
struct Signatures {
  // Calls f with the rule's Types for these dtypes; returns whether there are such.
  template <class F>
  static bool with_types(int rule, const DType* dtype, F&& f) {
    bool found = false;
    int index = 0;
    for_each_rule([&](auto example) {
      using Rule = decltype(example);
      if (index++ != rule) return;
      ((!found && S::matches(dtype, Rule::kStates)
            ? (found = true,
               f(Types<Rule, typename S::T, typename S::P, typename S::G, typename S::S>{}))
            : void()),
       ...);
    });
    return found;
  }
};

using Singles = Signatures<Signature<float, F32, F32, F32>, Signature<float, F32, BF16, F32>,
                           Signature<double, F64, F64, F64>>;
using Halves = Signatures<Signature<float, BF16, BF16, F32>, Signature<float, BF16, BF16, BF16>,
                          Signature<float, BF16, F32, F32>, Signature<float, F16, F16, F32>,
                          Signature<float, F16, F16, F16>>;
using Measured = Signatures<Signature<float, F32, F32, F32>, Signature<float, BF16, BF16, F32>,
                            Signature<double, F64, F64, F64>>;
using Others = Signatures<Signature<float, AnyCodec, AnyCodec, AnyCodec>,
                          Signature<double, AnyCodec, AnyCodec, AnyCodec>>;

}  // namespace fused_momentum::cuda
