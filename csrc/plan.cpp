#include "plan.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "peek.h"

namespace fused_momentum {
namespace {

// Keys are interned, as those in the dicts are: a look-up then compares addresses, not letters.
py::object interned(const std::string& name) {
  return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name.c_str()));
}

// Whether two launches may take one for the other: a layout is never the same, as it may have been
// written anew at an old address. What prepare() leaves as it was is not compared.
bool says_the_same(const Segment& a, const Segment& b) {
  return std::equal(a.data, std::end(a.data), b.data) &&
         std::equal(a.kept, std::end(a.kept), b.kept) &&
         std::equal(a.dtype, std::end(a.dtype), b.dtype) && a.numel == b.numel && !a.layout &&
         !b.layout;
}

}  // namespace

Plan::State::State(PyObject* tensor) : object(tensor) {
  if (tensor && THPVariable_Unpack(tensor).has_storage())
    storage = c10::weak_intrusive_ptr<c10::StorageImpl>(
        THPVariable_Unpack(tensor).storage().getWeakStorageImpl());
}

bool Plan::State::has_its_storage() const {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass)) &&
         THPVariable_Unpack(object)
                 .unsafeGetTensorImpl()
                 ->unsafe_storage()
                 .unsafeGetStorageImpl() == storage._unsafe_get_target();
}

Plan::Plan(int rule, const std::vector<std::string>& hyper_keys,
           const std::vector<std::vector<std::string>>& choices, std::vector<StateKey> state_keys,
           const std::string& device_type)
    : rule_(rule),
      info_(rule_infos().at(rule)),
      device_type_(at::Device(device_type).type()),
      choices_(choices),
      state_keys_(std::move(state_keys)),
      params_key_(interned("params")),
      maximize_key_(interned("maximize")),
      capturable_key_(interned("capturable")),
      step_key_(interned("step")),
      spec_key_(interned("_spec")),
      part_key_(interned("_local_tensor")),
      read_row_(py::none()),
      parts_of_(py::none()) {
  for (const std::string& key : hyper_keys) hyper_keys_.push_back(interned(key));
  for (const StateKey& key : state_keys_) state_names_.push_back(interned(key.name));
}

// The tensor takes no part in this step: it has no tiles.
void Plan::sit_out(int64_t position) {
  entries_[position].key = 0;
  if (segments_[position].numel == 0) return;
  segments_[position].numel = 0;
  tiles_changed_ = true;
  generation_++;
}

// A tensor on another kind of device has a gradient: somebody must take it.
void Plan::meet(at::DeviceType type, Todo* todo) const {
  const std::string name = c10::DeviceTypeName(type, /*lower_case=*/true);
  if (std::find(left_.begin(), left_.end(), type) == left_.end() &&
      std::find(todo->devices.begin(), todo->devices.end(), name) == todo->devices.end())
    todo->devices.push_back(name);
}

// What the check of a tensor looks at, read once for many of them.
struct Plan::Known {
  const Entry* entries;
  Segment* segments;
  const uint32_t* needed;
  const State* states;
  const py::object *kept, *state_names, *steps;  // steps: nullptr where none are counted
  int keys, states_of_rule, kept_of_rule, kept_itemsize;
  uint64_t state_version;

  explicit Known(Plan* plan)
      : entries(plan->entries_.data()),
        segments(plan->segments_.data()),
        needed(plan->needed_.data()),
        states(plan->states_.data()),
        kept(plan->kept_.data()),
        state_names(plan->state_names_.data()),
        steps(plan->read_row_.is_none() ? nullptr : plan->steps_.data()),
        keys(int(plan->state_keys_.size())),
        states_of_rule(plan->info_.states),
        kept_of_rule(plan->info_.kept),
        kept_itemsize(itemsize_of(plan->info_.kept_dtype)),
        state_version(plan->state_version_) {}

  // What was found under key k, or nullptr.
  [[gnu::always_inline]] inline PyObject* found(int64_t position, int k) const {
    return k < states_of_rule ? states[position * states_of_rule + k].object
                              : kept[position * kept_of_rule + k - states_of_rule].ptr();
  }

  // Whether state[param] still holds the tensors that were found there. They are made in the order
  // of the keys, so a walk through the dict meets them without a look-up; it may be read by several
  // threads, as it changes not so much as a reference count.
  __attribute__((noinline)) bool holds_its_states(int64_t position,
                                                  const c10::TensorImpl* param) const {
    const Segment& segment = segments[position];
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t at = 0;
    for (int k = 0; k < keys; k++) {
      if ((needed[segment.row] >> k & 1) == 0) continue;
      for (bool again = false; key != state_names[k].ptr();) {
        if (PyDict_Next(entries[position].state, &at, &key, &value)) continue;
        if (again) return false;
        again = true;
        at = 0;
      }
      if (value != found(position, k)) return false;
      if (k >= states_of_rule) continue;
      if (!states[position * states_of_rule + k].has_its_storage()) return false;
      const c10::TensorImpl* impl = THPVariable_Unpack(value).unsafeGetTensorImpl();
      if (segment.layout != nullptr || impl->sizes() != param->sizes() ||
          impl->strides() != param->strides() ||
          dtype_of(impl->dtype().toScalarType()) != segment.dtype[2 + k])
        return false;
    }
    return true;
  }

