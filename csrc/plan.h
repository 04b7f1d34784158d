// The plan: what one step works on, cached between steps and checked at each. One walk over the
// parameter groups reads every parameter and gradient (address, dtype, shape, strides) and every
// state; only what changed is worked out anew.
#pragma once

#include <torch/extension.h>

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "launch.h"

namespace fused_momentum {

struct StateKey {
  std::string name;
  int when;  // index of the hyper-parameter that must not be zero, or -1
};

class Plan {
 public:
  Plan(int rule, const std::vector<std::string>& hyper_keys, std::vector<StateKey> state_keys);

  // What must be done before a step can be: make states for the tensors at these positions, or find
  // a back-end for tensors on other devices.
  struct Todo {
    std::vector<int64_t> missing;
    bool others = false;
  };

  // One step over every CPU parameter with a gradient, or over those of `subset`. Gradients are
  // multiplied by grad_multiplier first. Tensors listed in `first` take their first step. Where
  // there is something to do first, nothing is updated. `others`: tensors on other devices are
  // taken care of.
  std::optional<Todo> step(const py::list& groups, const py::dict& state,
                           const std::optional<py::list>& subset, double grad_multiplier,
                           const std::vector<int64_t>& first, bool others);

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
  void read_state(const py::dict& state);
  bool read_entry(int64_t position, Todo* todo);
  void sit_out(int64_t position);
  void prepare(int64_t position, const at::Tensor& param, const at::Tensor& grad);
  int64_t find(PyObject* param) const;
  std::string name_of(int64_t position) const;
  bool needs(const StateKey& key, int row) const;
  std::vector<int64_t> positions_of(const py::list& subset) const;
  void run_all();
  void run_subset(const std::vector<int64_t>& positions);
  void run(const std::vector<Segment>& segments, const std::vector<int64_t>& tile_ends) const;
  void finish(int64_t position);

  const int rule_;
  std::vector<py::object> hyper_keys_;
  const std::vector<StateKey> state_keys_;
  std::vector<py::object> state_names_;
  const py::object params_key_, maximize_key_;

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
};

// Fills data, dtype, numel and layout of a segment from its streams p, g, states (undefined:
// absent). `name` is the parameter's in error messages.
void describe(const std::string& name, const std::vector<at::Tensor>& streams, Segment* segment,
              std::unique_ptr<Layout>* layout);

}  // namespace fused_momentum
