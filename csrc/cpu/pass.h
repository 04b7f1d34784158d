// The generic pass of the CPU: load, cast, RULE, cast, store, for any rule of the table. This
// text is compiled once per instruction-set level, each time inside an anonymous namespace of a
// file that has set its target, so nothing here may be visible to the linker.
#pragma once

#include "codec.h"
#include "lanes.h"

// Elements that a pass keeps in the first-level cache while it converts them.
constexpr int kBlock = 512;
constexpr int64_t kAhead = 128;  // elements that are asked for at a time

template <class T, size_t>
using Repeat = T;  // a T for each number of a pack

// Tiles [tile, tile_end) of a launch, part by part: the tiles of one segment are a part.
struct Parts {
  const Launch* launch;
  int64_t tile_end, segment, first, tile;  // `segment` has the tiles from `first` on

  Parts(const Launch& of, int64_t tile, int64_t tile_end)
      : launch(&of), tile_end(tile_end), tile(tile) {
    segment = segment_of(of.tile_ends, of.segment_count, tile);
    first = segment == 0 ? 0 : of.tile_ends[segment - 1];
  }

  inline bool any() const { return tile < tile_end; }
  inline const Segment& here() const { return launch->segments[segment]; }
  inline const Segment& following() const {
    return launch->segments[segment + 1 < launch->segment_count ? segment + 1 : segment];
  }
  inline int64_t last_tile() const {
    return launch->tile_ends[segment] < tile_end ? launch->tile_ends[segment] : tile_end;
  }
  // The elements of the part.
  inline int64_t begin() const { return (tile - first) * kTile; }
  inline int64_t end() const {
    const int64_t whole = (last_tile() - first) * kTile;
    return whole < here().numel ? whole : here().numel;
  }
  inline void next() {
    first = tile = launch->tile_ends[segment++];
    if (any())
      while (launch->tile_ends[segment] == tile) segment++;  // has no elements
  }
};

// The streams that a pass needs. It writes those of its states that it needs.
template <class Rule, class Pass, class Scalars>
inline unsigned needed(const Scalars& scalars) {
  constexpr unsigned all = (1u << (2 + Rule::kStates)) - 1;
  return Pass::reads(scalars) & all;
}

// Calls f with a setting of the pass's switches, as a constant: bit k says that switch k is not 0.
template <class Pass, unsigned setting = 0, size_t k = 0, class Scalars, class F>
inline void with_setting(const Scalars& scalars, F&& f) {
  constexpr auto switches = Pass::switches(static_cast<Scalars*>(nullptr));
  if constexpr (k == switches.size())
    f(std::integral_constant<unsigned, setting>{});
  else if (scalars.*switches[k] != 0)
    with_setting<Pass, setting | 1u << k, k + 1>(scalars, f);
  else
    with_setting<Pass, setting, k + 1>(scalars, f);
}

// The same scalars; the compiler sees which switches are 0.
template <class Pass, unsigned setting, size_t k = 0, class Scalars>
__attribute__((always_inline)) inline Scalars in_setting(Scalars scalars) {
  constexpr auto switches = Pass::switches(static_cast<Scalars*>(nullptr));
  if constexpr (k == switches.size()) {
    return scalars;
  } else {
    if (setting >> k & 1) {
      if (scalars.*switches[k] == 0) __builtin_unreachable();
    } else {
      scalars.*switches[k] = 0;
    }
    return in_setting<Pass, setting, k + 1>(scalars);
  }
}

// The loop: P, G and S are the codecs of the parameter, the gradient and the states. Streams that
// are not needed have no address.
template <class Rule, class T, class P, class G, class S, size_t... I>
__attribute__((always_inline)) inline void update_each(
    void* const* at, int64_t n, T grad_multiplier,
    const typename Rule::template Scalars<T>& scalars, std::index_sequence<I...>) {
  const unsigned states = needed<Rule, Rule>(scalars) >> 2, written = states & Rule::kWrites;
  auto* p = static_cast<typename P::storage*>(at[0]);
  const auto* g = static_cast<const typename G::storage*>(at[1]);
  typename S::storage* const state[] = {static_cast<typename S::storage*>(at[2 + I])...};
// The streams of a tensor never overlap; the plan and the functional ops see to it.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    T new_p = P::load(p[i]);
    [&](Repeat<T, I>... new_states) __attribute__((always_inline)) {
      Rule::update(new_p, T(G::load(g[i])) * grad_multiplier, new_states..., scalars);
      ((written >> I & 1 ? void(state[I][i] = S::store(new_states)) : void()), ...);
    }((states >> I & 1 ? S::load(state[I][i]) : T(0))...);
    p[i] = P::store(new_p);
  }
}

