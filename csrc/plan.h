// The plan: what one step works on, cached between steps and checked at each. One walk over the
// parameter groups reads every parameter and gradient (address, dtype, shape, strides) and every
// state; only what changed is worked out anew.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "launch.h"
#include "rule_info.h"
#include "tiles.h"

#ifdef FUSED_MOMENTUM_CUDA
#include "cuda/launch_cuda.h"
#endif

namespace fused_momentum {

// Up to this many tensors one thread checks them: a second one has to fetch what the first, on
// another core, has written.
constexpr int64_t kTensorsPerThread = 2048;

// What is kept per parameter under a name: a state, or a number.
struct StateKey {
  std::string name;
  int when;  // index of the hyper-parameter that must not be zero, or -1
};

// Tensors of one device with the same dtypes, for a back-end that Python launches: tables on the
// CPU.
struct Batch {
  at::Device device;
  std::vector<DType> dtypes;
  int rule;
  std::vector<Segment> segments;

  at::Tensor addresses() const;       // int64 [streams, n], 0 where a state is absent
  at::Tensor numels() const;          // int64 [n]
  at::Tensor rows() const;            // int64 [n], in the table of hyper-parameters
  at::Tensor tensor_scalars() const;  // float64 [k, n]: whether it is the first step, then zeros
  at::Tensor kept() const;            // int64 [k, n], 0 where a number is absent
  // int64 [n, 1 + streams, dims]: sizes and each stream's strides, outermost first; 0: contiguous.
  std::optional<at::Tensor> layouts() const;
};

class Plan {
 public:
  // Works on the tensors of one kind of device. choices: per hyper-parameter, the words that it may
  // have for a value. state_keys: states, then kept numbers, in the rule's order.
  Plan(int rule, const std::vector<std::string>& hyper_keys,
       const std::vector<std::vector<std::string>>& choices, std::vector<StateKey> state_keys,
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
  // The step is over, or has failed: what was read is no longer needed, and nothing is first.
  void abandon();

  // Whether any tensor of this step may have something to measure.
  bool measures() const;
  // The positions of those tensors, for a rule that measures each one only once.
  std::vector<int64_t> unsettled() const;
  // As unsettled, of sharded parameters: what is to be measured is not in the part here alone.
  std::vector<int64_t> unsettled_shards() const;
  // Marks a tensor as measured for as long as these are its kept numbers.
  void settle(int64_t position, const py::list& kept);
  // The kept numbers of a tensor (None: absent), and its hyper-parameters.
  std::pair<py::list, std::vector<double>> kept(int64_t position) const;

  // The measuring pass, on the CPU; `updates`: the step follows.
  void measure(bool updates);
  // The step itself, on the CPU.
  void run();

  // Reads, measures and steps with nothing in between; returns false, and nothing has changed,
  // where Python has something to do first.
  bool step(const py::list& groups, const py::dict& state, const std::optional<py::list>& subset,
            double grad_multiplier);

  // The same on CUDA devices: one kernel per device and set of types, on the stream that
  // current_stream(device index) names. grad_scale and found_inf are read there.
  void measure_cuda(const py::function& current_stream, bool updates,
                    const std::optional<at::Tensor>& grad_scale,
                    const std::optional<at::Tensor>& found_inf);
  void run_cuda(const py::function& current_stream, const std::optional<at::Tensor>& grad_scale,
                const std::optional<at::Tensor>& found_inf);
  // How many kernels the last step launched.
  int launches() const { return launches_; }

  // The step as tables, for a back-end that is launched from Python; finish() when it is.
  std::vector<Batch> batches() const;
  void finish();

  // float64 [rows, hyper-parameters + 1]; last the gradient multiplier.
  at::Tensor hyper() const;
  // int64 [rows]: address of a learning rate that is read on the device (lowest bit set: float64,
  // else float32), 0 where it is in hyper(). nullopt: every one is there.
  std::optional<at::Tensor> device_lr() const;

  // The rule depends on the number of a tensor's step: read(group, t) returns its hyper-parameters,
  // and state[p]["step"] counts.
  void read_rows_with(const py::function& read) { read_row_ = read; }

  // parts(name, streams) returns what is here of a sharded parameter, its gradient and its states.
  void read_parts_with(const py::function& parts) { parts_of_ = parts; }

  // The back-end reads learning rates of capturable groups on the device.
  void keep_lr_on_device() { keeps_lr_ = true; }

  // Tensors on this kind of device are taken care of elsewhere.
  void leave(const std::string& device_type) { left_.push_back(at::Device(device_type).type()); }

  // The parameter at a position of Todo::missing, and the index of its group.
  std::pair<py::object, int> at(int64_t position) const;

  // Changes whenever anything does that a segment says, or which of them take part.
  uint64_t generation() const { return generation_; }

  // How often a parameter was found at another address than before.
  int64_t moves() const { return moves_; }

  // Bytes that the plan itself holds.
  int64_t bytes() const;

  // For Python's garbage collector: a parameter may refer to its optimizer.
  int traverse(visitproc visit, void* arg) const;

 private:
  struct Group {
    py::object dict;
    int64_t begin, end;  // positions of its tensors
  };
  struct Entry {
    py::object param;
    PyObject* state = nullptr;  // state[param], owned by the optimizer's dict
    // See key_of. 0: takes no part; 1: is read anew at each step.
    uint64_t key = 0;
    uint8_t itemsize[kMaxStreams] = {};
    bool settled = false;
    c10::VariableVersion version;  // the parameter's: one line of memory a step instead of three
  };
  // A tensor in an optimizer's dict, which owns it: what is dropped between steps is gone. Each
  // read looks whether the dict still has it, before anything else does. As its storage is held,
  // weakly, no other one takes its place.
  struct State {
    PyObject* object = nullptr;
    c10::weak_intrusive_ptr<c10::StorageImpl> storage{c10::intrusive_ptr<c10::StorageImpl>()};

    State() = default;
    explicit State(PyObject* tensor);
    // Of an object that the dict has at this moment: it may be another one at an old address.
    bool has_its_storage() const;
  };
  struct Known;
  struct Row {
    int group;
    int64_t t;
  };

  bool groups_changed(const py::list& groups) const;
  void read_groups(const py::list& groups);
  void read_hyper(double grad_multiplier);
  bool read_device_lr(PyObject* dict, size_t row);
  void read_state(const py::dict& state);
  void read_rows();
  int64_t read_step(int64_t position);
  int row_of(int group, int64_t t);
  std::optional<Todo> look(const py::list& groups, const py::dict& state,
                           const std::optional<py::list>& subset, double grad_multiplier,
                           const std::vector<int64_t>& first);
  void let_go();
  enum class Found { same, grad_moved, param_moved, changed };
  bool check_all();
  void read_entry(int64_t position, Todo* todo);
  bool find_state(int64_t position, size_t k);
  void sit_out(int64_t position);
  void meet(at::DeviceType type, Todo* todo) const;
  // How DTensors are laid out, by stream.
  using Specs = std::array<py::object, kMaxStreams>;
  bool take_parts(int64_t position, std::vector<at::Tensor>* streams);
  bool find_parts(const std::vector<at::Tensor>& streams, const Specs& specs,
                  std::vector<at::Tensor>* parts) const;
  void remember_specs(int64_t position, const std::vector<at::Tensor>& streams,
                      const std::vector<at::Tensor>& parts);
  void prepare(int64_t position, const std::vector<at::Tensor>& streams);
  void describe_kept(int64_t position, const at::Tensor& param, Segment* segment) const;
  void check_number(int64_t position, const char* key, const at::Tensor& number,
                    at::ScalarType dtype, at::Device device) const;
  int group_of(int64_t position) const;
  int64_t find(PyObject* param) const;
  std::string name_of(int64_t position) const;
  void append_needed();
  void make_scratch(const Launch& launch);
  std::vector<c10::Storage> memory() const;
  std::vector<int64_t> positions_of(const py::list& subset) const;
  template <class F>
  void with_launch(F&& f);
  Launch describe_launch(const std::vector<Segment>& segments, const Tiles& tiles) const;
  template <class F>
  void for_each_chosen(F&& f) const;
  // The same, on the CPU by several threads where there are many; f may not call Python.
  template <class F>
  void for_each_chosen_in_threads(F&& f) const;

  const int rule_;
  const RuleInfo& info_;
  const at::DeviceType device_type_;
  std::vector<at::DeviceType> left_;
  bool all_ = true;              // this step is over all tensors,
  std::vector<int64_t> chosen_;  // or over these
  std::vector<py::object> hyper_keys_;
  std::vector<std::vector<std::string>> choices_;
  const std::vector<StateKey> state_keys_;
  std::vector<py::object> state_names_;
  const py::object params_key_, maximize_key_, capturable_key_, step_key_, spec_key_, part_key_;
  py::object read_row_;  // None: the rows are the groups
  py::object parts_of_;

  std::vector<Group> groups_;
  std::vector<Entry> entries_;
  std::vector<State> states_;        // entries x the rule's states: what the segments point into
  std::vector<py::object> kept_;     // entries x the rule's kept numbers, as well
  std::vector<py::object> steps_;    // per entry, where steps are counted
  std::vector<int32_t> by_address_;  // positions, sorted by the parameters' addresses
  // Positions of the parameters in the order of the optimizer's dict; -1: a key that is none.
  std::vector<int32_t> state_order_;
  // A dict whose version is below this one has not changed since everything was last looked up.
  uint64_t state_version_ = 0;
  bool state_is_newer_ = true;  // what it holds may have changed since then
  PyObject* state_ = nullptr;   // the optimizer's dict

  std::vector<c10::Storage> alive_;  // memory of this step, where others may drop it
  // Tensors of this step that nobody else need own: lazily conjugated or negated gradients made
  // real, and the parts here of sharded parameters, gradients and states.
  std::vector<at::Tensor> made_;
  std::vector<std::pair<int64_t, at::Tensor>> sharded_;  // of these the parameters, by position
  // By position: what is laid out so need not be looked at in Python again.
  std::map<int64_t, Specs> specs_;

  std::vector<Segment> segments_;
  std::map<int64_t, std::unique_ptr<Layout>> layouts_;  // by position
  Tiles tiles_;
  bool tiles_changed_ = true;
  int64_t moves_ = 0;
  uint64_t generation_ = 1;
  std::vector<Row> rows_;
  std::vector<double> hyper_, grad_multiplier_;
  std::vector<uint32_t> needed_;  // per row, the state keys that it needs: bit k
  double multiplier_ = 1;
  // What the measuring pass of this step has found, per segment; empty: there was none.
  std::vector<double> tensor_scalars_, tile_sums_;
  bool measures_in_run_ = false;
  std::vector<uint8_t> changed_;  // per entry, whether it must be read anew
  bool begins_ = false;           // a segment may be `first`
  // Per row, a learning rate that a captured graph reads on the device (capturable), or nullptr.
  std::vector<const void*> lr_;
  std::vector<DType> lr_dtype_;
  bool keeps_lr_ = false;
  int launches_ = 0;
#ifdef FUSED_MOMENTUM_CUDA
  void sort_by_device();
  template <class F>
  void on_cuda_devices(const py::function& current_stream,
                       const std::optional<at::Tensor>& grad_scale,
                       const std::optional<at::Tensor>& found_inf, F&& f);

  struct OfDevice {
    std::vector<Segment> segments;
    Tiles tiles;
  };
  std::map<int, OfDevice> by_device_;  // the segments of this step
  uint64_t by_device_generation_ = 0;  // for which by_device_ was made
  std::map<int, std::unique_ptr<cuda::Cuda>> cuda_devices_;
  std::map<int, at::Tensor> cuda_scalars_;  // as tensor_scalars_, by device
#endif
};

template <class F>
void Plan::for_each_chosen(F&& f) const {
  if (all_)
    for (size_t i = 0; i < entries_.size(); i++) f(int64_t(i));
  else
    for (int64_t position : chosen_) f(position);
}

template <class F>
void Plan::for_each_chosen_in_threads(F&& f) const {
  const int64_t count = int64_t(all_ ? entries_.size() : chosen_.size());
  // Beside a GPU the processors have other work, and a thread that waits for one costs more.
  const int64_t grain = device_type_ == at::kCPU ? kTensorsPerThread : std::max<int64_t>(count, 1);
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const auto here = f;  // a copy: the compiler sees that nothing changes what it holds
    const int64_t* chosen = all_ ? nullptr : chosen_.data();
    for (int64_t i = begin; i < end; i++) here(chosen ? chosen[i] : i);
  });
}

// A gradient, no longer lazily conjugated or negated; as it is where it cannot be read, which
// describe() refuses.
at::Tensor resolved(const at::Tensor& grad);

// Fills data, dtype, numel and layout of a segment from its streams p, g, states (undefined:
// absent). `name` is the parameter's in error messages.
void describe(const std::string& name, const std::vector<at::Tensor>& streams, Segment* segment,
              std::unique_ptr<Layout>* layout);

// One launch over lists of tensors on one device: streams[0] the parameters, streams[1] the
// gradients, then the states; a state without tensors is absent. `first` holds one value per
// tensor. On the CUDA kernels where there is current_stream(device index), else on the CPU's.
void run_tensors(int rule, const std::vector<std::vector<at::Tensor>>& streams,
                 const std::vector<double>& hyper, double grad_multiplier,
                 const std::vector<double>& first,
                 const std::optional<py::function>& current_stream);

// A launch on a CUDA device, by nobody's plan.
void run_cuda(const Launch& launch, int device, const py::function& current_stream);

// The number of CUDA devices; raises, with the reason, where there is none.
int cuda_devices();

}  // namespace fused_momentum
