// What Python sees of the extension: the plan, one call over lists of tensors, and the tables that
// tests compare with their Python twins.
#include <torch/csrc/DynamicTypes.h>
#include <torch/version.h>

#include <map>

#include "cpu/run.h"
#include "plan.h"
#include "rule_info.h"
#include "tiles.h"

namespace fused_momentum {
namespace {

py::tuple torch_dtypes(const Batch& batch) {
  static const std::map<DType, at::ScalarType> types = {{DType::f32, at::kFloat},
                                                        {DType::f64, at::kDouble},
                                                        {DType::bf16, at::kBFloat16},
                                                        {DType::f16, at::kHalf}};
  py::tuple names(batch.dtypes.size());
  for (size_t i = 0; i < batch.dtypes.size(); i++)
    names[i] = py::reinterpret_borrow<py::object>(
        reinterpret_cast<PyObject*>(torch::getTHPDtype(types.at(batch.dtypes[i]))));
  return names;
}

std::vector<std::string> cpu_levels() {
  int count;
  const cpu::Level* table = cpu::levels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; i++)
    if (table[i].supported) names.push_back(table[i].name);
  return names;
}

void use_cpu_level(const std::string& name) {
  int count;
  const cpu::Level* table = cpu::levels(&count);
  for (int i = 0; i < count; i++)
    if (table[i].supported && name == table[i].name) return set_cpu_level(&table[i]);
  TORCH_CHECK_VALUE(false, "cpu level '", name, "' is not one of ", cpu_levels());
}

std::vector<int64_t> split(const std::vector<int64_t>& numels, int parts) {
  std::vector<Segment> segments(numels.size());
  for (size_t i = 0; i < numels.size(); i++) segments[i].numel = numels[i];
  Tiles tiles;
  count_tiles(segments, &tiles);
  std::vector<int64_t> bounds(parts + 1);
  split_tiles(segments.data(), tiles.ends.data(), int64_t(numels.size()), tiles.cost, parts,
              bounds.data());
  return bounds;
}

// The plan that a Python object holds; nullptr where it has none as yet.
Plan* plan_of(PyObject* object) {
  auto held = reinterpret_cast<py::detail::instance*>(object)->get_value_and_holder();
  return held.holder_constructed() ? held.value_ptr<Plan>() : nullptr;
}

// Nothing is cleared: what refers to a plan is a dict, and breaking one link breaks the circle.
void take_part_in_garbage_collection(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const Plan* plan = plan_of(self);
    return plan ? plan->traverse(visit, arg) : 0;
  };
}

}  // namespace
}  // namespace fused_momentum

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fused_momentum;
  m.attr("TORCH_VERSION") = TORCH_VERSION;
  m.attr("TILE") = kTile;
  m.attr("TENSORS_PER_THREAD") = kTensorsPerThread;
  py::class_<RuleInfo>(m, "RuleInfo")
      .def_readonly("name", &RuleInfo::name)
      .def_readonly("hyper", &RuleInfo::hyper)
      .def_readonly("tensor_scalars", &RuleInfo::tensor_scalars)
      .def_readonly("states", &RuleInfo::states)
      .def_readonly("kept", &RuleInfo::kept)
      .def_readonly("sums", &RuleInfo::sums)
      .def_readonly("settles", &RuleInfo::settles)
      .def_property_readonly("kept_itemsize",
                             [](const RuleInfo& info) { return itemsize_of(info.kept_dtype); });
  m.def("rules", &rule_infos);
  m.def("run_tensors", &run_tensors);
  m.def("cpu_levels", &cpu_levels);
  m.def("cpu_level", [] { return std::string(cpu_level()->name); });
  m.def("use_cpu_level", &use_cpu_level);
  m.def("split", &split);
  m.def("cuda_devices", &cuda_devices);
  py::class_<StateKey>(m, "StateKey").def(py::init<std::string, int>());
  py::class_<Batch>(m, "Batch")
      .def_property_readonly("device", [](const Batch& batch) { return py::cast(batch.device); })
      .def_property_readonly("dtypes", &torch_dtypes)
      .def_property_readonly("addresses", &Batch::addresses)
      .def_property_readonly("numels", &Batch::numels)
      .def_property_readonly("rows", &Batch::rows)
      .def_property_readonly("tensor_scalars", &Batch::tensor_scalars)
      .def_property_readonly("kept", &Batch::kept)
      .def_property_readonly("layouts", &Batch::layouts);
  py::class_<Plan> plan(m, "Plan", py::custom_type_setup(take_part_in_garbage_collection));
  py::class_<Plan::Todo>(plan, "Todo")
      .def_readonly("missing", &Plan::Todo::missing)
      .def_readonly("devices", &Plan::Todo::devices);
  plan.def(py::init<int, std::vector<std::string>, std::vector<std::vector<std::string>>,
                    std::vector<StateKey>, std::string>())
      .def("read", &Plan::read)
      .def("abandon", &Plan::abandon)
      .def("read_rows_with", &Plan::read_rows_with)
      .def("read_parts_with", &Plan::read_parts_with)
      .def("measures", &Plan::measures)
      .def("unsettled", &Plan::unsettled)
      .def("unsettled_shards", &Plan::unsettled_shards)
      .def("settle", &Plan::settle)
      .def("kept", &Plan::kept)
      .def("measure", &Plan::measure)
      .def("run", &Plan::run)
      .def("step", &Plan::step)
      .def("measure_cuda", &Plan::measure_cuda)
      .def("run_cuda", &Plan::run_cuda)
      .def_property_readonly("launches", &Plan::launches)
      .def("batches", &Plan::batches)
      .def("finish", py::overload_cast<>(&Plan::finish))
      .def("hyper", &Plan::hyper)
      .def("device_lr", &Plan::device_lr)
      .def("keep_lr_on_device", &Plan::keep_lr_on_device)
      .def("leave", &Plan::leave)
      .def("at", &Plan::at)
      .def_property_readonly("generation", &Plan::generation)
      .def_property_readonly("moves", &Plan::moves)
      .def("bytes", &Plan::bytes);
}
