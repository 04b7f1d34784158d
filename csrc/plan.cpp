#include "plan.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

#include "cpu/run.h"
#include "tiles.h"

namespace fused_momentum {
namespace {

// Changes whenever a tensor's dtype, kind of device, shape or strides do; never 0.
inline uint64_t key_of(const at::Tensor& tensor) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  // The dispatch keys tell device, layout, subclass and lazy conjugation apart.
  uint64_t key = (impl->key_set().raw_repr() << 8 ^ uint64_t(impl->dtype().toScalarType())) << 1;
  const auto sizes = impl->sizes(), strides = impl->strides();
  for (size_t d = 0; d < sizes.size(); d++) {
    key = (key ^ uint64_t(sizes[d])) * 0x9e3779b97f4a7c15u;
    key = (key ^ (key >> 31) ^ uint64_t(strides[d])) * 0xd6e8feb86659fd93u;
  }
  return key | 1;
}

// param.grad without its virtual calls, and without its warning for tensors that are no leaves.
inline const at::Tensor& grad_of(const at::Tensor& param) {
  static const at::Tensor none;
  const auto* meta =
      static_cast<torch::autograd::AutogradMeta*>(param.unsafeGetTensorImpl()->autograd_meta());
  return meta ? meta->grad_ : none;
}

// Where the elements of a strided tensor begin: data_ptr() without its virtual calls.
inline char* address_of(const c10::TensorImpl* impl, int itemsize, bool written) {
  c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  void* data = written ? storage->mutable_data() : const_cast<void*>(storage->data());
  return static_cast<char*>(data) + impl->storage_offset() * itemsize;
}

double number_of(PyObject* value, PyObject* key) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  if (THPVariable_Check(value)) return THPVariable_Unpack(value).item().toDouble();
  const double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    TORCH_CHECK_TYPE(false, "param_groups: ", py::cast<std::string>(py::handle(key)), " is a ",
                     Py_TYPE(value)->tp_name, "; needed: a number or a tensor with one element");
  }
  return number;
}

double read_number(PyObject* dict, const py::object& key) {
  PyObject* value = PyDict_GetItemWithError(dict, key.ptr());
  TORCH_CHECK(value != nullptr, "param_groups: key '", py::cast<std::string>(key), "' is missing");
  return number_of(value, key.ptr());
}

// Keys are interned, as those in the dicts are: a look-up then compares addresses, not letters.
py::object interned(const std::string& name) {
  return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name.c_str()));
}

}  // namespace

Plan::Plan(int rule, const std::vector<std::string>& hyper_keys, std::vector<StateKey> state_keys,
           const std::string& device_type)
    : rule_(rule),
      device_type_(at::Device(device_type).type()),
      state_keys_(std::move(state_keys)),
      params_key_(interned("params")),
      maximize_key_(interned("maximize")),
      capturable_key_(interned("capturable")) {
  for (const std::string& key : hyper_keys) hyper_keys_.push_back(interned(key));
  for (const StateKey& key : state_keys_) state_names_.push_back(interned(key.name));
}

bool Plan::groups_changed(const py::list& groups) const {
  if (size_t(PyList_GET_SIZE(groups.ptr())) != groups_.size()) return true;
  for (size_t i = 0; i < groups_.size(); i++) {
    const Group& group = groups_[i];
    if (PyList_GET_ITEM(groups.ptr(), i) != group.dict.ptr()) return true;
    PyObject* params = PyDict_GetItemWithError(group.dict.ptr(), params_key_.ptr());
    if (params == nullptr || !PyList_Check(params) ||
        PyList_GET_SIZE(params) != group.end - group.begin)
      return true;
    for (int64_t k = 0; k < group.end - group.begin; k++)
      if (PyList_GET_ITEM(params, k) != entries_[group.begin + k].param.ptr()) return true;
  }
  return false;
}

