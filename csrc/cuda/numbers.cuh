// The numbers of one tensor: hyper-parameters, scalars of the step, kept numbers; in float64.
#pragma once

#include "../rules.h"
#include "machine.cuh"

namespace fused_momentum::cuda {

template <class Rule>
struct Numbers {
  double hyper[Rule::kHyper], tensor[Rule::kTensor], kept[Rule::kKept + 1], grad_multiplier;
};

template <class Rule, class A>
FM_DEVICE void read_row(const A& args, uint32_t row, Numbers<Rule>* numbers) {
  const uint32_t at = row * (Rule::kHyper + 2);
#pragma unroll
  for (int k = 0; k < Rule::kHyper; k++) numbers->hyper[k] = double_of(row_word(args, at + k));
  double multiplier = double_of(row_word(args, at + Rule::kHyper));
  if (args.header.grad_scale) multiplier *= double(float(1.0 / double(*args.header.grad_scale)));
  numbers->grad_multiplier = multiplier;
  const uint64_t lr = row_word(args, at + Rule::kHyper + 1);
  if (lr & 1)
    numbers->hyper[0] = read_scalar(reinterpret_cast<const double*>(lr - 1));
  else if (lr)
    numbers->hyper[0] = read_scalar(reinterpret_cast<const float*>(lr));
}

// Where kept number k of tensor i is; nullptr: absent.
template <class Rule, class A>
FM_DEVICE typename Rule::Kept* kept_of(const A& args, uint32_t i, int k) {
  const uint64_t column = 3 + Rule::kStates + k;
  return reinterpret_cast<typename Rule::Kept*>(
      tensor_word(args, column * args.header.tensor_count + i));
}

// The tensor's scalars are `first`, then zeros; `measured`: unless a measuring pass found others.
template <class Rule, class A>
FM_DEVICE Numbers<Rule> numbers_of(const A& args, const Place& place, bool measured) {
  Numbers<Rule> numbers;
  read_row(args, place.entry.row, &numbers);
  const double* found = measured ? args.header.tensor_scalars : nullptr;
  if (found != nullptr) {
#pragma unroll
    for (int k = 0; k < Rule::kTensor; k++)
      numbers.tensor[k] = read_scalar(found + int64_t(place.i) * Rule::kTensor + k);
  } else {
#pragma unroll
    for (int k = 0; k < Rule::kTensor; k++) numbers.tensor[k] = 0.0;
    const bool first = args.header.first ? args.header.first[place.i] != 0 : place.entry.first;
    numbers.tensor[0] = first ? 1.0 : 0.0;
  }
#pragma unroll
  for (int k = 0; k < Rule::kKept; k++) {
    const typename Rule::Kept* kept = kept_of<Rule>(args, place.i, k);
    numbers.kept[k] = kept ? double(read_scalar(kept)) : Rule::initial(k);
  }
  return numbers;
}

}  // namespace fused_momentum::cuda
