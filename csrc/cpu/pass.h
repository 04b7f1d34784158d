// The generic pass of the CPU: load, cast, RULE, cast, store, for any rule of the table. This text
// is compiled once per instruction-set level, each time inside an anonymous namespace of a file
// that has set its target, so nothing here may be visible to the linker.

#include "codec.h"

template <class T>
constexpr DType native = sizeof(T) == 8 ? DType::f64 : DType::f32;

// Elements that a pass keeps in the first-level cache while it converts them.
constexpr int kBlock = 512;

template <class Rule, class T, class... State>
inline void update_block(int n, T grad_multiplier,
                         const typename Rule::template Scalars<T>& scalars_in_memory, T* p,
                         const T* g, State*... states) {
  // A local copy: the compiler sees that writing the streams cannot change it.
  const typename Rule::template Scalars<T> scalars = scalars_in_memory;
// The streams of a tensor never overlap; the plan and the functional ops see to it.
#pragma GCC ivdep
  for (int i = 0; i < n; i++) {
    T new_p = p[i];
    [&](State... new_states) {
      Rule::update(new_p, g[i] * grad_multiplier, new_states..., scalars);
      ((states[i] = new_states), ...);
    }(states[i]...);
    p[i] = new_p;
  }
}

template <class Rule, class T, size_t... S>
inline void update_streams(T* const* at, int n, T grad_multiplier,
                           const typename Rule::template Scalars<T>& scalars,
                           std::index_sequence<S...>) {
  update_block<Rule, T>(n, grad_multiplier, scalars, at[0], at[1], at[2 + S]...);
}

// Elements [begin, begin + n) of a segment, n <= kBlock.
template <class Rule, class T>
inline void run_block(const Segment& segment, int64_t begin, int n, T grad_multiplier,
                      const typename Rule::template Scalars<T>& scalars) {
  constexpr int streams = 2 + Rule::kStates;
  alignas(64) T buffers[streams][kBlock];
  T* at[streams];
  bool direct = segment.layout == nullptr;
  for (int s = 0; s < streams; s++) {
    at[s] = static_cast<T*>(segment.data[s]) + begin;
    direct &= segment.data[s] != nullptr && segment.dtype[s] == native<T>;
  }
  if (direct)
    return update_streams<Rule, T>(at, n, grad_multiplier, scalars,
                                   std::make_index_sequence<Rule::kStates>{});
  for (int s = 0; s < streams; s++) {
    const Span span{segment.data[s], segment.layout, s, begin, n};
    if (segment.data[s] == nullptr) {
      at[s] = buffers[s];
      for (int i = 0; i < n; i++) at[s][i] = 0;
    } else if (segment.dtype[s] == native<T> && segment.layout == nullptr) {
      at[s] = static_cast<T*>(segment.data[s]) + begin;
    } else {
      at[s] = buffers[s];
      load(segment.dtype[s], span, at[s]);
    }
  }
  update_streams<Rule, T>(at, n, grad_multiplier, scalars,
                          std::make_index_sequence<Rule::kStates>{});
  for (int s = 0; s < streams; s++) {
    const bool written = s != 1;  // gradients are never modified
    if (written && at[s] == buffers[s] && segment.data[s] != nullptr)
      store(segment.dtype[s], {segment.data[s], segment.layout, s, begin, n}, at[s]);
  }
}

template <class Rule, class T>
void run_segment(const Launch& launch, const Segment& segment, int64_t begin, int64_t end) {
  const auto scalars = Rule::template derive<T>(
      launch.hyper + int64_t(segment.row) * launch.hyper_stride, segment.tensor);
  const T grad_multiplier = T(launch.grad_multiplier[segment.row]);
  for (; begin < end; begin += kBlock) {
    const int n = end - begin < kBlock ? int(end - begin) : kBlock;
    run_block<Rule, T>(segment, begin, n, grad_multiplier, scalars);
  }
}

template <class Rule>
void run_rule(const Launch& launch, int64_t tile, int64_t tile_end) {
  int64_t i = segment_of(launch.tile_ends, launch.segment_count, tile);
  for (; tile < tile_end; i++) {
    const int64_t first = i == 0 ? 0 : launch.tile_ends[i - 1];
    const int64_t last = launch.tile_ends[i] < tile_end ? launch.tile_ends[i] : tile_end;
    if (first == launch.tile_ends[i]) continue;
    const Segment& segment = launch.segments[i];
    const int64_t begin = (tile - first) * kTile;
    const int64_t end = (last - first) * kTile;
    const auto run = segment.dtype[0] == DType::f64 ? run_segment<Rule, double>
                                                    : run_segment<Rule, float>;
    run(launch, segment, begin, end < segment.numel ? end : segment.numel);
    tile = last;
  }
}

void run_tiles_here(const Launch& launch, int64_t tile, int64_t tile_end) {
  int index = 0;
  for_each_rule([&](auto rule) {
    if (index++ == launch.rule) run_rule<decltype(rule)>(launch, tile, tile_end);
  });
}