void Plan::read_groups(const py::list& groups) {
  groups_.clear();
  entries_.clear();
  position_of_.clear();
  segments_.clear();
  state_items_.clear();
  for (const py::handle& item : groups) {
    Group group{py::reinterpret_borrow<py::object>(item), int64_t(entries_.size()), 0};
    for (const py::handle& param : py::list(group.dict[params_key_])) {
      TORCH_CHECK_TYPE(THPVariable_Check(param.ptr()), "param_groups[", groups_.size(),
                       "]['params'][", int64_t(entries_.size()) - group.begin, "] is a ",
                       Py_TYPE(param.ptr())->tp_name, "; needed: a tensor");
      position_of_.emplace_back(param.ptr(), int64_t(entries_.size()));
      Entry entry;
      entry.param = py::reinterpret_borrow<py::object>(param);
      entries_.push_back(std::move(entry));
      Segment segment;
      segment.row = int32_t(groups_.size());
      segments_.push_back(segment);
    }
    group.end = int64_t(entries_.size());
    groups_.push_back(std::move(group));
  }
  std::sort(position_of_.begin(), position_of_.end());
  entries_.shrink_to_fit();
  segments_.shrink_to_fit();
  position_of_.shrink_to_fit();
  states_.assign(entries_.size() * state_keys_.size(), py::object());
  layouts_.clear();
  layouts_.resize(entries_.size());
  tiles_changed_ = true;
}

void Plan::read_hyper(double grad_multiplier) {
  hyper_.clear();
  grad_multiplier_.clear();
  lr_.assign(groups_.size(), nullptr);
  lr_dtype_.assign(groups_.size(), DType::f32);
  for (size_t row = 0; row < groups_.size(); row++) {
    PyObject* dict = groups_[row].dict.ptr();
    for (size_t k = 0; k < hyper_keys_.size(); k++) {
      const bool on_device = k == 0 && read_device_lr(dict, row);
      hyper_.push_back(on_device ? 0.0 : read_number(dict, hyper_keys_[k]));
    }
    const bool maximize = read_number(dict, maximize_key_) != 0;
    grad_multiplier_.push_back(maximize ? -grad_multiplier : grad_multiplier);
  }
}

// A learning rate that is a tensor on the device stays there in a capturable group: reading it here
// would wait for the device, and freeze its value in a captured graph.
bool Plan::read_device_lr(PyObject* dict, size_t row) {
  if (!keeps_lr_) return false;
  PyObject* value = PyDict_GetItemWithError(dict, hyper_keys_[0].ptr());
  if (value == nullptr || !THPVariable_Check(value)) return false;
  const at::Tensor& lr = THPVariable_Unpack(value);
  const bool number = lr.scalar_type() == at::kFloat || lr.scalar_type() == at::kDouble;
  if (!lr.is_cuda() || !number || read_number(dict, capturable_key_) == 0) return false;
  lr_[row] = lr.const_data_ptr();
  lr_dtype_[row] = lr.scalar_type() == at::kDouble ? DType::f64 : DType::f32;
  return true;
}

void Plan::read_state(const py::dict& state) {
  // The dict keeps its order, so one pass over its items tells whether any state[param] is another.
  bool changed = size_t(PyDict_Size(state.ptr())) != state_items_.size();
  PyObject *key, *value;
  Py_ssize_t at = 0;
  for (size_t i = 0; !changed && PyDict_Next(state.ptr(), &at, &key, &value); i++)
    changed = state_items_[i].first != key || state_items_[i].second != value;
  if (!changed) return;
  state_items_.clear();
  for (Entry& entry : entries_) entry.state = nullptr;
  for (at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
    state_items_.emplace_back(key, value);
    const int64_t position = find(key);
    if (position >= 0 && PyDict_Check(value)) entries_[position].state = value;
  }
  state_items_.shrink_to_fit();
}

// The position of a parameter, or -1.
int64_t Plan::find(PyObject* param) const {
  const auto found =
      std::lower_bound(position_of_.begin(), position_of_.end(), std::make_pair(param, int64_t(0)));
  return found != position_of_.end() && found->first == param ? found->second : -1;
}

bool Plan::needs(const StateKey& key, int row) const {
  return key.when < 0 || hyper_[row * hyper_keys_.size() + key.when] != 0;
}

std::string Plan::name_of(int64_t position) const {
  const int row = segments_[position].row;
  return "param_groups[" + std::to_string(row) + "]['params'][" +
         std::to_string(position - groups_[row].begin) + "]";
}

