// From torch tensors to a segment: what may be updated, and the error for what may not.
#include <ATen/MemoryOverlap.h>
#include <ATen/SparseCsrTensorUtils.h>
#include <torch/csrc/DynamicTypes.h>

#include "layout.h"
#include "peek.h"
#include "plan.h"

namespace fused_momentum {
namespace {

constexpr const char* kDTypes =
    "torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, "
    "torch.complex128";

// The dtype as Python writes it.
std::string dtype_name(const at::Tensor& tensor) {
  auto* dtype = reinterpret_cast<PyObject*>(torch::getTHPDtype(tensor.scalar_type()));
  return py::str(py::handle(dtype));
}

void check_stream(const std::string& name, const at::Tensor& param, const at::Tensor& tensor) {
  const bool is_sparse = tensor.is_sparse() || at::sparse_csr::is_sparse_compressed(tensor);
  TORCH_CHECK(!is_sparse, name,
              " is sparse; sparse gradients are not supported (make it dense with .to_dense())");
  TORCH_CHECK_TYPE(
      !tensor.is_nested(), name,
      " is a nested tensor; these are not supported (optimize the dense parameters behind it)");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, name, " has layout ", tensor.layout(),
                   "; needed: torch.strided");
  TORCH_CHECK_TYPE(
      !tensor.unsafeGetTensorImpl()->is_python_dispatch(), name,
      " is a tensor subclass without storage of its own; needed: a plain tensor, or DTensors for a "
      "parameter and its gradient");
  TORCH_CHECK_VALUE(tensor.device() == param.device(), name, " is on device ", tensor.device(),
                    ", its parameter on ", param.device(), "; both must be on the same device");
  TORCH_CHECK_VALUE(tensor.sizes() == param.sizes(), name, " has shape ", tensor.sizes(),
                    ", its parameter ", param.sizes(), "; they must be the same");
  TORCH_CHECK_TYPE(tensor.is_complex() == param.is_complex(), name, " has dtype ",
                   dtype_name(tensor), ", its parameter ", dtype_name(param),
                   "; both must be real or both complex");
}

void check_memory(const std::string& name, const at::Tensor& param, const at::Tensor& tensor,
                  bool written) {
  if (tensor.numel() == 0) return;
  TORCH_CHECK(!written || at::has_internal_overlap(tensor) != at::MemOverlap::Yes, name,
              " has elements that share memory (an expanded tensor); give it memory of its own");
  TORCH_CHECK(at::get_overlap_status(param, tensor) != at::MemOverlapStatus::Partial, name,
              " shares a part of its parameter's memory; give it memory of its own");
  // Not of the tensor: with a storage offset nothing is at an address that is not null.
  TORCH_CHECK(tensor.storage().data() != nullptr, name,
              " has no memory: its storage has been given back");
}

}  // namespace

at::Tensor resolved(const at::Tensor& grad) {
  const bool is_there = grad.has_storage() && grad.storage().data() != nullptr;
  return is_there ? grad.resolve_conj().resolve_neg() : grad;
}

void describe(const std::string& name, const std::vector<at::Tensor>& streams, Segment* segment,
              std::unique_ptr<Layout>* layout) {
  static const char* const role[] = {"", ".grad"};
  const at::Tensor& param = streams[0];
  std::vector<Strided> strided;
  Layout made;
  for (size_t s = 0; s < streams.size(); s++) {
    const at::Tensor& tensor = streams[s].defined() ? streams[s] : param;
    const std::string stream_name = name + (s < 2 ? role[s] : " state");
    check_stream(stream_name, param, tensor);
    const std::optional<DType> dtype = dtype_of(tensor.scalar_type());
    TORCH_CHECK_TYPE(dtype, stream_name, " has dtype ", dtype_name(tensor), "; needed: ", kDTypes);
    segment->dtype[s] = *dtype;
    // An absent state has the type that states have by default: no launch of its own for it.
    if (!streams[s].defined() && segment->dtype[s] != DType::f64) segment->dtype[s] = DType::f32;
    check_memory(stream_name, param, tensor, s != 1);
    strided.push_back({tensor.sizes().data(), tensor.strides().data()});
  }
  TORCH_CHECK_TYPE(
      !param.is_conj() && !param.is_neg(), name,
      " is a lazily conjugated or negated view; resolve it with .resolve_conj().resolve_neg()");
  const auto kind = make_layout(int(param.dim()), strided, param.is_complex(), &made);
  TORCH_CHECK(kind != LayoutKind::too_many_dims, name, " with its gradient has more than ",
              kMaxDims, " dimensions that cannot be merged; make the gradient contiguous");
  *layout = kind == LayoutKind::strided ? std::make_unique<Layout>(made) : nullptr;
  segment->layout = layout->get();
  segment->numel = param.numel() * (param.is_complex() ? 2 : 1);
  for (size_t s = 0; s < streams.size(); s++) {
    const at::Tensor& tensor = streams[s];
    segment->data[s] = !tensor.defined() || segment->numel == 0 ? nullptr
                       : s == 1 ? const_cast<void*>(tensor.const_data_ptr())
                                : tensor.mutable_data_ptr();
  }
}

// Raises where a number (undefined: what is there is no tensor) cannot be kept under `key`.
void Plan::check_number(int64_t position, const char* key, const at::Tensor& number,
                        at::ScalarType dtype, at::Device device) const {
  TORCH_CHECK_TYPE(number.defined() && number.has_storage() && number.numel() == 1 &&
                       number.scalar_type() == dtype && number.device() == device,
                   name_of(position), ": its state '", key, "' must be a ",
                   dtype == at::kDouble ? "torch.float64" : "torch.float32",
                   " tensor of one element on ", device);
  TORCH_CHECK(number.storage().data() != nullptr, name_of(position), ": its state '", key,
              "' has no memory: its storage has been given back");
}

}  // namespace fused_momentum
