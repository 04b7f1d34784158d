// Sums over each tensor in float64, in a fixed order. 1024 values are summed by halving:
// x[i] += x[i + h] for h = 512, 256, ... 1. So is each tile (zero padded); then lane j of 1024 adds
// the sums of a tensor's tiles j, j + 1024, ... in that order to 0, and the lanes are halved.
//
// A block works in steps, with a barrier after each: gather, then halve with h = kThreads / 2,
// ... 1.
#pragma once

#include "tensor.cuh"

namespace fused_momentum::cuda {

// The terms g and g * g.
struct GradTerms {
  static constexpr int kSums = 2, kStream = 1;
  FM_DEVICE static void terms(double g, double* terms) {
    terms[0] = g;
    terms[1] = g * g;
  }
};

template <int kSums>
struct Lanes {
  double x[kSums][kThreads];
};

// Halves 1024 values, of which this thread has thread, thread + kThreads, ..., to one per thread.
FM_DEVICE double halve(double* x) {
#pragma unroll
  for (int h = kPerThread / 2; h > 0; h /= 2)
#pragma unroll
    for (int k = 0; k < h; k++) x[k] += x[k + h];
  return x[0];
}

template <class Terms>
struct Sums {
  static constexpr int kSums = Terms::kSums;
  static constexpr int kStreams = 2;

  FM_DEVICE static void halve_lanes(int h, int thread, Lanes<kSums>& lanes) {
    if (thread >= h) return;
#pragma unroll
    for (int k = 0; k < kSums; k++) lanes.x[k][thread] += lanes.x[k][thread + h];
  }

  struct Span {
    DType dtype;
    const void* data;
    int64_t begin;
    int n;
  };

  // Loads every term of a tile before the first is added.
  template <class C, class F>
  FM_DEVICE static void gather(const Span& span, int thread, Lanes<kSums>& lanes, F&& offset_of) {
    const C codec(span.dtype);
    double x[kSums][kPerThread];
#pragma unroll
    for (int k = 0; k < kPerThread; k++) {
      const int index = thread + k * kThreads;
      double value = 0, terms[kSums];
      if (index < span.n) codec.template load<1>(span.data, offset_of(span.begin + index), &value);
      Terms::terms(value, terms);
#pragma unroll
      for (int t = 0; t < kSums; t++) x[t][k] = index < span.n ? terms[t] : 0;
    }
#pragma unroll
    for (int t = 0; t < kSums; t++) lanes.x[t][thread] = halve(x[t]);
  }

  template <class A>
  FM_DEVICE static void gather_tile(const A& args, uint32_t tile, int thread, Lanes<kSums>& lanes) {
    const uint32_t i = tensor_of(args, tile);
    const uint32_t start = i == 0 ? 0 : entry_at(args, i - 1).tile_end;
    const Entry entry = entry_at(args, i);
    const auto tensor = tensor_at<kStreams>(args, i, entry.strided);
    const int64_t begin = int64_t(tile - start) * kTile;
    const int n = tile + 1 == entry.tile_end ? entry.tail : kTile;
    const Span span{args.header.dtype[Terms::kStream], tensor.data[Terms::kStream], begin, n};
    if (tensor.dims != 0)
      return gather<AnyCodec>(span, thread, lanes, [&](int64_t index) {
        int64_t offsets[kStreams];
        find_offsets(args, tensor, index, offsets);
        return offsets[Terms::kStream];
      });
    const auto in_order = [](int64_t index) { return index; };
    switch (span.dtype) {
      case DType::f32:
        return gather<F32>(span, thread, lanes, in_order);
      case DType::f64:
        return gather<F64>(span, thread, lanes, in_order);
      case DType::bf16:
        return gather<BF16>(span, thread, lanes, in_order);
      case DType::f16:
        return gather<F16>(span, thread, lanes, in_order);
    }
  }

  template <class A>
  FM_DEVICE static void store_tile(const A& args, uint32_t tile, const Lanes<kSums>& lanes) {
    for (int t = 0; t < kSums; t++)
      write(args.header.tile_sums + int64_t(t) * args.header.tiles + tile, lanes.x[t][0]);
  }

  template <class A>
  FM_DEVICE static void gather_tensor(const A& args, uint32_t i, int thread, Lanes<kSums>& lanes) {
    const uint32_t start = i == 0 ? 0 : entry_at(args, i - 1).tile_end;
    const uint32_t end = entry_at(args, i).tile_end;
    for (int t = 0; t < kSums; t++) {
      const double* tile_sums = args.header.tile_sums + int64_t(t) * args.header.tiles;
      double x[kPerThread] = {};
      for (uint32_t tile = start; tile < end; tile += kTile)
#pragma unroll
        for (int k = 0; k < kPerThread; k++) {
          const uint32_t at = tile + thread + k * kThreads;
          if (at < end) x[k] += tile_sums[at];
        }
      lanes.x[t][thread] = halve(x);
    }
  }

  template <class A>
  FM_DEVICE static void store_tensor(const A& args, uint32_t i, const Lanes<kSums>& lanes) {
    const uint32_t start = i == 0 ? 0 : entry_at(args, i - 1).tile_end;
    if (entry_at(args, i).tile_end == start) return;
    for (int t = 0; t < kSums; t++)
      write(args.header.sums + t * args.header.sums_stride + i, lanes.x[t][0]);
  }
};

}  // namespace fused_momentum::cuda
