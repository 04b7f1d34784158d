// The tables of a batch, as CPU tensors.
#include "plan.h"

namespace fused_momentum {
namespace {

// A tensor of int64 filled by f(index of the segment).
template <class F>
at::Tensor per_segment(const std::vector<Segment>& segments, F&& f) {
  at::Tensor table = at::empty({int64_t(segments.size())}, at::kLong);
  for (size_t i = 0; i < segments.size(); i++)
    table.mutable_data_ptr<int64_t>()[i] = f(segments[i]);
  return table;
}

}  // namespace

at::Tensor Batch::addresses() const {
  std::vector<at::Tensor> streams;
  for (size_t s = 0; s < dtypes.size(); s++)
    streams.push_back(per_segment(segments, [&](const Segment& segment) {
      return int64_t(reinterpret_cast<intptr_t>(segment.data[s]));
    }));
  return at::stack(streams);
}

at::Tensor Batch::numels() const {
  return per_segment(segments, [](const Segment& segment) { return segment.numel; });
}

at::Tensor Batch::rows() const {
  return per_segment(segments, [](const Segment& segment) { return int64_t(segment.row); });
}

at::Tensor Batch::tensor_scalars() const {
  at::Tensor table =
      at::zeros({rule_infos()[rule].tensor_scalars, int64_t(segments.size())}, at::kDouble);
  for (size_t i = 0; i < segments.size(); i++)
    table.mutable_data_ptr<double>()[i] = segments[i].first;
  return table;
}

at::Tensor Batch::kept() const {
  const int64_t count = int64_t(segments.size()), numbers = rule_infos()[rule].kept;
  at::Tensor table = at::empty({numbers, count}, at::kLong);
  for (int64_t k = 0; k < numbers; k++)
    for (int64_t i = 0; i < count; i++)
      table.mutable_data_ptr<int64_t>()[k * count + i] =
          int64_t(reinterpret_cast<intptr_t>(segments[i].kept[k]));
  return table;
}

std::optional<at::Tensor> Batch::layouts() const {
  int dims = 0;
  for (const Segment& segment : segments)
    if (segment.layout) dims = std::max(dims, segment.layout->dims);
  if (dims == 0) return std::nullopt;
  const int64_t streams = int64_t(dtypes.size());
  at::Tensor table = at::zeros({int64_t(segments.size()), 1 + streams, dims}, at::kLong);
  int64_t* out = table.mutable_data_ptr<int64_t>();
  for (const Segment& segment : segments) {
    if (const Layout* layout = segment.layout) {
      const int pad = dims - layout->dims;  // dimensions of size 1 on the outside
      for (int d = 0; d < dims; d++) out[d] = d < pad ? 1 : layout->sizes[d - pad];
      for (int64_t s = 0; s < streams; s++)
        for (int d = pad; d < dims; d++) out[(1 + s) * dims + d] = layout->strides[s][d - pad];
    }
    out += (1 + streams) * dims;
  }
  return table;
}

}  // namespace fused_momentum
