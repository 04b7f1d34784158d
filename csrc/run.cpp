// What a step does with what the plan has read: measure, update, count.
#include <torch/csrc/autograd/python_variable.h>

#include "cpu/run.h"
#include "peek.h"
#include "plan.h"
#include "tiles.h"

namespace fused_momentum {

bool Plan::measures() const {
  if (info_.settles) return !unsettled().empty();
  bool any = false;
  int index = 0;
  for_each_rule([&](auto rule) {
    using Rule = decltype(rule);
    if constexpr (!std::is_void_v<typename Rule::Measure>) {
      if (index == rule_)
        for (size_t at = 0; at < hyper_.size(); at += hyper_keys_.size())
          any |= !Rule::Measure::settled(hyper_.data() + at, nullptr);
    }
    index++;
  });
  return any;
}

std::vector<int64_t> Plan::unsettled() const {
  std::vector<int64_t> positions;
  for_each_chosen([&](int64_t position) {
    if (segments_[position].numel != 0 && !entries_[position].settled)
      positions.push_back(position);
  });
  return positions;
}

void Plan::settle(int64_t position, const py::list& kept) {
  if (size_t(position) >= entries_.size()) return;
  const py::object* known = &kept_[position * info_.kept];
  bool same = true;
  for (int k = 0; k < info_.kept; k++)
    same &= (known[k] ? known[k].ptr() : Py_None) == PyList_GET_ITEM(kept.ptr(), k);
  entries_[position].settled |= same;
}

std::pair<py::list, std::vector<double>> Plan::kept(int64_t position) const {
  py::list tensors;
  for (int k = 0; k < info_.kept; k++) {
    const py::object& found = kept_.at(position * info_.kept + k);
    tensors.append(found ? found : py::none());
  }
  const double* hyper = hyper_.data() + segments_[position].row * hyper_keys_.size();
  return {tensors, std::vector<double>(hyper, hyper + hyper_keys_.size())};
}

// Up to this cost (tiles.h), some milliseconds, a step keeps the GIL: nobody drops what it works
// on.
constexpr int64_t kCostWithGil = 1 << 22;

// The memory of this step, which others may drop. Called before they can.
std::vector<c10::Storage> Plan::memory() const {
  std::vector<c10::Storage> memory;
  for_each_chosen([&](int64_t position) {
    if (segments_[position].numel == 0) return;
    const at::Tensor& param = THPVariable_Unpack(entries_[position].param.ptr());
    // made_ has the parts of a sharded one; what Python has of it may have changed by now.
    if (param.unsafeGetTensorImpl()->is_python_dispatch()) return;
    memory.push_back(param.storage());
    if (const at::Tensor* grad = grad_of(param)) memory.push_back(grad->storage());
    for (int k = 0; k < info_.states; k++)
      if (auto storage = states_[position * info_.states + k].storage.lock())
        memory.emplace_back(std::move(storage));
  });
  return memory;
}

void Plan::let_go() {
  alive_.clear();
  made_.clear();
  sharded_.clear();
}

void Plan::abandon() {
  let_go();
  if (!begins_) return;
  for (Segment& segment : segments_) segment.first = false;
  begins_ = false;
  generation_++;
}

// Calls f with this step as a launch.
template <class F>
void Plan::with_launch(F&& f) {
  std::vector<Segment> segments;
  Tiles tiles;
  if (all_) {
    if (tiles_changed_) count_tiles(segments_, &tiles_);
    tiles_changed_ = false;
  } else {
    for (int64_t position : chosen_) segments.push_back(segments_[position]);
    count_tiles(segments, &tiles);
  }
  const Launch launch =
      all_ ? describe_launch(segments_, tiles_) : describe_launch(segments, tiles);
  if (launch.segment_count == 0) return;
  if (launch.cost <= kCostWithGil) return f(launch);
  if (alive_.empty()) alive_ = memory();
  py::gil_scoped_release without_gil;
  f(launch);
}

bool Plan::step(const py::list& groups, const py::dict& state,
                const std::optional<py::list>& subset, double grad_multiplier) {
  if (look(groups, state, subset, grad_multiplier, {})) return false;
  if (!sharded_.empty()) alive_ = memory();  // Python has looked at them, so others may have run
  if (info_.sums > 0) {
    if (info_.settles && !(unsettled().empty() && unsettled_shards().empty())) return false;
    const bool measures_all = !info_.settles && measures();
    if (measures_all && !sharded_.empty()) return false;
    if (measures_all) measure(/*updates=*/true);
  }
  run();
  return true;
}

void Plan::make_scratch(const Launch& launch) {
  tile_sums_.resize(launch.tile_ends[launch.segment_count - 1] * info_.sums);
  tensor_scalars_.resize(launch.segment_count * info_.tensor_scalars);
}

void Plan::measure(bool updates) {
  // Where every step measures, nobody asks for the numbers between the two passes.
  measures_in_run_ = updates && !info_.settles;
  if (measures_in_run_) return;
  with_launch([&](const Launch& launch) {
    make_scratch(launch);
    measure_cpu(launch, updates, tile_sums_.data(), tensor_scalars_.data());
  });
}

void Plan::run() {
  with_launch([&](const Launch& launch) {
    if (!measures_in_run_) return run_cpu(launch);
    make_scratch(launch);
    measure_and_run_cpu(launch, tile_sums_.data(), tensor_scalars_.data());
  });
  finish();
  if (!info_.settles) return;
  std::vector<double>().swap(tensor_scalars_);  // few steps measure
  std::vector<double>().swap(tile_sums_);
}

void Plan::finish() {
  Entry* entries = entries_.data();
  const py::object* steps = steps_.empty() ? nullptr : steps_.data();
  for_each_chosen_in_threads([entries, steps](int64_t position) {
    Entry& entry = entries[position];
    if (entry.key == 0) return;
    if (entry.version.enabled()) entry.version.bump();  // inference tensors have none
    if (steps) *THPVariable_Unpack(steps[position].ptr()).mutable_data_ptr<float>() += 1;
  });
  for (const auto& [position, part] : sharded_)
    if (!part.is_inference()) part.unsafeGetTensorImpl()->bump_version();
  let_go();
}

std::vector<Batch> Plan::batches() const {
  std::vector<Batch> batches;
  for_each_chosen([&](int64_t position) {
    const Segment& segment = segments_[position];
    if (segment.numel == 0) return;
    const at::Device device = THPVariable_Unpack(entries_[position].param.ptr()).device();
    const std::vector<DType> dtypes(segment.dtype, segment.dtype + 2 + info_.states);
    auto batch = std::find_if(batches.begin(), batches.end(), [&](const Batch& b) {
      return b.device == device && b.dtypes == dtypes;
    });
    if (batch == batches.end()) batch = batches.insert(batch, Batch{device, dtypes, rule_, {}});
    batch->segments.push_back(segment);
  });
  return batches;
}

Launch Plan::describe_launch(const std::vector<Segment>& segments, const Tiles& tiles) const {
  Launch launch;
  launch.rule = rule_;
  launch.segments = segments.data();
  launch.tile_ends = tiles.ends.data();
  launch.segment_count = int64_t(segments.size());
  launch.cost = tiles.cost;
  launch.hyper = hyper_.data();
  launch.hyper_stride = int(hyper_keys_.size());
  launch.grad_multiplier = grad_multiplier_.data();
  if (!tensor_scalars_.empty()) launch.tensor_scalars = tensor_scalars_.data();
  launch.generation = generation_;
  return launch;
}

}  // namespace fused_momentum
