// Which parameters there are, and which dict holds the state of each: Python's lists and dicts.
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "peek.h"
#include "plan.h"

namespace fused_momentum {

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
  by_address_.clear();
  segments_.clear();
  state_order_.clear();
  state_ = nullptr;
  for (const py::handle& item : groups) {
    Group group{py::reinterpret_borrow<py::object>(item), int64_t(entries_.size()), 0};
    for (const py::handle& param : py::list(group.dict[params_key_])) {
      TORCH_CHECK_TYPE(THPVariable_Check(param.ptr()), "param_groups[", groups_.size(),
                       "]['params'][", int64_t(entries_.size()) - group.begin, "] is a ",
                       Py_TYPE(param.ptr())->tp_name, "; needed: a tensor");
      by_address_.push_back(int32_t(entries_.size()));
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
  std::sort(by_address_.begin(), by_address_.end(), [this](int32_t a, int32_t b) {
    return entries_[a].param.ptr() < entries_[b].param.ptr();
  });
  entries_.shrink_to_fit();
  segments_.shrink_to_fit();
  by_address_.shrink_to_fit();
  states_.assign(entries_.size() * info_.states, State());
  kept_.assign(entries_.size() * info_.kept, py::object());
  steps_.assign(read_row_.is_none() ? 0 : entries_.size(), py::object());
  layouts_.clear();
  specs_.clear();
  tiles_changed_ = true;
  generation_++;
}

void Plan::read_state(const py::dict& state) {
  if (state.ptr() == state_ && version_of(state_) < state_version_) return;
  state_ = state.ptr();
  state_version_ = 0;  // a state[param] that is new there may be an old dict
  state_is_newer_ = true;
  // The dict keeps its order, so one pass over its items tells whether any state[param] is another.
  bool changed = size_t(PyDict_Size(state.ptr())) != state_order_.size();
  PyObject *key, *value;
  Py_ssize_t at = 0;
  for (size_t i = 0; !changed && PyDict_Next(state.ptr(), &at, &key, &value); i++) {
    const int32_t position = state_order_[i];
    changed = position < 0
                  ? find(key) >= 0
                  : entries_[position].param.ptr() != key || entries_[position].state != value;
  }
  if (!changed) return;
  state_order_.clear();
  state_order_.reserve(PyDict_Size(state.ptr()));
  for (Entry& entry : entries_) entry.state = nullptr;
  for (at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
    const int64_t position = find(key);
    state_order_.push_back(int32_t(position));
    if (position >= 0 && PyDict_Check(value)) entries_[position].state = value;
  }
}

// The position of a parameter, or -1.
int64_t Plan::find(PyObject* param) const {
  const auto found = std::lower_bound(
      by_address_.begin(), by_address_.end(), param,
      [this](int32_t position, PyObject* to) { return entries_[position].param.ptr() < to; });
  return found != by_address_.end() && entries_[*found].param.ptr() == param ? *found : -1;
}

int Plan::group_of(int64_t position) const {
  const auto after =
      std::upper_bound(groups_.begin(), groups_.end(), position,
                       [](int64_t position, const Group& group) { return position < group.begin; });
  return int(after - groups_.begin()) - 1;
}

std::string Plan::name_of(int64_t position) const {
  const int group = group_of(position);
  return "param_groups[" + std::to_string(group) + "]['params'][" +
         std::to_string(position - groups_[group].begin) + "]";
}

std::vector<int64_t> Plan::positions_of(const py::list& subset) const {
  std::vector<int64_t> positions;
  std::vector<bool> given(entries_.size());
  for (const py::handle& param : subset) {
    const int64_t position = find(param.ptr());
    TORCH_CHECK_VALUE(position >= 0, "params[", positions.size(),
                      "] is not a parameter of this optimizer");
    TORCH_CHECK_VALUE(!given[position], "params[", positions.size(), "] is given twice");
    given[position] = true;
    positions.push_back(position);
  }
  return positions;
}

int Plan::traverse(visitproc visit, void* arg) const {
  Py_VISIT(read_row_.ptr());
  for (const Group& group : groups_) Py_VISIT(group.dict.ptr());
  for (const Entry& entry : entries_) Py_VISIT(entry.param.ptr());
  for (const py::object& number : kept_) Py_VISIT(number.ptr());
  for (const py::object& step : steps_) Py_VISIT(step.ptr());
  return 0;
}

}  // namespace fused_momentum
