// The plan: what one step works on, cached between steps and checked at each. One walk over the
// parameter groups reads every parameter and gradient (address, dtype, shape, strides) and every
// state; only what changed is worked out anew.
#pragma once

#include <torch/extension.h>

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "launch.h"

#ifdef FUSED_MOMENTUM_CUDA
#include "cuda/launch_cuda.h"
#endif

namespace fused_momentum {

struct StateKey {
  std::string name;
  int when;  // index of the hyper-parameter that must not be zero, or -1
};

// Tensors of one device with the same dtypes, for a back-end that Python launches: tables on the
// CPU.
struct Batch {
  at::Device device;
  std::vector<DType> dtypes;
  std::vector<Segment> segments;

  at::Tensor addresses() const;       // int64 [streams, n], 0 where a state is absent
  at::Tensor numels() const;          // int64 [n]
  at::Tensor rows() const;            // int64 [n], in the table of hyper-parameters
  at::Tensor tensor_scalars() const;  // float64 [1, n]
  // int64 [n, 1 + streams, dims]: sizes and each stream's strides, outermost first; 0: contiguous.
  std::optional<at::Tensor> layouts() const;
};

class Plan {
 public:
  // Works on the tensors of one kind of device.
  Plan(int rule, const std::vector<std::string>& hyper_keys, std::vector<StateKey> state_keys,
       const std::string& device_type);

  // What must be done before a step can be: make states for the tensors at these positions, or find
  // a back-end for the tensors on other kinds of devices.
  struct Todo {
    std::vector<int64_t> missing;
    std::vector<std::string> devices;
  };

  // Brings the plan up to date for a step over every parameter with a gradient, or over those of
  // `subset`. Gradients will be multiplied by grad_multiplier. Tensors listed in `first` take their
  // first step. Raises where a tensor cannot be updated; changes no tensor.
  std::optional<Todo> read(const py::list& groups, const py::dict& state,
                           const std::optional<py::list>& subset, double grad_multiplier,
                           const std::vector<int64_t>& first);

  // The step itself, on the CPU.
  void run();

  // The step itself, on CUDA devices: one kernel per device and set of types, on the stream that
  // current_stream(device index) names. grad_scale and found_inf are read there.
  void run_cuda(const py::function& current_stream, const std::optional<at::Tensor>& grad_scale,
                const std::optional<at::Tensor>& found_inf);
  // How many kernels the last step launched.
  int launches() const { return launches_; }

  // The step as tables, for a back-end that is launched from Python; finish() when it is.
  std::vector<Batch> batches() const;
  void finish();

  // float64 [rows, hyper-parameters + 1]: each group's, then its gradient multiplier.
  at::Tensor hyper() const;

  // The back-end reads learning rates of capturable groups on the device.
  void keep_lr_on_device() { keeps_lr_ = true; }

  // Tensors on this kind of device are taken care of elsewhere.
  void leave(const std::string& device_type) { left_.push_back(at::Device(device_type).type()); }

  // The parameter at a position returned by step, and the index of its group.
  std::pair<py::object, int> at(int64_t position) const;

  // How often a parameter was found at another address than before.
  int64_t moves() const { return moves_; }

  // Bytes that the plan itself holds.
  int64_t bytes() const;

 private:
  struct Group {
    py::object dict;
    int64_t begin, end;  // positions of its tensors
  };
  struct Entry {
    py::object param;
    PyObject* state = nullptr;             // state[param], owned by the optimizer's dict
    uint64_t param_key = 0, grad_key = 0;  // 0: takes no part
    uint8_t itemsize[kMaxStreams] = {};
  };

  bool groups_changed(const py::list& groups) const;
  void read_groups(const py::list& groups);
  void read_hyper(double grad_multiplier);
  bool read_device_lr(PyObject* dict, size_t row);
  void read_state(const py::dict& state);
  bool read_entry(int64_t position, Todo* todo);
  void sit_out(int64_t position);
  void meet(at::DeviceType type, Todo* todo) const;
  void prepare(int64_t position, const at::Tensor& param, const at::Tensor& grad);
  int64_t find(PyObject* param) const;
  std::string name_of(int64_t position) const;
  bool needs(const StateKey& key, int row) const;
  std::vector<int64_t> positions_of(const py::list& subset) const;
  void launch_cpu(const std::vector<Segment>& segments,
                  const std::vector<int64_t>& tile_ends) const;
  Launch describe_launch(const std::vector<Segment>& segments,
                         const std::vector<int64_t>& tile_ends) const;
  void finish(int64_t position);
  template <class F>
  void for_each_chosen(F&& f) const;

  const int rule_;
  const at::DeviceType device_type_;
  std::vector<at::DeviceType> left_;
  bool all_ = true;              // this step is over all tensors,
  std::vector<int64_t> chosen_;  // or over these
  std::vector<py::object> hyper_keys_;
  const std::vector<StateKey> state_keys_;
  std::vector<py::object> state_names_;
  const py::object params_key_, maximize_key_, capturable_key_;

  std::vector<Group> groups_;
  std::vector<Entry> entries_;
  std::vector<py::object> states_;  // entries x state_keys: the tensors the segments point into
  std::vector<std::pair<PyObject*, int64_t>> position_of_;  // sorted by address
  std::vector<std::pair<PyObject*, PyObject*>> state_items_;

  // Gradients that were lazily conjugated or negated, made real; alive until the next step.
  std::deque<at::Tensor> resolved_;

  std::vector<Segment> segments_;
  std::vector<std::unique_ptr<Layout>> layouts_;
  std::vector<int64_t> tile_ends_;
  bool tiles_changed_ = true;
  int64_t moves_ = 0;
  std::vector<double> hyper_, grad_multiplier_;
  // Per row, a learning rate that a captured graph reads on the device (capturable), or nullptr.
  std::vector<const void*> lr_;
  std::vector<DType> lr_dtype_;
  bool keeps_lr_ = false;
  int launches_ = 0;
#ifdef FUSED_MOMENTUM_CUDA
  std::map<int, std::unique_ptr<cuda::Cuda>> cuda_devices_;
#endif
};

template <class F>
void Plan::for_each_chosen(F&& f) const {
  if (all_)
    for (size_t i = 0; i < entries_.size(); i++) f(int64_t(i));
  else
    for (int64_t position : chosen_) f(position);
}

// Fills data, dtype, numel and layout of a segment from its streams p, g, states (undefined:
// absent). `name` is the parameter's in error messages.
void describe(const std::string& name, const std::vector<at::Tensor>& streams, Segment* segment,
              std::unique_ptr<Layout>* layout);

// The number of CUDA devices; raises, with the reason, where there is none.
int cuda_devices();

}  // namespace fused_momentum