  // Whether it does, and they are where the segment says, with as many elements as the parameter.
  inline bool has_its_states(int64_t position, const c10::TensorImpl* param) const {
    const Entry& entry = entries[position];
    const Segment& segment = segments[position];
    const uint32_t needed_here = needed[segment.row];
    if (needed_here != 0) {
      if (entry.state == nullptr) return false;
      if (version_of(entry.state) >= state_version && !holds_its_states(position, param))
        return false;
    }
    for (int k = 0; k < keys; k++) {
      if ((needed_here >> k & 1) == 0) continue;
      PyObject* const state = found(position, k);
      if (state == nullptr) return false;
      const bool is_state = k < states_of_rule;
      const void* data = is_state ? segment.data[2 + k] : segment.kept[k - states_of_rule];
      if (data == nullptr) continue;
      const c10::TensorImpl* impl = THPVariable_Unpack(state).unsafeGetTensorImpl();
      const int itemsize = is_state ? entry.itemsize[2 + k] : kept_itemsize;
      if (data != address_of(impl, itemsize, true)) return false;
      if (is_state && impl->numel() != segment.numel && impl->numel() != param->numel())
        return false;
    }
    return steps == nullptr || steps[position];
  }

  // How a tensor compares with what is known of it; addresses are brought up to date. Several
  // threads do this while the caller holds the GIL, so it may read Python's objects and nothing
  // more.
  [[gnu::always_inline]] inline Found check(int64_t position) const {
    const Entry& entry = entries[position];
    Segment& segment = segments[position];
    const at::Tensor& param = THPVariable_Unpack(entry.param.ptr());
    const at::Tensor* const found = grad_of(param);
    if (!found) return entry.key == 0 && segment.numel == 0 ? Found::same : Found::changed;
    const c10::TensorImpl *impl = param.unsafeGetTensorImpl(), *grad = found->unsafeGetTensorImpl();
    if (!has_sizes(impl) || !has_sizes(grad) ||
        entry.key != key_of(impl, grad, needed[segment.row]) ||
        !is_same(entry.version, impl->version_counter()) || !has_its_states(position, impl))
      return Found::changed;
    if (segment.numel == 0) return Found::same;
    void* p = address_of(impl, entry.itemsize[0], true);
    void* g = address_of(grad, entry.itemsize[1], false);
    if (p == nullptr || g == nullptr) return Found::changed;
    // What is not written stays in the caches of all threads.
    const bool param_moved = segment.data[0] != p, grad_moved = segment.data[1] != g;
    // A gradient that comes to lie beside its parameter may overlap it.
    if (grad_moved && impl->unsafe_storage().is_alias_of(grad->unsafe_storage()))
      return Found::changed;
    if (param_moved) segment.data[0] = p;
    if (grad_moved) segment.data[1] = g;
    return param_moved ? Found::param_moved : grad_moved ? Found::grad_moved : Found::same;
  }
};

// Checks every tensor of this step, and marks those that must be read anew; returns whether any is.
bool Plan::check_all() {
  changed_.assign(entries_.size(), 0);
  std::atomic<int64_t> moves{0}, moved{0}, changed{0};
  const auto look_at = [&, known = Known(this)](int64_t position) __attribute__((always_inline)) {
    const Found found = known.check(position);
    if (found == Found::same) return;
    if (found == Found::changed) {
      changed_[position] = 1;
      changed.store(1, std::memory_order_relaxed);
      return;
    }
    if (found == Found::param_moved) moves++;
    if (!moved.load(std::memory_order_relaxed)) moved.store(1, std::memory_order_relaxed);
  };
  for_each_chosen_in_threads(look_at);
  moves_ += moves;
  generation_ += moved;
  return changed != 0;
}

// Looks up what the tensor keeps under key k; returns whether all that is needed is there.
bool Plan::find_state(int64_t position, size_t k) {
  const Entry& entry = entries_[position];
  const bool needed = needed_[segments_[position].row] >> k & 1;
  PyObject* found = nullptr;
  if (needed && entry.state != nullptr)
    found = PyDict_GetItemWithError(entry.state, state_names_[k].ptr());
  if (found != nullptr && !THPVariable_Check(found)) found = nullptr;
  if (int64_t(k) < info_.states) {
    states_[position * info_.states + k] = State(found);
  } else {
    py::object& known = kept_[position * info_.kept + int64_t(k) - info_.states];
    if (known.ptr() != found) entries_[position].settled = false;
    known = py::reinterpret_borrow<py::object>(found);
  }
  return !needed || found != nullptr;
}

