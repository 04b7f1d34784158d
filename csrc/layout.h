// Turns the shapes and strides of a tensor's streams into the order in which its elements are
// visited. Plain C++; tested through the plan.
#pragma once

#include <algorithm>
#include <vector>

#include "launch.h"

namespace fused_momentum {

struct Strided {
  const int64_t* sizes;
  const int64_t* strides;
};

enum class LayoutKind { contiguous, strided, too_many_dims };

// Visits the elements in the order of the first stream's memory (the parameter's), merging
// dimensions that are one run in every stream. `complex`: each element is two numbers side by side.
inline LayoutKind make_layout(int dims, const std::vector<Strided>& streams, bool complex,
                              Layout* layout) {
  struct Dim {
    int64_t size;
    std::vector<int64_t> strides;
  };
  std::vector<Dim> all;
  for (int d = 0; d < dims; d++) {
    if (streams[0].sizes[d] == 1) continue;
    Dim dim{streams[0].sizes[d], {}};
    for (const Strided& stream : streams)
      dim.strides.push_back(stream.strides[d] * (complex ? 2 : 1));
    all.push_back(dim);
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const Dim& a, const Dim& b) { return a.strides[0] > b.strides[0]; });
  if (complex) all.push_back({2, std::vector<int64_t>(streams.size(), 1)});
  std::vector<Dim> merged;
  for (const Dim& dim : all) {
    bool one_run = !merged.empty();
    for (size_t s = 0; one_run && s < streams.size(); s++)
      one_run = merged.back().strides[s] == dim.strides[s] * dim.size;
    if (one_run)
      merged.back() = {merged.back().size * dim.size, dim.strides};
    else
      merged.push_back(dim);
  }
  const bool contiguous =
      merged.empty() ||
      (merged.size() == 1 && std::all_of(merged[0].strides.begin(), merged[0].strides.end(),
                                         [](int64_t stride) { return stride == 1; }));
  if (contiguous) return LayoutKind::contiguous;
  if (merged.size() > kMaxDims) return LayoutKind::too_many_dims;
  layout->dims = int(merged.size());
  for (int d = 0; d < layout->dims; d++) {
    layout->sizes[d] = merged[d].size;
    for (size_t s = 0; s < streams.size(); s++) layout->strides[s][d] = merged[d].strides[s];
  }
  return LayoutKind::strided;
}

}  // namespace fused_momentum
