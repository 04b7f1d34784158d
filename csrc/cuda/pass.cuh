// The generic pass of the GPU: load, cast, RULE, cast, store, for any rule of the table. A block
// works on consecutive tiles; no thread waits for another.
#pragma once

#include <type_traits>
#include <utility>

#include "../rules.h"
#include "tensor.cuh"

namespace fused_momentum::cuda {

constexpr int larger(int a, int b) {
  return a > b ? a : b;
}

// Rule on values of type T, with the codecs of the parameter, the gradient and the states.
template <class Rule, class T, class P, class G, class S>
struct Pass {
  static constexpr int kStreams = 2 + Rule::kStates;
  static constexpr int kRowWords = Rule::kHyper + 2;
  static constexpr int kVector = larger(larger(P::kVector, G::kVector), S::kVector);
  static constexpr bool kAny = std::is_same_v<P, AnyCodec>;
  using Scalars = typename Rule::template Scalars<T>;
  using Streams = Tensor<kStreams>;
  static constexpr int kTileBytes = kTile * (P::kBytes + G::kBytes + Rule::kStates * S::kBytes);
  // The memory of an H200 needs 48 KB of loads in flight on every processor; some blocks more hide
  // the beginnings and ends of blocks.
  static constexpr int kBlocksPerProcessor =
      larger(sizeof(T) == 8 ? 2 : 6, (48 * 1024 - 1) / kTileBytes + 1);
  static_assert(Rule::kTensor == 1, "the table holds one scalar per tensor: first");

  struct Codecs {
    P p;
    G g;
    S s;
    FM_DEVICE explicit Codecs(const Header& header)
        : p(header.dtype[0]), g(header.dtype[1]), s(header.dtype[2]) {}
  };

  struct Update {
    Scalars scalars;
    T grad_multiplier;
  };

  template <class A>
  FM_DEVICE static Update update_of(const A& args, uint32_t row, double first) {
    const uint32_t at = row * kRowWords;
    double hyper[Rule::kHyper];
#pragma unroll
    for (int k = 0; k < Rule::kHyper; k++) hyper[k] = double_of(row_word(args, at + k));
    const uint64_t lr = row_word(args, at + Rule::kHyper + 1);
    if (lr & 1)
      hyper[0] = read_scalar<double>(lr - 1);
    else if (lr)
      hyper[0] = read_scalar<float>(lr);
    double multiplier = double_of(row_word(args, at + Rule::kHyper));
    if (args.header.grad_scale) multiplier *= double(float(1.0 / double(*args.header.grad_scale)));
    return {Rule::template derive<T>(hyper, &first), T(multiplier)};
  }

  template <size_t... I>
  FM_DEVICE static void apply(T& p, T g, T* states, const Update& update,
                              std::index_sequence<I...>) {
    Rule::update(p, g * update.grad_multiplier, states[I]..., update.scalars);
  }

  FM_DEVICE static int64_t place(int64_t at, int) { return at; }
  FM_DEVICE static int64_t place(const int64_t* at, int s) { return at[s]; }

  // V elements that begin at the same place `at` in every stream, or at a place for each.
  template <int V>
  struct Elements {
    T x[kStreams][V];

    template <class At>
    FM_DEVICE void load(const Codecs& codec, const Streams& tensor, const At& at) {
#pragma unroll
      for (int s = 0; s < kStreams; s++) {
        if (tensor.data[s] == nullptr)
          for (int v = 0; v < V; v++) x[s][v] = 0;
        else if (s == 0)
          codec.p.template load<V>(tensor.data[s], place(at, s), x[s]);
        else if (s == 1)
          codec.g.template load<V>(tensor.data[s], place(at, s), x[s]);
        else
          codec.s.template load<V>(tensor.data[s], place(at, s), x[s]);
      }
    }

    FM_DEVICE void update(const Update& update) {
#pragma unroll
      for (int v = 0; v < V; v++) {
        T states[Rule::kStates + 1];
        for (int s = 0; s < Rule::kStates; s++) states[s] = x[2 + s][v];
        apply(x[0][v], x[1][v], states, update, std::make_index_sequence<Rule::kStates>{});
        for (int s = 0; s < Rule::kStates; s++) x[2 + s][v] = states[s];
      }
    }