// Reads one tensor anew.
void Plan::read_entry(int64_t position, Todo* todo) {
  Entry& entry = entries_[position];
  const at::Tensor& param = THPVariable_Unpack(entry.param.ptr());
  const at::Tensor* const found = grad_of(param);
  if (!found || param.device().type() != device_type_) {
    if (found) meet(param.device().type(), todo);
    return sit_out(position);
  }
  bool has_states = read_row_.is_none() || steps_[position];
  for (size_t k = 0; k < state_keys_.size(); k++) has_states &= find_state(position, k);
  std::vector<at::Tensor> streams{param, *found};
  for (int k = 0; k < info_.states; k++) {
    PyObject* const state = states_[position * info_.states + k].object;
    streams.push_back(state ? THPVariable_Unpack(state) : at::Tensor());
  }
  entry.key = 0;
  entry.version = param.unsafeGetTensorImpl()->version_counter();
  const bool sharded = take_parts(position, &streams);
  const bool lazy = streams[1].is_conj() || streams[1].is_neg();
  if (lazy) streams[1] = resolved(streams[1]);
  if (lazy) made_.push_back(streams[1]);
  const void* before = segments_[position].data[0];
  prepare(position, streams);
  moves_ += before != segments_[position].data[0];
  if (!has_states) todo->missing.push_back(position);
  const uint32_t needed = needed_[segments_[position].row];
  entry.key = sharded || lazy
                  ? 1
                  : key_of(param.unsafeGetTensorImpl(), found->unsafeGetTensorImpl(), needed);
}

// Where it raises, what is known of the tensor stays as it was.
void Plan::prepare(int64_t position, const std::vector<at::Tensor>& streams) {
  Segment segment = segments_[position];
  std::unique_ptr<Layout> layout;
  describe(name_of(position), streams, &segment, &layout);
  describe_kept(position, streams[0], &segment);
  for (size_t s = 0; s < streams.size(); s++)
    if (streams[s].defined()) entries_[position].itemsize[s] = uint8_t(streams[s].itemsize());
  generation_ += !says_the_same(segments_[position], segment);
  tiles_changed_ |= segments_[position].numel != segment.numel;
  segments_[position] = segment;
  layouts_.erase(position);
  if (layout) layouts_[position] = std::move(layout);
}

void Plan::describe_kept(int64_t position, const at::Tensor& param, Segment* segment) const {
  for (int k = 0; k < info_.kept; k++) {
    const py::object& found = kept_[position * info_.kept + k];
    segment->kept[k] = nullptr;
    if (!found) continue;
    const at::Tensor& number = THPVariable_Unpack(found.ptr());
    check_number(position, state_keys_[info_.states + k].name.c_str(), number,
                 info_.kept_dtype == DType::f64 ? at::kDouble : at::kFloat, param.device());
    segment->kept[k] = number.mutable_data_ptr();
  }
}

std::optional<Plan::Todo> Plan::look(const py::list& groups, const py::dict& state,
                                     const std::optional<py::list>& subset, double grad_multiplier,
                                     const std::vector<int64_t>& first) {
  let_go();
  if (groups_changed(groups)) read_groups(groups);
  read_hyper(grad_multiplier);
  read_state(state);
  tensor_scalars_.clear();
  measures_in_run_ = false;
#ifdef FUSED_MOMENTUM_CUDA
  cuda_scalars_.clear();
#endif
  for (int64_t position : first) segments_[position].first = begins_ = true;
  generation_ += !first.empty() || subset || !all_;  // subsets are not compared
  all_ = !subset;
  chosen_ = subset ? positions_of(*subset) : std::vector<int64_t>();
  if (!read_row_.is_none()) {
    read_rows();
    read_state(state);  // Python ran, and may have changed it
  }
  Todo todo;
  if (check_all()) {
    state_is_newer_ = true;
    for_each_chosen([&](int64_t position) {
      if (changed_[position]) read_entry(position, &todo);
    });
  }
  // Now all that takes part is known as it is. What a subset has left out is not.
  if (state_is_newer_ && all_) {
    state_version_ = version_of(py::dict().ptr());
    state_is_newer_ = false;
  }
  if (todo.missing.empty() && todo.devices.empty()) return std::nullopt;
  return todo;
}

// Between this and the step Python runs, and with it other threads.
std::optional<Plan::Todo> Plan::read(const py::list& groups, const py::dict& state,
                                     const std::optional<py::list>& subset, double grad_multiplier,
                                     const std::vector<int64_t>& first) {
  auto todo = look(groups, state, subset, grad_multiplier, first);
  if (!todo && device_type_ == at::kCPU) alive_ = memory();
  return todo;
}

std::pair<py::object, int> Plan::at(int64_t position) const {
  return {entries_.at(position).param, group_of(position)};
}

int64_t Plan::bytes() const {
  const auto bytes_of = [](const auto& list) {
    return int64_t(list.capacity() * sizeof(*list.data()));
  };
  int64_t total = sizeof(Plan) + bytes_of(entries_) + bytes_of(states_) + bytes_of(kept_) +
                  bytes_of(segments_) + bytes_of(tiles_.ends) + bytes_of(state_order_) +
                  bytes_of(by_address_) + bytes_of(steps_) + bytes_of(changed_) +
                  bytes_of(tensor_scalars_) + bytes_of(tile_sums_);
  total += int64_t(layouts_.size()) * (sizeof(Layout) + 64);  // and a node of the map
  return total;
}

}  // namespace fused_momentum
