// What one launch works on, in plain C++ that the host and the device compile: pointers, sizes and
// tables; no torch, no Python.
#pragma once

#include <cstdint>

namespace fused_momentum {

enum class DType : uint8_t { f32, f64, bf16, f16 };

constexpr int itemsize_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

constexpr int kMaxStates = 5;
constexpr int kMaxStreams = 2 + kMaxStates;  // p, g, states
constexpr int kMaxKept = 3;

// Elements in a tile: the unit in which work is dealt out, and in which per-tensor sums are taken.
constexpr int kTile = 1024;

// How the elements of a tensor lie in memory, where they do not lie one after the other. Dimensions
// are outermost first, in the order in which the elements are visited; strides are in elements.
constexpr int kMaxDims = 8;
struct Layout {
  int dims = 0;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxStreams][kMaxDims];
};

// One tensor of a launch: its streams p, g, states, and the numbers kept for it. A stream without
// data is absent (a rule with momentum 0 keeps no buffer): it reads as zero and is not written; an
// absent number reads as what it begins with.
struct Segment {
  void* data[kMaxStreams] = {};
  void* kept[kMaxKept] = {};  // of the rule's type Kept
  int64_t numel = 0;
  const Layout* layout = nullptr;  // nullptr: every stream is contiguous
  int32_t row = 0;                 // which row of the hyper-parameter table
  DType dtype[kMaxStreams] = {};
  bool first = false;  // it takes its first step
};

struct Launch {
  int rule = 0;  // index in the rule table
  const Segment* segments = nullptr;
  const int64_t* tile_ends = nullptr;  // per segment: number of tiles up to and including it
  int64_t segment_count = 0;
  int64_t cost = 0;               // see tiles.h; only the CPU's threads share the work by it
  const double* hyper = nullptr;  // rows x the rule's kHyper
  int hyper_stride = 0;
  const double* grad_multiplier = nullptr;  // per row: -1 where maximize, times 1 / loss scale
  // The rule's kTensor scalars of segment i begin at i * kTensor, on the CPU: what a measuring pass
  // has found. nullptr: `first` of the segment, then zeros.
  const double* tensor_scalars = nullptr;
  // Of two launches with the same number, from one plan, the segments are the same; 0: no number.
  uint64_t generation = 0;
};

}  // namespace fused_momentum
