// The generic update of the GPU: load, cast, RULE, cast, store, for any rule of the table. A block
// works on consecutive tiles; no thread waits for another.
#pragma once

#include "elements.cuh"

namespace fused_momentum::cuda {

// How many of a rule's states are in a set.
constexpr int states_in(unsigned set, int states) {
  int count = 0;
  for (int s = 0; s < states; s++) count += int(set >> s & 1);
  return count;
}

template <class Types>
struct Pass {
  using Rule = typename Types::Rule;
  using Streams = Tensor<Types::kStreams>;
  static constexpr unsigned kWrites = 1 | Rule::kWrites << 2;
  static constexpr int kWritten = states_in(Rule::kWrites, Rule::kStates);
  // The memory of an H200 needs 48 KB of loads in flight on every processor; some blocks more hide
  // the beginnings and ends of blocks. States that are not written are seldom read.
  static constexpr int kBlocksPerProcessor =
      larger(blocks_per_processor<typename Types::T>(2 + kWritten, 40),
             (48 * 1024 - 1) / (kTile * Types::bytes(kWritten)) + 1);

  // Elements of a tile, V at a time, all of them loaded before any is used.
  template <int V, class At>
  FM_DEVICE static void run_contiguous(const Header& header, const Streams& tensor,
                                       const Factors<Types>& factors, unsigned reads,
                                       const At& at) {
    Elements<Types, V, kPerThread / V> elements;
    elements.load(header, tensor, reads, at);
    elements.update(factors);
    elements.store(header, tensor, kWrites, at);
  }

  // One element after the other: strides, and types that are told apart at every access.
  template <class A>
  FM_DEVICE static void run_one_by_one(const A& args, const Streams& tensor,
                                       const Factors<Types>& factors, unsigned reads, int64_t begin,
                                       int n, int thread) {
#pragma unroll 1
    for (int k = thread; k < n; k += kThreads) {
      const auto at = places_of(args, tensor, begin + k);
      Elements<Types, 1, 1> element;
      element.load(args.header, tensor, reads, at);
      element.update(factors);
      element.store(args.header, tensor, kWrites, at);
    }
  }

  // Everything that one thread of a block does.
  template <class A>
  FM_DEVICE static void run(const A& args, uint32_t block, int thread) {
    const Header& header = args.header;
    if (is_skipped(header)) return;
    const Tiles tiles = tiles_of_block(header, block);
    uint32_t tile = tiles.begin;
    for (Place place = place_of(args, tile);; place = place_after(args, place)) {
      const auto tensor = tensor_at<Types::kStreams>(args, place);
      const bool aligned = tensor.dims == 0 && is_aligned(tensor);
      const auto factors = Factors<Types>::of(numbers_of<Rule>(args, place, true));
      const unsigned reads = Rule::reads(factors.scalars);
      const uint32_t last = place.entry.tile_end < tiles.end ? place.entry.tile_end : tiles.end;
#pragma unroll 1
      for (; tile < last; tile++) {
        constexpr int V = Types::kVector;
        const int64_t begin = place.begin(tile);
        const int n = place.elements(tile);
        if (aligned && n == kTile)
          run_contiguous<V>(header, tensor, factors, reads,
                            Whole<kThreads * V>{begin + int64_t(thread) * V});
        else if (tensor.dims != 0 || Types::kAny)
          run_one_by_one(args, tensor, factors, reads, begin, n, thread);
        else if constexpr (!Types::kAny)
          run_contiguous<1>(header, tensor, factors, reads,
                            Rest<kThreads>{begin + thread, n - thread});
      }
      if (tile == tiles.end) return;
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
  if (is_skipped(header)) return;
  for (uint32_t i = thread; i < header.tensor_count; i += kThreads)
    if (!place_at(args, i).is_empty()) header.first[i] = 0;
}

}  // namespace fused_momentum::cuda