// The same, as many at a time as there are lanes; n is a multiple of that.
template <class Rule, class T, class P, class G, class S, size_t... I>
__attribute__((always_inline)) inline void update_lanes(
    void* const* at, int64_t n, T grad_multiplier,
    const typename Rule::template Scalars<T>& scalars, std::index_sequence<I...> index) {
  const unsigned states = needed<Rule, Rule>(scalars) >> 2, written = states & Rule::kWrites;
  auto* p = static_cast<typename P::storage*>(at[0]);
  const auto* g = static_cast<const typename G::storage*>(at[1]);
  typename S::storage* const state[] = {static_cast<typename S::storage*>(at[2 + I])...};
  constexpr int count = Lanes<P>::kCount;
  for (int64_t begin = 0; begin < n; begin += count) {
    alignas(64) T lanes[2 + sizeof...(I)][count];  // which the compiler keeps in registers
    Lanes<P>::load(P{}, p + begin, lanes[0]);
    Lanes<P>::load(G{}, g + begin, lanes[1]);
    ((states >> I & 1 ? Lanes<P>::load(S{}, state[I] + begin, lanes[2 + I]) : void()), ...);
    void* const loaded[] = {lanes[0], lanes[1], lanes[2 + I]...};
    update_each<Rule, T, f32, f32, f32>(loaded, count, grad_multiplier, scalars, index);
    ((written >> I & 1 ? Lanes<P>::store(S{}, lanes[2 + I], state[I] + begin) : void()), ...);
    Lanes<P>::store(P{}, lanes[0], p + begin);
  }
}

// Asks for elements [begin, end) of the streams I of a segment that are needed, `step` at a time;
// their elements have `sizes` bytes, and none is wider than T.
template <class T, int step, size_t... I>
__attribute__((always_inline)) inline void prefetch(const Segment& segment, int64_t begin,
                                                    int64_t end, unsigned streams, const int* sizes,
                                                    std::index_sequence<I...>) {
  // A stream that is not needed asks for a line that is cached anyway: the loop has no branch.
  const char* data[] = {static_cast<const char*>(segment.data[streams >> I & 1 ? I : 1])...};
  const int64_t size[] = {(streams >> I & 1 ? sizes[I] : 0)...};
  if (end > segment.numel) end = segment.numel;
  for (int64_t i = begin; i < end; i += step)
    for (int line = 0; line < step * int(sizeof(T)); line += 64)
      ((line == 0 || line < step * size[I] ? __builtin_prefetch(data[I] + i * size[I] + line)
                                           : void()),
       ...);
}

// Elements [begin, begin + n) of a segment as values of type T, n <= kSize: where they lie, or
// converted. Streams that are absent, or not needed, are zeros.
template <class Rule, class T, int kSize>
struct Values {
  static constexpr int kStreams = 2 + Rule::kStates;
  using Native = std::conditional_t<sizeof(T) == 8, f64, f32>;
  alignas(64) T buffers[kStreams][kSize];
  void* at[kStreams];
  int zeros[kStreams] = {};  // so many elements of a buffer are zero, and no pass changes that

  inline void read(const Segment& segment, int64_t begin, int n, unsigned streams) {
    for (int s = 0; s < kStreams; s++) {
      at[s] = buffers[s];
      if ((streams >> s & 1) == 0)
        for (; zeros[s] < n; zeros[s]++) buffers[s][zeros[s]] = 0;
      else if (segment.data[s] == nullptr)
        for (int i = 0; i < n; i++) buffers[s][i] = 0;
      else if (segment.dtype[s] == Native::dtype && segment.layout == nullptr)
        at[s] = static_cast<T*>(segment.data[s]) + begin;
      else
        load(segment.dtype[s], {segment.data[s], segment.layout, s, begin, n}, buffers[s]);
    }
  }

  inline void write(const Segment& segment, int64_t begin, int n, unsigned streams) {
    for (int s = 0; s < kStreams; s++)
      if ((streams >> s & 1) != 0 && at[s] == buffers[s] && segment.data[s] != nullptr)
        store(segment.dtype[s], {segment.data[s], segment.layout, s, begin, n}, buffers[s]);
  }
};