// The tensor takes no part in this step: it has no tiles.
void Plan::sit_out(int64_t position) {
  entries_[position].grad_key = 0;
  if (segments_[position].numel == 0) return;
  segments_[position].numel = 0;
  tiles_changed_ = true;
}

// A tensor on another kind of device has a gradient: somebody must take it.
void Plan::meet(at::DeviceType type, Todo* todo) const {
  const std::string name = c10::DeviceTypeName(type, /*lower_case=*/true);
  if (std::find(left_.begin(), left_.end(), type) == left_.end() &&
      std::find(todo->devices.begin(), todo->devices.end(), name) == todo->devices.end())
    todo->devices.push_back(name);
}

// Brings one tensor up to date. Returns whether it takes part in this step.
bool Plan::read_entry(int64_t position, Todo* todo) {
  Entry& entry = entries_[position];
  Segment& segment = segments_[position];
  const at::Tensor& param = THPVariable_Unpack(entry.param.ptr());
  const at::Tensor& given = grad_of(param);
  if (!given.defined() || param.device().type() != device_type_) {
    if (given.defined()) meet(param.device().type(), todo);
    sit_out(position);
    return false;
  }
  const bool lazy = given.is_conj() || given.is_neg();
  if (lazy) resolved_.push_back(given.resolve_conj().resolve_neg());
  const at::Tensor& grad = lazy ? resolved_.back() : given;
  const uint64_t param_key = key_of(param), grad_key = key_of(grad);
  bool changed = param_key != entry.param_key || grad_key != entry.grad_key;
  bool has_states = true;
  for (size_t k = 0; k < state_keys_.size(); k++) {
    PyObject* found = nullptr;
    if (needs(state_keys_[k], segment.row)) {
      if (entry.state != nullptr)
        found = PyDict_GetItemWithError(entry.state, state_names_[k].ptr());
      if (found != nullptr && !THPVariable_Check(found)) found = nullptr;
      has_states &= found != nullptr;
    }
    py::object& known = states_[position * state_keys_.size() + k];
    if (found != known.ptr()) {
      known = py::reinterpret_borrow<py::object>(found);
      changed = true;
    }
    if (found != nullptr && !changed && segment.data[2 + k] != nullptr)
      changed = address_of(THPVariable_Unpack(found).unsafeGetTensorImpl(), entry.itemsize[2 + k],
                           true) != segment.data[2 + k];
  }
  const void* before = segment.data[0];
  if (changed) {
    entry.param_key = 0;
    prepare(position, param, grad);
    entry.param_key = param_key;
    entry.grad_key = grad_key;
  } else if (segment.numel != 0) {
    segment.data[0] = address_of(param.unsafeGetTensorImpl(), entry.itemsize[0], true);
    segment.data[1] = address_of(grad.unsafeGetTensorImpl(), entry.itemsize[1], false);
  }
  moves_ += before != segment.data[0];
  if (!has_states) todo->missing.push_back(position);
  return true;
}

void Plan::prepare(int64_t position, const at::Tensor& param, const at::Tensor& grad) {
  std::vector<at::Tensor> streams{param, grad};
  for (size_t k = 0; k < state_keys_.size(); k++) {
    const py::object& state = states_[position * state_keys_.size() + k];
    streams.push_back(state ? THPVariable_Unpack(state.ptr()) : at::Tensor());
  }
  for (size_t s = 0; s < streams.size(); s++)
    entries_[position].itemsize[s] = streams[s].defined() ? uint8_t(streams[s].itemsize()) : 0;
  const int64_t numel = segments_[position].numel;
  describe(name_of(position), streams, &segments_[position], &layouts_[position]);
  tiles_changed_ |= numel != segments_[position].numel;
}

std::vector<int64_t> Plan::positions_of(const py::list& subset) const {
  std::vector<int64_t> positions;
  for (const py::handle& param : subset) {
    const int64_t position = find(param.ptr());
    TORCH_CHECK_VALUE(position >= 0, "params[", positions.size(),
                      "] is not a parameter of this optimizer");
    TORCH_CHECK_VALUE(std::find(positions.begin(), positions.end(), position) == positions.end(),
                      "params[", positions.size(), "] is given twice");
    positions.push_back(position);
  }
  return positions;
}

