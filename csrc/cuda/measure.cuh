// The pass before an update, in two kernels: blocks of some tiles (terms, the states that the pass
// writes, the sums of each tile), then a block for each tensor (the sum of its tiles, and what
// follows from it). A tensor with nothing to measure is left out of both; its scalars are those it
// came with. What is done between two barriers is a function: the tests run it without a GPU.
#pragma once

#include "elements.cuh"
#include "sums.cuh"

namespace fused_momentum::cuda {

// What one thread of a block does and remembers.
template <class Types>
class TilePass {
  using Rule = typename Types::Rule;
  using Measure = typename Rule::Measure;
  using T = typename Types::T;
  static constexpr unsigned kWrites = Measure::kWrites << 2;

 public:
  static constexpr int kSums = Measure::kSums;
  // All loads of a tile are in flight at once: few blocks are enough.
  static constexpr int kBlocksPerProcessor = blocks_per_processor<T>(Types::kStreams, 72);

  template <class A>
  FM_DEVICE TilePass(const A& args, uint32_t tile, int thread)
      : thread_(thread), place_(place_of(args, tile)) {}

  // Puts this thread's part of the sums of a tile into its lane; false where the tile is left out.
  // Tiles are taken one after the other.
  template <class A>
  FM_DEVICE bool gather(const A& args, uint32_t tile, Lanes<kSums>& lanes) {
    if (tile >= met_until_) {
      if (tile == place_.entry.tile_end) place_ = place_after(args, place_);
      meet(args);
      met_until_ = place_.entry.tile_end;
    }
    if (settled_) return false;
    const int64_t begin = place_.begin(tile);
    const int n = place_.elements(tile);
    Halving<kSums> halving;
    if (tensor_.dims != 0 || Types::kAny)
      run_one_by_one(args, begin, n, halving);
    else if constexpr (!Types::kAny)
      run_contiguous(args.header, Rest<kThreads>{begin + thread_, n - thread_}, halving);
#pragma unroll
    for (int t = 0; t < kSums; t++) lanes.x[t][thread_] = halving.sum[t];
    return true;
  }

  template <class A>
  FM_DEVICE static void store(const A& args, uint32_t tile, const Lanes<kSums>& lanes) {
#pragma unroll
    for (int t = 0; t < kSums; t++)
      write(args.header.tile_sums + int64_t(t) * args.header.tiles + tile, lanes.x[t][0]);
  }

 private:
  template <class A>
  FM_DEVICE void meet(const A& args) {
    const auto numbers = numbers_of<Rule>(args, place_, false);
    settled_ = Measure::settled(numbers.hyper, numbers.kept);
    if (settled_) return;
    tensor_ = tensor_at<Types::kStreams>(args, place_);
    factors_ = Factors<Types>::of(numbers);
    reads_ = Measure::reads(factors_.scalars);
  }

  FM_DEVICE void run_contiguous(const Header& header, const Rest<kThreads>& at,
                                Halving<kSums>& halving) const {
    Elements<Types, 1, kPerThread> elements;
    elements.load(header, tensor_, reads_, at);
#pragma unroll
    for (int j = 0; j < kPerThread; j++) {
      const int k = reversed(j);
      double terms[kSums] = {};
      if (at.has(k)) elements.terms(k, factors_, terms);
      halving.add(j, terms);
    }
    elements.store(header, tensor_, kWrites, at);
  }

  template <class A>
  FM_DEVICE void run_one_by_one(const A& args, int64_t begin, int n,
                                Halving<kSums>& halving) const {
#pragma unroll 1
    for (int j = 0; j < kPerThread; j++) {
      const int index = thread_ + kThreads * reversed(j);
      double terms[kSums] = {};
      if (index < n) {
        const auto at = places_of(args, tensor_, begin + index);
        Elements<Types, 1, 1> element;
        element.load(args.header, tensor_, reads_, at);
        element.terms(0, factors_, terms);
        element.store(args.header, tensor_, kWrites, at);
      }
      halving.add(j, terms);
    }
  }

  const int thread_;
  Place place_;             // of the tensor that the block is at,
  uint32_t met_until_ = 0;  // what is known of the tensor holds for the tiles below this one
  bool settled_;
  Tensor<Types::kStreams> tensor_;
  Factors<Types> factors_;
  unsigned reads_;
};

template <class Rule>
struct TensorPass {
  using Measure = typename Rule::Measure;
  static constexpr int kSums = Measure::kSums;

  // Puts this thread's part of the sums of tensor i into its lane; false where it is left out.
  template <class A>
  FM_DEVICE static bool gather(const A& args, uint32_t i, int thread, Lanes<kSums>& lanes) {
    const Place place = place_at(args, i);
    if (place.is_empty() || is_skipped(args.header)) return false;
    const auto numbers = numbers_of<Rule>(args, place, false);
    if (Measure::settled(numbers.hyper, numbers.kept)) return false;
#pragma unroll
    for (int t = 0; t < kSums; t++) {
      const double* sums = args.header.tile_sums + int64_t(t) * args.header.tiles + place.start;
      lanes.x[t][thread] = sum_of(sums, place.entry.tile_end - place.start, thread);
    }
    return true;
  }

  // What one thread does with the sums.
  template <class A>
  FM_DEVICE static void settle(const A& args, uint32_t i, bool measured,
                               const Lanes<kSums>& lanes) {
    const Place place = place_at(args, i);
    if (place.is_empty()) return;
    auto numbers = numbers_of<Rule>(args, place, false);
    if (measured) {
      double sums[kSums];
      for (int t = 0; t < kSums; t++) sums[t] = lanes.x[t][0];
      Measure::settle(numbers.hyper, double(place.numel()), args.header.updates ? 1.0 : 0.0, sums,
                      numbers.tensor, numbers.kept);
      for (int k = 0; k < Rule::kKept; k++)
        if (auto* kept = kept_of<Rule>(args, i, k))
          write(kept, typename Rule::Kept(numbers.kept[k]));
    }
    for (int k = 0; k < Rule::kTensor; k++)
      write(args.header.tensor_scalars + int64_t(i) * Rule::kTensor + k, numbers.tensor[k]);
  }

 private:
  FM_DEVICE static double sum_of(const double* sums, uint32_t n, int thread) {
    double x[kPerThread] = {};
    uint32_t at = thread;
    // Several rounds of loads in flight: one block adds up all tiles of a huge tensor.
#pragma unroll 4
    for (; at - thread + kTile <= n; at += kTile)
#pragma unroll
      for (int k = 0; k < kPerThread; k++) x[k] += read(sums + at + k * kThreads);
#pragma unroll
    for (int k = 0; k < kPerThread; k++)
      if (at + k * kThreads < n) x[k] += read(sums + at + k * kThreads);
    Halving<1> halving;
#pragma unroll
    for (int j = 0; j < kPerThread; j++) halving.add(j, &x[reversed(j)]);
    return halving.sum[0];
  }
};

}  // namespace fused_momentum::cuda