// What the scalars of a tensor are derived from.
template <class Rule>
struct Numbers {
  const double* hyper;
  double tensor[Rule::kTensor] = {};
  double kept[Rule::kKept + 1];

  Numbers(const Launch& launch, int64_t i) {
    const Segment& segment = launch.segments[i];
    hyper = launch.hyper + int64_t(segment.row) * launch.hyper_stride;
    tensor[0] = segment.first;
    if (launch.tensor_scalars)
      for (int k = 0; k < Rule::kTensor; k++)
        tensor[k] = launch.tensor_scalars[i * Rule::kTensor + k];
    load_kept<Rule>(segment.kept, kept);
  }
};

// The scalars of a tensor, and the loop for its switches and dtypes. Most tensors of a launch have
// those of the tensor before, `like`: then nothing is found anew.
template <class Rule, class T>
struct Update {
  // Updates the part, and those after it that `with` fits; returns the first that is left.
  using Loop = Parts (*)(Parts parts, const Update& with);
  typename Rule::template Scalars<T> scalars;
  T grad_multiplier;
  unsigned streams;
  Loop loop;
  const Segment* like = nullptr;

  // Whether another tensor of the launch has the same ones. Its absent streams are then the same
  // too: they follow from its row.
  inline bool fits(const Parts& parts) const {
    const Segment& segment = parts.here();
    return Rule::kKept == 0 && parts.launch->tensor_scalars == nullptr && like != nullptr &&
           segment.row == like->row && segment.first == like->first &&
           segment.layout == like->layout &&
           std::memcmp(segment.dtype, like->dtype, sizeof segment.dtype) == 0;
  }

  void find(const Launch& launch, int64_t i);
};

// Updates segments, whatever they are, block by block.
template <class Rule, class T>
__attribute__((noinline)) Parts update_blocks(Parts parts, const Update<Rule, T>& with) {
  constexpr unsigned written = 1 | Rule::kWrites << 2;  // gradients are never modified
  Values<Rule, T, kBlock> values;
  using Native = typename decltype(values)::Native;
  do {
    const Segment& segment = parts.here();
    const int64_t end = parts.end();
    for (int64_t begin = parts.begin(); begin < end; begin += kBlock) {
      const int n = end - begin < kBlock ? int(end - begin) : kBlock;
      values.read(segment, begin, n, with.streams);
      update_each<Rule, T, Native, Native, Native>(values.at, n, with.grad_multiplier, with.scalars,
                                                   std::make_index_sequence<Rule::kStates>{});
      values.write(segment, begin, n, with.streams & written);
    }
    parts.next();
  } while (parts.any() && with.fits(parts));
  return parts;
}

// The dtype of stream s of a segment that is stored as P, G, S.
template <class P, class G, class S>
constexpr DType dtype_of(int s) {
  return s == 0 ? P::dtype : s == 1 ? G::dtype : S::dtype;
}

// Where the elements from `begin` on of a segment's streams lie, which are stored as P, G, S.
template <class P, class G, class S, int count>
inline void find_streams(const Segment& segment, int64_t begin, void* (&at)[count]) {
  for (int s = 0; s < count; s++)
    at[s] = static_cast<char*>(segment.data[s]) + begin * itemsize_of(dtype_of<P, G, S>(s));
}

// Updates elements [begin, end) of a segment, too few to fill the lanes. Out of line: what it needs
// in registers is in nobody's way.
template <class Rule, class T, class P, class G, class S, unsigned setting>
__attribute__((noinline)) void update_rest(const Segment& segment, int64_t begin, int64_t end,
                                           const Update<Rule, T>& with) {
  void* at[2 + Rule::kStates];
  find_streams<P, G, S>(segment, begin, at);
  update_each<Rule, T, P, G, S>(at, end - begin, with.grad_multiplier,
                                in_setting<Rule, setting>(with.scalars),
                                std::make_index_sequence<Rule::kStates>{});
}

