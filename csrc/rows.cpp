// The table of hyper-parameters: a row per group, or per group and step of its tensors.
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>

#include "peek.h"
#include "plan.h"

namespace fused_momentum {
namespace {

double number_of(PyObject* value, PyObject* key) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  if (PyBool_Check(value)) return value == Py_True;
  // Asking whether something is a tensor is slow.
  if (!PyLong_Check(value) && THPVariable_Check(value) && THPVariable_Unpack(value).numel() == 1)
    return THPVariable_Unpack(value).item().toDouble();
  const double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred()) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_ValueError))
      throw py::error_already_set();
    PyErr_Clear();
    TORCH_CHECK_TYPE(false, "param_groups: ", py::cast<std::string>(py::handle(key)), " is a ",
                     Py_TYPE(value)->tp_name, "; needed: a number or a tensor with one element");
  }
  return number;
}

// Keys that the groups of torch.optim.SGD, and of its checkpoints, do not have: absent is False.
bool is_optional(const std::string& key) {
  return key == "capturable" || key == "decoupled_weight_decay";
}

double read_number(PyObject* dict, const py::object& key,
                   const std::vector<std::string>& choices = {}) {
  PyObject* value = PyDict_GetItemWithError(dict, key.ptr());
  if (value == nullptr) {
    const std::string name = py::cast<std::string>(key);
    if (is_optional(name)) return 0;
    throw py::key_error("param_groups: key '" + name + "' is missing");
  }
  if (choices.empty()) return number_of(value, key.ptr());
  for (size_t i = 0; i < choices.size(); i++)
    if (PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, choices[i].c_str()) == 0)
      return double(i);
  const py::object words = py::cast(choices);
  TORCH_CHECK_VALUE(false, "param_groups: ", py::cast<std::string>(key), "=",
                    py::cast<std::string>(py::repr(py::handle(value))), " is not one of ",
                    py::cast<std::string>(py::repr(words)));
}

}  // namespace

void Plan::read_hyper(double grad_multiplier) {
  hyper_.clear();
  grad_multiplier_.clear();
  needed_.clear();
  rows_.clear();
  multiplier_ = grad_multiplier;
  lr_.assign(groups_.size(), nullptr);
  lr_dtype_.assign(groups_.size(), DType::f32);
  if (!read_row_.is_none()) return;  // rows are made as tensors are met
  for (size_t row = 0; row < groups_.size(); row++) {
    PyObject* dict = groups_[row].dict.ptr();
    const bool maximize = read_number(dict, maximize_key_) != 0;
    for (size_t k = 0; k < hyper_keys_.size(); k++) {
      const bool on_device = k == 0 && read_device_lr(dict, row);
      hyper_.push_back(on_device ? 0.0 : read_number(dict, hyper_keys_[k], choices_[k]));
    }
    grad_multiplier_.push_back(maximize ? -grad_multiplier : grad_multiplier);
    append_needed();
  }
}

// The row of each tensor at its next step, for a rule that depends on it.
void Plan::read_rows() {
  std::vector<std::pair<int64_t, int64_t>> steps;  // position, number of its step
  for_each_chosen([&](int64_t position) {
    if (grad_of(THPVariable_Unpack(entries_[position].param.ptr())))
      steps.emplace_back(position, read_step(position));
  });
  // Python runs from here on: what its dicts hold may change.
  for (const auto& [position, t] : steps) {
    const int32_t row = row_of(group_of(position), t);
    generation_ += segments_[position].row != row;
    segments_[position].row = row;
  }
}

// The number of the step that a tensor takes next.
int64_t Plan::read_step(int64_t position) {
  PyObject* found = entries_[position].state;
  if (found != nullptr) found = PyDict_GetItemWithError(found, step_key_.ptr());
  steps_[position] = py::object();
  if (found == nullptr || found == Py_None) return 1;
  const at::Tensor step = THPVariable_Check(found) ? THPVariable_Unpack(found) : at::Tensor();
  check_number(position, "step", step, at::kFloat, at::kCPU);
  const float count = *step.mutable_data_ptr<float>();  // finish() writes it
  TORCH_CHECK_VALUE(std::isfinite(count) && count >= 0, name_of(position), ": its state 'step' is ",
                    count, "; needed: a number of steps");
  steps_[position] = py::reinterpret_borrow<py::object>(found);
  return int64_t(count) + 1;
}

