// Sharded parameters (torch's DTensor): the plan works on the parts that are here.
#include <torch/csrc/autograd/python_variable.h>

#include "plan.h"

namespace fused_momentum {

// Puts the parts that are here in the place of a sharded parameter's streams; returns whether it is
// one.
bool Plan::take_parts(int64_t position, std::vector<at::Tensor>* streams) {
  if (!streams->front().unsafeGetTensorImpl()->is_python_dispatch() || parts_of_.is_none())
    return false;
  std::vector<at::Tensor> parts(streams->size());
  const auto known = specs_.find(position);
  if (known == specs_.end() || !find_parts(*streams, known->second, &parts)) {
    const auto found = py::cast<std::vector<std::optional<at::Tensor>>>(
        parts_of_(name_of(position), py::cast(*streams)));
    if (found[0]->is_same(streams->front())) return false;
    for (size_t s = 0; s < parts.size(); s++)
      if (found[s]) parts[s] = *found[s];
    remember_specs(position, *streams, parts);
  }
  *streams = parts;
  made_.insert(made_.end(), parts.begin(), parts.end());
  sharded_.emplace_back(position, parts[0]);
  return true;
}

// The parts of streams that are laid out as they were when Python last looked at them; returns
// whether they are.
bool Plan::find_parts(const std::vector<at::Tensor>& streams, const Specs& specs,
                      std::vector<at::Tensor>* parts) const {
  for (size_t s = 0; s < streams.size(); s++) {
    if (streams[s].defined() != bool(specs[s])) return false;
    if (!streams[s].defined()) continue;
    const py::object tensor = py::cast(streams[s]);
    const py::object spec = py::getattr(tensor, spec_key_, py::none());
    if (!spec.is(specs[s]) && !spec.equal(specs[s])) return false;
    const py::object part = py::getattr(tensor, part_key_, py::none());
    if (!THPVariable_Check(part.ptr())) return false;
    (*parts)[s] = THPVariable_Unpack(part.ptr());
    if ((*parts)[s].unsafeGetTensorImpl()->is_python_dispatch()) return false;  // on its way
  }
  return true;
}

// Remembers how the streams of a sharded parameter are laid out, where their own parts are what
// Python has returned: a gradient that it had to bring to the parameter's layout has others.
void Plan::remember_specs(int64_t position, const std::vector<at::Tensor>& streams,
                          const std::vector<at::Tensor>& parts) {
  specs_.erase(position);
  Specs specs;
  for (size_t s = 0; s < streams.size(); s++) {
    if (!streams[s].defined()) continue;
    const py::object tensor = py::cast(streams[s]);
    specs[s] = py::getattr(tensor, spec_key_, py::none());
    const py::object part = py::getattr(tensor, part_key_, py::none());
    if (specs[s].is_none() || !THPVariable_Check(part.ptr())) return;
    const at::Tensor& own = THPVariable_Unpack(part.ptr());
    const bool same = own.is_alias_of(parts[s]) && own.sizes() == parts[s].sizes() &&
                      own.storage_offset() == parts[s].storage_offset();
    if (own.unsafeGetTensorImpl()->is_python_dispatch() || !same) return;
  }
  specs_[position] = std::move(specs);
}

std::vector<int64_t> Plan::unsettled_shards() const {
  std::vector<int64_t> positions;
  for (const auto& [position, part] : sharded_)
    if (!entries_[position].settled) positions.push_back(position);
  return positions;
}

}  // namespace fused_momentum