// Updates segments where they lie, stored as P, G, S.
//
// Hardware prefetchers follow a stream, but stop at the end of a page and know nothing of the next
// tensor: while the last elements are updated, as many of `next` are asked for.
template <class Rule, class T, class P, class G, class S, unsigned setting>
__attribute__((noinline)) Parts update_in_place(Parts parts, const Update<Rule, T>& with) {
  constexpr int count = 2 + Rule::kStates;
  constexpr std::make_index_sequence<Rule::kStates> states;
  const auto scalars = in_setting<Rule, setting>(with.scalars);
  const T grad_multiplier = with.grad_multiplier;
  const unsigned streams = needed<Rule, Rule>(scalars) | 3;
  int sizes[count];
  for (int s = 0; s < count; s++) sizes[s] = itemsize_of(dtype_of<P, G, S>(s));
  constexpr int step = 64 / itemsize_of(P::dtype);  // no stream that is stored so is narrower
  do {
    const Segment &segment = parts.here(), &next = parts.following();
    int64_t begin = parts.begin();
    const int64_t end = parts.end();
    const int64_t last = end - begin < kTile ? end - begin : kTile;
    const int64_t near = (end - last + kAhead - 1) & -kAhead;
    while (begin < end) {
      int64_t size = near - begin;
      if (size <= 0) {
        prefetch<T, step>(next, begin - near, begin - near + kAhead, streams, sizes,
                          std::make_index_sequence<count>{});
        size = end - begin < kAhead ? end - begin : kAhead;
      }
      void* at[count];
      find_streams<P, G, S>(segment, begin, at);
      if constexpr (Lanes<P>::kCount == 0) {
        update_each<Rule, T, P, G, S>(at, size, grad_multiplier, scalars, states);
      } else {
        const int64_t rest = size & (Lanes<P>::kCount - 1);
        update_lanes<Rule, T, P, G, S>(at, size - rest, grad_multiplier, scalars, states);
        if (rest != 0)
          update_rest<Rule, T, P, G, S, setting>(segment, begin + size - rest, begin + size, with);
      }
      begin += size;
    }
    parts.next();
  } while (parts.any() && with.fits(parts));
  return parts;
}

// Whether a segment is contiguous, has the streams that are needed, and stores them as P, G, S.
template <class P, class G, class S>
inline bool is_stored_as(const Segment& segment, unsigned streams) {
  for (int s = 0; streams >> s != 0; s++)
    if ((streams >> s & 1) != 0 &&
        (segment.data[s] == nullptr || segment.dtype[s] != dtype_of<P, G, S>(s)))
      return false;
  return segment.layout == nullptr;
}

// What training uses is updated where it lies.
template <class Rule, class T>
__attribute__((noinline)) void Update<Rule, T>::find(const Launch& launch, int64_t i) {
  const Segment& segment = launch.segments[i];
  const Numbers<Rule> numbers(launch, i);
  scalars = Rule::template derive<T>(numbers.hyper, numbers.tensor, numbers.kept);
  grad_multiplier = T(launch.grad_multiplier[segment.row]);
  streams = needed<Rule, Rule>(scalars);
  like = &segment;
  loop = update_blocks<Rule, T>;
  const auto try_in_place = [&](auto p, auto g, auto s) {
    using P = decltype(p);
    using G = decltype(g);
    using S = decltype(s);
    if (!is_stored_as<P, G, S>(segment, streams)) return;
    with_setting<Rule>(
        scalars, [&](auto setting) { loop = update_in_place<Rule, T, P, G, S, setting.value>; });
  };
  if constexpr (sizeof(T) == 8) {
    try_in_place(f64{}, f64{}, f64{});
  } else {
    try_in_place(f32{}, f32{}, f32{});
    try_in_place(bf16{}, bf16{}, f32{});
    try_in_place(bf16{}, bf16{}, bf16{});
  }
}

template <class Rule, class T>
inline Parts run_parts(const Parts& parts, Update<Rule, T>* with) {
  if (!with->fits(parts)) with->find(*parts.launch, parts.segment);
  return with->loop(parts, *with);
}

template <class Rule>
void run_rule(const Launch& launch, int64_t tile, int64_t tile_end) {
  Update<Rule, float> in_float;
  Update<Rule, double> in_double;
  for (Parts parts(launch, tile, tile_end); parts.any();)
    parts = parts.here().dtype[0] == DType::f64 ? run_parts(parts, &in_double)
                                                : run_parts(parts, &in_float);
}

void run_tiles_here(const Launch& launch, int64_t tile, int64_t tile_end) {
  int index = 0;
  for_each_rule([&](auto rule) {
    if (index++ == launch.rule) run_rule<decltype(rule)>(launch, tile, tile_end);
  });
}