std::optional<Plan::Todo> Plan::read(const py::list& groups, const py::dict& state,
                                     const std::optional<py::list>& subset, double grad_multiplier,
                                     const std::vector<int64_t>& first) {
  resolved_.clear();
  if (groups_changed(groups)) read_groups(groups);
  read_hyper(grad_multiplier);
  read_state(state);
  for (int64_t position : first) segments_[position].tensor[0] = 1;
  all_ = !subset;
  chosen_ = subset ? positions_of(*subset) : std::vector<int64_t>();
  Todo todo;
  for_each_chosen([&](int64_t position) { read_entry(position, &todo); });
  if (todo.missing.empty() && todo.devices.empty()) return std::nullopt;
  return todo;
}

void Plan::run() {
  if (all_) {
    if (tiles_changed_) count_tiles(segments_, &tile_ends_);
    tiles_changed_ = false;
    launch_cpu(segments_, tile_ends_);
  } else {
    std::vector<Segment> segments;
    std::vector<int64_t> tile_ends;
    for (int64_t position : chosen_) segments.push_back(segments_[position]);
    count_tiles(segments, &tile_ends);
    launch_cpu(segments, tile_ends);
  }
  finish();
}

void Plan::finish() {
  for_each_chosen([&](int64_t position) { finish(position); });
}

std::vector<Batch> Plan::batches() const {
  std::vector<Batch> batches;
  for_each_chosen([&](int64_t position) {
    const Segment& segment = segments_[position];
    if (segment.numel == 0) return;
    const at::Device device = THPVariable_Unpack(entries_[position].param.ptr()).device();
    const std::vector<DType> dtypes(segment.dtype, segment.dtype + 2 + state_keys_.size());
    auto batch = std::find_if(batches.begin(), batches.end(), [&](const Batch& b) {
      return b.device == device && b.dtypes == dtypes;
    });
    if (batch == batches.end()) batch = batches.insert(batch, Batch{device, dtypes, {}});
    batch->segments.push_back(segment);
  });
  return batches;
}

at::Tensor Plan::hyper() const {
  const int64_t rows = int64_t(groups_.size()), columns = int64_t(hyper_keys_.size());
  at::Tensor table = at::empty({rows, columns + 1}, at::kDouble);
  for (int64_t r = 0; r < rows; r++) {
    double* row = table.mutable_data_ptr<double>() + r * (columns + 1);
    std::copy_n(hyper_.data() + r * columns, columns, row);
    row[columns] = grad_multiplier_[r];
  }
  return table;
}

Launch Plan::describe_launch(const std::vector<Segment>& segments,
                             const std::vector<int64_t>& tile_ends) const {
  Launch launch;
  launch.rule = rule_;
  launch.segments = segments.data();
  launch.tile_ends = tile_ends.data();
  launch.segment_count = int64_t(segments.size());
  launch.hyper = hyper_.data();
  launch.hyper_stride = int(hyper_keys_.size());
  launch.grad_multiplier = grad_multiplier_.data();
  return launch;
}

void Plan::launch_cpu(const std::vector<Segment>& segments,
                      const std::vector<int64_t>& tile_ends) const {
  if (segments.empty()) return;
  py::gil_scoped_release without_gil;
  run_cpu(describe_launch(segments, tile_ends));
}

void Plan::finish(int64_t position) {
  if (entries_[position].grad_key == 0) return;
  const at::Tensor& param = THPVariable_Unpack(entries_[position].param.ptr());
  if (!param.is_inference()) param.unsafeGetTensorImpl()->bump_version();
  segments_[position].tensor[0] = 0;
}

std::pair<py::object, int> Plan::at(int64_t position) const {
  return {entries_.at(position).param, segments_.at(position).row};
}

int64_t Plan::bytes() const {
  const auto bytes_of = [](const auto& list) {
    return int64_t(list.capacity() * sizeof(*list.data()));
  };
  int64_t total = sizeof(Plan) + bytes_of(entries_) + bytes_of(states_) + bytes_of(segments_) +
                  bytes_of(layouts_) + bytes_of(tile_ends_) + bytes_of(state_items_) +
                  bytes_of(position_of_);
  for (const auto& layout : layouts_)
    if (layout) total += sizeof(Layout);
  return total;
}

}  // namespace fused_momentum