int Plan::row_of(int group, int64_t t) {
  for (size_t row = rows_.size(); row-- > 0;)
    if (rows_[row].group == group && rows_[row].t == t) return int(row);
  const py::object& dict = groups_[group].dict;
  const bool maximize = read_number(dict.ptr(), maximize_key_) != 0;
  for (const py::handle& number : py::tuple(read_row_(dict, t)))
    hyper_.push_back(number_of(number.ptr(), step_key_.ptr()));
  grad_multiplier_.push_back(maximize ? -multiplier_ : multiplier_);
  rows_.push_back({group, t});
  TORCH_CHECK(hyper_.size() == rows_.size() * hyper_keys_.size(), info_.name, " needs ",
              hyper_keys_.size(), " hyper-parameters");
  append_needed();
  lr_.resize(rows_.size(), nullptr);
  lr_dtype_.resize(rows_.size(), DType::f32);
  return int(rows_.size()) - 1;
}

// A learning rate that is a tensor on the device stays there in a capturable group: reading it here
// would wait for the device, and freeze its value in a captured graph.
bool Plan::read_device_lr(PyObject* dict, size_t row) {
  if (!keeps_lr_) return false;
  PyObject* value = PyDict_GetItemWithError(dict, hyper_keys_[0].ptr());
  if (value == nullptr || !THPVariable_Check(value)) return false;
  const at::Tensor& lr = THPVariable_Unpack(value);
  const bool number = lr.scalar_type() == at::kFloat || lr.scalar_type() == at::kDouble;
  if (lr.device().type() != device_type_ || !number || lr.numel() != 1) return false;
  if (read_number(dict, capturable_key_) == 0) return false;
  // A kernel reads no number of another device's.
  for (int64_t k = groups_[row].begin; k < groups_[row].end; k++)
    if (THPVariable_Unpack(entries_[k].param.ptr()).device() != lr.device()) return false;
  lr_[row] = lr.const_data_ptr();
  lr_dtype_[row] = lr.scalar_type() == at::kDouble ? DType::f64 : DType::f32;
  return true;
}

// Which states a tensor of the last row needs.
void Plan::append_needed() {
  const double* hyper = hyper_.data() + needed_.size() * hyper_keys_.size();
  uint32_t needed = 0;
  for (size_t k = 0; k < state_keys_.size(); k++) {
    const int when = state_keys_[k].when;
    needed |= uint32_t(when < 0 || hyper[when] != 0) << k;
  }
  needed_.push_back(needed);
}

at::Tensor Plan::hyper() const {
  const int64_t rows = int64_t(grad_multiplier_.size()), columns = int64_t(hyper_keys_.size());
  at::Tensor table = at::empty({rows, columns + 1}, at::kDouble);
  for (int64_t r = 0; r < rows; r++) {
    double* row = table.mutable_data_ptr<double>() + r * (columns + 1);
    std::copy_n(hyper_.data() + r * columns, columns, row);
    row[columns] = grad_multiplier_[r];
  }
  return table;
}

std::optional<at::Tensor> Plan::device_lr() const {
  if (std::all_of(lr_.begin(), lr_.end(), [](const void* lr) { return lr == nullptr; }))
    return std::nullopt;
  at::Tensor table = at::empty({int64_t(lr_.size())}, at::kLong);
  for (size_t row = 0; row < lr_.size(); row++)
    table.mutable_data_ptr<int64_t>()[row] =
        int64_t(reinterpret_cast<intptr_t>(lr_[row])) | (lr_dtype_[row] == DType::f64);
  return table;
}

}  // namespace fused_momentum
