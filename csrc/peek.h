// What the plan looks at in torch's tensors and Python's dicts at every step, without calls.
#pragma once

#include <c10/core/impl/COWDeleter.h>
#include <torch/csrc/autograd/variable.h>

#include <cstring>
#include <optional>

#include "launch.h"

namespace fused_momentum {

// How a stream of this type is stored; of complex numbers, each of their two halves.
inline std::optional<DType> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
    case at::kComplexFloat:
      return DType::f32;
    case at::kDouble:
    case at::kComplexDouble:
      return DType::f64;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      return std::nullopt;
  }
}

// param.grad, without its warning for tensors that are no leaves; nullptr: there is none.
inline const at::Tensor* grad_of(const at::Tensor& param) {
  const auto* meta =
      static_cast<torch::autograd::AutogradMeta*>(param.unsafeGetTensorImpl()->autograd_meta());
  return meta && meta->grad_.defined() ? &meta->grad_ : nullptr;
}

// Up to Python 3.11: the number of the dict's last change, from one counter for all dicts. Later
// versions do not tell: always 0, so that no dict counts as unchanged.
inline uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030c0000
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  return 0;
#endif
}

// Whether both count the changes of one tensor and its views.
inline bool is_same(const c10::VariableVersion& a, const c10::VariableVersion& b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

// Where the elements of a strided tensor begin; nullptr: its memory has been given back, or is to
// be written and shared with a lazy clone, which torch parts from it only outside parallel regions.
inline char* address_of(const c10::TensorImpl* impl, int itemsize, bool written) {
  const at::DataPtr& memory =
      impl->unsafe_storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks();
  if (written && memory.get_deleter() == c10::impl::cow::cow_deleter) return nullptr;
  char* const data = static_cast<char*>(memory.get());
  return data ? data + impl->storage_offset() * itemsize : nullptr;
}

// False for a nested or compressed tensor, which lacks sizes or strides, and for a subclass that
// Python must be asked about: threads without the GIL may not.
inline bool has_sizes(const c10::TensorImpl* impl) {
  constexpr c10::DispatchKeySet others(
      {c10::DispatchKey::NestedTensor, c10::DispatchKey::SparseCsr, c10::DispatchKey::Python});
  return !impl->key_set().has_any(others);
}

// The key of one number more. The factor is the golden ratio's, of which no small multiple comes
// near a whole number: two pairs of sizes with one key would have more than 2^62 elements.
inline uint64_t mix(uint64_t key, uint64_t number) {
  return (key + number) * 0x9e3779b97f4a7c15u;
}

// The dispatch keys tell kind of device, layout, subclass and lazy conjugation apart.
inline uint64_t with_kind(uint64_t key, const c10::TensorImpl* impl) {
  const c10::DispatchKeySet keys = impl->key_set();
  const bool has_index = !keys.has_backend(c10::BackendComponent::CPUBit);
  const uint64_t index = has_index ? uint8_t(impl->device().index()) : 0;
  return mix(mix(key, keys.raw_repr()), index << 8 | uint8_t(impl->dtype().toScalarType()));
}

[[gnu::noinline]] inline uint64_t with_layouts(uint64_t key, const c10::TensorImpl* param,
                                               const c10::TensorImpl* grad) {
  for (const auto& numbers : {param->strides(), grad->sizes(), grad->strides()}) {
    key = mix(key, numbers.size());
    for (const int64_t number : numbers) key = mix(key, uint64_t(number));
  }
  return key;
}

// Changes whenever dtype, device, shape or memory order of a parameter or its gradient do,
// or which states are needed. Neither 0 nor 1.
[[gnu::always_inline]] inline uint64_t key_of(const c10::TensorImpl* param,
                                              const c10::TensorImpl* grad, uint32_t states) {
  const c10::IntArrayRef sizes = param->sizes(), grad_sizes = grad->sizes();
  // Contiguous and of one shape, as most are: that shape is all there is to tell.
  bool alike = param->is_contiguous() && grad->is_contiguous() && sizes.size() == grad_sizes.size();
  uint64_t key = with_kind(with_kind(0, param), grad);
  key = mix(key, uint64_t(states) << 8 | sizes.size());
  for (size_t d = 0; d < sizes.size(); d++) {
    key = mix(key, uint64_t(sizes[d]));
    alike = alike && sizes[d] == grad_sizes[d];
  }
  return (alike ? key : with_layouts(key, param, grad)) | 2;
}

}  // namespace fused_momentum
