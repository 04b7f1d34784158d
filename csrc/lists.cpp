// One launch over lists of tensors, without a plan.
#include "cpu/run.h"
#include "plan.h"
#include "tiles.h"

namespace fused_momentum {

void run_tensors(int rule, const std::vector<std::vector<at::Tensor>>& streams,
                 const std::vector<double>& hyper, double grad_multiplier,
                 const std::vector<double>& first,
                 const std::optional<py::function>& current_stream) {
  const size_t count = streams.at(0).size();
  std::vector<Segment> segments(count);
  std::vector<std::unique_ptr<Layout>> layouts(count);
  std::vector<at::Tensor> grads(count);  // no longer lazy
  Tiles tiles;
  for (size_t i = 0; i < count; i++) {
    std::vector<at::Tensor> tensors;
    for (const auto& stream : streams)
      tensors.push_back(stream.empty() ? at::Tensor() : stream.at(i));
    tensors[1] = grads[i] = resolved(tensors[1]);
    describe("params[" + std::to_string(i) + "]", tensors, &segments[i], &layouts[i]);
    segments[i].first = first.at(i) != 0;
  }
  count_tiles(segments, &tiles);
  if (count == 0) return;
  Launch launch;
  launch.rule = rule;
  launch.segments = segments.data();
  launch.tile_ends = tiles.ends.data();
  launch.segment_count = int64_t(count);
  launch.cost = tiles.cost;
  launch.hyper = hyper.data();
  launch.hyper_stride = int(hyper.size());
  launch.grad_multiplier = &grad_multiplier;
  if (current_stream) return run_cuda(launch, streams[0][0].device().index(), *current_stream);
  py::gil_scoped_release without_gil;
  run_cpu(launch);
}

}  // namespace fused_momentum
