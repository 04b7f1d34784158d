// The generic pass of the CPU: load, cast, RULE, cast, store, for any rule of the table. This text
// is compiled once per instruction-set level, each time inside an anonymous namespace of a file
// that has set its target, so nothing here may be visible to the linker.

#include "codec.h"

template <class T>
constexpr DType native = sizeof(T) == 8 ? DType::f64 : DType::f32;

// Elements that a pass keeps in the first-level cache while it converts them.
constexpr int kBlock = 512;
constexpr int kPrefetchLines = 4;

template <class Rule, class T, class... State>
inline void update_streams(int64_t n, T grad_multiplier,
                           const typename Rule::template Scalars<T>& scalars_in_memory, T* p,
                           const T* g, State*... states) {
  // A local copy: the compiler sees that writing the streams cannot change it.
  const typename Rule::template Scalars<T> scalars = scalars_in_memory;
// The streams of a tensor never overlap; the plan and the functional ops see to it.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    T new_p = p[i];
    [&](State... new_states) {
      Rule::update(new_p, g[i] * grad_multiplier, new_states..., scalars);
      ((states[i] = new_states), ...);
    }(states[i]...);
    p[i] = new_p;
  }
}

template <class Rule, class T, size_t... S>
inline void update(T* const* at, int64_t n, T grad_multiplier,
                   const typename Rule::template Scalars<T>& scalars, std::index_sequence<S...>) {
  update_streams<Rule, T>(n, grad_multiplier, scalars, at[0], at[1], at[2 + S]...);
}

// The addresses of a segment's elements from `begin` on, if the rule can work on them as they lie.
template <class Rule, class T>
inline bool in_place(const Segment& segment, int64_t begin, T** at) {
  bool direct = segment.layout == nullptr;
  for (int s = 0; s < 2 + Rule::kStates; s++) {
    direct &= segment.data[s] != nullptr && segment.dtype[s] == native<T>;
    at[s] = static_cast<T*>(segment.data[s]) + begin;
  }
  return direct;
}

// Elements [begin, begin + n) of a segment, n <= kBlock, converted on the way.
template <class Rule, class T>
inline void convert_and_update(const Segment& segment, int64_t begin, int n, T grad_multiplier,
                               const typename Rule::template Scalars<T>& scalars) {
  constexpr int streams = 2 + Rule::kStates;
  alignas(64) T buffers[streams][kBlock];
  T* at[streams];
  for (int s = 0; s < streams; s++) {
    at[s] = buffers[s];
    if (segment.data[s] == nullptr)
      for (int i = 0; i < n; i++) at[s][i] = 0;
    else if (segment.dtype[s] == native<T> && segment.layout == nullptr)
      at[s] = static_cast<T*>(segment.data[s]) + begin;
    else
      load(segment.dtype[s], {segment.data[s], segment.layout, s, begin, n}, at[s]);
  }
  update<Rule, T>(at, n, grad_multiplier, scalars, std::make_index_sequence<Rule::kStates>{});
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
  T* at[2 + Rule::kStates];
  if (in_place<Rule, T>(segment, begin, at))
    return update<Rule, T>(at, end - begin, grad_multiplier, scalars,
                           std::make_index_sequence<Rule::kStates>{});
  for (; begin < end; begin += kBlock) {
    const int n = end - begin < kBlock ? int(end - begin) : kBlock;
    convert_and_update<Rule, T>(segment, begin, n, grad_multiplier, scalars);
  }
}

// Hardware prefetchers stop at the end of a page, which for small tensors is everywhere: ask for the
// first lines of the tensor that comes next.
template <class Rule>
inline void prefetch(const Segment& segment) {
  for (int s = 0; s < 2 + Rule::kStates; s++)
    for (int line = 0; line < kPrefetchLines; line++)
      __builtin_prefetch(static_cast<const char*>(segment.data[s]) + line * 64);
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
    const auto run =
        segment.dtype[0] == DType::f64 ? run_segment<Rule, double> : run_segment<Rule, float>;
    if (i + 1 < launch.segment_count) prefetch<Rule>(launch.segments[i + 1]);
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
