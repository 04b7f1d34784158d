// The measuring pass of the CPU, for any rule that has one: terms of each element, added up tile by
// tile. Included inside an anonymous namespace.
#pragma once

#include "pass.h"

// The terms of elements [begin, end) of a tile; the states are written in place.
template <class Rule, class T, unsigned setting, size_t... I>
__attribute__((always_inline)) inline void find_terms(
    void* const* at, int begin, int end, T grad_multiplier,
    const typename Rule::template Scalars<T>& scalars_in_memory, double (*terms)[kTile],
    std::index_sequence<I...>) {
  using Measure = typename Rule::Measure;
  const auto scalars = in_setting<Measure, setting>(scalars_in_memory);
  const unsigned written = needed<Rule, Measure>(scalars) >> 2 & Measure::kWrites;
  const int sums = Measure::sums(scalars);
  const T* p = static_cast<const T*>(at[0]);
  const T* g = static_cast<const T*>(at[1]);
#pragma GCC ivdep
  for (int i = begin; i < end; i++) {
    double found[Measure::kSums];
    [&](Repeat<T, I>... states) __attribute__((always_inline)) {
      Measure::terms(p[i], g[i] * grad_multiplier, states..., scalars, found);
      ((written >> I & 1 ? void(static_cast<T*>(at[2 + I])[i] = states) : void()), ...);
    }(static_cast<const T*>(at[2 + I])[i]...);
    for (int k = 0; k < sums; k++) terms[k][i] = found[k];
  }
}

// The sum of row, row + step, ... below kRows of a column, as halving adds them.
constexpr int kRows = 16, kColumns = kTile / kRows;
template <int row, int step>
inline double halve_column(const double* x) {
  if constexpr (step == kRows)
    return x[row * kColumns];
  else
    return halve_column<row, step * 2>(x) + halve_column<row + step, step * 2>(x);
}

// The sum of a tile: x[i] += x[i + h] for h = 512, 256, ... 1. The first four halvings (kRows = 16)
// are done in registers, column by column.
inline double halve(const double* x) {
  double sums[kColumns];
  for (int i = 0; i < kColumns; i++) sums[i] = halve_column<0, 1>(x + i);
  for (int h = kColumns / 2; h > 0; h /= 2)
    for (int i = 0; i < h; i++) sums[i] += sums[i + h];
  return sums[0];
}

template <class Rule, class T>
void measure_segment(const Launch& launch, int64_t i, int64_t first, int64_t tile, int64_t tile_end,
                     double* tile_sums) {
  using Measure = typename Rule::Measure;
  const Segment& segment = launch.segments[i];
  const Numbers<Rule> numbers(launch, i);
  if (Measure::settled(numbers.hyper, numbers.kept)) return;
  const auto scalars = Rule::template derive<T>(numbers.hyper, numbers.tensor, numbers.kept);
  const T multiplier = T(launch.grad_multiplier[segment.row]);
  const unsigned streams = needed<Rule, Measure>(scalars);
  const int sums = Measure::sums(scalars);
  const int64_t tiles = launch.tile_ends[launch.segment_count - 1];
  constexpr std::make_index_sequence<Rule::kStates> states;
  int sizes[2 + Rule::kStates];
  for (int s = 0; s < 2 + Rule::kStates; s++) sizes[s] = itemsize_of(segment.dtype[s]);
  Values<Rule, T, kTile> values;
  alignas(64) double terms[Measure::kSums][kTile];
  for (; tile < tile_end; tile++) {
    const int64_t begin = (tile - first) * kTile;
    const int n = segment.numel - begin < kTile ? int(segment.numel - begin) : kTile;
    values.read(segment, begin, n, streams);
    for (int done = 0; done < n; done += kAhead) {
      const int64_t ahead = begin + done + kTile;
      prefetch<T, 64 / sizeof(T)>(segment, ahead, ahead + kAhead, streams, sizes,
                                  std::make_index_sequence<2 + Rule::kStates>{});
      with_setting<Measure>(scalars, [&](auto setting) __attribute__((always_inline)) {
        find_terms<Rule, T, setting.value>(values.at, done,
                                           n - done < kAhead ? n : int(done + kAhead), multiplier,
                                           scalars, terms, states);
      });
    }
    values.write(segment, begin, n, streams & Measure::kWrites << 2);
    for (int k = 0; k < Measure::kSums; k++) {
      for (int j = n; j < kTile; j++) terms[k][j] = 0;
      tile_sums[k * tiles + tile] = k < sums ? halve(terms[k]) : 0;
    }
  }
}

template <class Rule>
void measure_rule(const Launch& launch, int64_t tile, int64_t tile_end, double* tile_sums) {
  for (Parts parts(launch, tile, tile_end); parts.any(); parts.next()) {
    const auto measure = parts.here().dtype[0] == DType::f64 ? measure_segment<Rule, double>
                                                             : measure_segment<Rule, float>;
    measure(launch, parts.segment, parts.first, parts.tile, parts.last_tile(), tile_sums);
  }
}

void measure_tiles_here(const Launch& launch, int64_t tile, int64_t tile_end, double* tile_sums) {
  int index = 0;
  for_each_rule([&](auto rule) {
    using Rule = decltype(rule);
    if constexpr (!std::is_void_v<typename Rule::Measure>)
      if (index == launch.rule) measure_rule<Rule>(launch, tile, tile_end, tile_sums);
    index++;
  });
}
