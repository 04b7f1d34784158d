// The rule table as data, for code that knows a rule by its number.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "launch.h"
#include "rules.h"

namespace fused_momentum {

struct RuleInfo {
  std::string name;
  int hyper, tensor_scalars, states, kept;
  DType kept_dtype;
  int sums = 0;          // of the measuring pass; 0: there is none
  bool settles = false;  // see Measure::kSettles
};

template <class Rule>
RuleInfo info_of() {
  RuleInfo info{Rule::name,    Rule::kHyper,
                Rule::kTensor, Rule::kStates,
                Rule::kKept,   sizeof(typename Rule::Kept) == 8 ? DType::f64 : DType::f32};
  if constexpr (!std::is_void_v<typename Rule::Measure>) {
    info.sums = Rule::Measure::kSums;
    info.settles = Rule::Measure::kSettles;
  }
  return info;
}

inline const std::vector<RuleInfo>& rule_infos() {
  static const std::vector<RuleInfo> table = [] {
    std::vector<RuleInfo> made;
    for_each_rule([&](auto rule) { made.push_back(info_of<decltype(rule)>()); });
    return made;
  }();
  return table;
}

// The kept numbers of a tensor: `at` are their addresses, nullptr where one is absent.
template <class Rule>
inline void load_kept(void* const* at, double* kept) {
  for (int k = 0; k < Rule::kKept; k++)
    kept[k] = at[k] ? double(*static_cast<const typename Rule::Kept*>(at[k])) : Rule::initial(k);
}

}  // namespace fused_momentum
