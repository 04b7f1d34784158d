// The maths of every optimizer, host and device: the twin of fused_momentum/rules, and nothing
// else. Same names, same order of operations; one operation is one rounding, so every compiler is
// told not to contract (g++ -ffp-contract=off, nvcc -fmad=false).
#pragma once

#include "rules/autosgm.h"
#include "rules/momentum.h"
#include "rules/sgd.h"
#include "rules/sgd_sai.h"

namespace fused_momentum {

// Calls f with one value of each rule type, in the order of the table in fused_momentum/rules.
template <class F>
void for_each_rule(F&& f) {
  f(sgd{});
  f(velocity{});
  f(lookahead{});
  f(sgd_sai{});
  f(autosgm{});
}

}  // namespace fused_momentum
