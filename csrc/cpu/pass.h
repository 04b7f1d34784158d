// The generic pass of the CPU: load, cast, RULE, cast, store, for any rule of the table. This text
// is compiled once per instruction-set level, each time inside an anonymous namespace of a file
// that has set its target, so nothing here may be visible to the linker.

#include "codec.h"

// Elements that a pass keeps in the first-level cache while it converts them.
constexpr int kBlock = 512;
constexpr int kPrefetchLines = 4;

template <class T, class>
using Value = T;  // a T for each type of a pack
template <class T, size_t>
using Repeat = T;  // a T for each number of a pack

// The loop: P, G and S are the codecs of the parameter, the gradient and the states.
template <class Rule, class T, class P, class G, class... S>
inline void update_streams(int64_t n, T grad_multiplier,
                           const typename Rule::template Scalars<T>& scalars_in_memory,
                           typename P::storage* p, const typename G::storage* g,
                           typename S::storage*... states) {
  // A local copy: the compiler sees that writing the streams cannot change it.
  const typename Rule::template Scalars<T> scalars = scalars_in_memory;
// The streams of a tensor never overlap; the plan and the functional ops see to it.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    T new_p = P::load(p[i]);
    [&](Value<T, S>... new_states) __attribute__((always_inline)) {
      Rule::update(new_p, T(G::load(g[i])) * grad_multiplier, new_states..., scalars);
      ((states[i] = S::store(new_states)), ...);
    }(S::load(states[i])...);
    p[i] = P::store(new_p);
  }
}

template <class Rule, class T, class P, class G, class S, size_t... I>
inline void update(void* const* at, int64_t n, T grad_multiplier,
                   const typename Rule::template Scalars<T>& scalars, std::index_sequence<I...>) {
  update_streams<Rule, T, P, G, Repeat<S, I>...>(n, grad_multiplier, scalars,
                                                 static_cast<typename P::storage*>(at[0]),
                                                 static_cast<const typename G::storage*>(at[1]),
                                                 static_cast<typename S::storage*>(at[2 + I])...);
}

// Updates elements [begin, begin + n) where they lie, if the segment is contiguous, complete, and
// stored as P, G, S. Returns whether it was.
template <class Rule, class T, class P, class G, class S>
inline bool update_in_place(const Segment& segment, int64_t begin, int64_t n, T grad_multiplier,
                            const typename Rule::template Scalars<T>& scalars) {
  constexpr int streams = 2 + Rule::kStates;
  constexpr DType stored[] = {P::dtype, G::dtype, S::dtype};
  bool matches = segment.layout == nullptr;
  void* at[streams];
  for (int s = 0; s < streams; s++) {
    matches &= segment.data[s] != nullptr && segment.dtype[s] == stored[s < 2 ? s : 2];
    at[s] = static_cast<char*>(segment.data[s]) + begin * itemsize_of(segment.dtype[s]);
  }
  if (matches)
    update<Rule, T, P, G, S>(at, n, grad_multiplier, scalars,
                             std::make_index_sequence<Rule::kStates>{});
  return matches;
}

// Elements [begin, begin + n) of a segment, n <= kBlock, converted on the way.
template <class Rule, class T>
inline void convert_and_update(const Segment& segment, int64_t begin, int n, T grad_multiplier,
                               const typename Rule::template Scalars<T>& scalars) {
  constexpr int streams = 2 + Rule::kStates;
  using Native = std::conditional_t<sizeof(T) == 8, f64, f32>;
  alignas(64) T buffers[streams][kBlock];
  void* at[streams];
  for (int s = 0; s < streams; s++) {
    at[s] = buffers[s];
    if (segment.data[s] == nullptr)
      for (int i = 0; i < n; i++) buffers[s][i] = 0;
    else if (segment.dtype[s] == Native::dtype && segment.layout == nullptr)
      at[s] = static_cast<T*>(segment.data[s]) + begin;
    else
      load(segment.dtype[s], {segment.data[s], segment.layout, s, begin, n}, buffers[s]);
  }
  update<Rule, T, Native, Native, Native>(at, n, grad_multiplier, scalars,
                                          std::make_index_sequence<Rule::kStates>{});
  for (int s = 0; s < streams; s++) {
    const bool written = s != 1;  // gradients are never modified
    if (written && at[s] == buffers[s] && segment.data[s] != nullptr)
      store(segment.dtype[s], {segment.data[s], segment.layout, s, begin, n}, buffers[s]);
  }
}

template <class Rule, class T>
void run_segment(const Launch& launch, const Segment& segment, int64_t begin, int64_t end) {
  const auto scalars = Rule::template derive<T>(
      launch.hyper + int64_t(segment.row) * launch.hyper_stride, segment.tensor);
  const T multiplier = T(launch.grad_multiplier[segment.row]);
  const int64_t size = end - begin;
  if constexpr (sizeof(T) == 8) {
    if (update_in_place<Rule, T, f64, f64, f64>(segment, begin, size, multiplier, scalars)) return;
  } else {  // what training uses; anything else is converted block by block
    if (update_in_place<Rule, T, f32, f32, f32>(segment, begin, size, multiplier, scalars) ||
        update_in_place<Rule, T, bf16, bf16, f32>(segment, begin, size, multiplier, scalars) ||
        update_in_place<Rule, T, bf16, bf16, bf16>(segment, begin, size, multiplier, scalars))
      return;
  }
  for (; begin < end; begin += kBlock) {
    const int n = end - begin < kBlock ? int(end - begin) : kBlock;
    convert_and_update<Rule, T>(segment, begin, n, multiplier, scalars);
  }
}

// Hardware prefetchers stop at the end of a page, which for small tensors is everywhere: ask for
// the first lines of the tensor that comes next.
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