    template <class At>
    FM_DEVICE void store(const Codecs& codec, const Streams& tensor, const At& at) const {
      codec.p.template store<V>(tensor.data[0], place(at, 0), x[0]);
#pragma unroll
      for (int s = 2; s < kStreams; s++)
        if (tensor.data[s] != nullptr)
          codec.s.template store<V>(tensor.data[s], place(at, s), x[s]);
    }
  };

  // The first n elements of a tile, V at a time, all of them loaded before any is used. A tile that
  // is not whole takes V = 1.
  template <int V>
  FM_DEVICE static void run_contiguous(const Codecs& codec, const Streams& tensor, int64_t begin,
                                       int n, int thread, const Update& update) {
    constexpr int kGroups = kPerThread / V;
    const int64_t at = begin + int64_t(thread) * V;
    Elements<V> elements[kGroups];
#pragma unroll
    for (int k = 0; k < kGroups; k++)
      if (V > 1 || thread + k * kThreads < n)
        elements[k].load(codec, tensor, at + k * (kThreads * V));
#pragma unroll
    for (int k = 0; k < kGroups; k++)
      if (V > 1 || thread + k * kThreads < n) {
        elements[k].update(update);
        elements[k].store(codec, tensor, at + k * (kThreads * V));
      }
  }

  // One element after the other: strides, and types that are told apart at every access.
  template <class A>
  FM_DEVICE static void run_one_by_one(const A& args, const Codecs& codec, const Streams& tensor,
                                       int64_t begin, int n, int thread, const Update& update) {
#pragma unroll 1
    for (int k = thread; k < n; k += kThreads) {
      int64_t offsets[kStreams];
      if (tensor.dims != 0)
        find_offsets(args, tensor, begin + k, offsets);
      else
        for (int s = 0; s < kStreams; s++) offsets[s] = begin + k;
      Elements<1> element;
      element.load(codec, tensor, offsets);
      element.update(update);
      element.store(codec, tensor, offsets);
    }
  }

  // Everything that one thread of a block does.
  template <class A>
  FM_DEVICE static void run(const A& args, uint32_t block, int thread) {
    const Header& header = args.header;
    if (header.found_inf != nullptr && *header.found_inf != 0.0f) return;
    uint32_t tile = block * header.tiles_per_block;
    const uint32_t rest = header.tiles - tile;
    const uint32_t end =
        rest < header.tiles_per_block ? header.tiles : tile + header.tiles_per_block;
    const Codecs codec(header);
    uint32_t i = tensor_of(args, tile);
    uint32_t start = i == 0 ? 0 : entry_at(args, i - 1).tile_end;
    for (; tile < end; i++) {
      const Entry entry = entry_at(args, i);
      if (entry.tile_end != start) {
        const auto tensor = tensor_at<kStreams>(args, i, entry.strided);
        const bool aligned = tensor.dims == 0 && is_aligned(tensor);
        const bool first = header.first ? header.first[i] != 0 : entry.first;
        const Update update = update_of(args, entry.row, first);
        const uint32_t last = entry.tile_end < end ? entry.tile_end : end;
#pragma unroll 1
        for (; tile < last; tile++) {
          const int64_t begin = int64_t(tile - start) * kTile;
          const int n = tile + 1 == entry.tile_end ? entry.tail : kTile;
          if (aligned && n == kTile)
            run_contiguous<kVector>(codec, tensor, begin, n, thread, update);
          else if (tensor.dims != 0 || kAny)
            run_one_by_one(args, codec, tensor, begin, n, thread, update);
          else if constexpr (!kAny)
            run_contiguous<1>(codec, tensor, begin, n, thread, update);
        }
      }
      start = entry.tile_end;
    }
  }
};

// The last block to finish clears the flags of the tensors that have had their first step, so that
// a step skipped for infinities is none. Runs after all threads of the block have run the pass, and
// all blocks have taken their ticket.
template <class A>
FM_DEVICE void clear_first(const A& args, int thread) {
  const Header& header = args.header;
  if (thread == 0) *header.ticket = 0;  // for the next launch, or replay of a graph
  if (header.found_inf != nullptr && *header.found_inf != 0.0f) return;
  for (uint32_t i = thread; i < header.tensor_count; i += kThreads) {
    const uint32_t start = i == 0 ? 0 : entry_at(args, i - 1).tile_end;
    if (entry_at(args, i).tile_end != start) header.first[i] = 0;
  }
}

}  // namespace fused_momentum::cuda
