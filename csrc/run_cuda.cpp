// The plan's step on CUDA devices. Without CUDA in the build, an answer that says so.
#include <torch/csrc/autograd/python_variable.h>

#include "plan.h"
#include "tiles.h"

#ifdef FUSED_MOMENTUM_CUDA

namespace fused_momentum {
namespace {

const float* scalar_on(const std::optional<at::Tensor>& tensor, at::Device device,
                       std::vector<at::Tensor>* alive) {
  if (!tensor) return nullptr;
  alive->push_back(tensor->to(device, at::kFloat, /*non_blocking=*/true));
  return alive->back().const_data_ptr<float>();
}

void raise(const cuda::Status& status) {
  TORCH_CHECK(status.code == 0, "backend='cuda': ", status.message);
}

using Devices = std::map<int, std::unique_ptr<cuda::Cuda>>;

cuda::Cuda& device_of(Devices* devices, int index) {
  auto& device = (*devices)[index];
  if (!device) {
    raise(cuda::check_device(index));
    device = std::make_unique<cuda::Cuda>(index);
  }
  return *device;
}

void* stream_of(const py::function& current_stream, int index) {
  return reinterpret_cast<void*>(py::cast<intptr_t>(current_stream(index)));
}

// What one device has to do.
struct Part {
  cuda::Cuda& cuda;
  at::Device device;
  Launch launch;
  cuda::OnDevice on_device;
  void* stream;
  int launches = 0;
};

}  // namespace

void Plan::sort_by_device() {
  if (by_device_generation_ == generation_) return;
  by_device_.clear();
  for_each_chosen([&](int64_t position) {
    if (segments_[position].numel == 0) return;
    const int index = THPVariable_Unpack(entries_[position].param.ptr()).device().index();
    by_device_[index].segments.push_back(segments_[position]);
  });
  for (auto& [index, part] : by_device_) count_tiles(part.segments, &part.tiles);
  by_device_generation_ = generation_;
}

// Calls f for the part of this step on each device.
template <class F>
void Plan::on_cuda_devices(const py::function& current_stream,
                           const std::optional<at::Tensor>& grad_scale,
                           const std::optional<at::Tensor>& found_inf, F&& f) {
  sort_by_device();
  for (const auto& [index, of_device] : by_device_) {
    const at::Device device(at::kCUDA, at::DeviceIndex(index));
    Part part{device_of(&cuda_devices_, index),
              device,
              describe_launch(of_device.segments, of_device.tiles),
              {},
              stream_of(current_stream, index)};
    std::vector<at::Tensor> alive;
    part.on_device.grad_scale = scalar_on(grad_scale, device, &alive);
    part.on_device.found_inf = scalar_on(found_inf, device, &alive);
    part.on_device.lr = lr_.data();
    part.on_device.lr_dtype = lr_dtype_.data();
    f(part);
    launches_ += part.launches;
  }
}

void Plan::measure_cuda(const py::function& current_stream, bool updates,
                        const std::optional<at::Tensor>& grad_scale,
                        const std::optional<at::Tensor>& found_inf) {
  launches_ = 0;
  on_cuda_devices(current_stream, grad_scale, found_inf, [&](Part& part) {
    // On the current stream, like the kernels: its memory may be used again as soon as it is free.
    const auto options = at::TensorOptions(part.device).dtype(at::kDouble);
    const cuda::Scratch size = cuda::scratch_of(part.launch);
    const at::Tensor tile_sums = at::empty({size.tile_sums}, options);
    const at::Tensor found = at::empty({size.tensor_scalars}, options);
    part.on_device.tensor_scalars = found.mutable_data_ptr<double>();
    raise(part.cuda.measure(part.launch, part.on_device, updates,
                            tile_sums.mutable_data_ptr<double>(), part.stream, &part.launches));
    if (updates) cuda_scalars_[part.device.index()] = found;
  });
}

void Plan::run_cuda(const py::function& current_stream, const std::optional<at::Tensor>& grad_scale,
                    const std::optional<at::Tensor>& found_inf) {
  if (cuda_scalars_.empty()) launches_ = 0;  // else the kernels that measured count too
  on_cuda_devices(current_stream, grad_scale, found_inf, [&](Part& part) {
    const auto found = cuda_scalars_.find(part.device.index());
    if (found != cuda_scalars_.end())
      part.on_device.tensor_scalars = found->second.mutable_data_ptr<double>();
    raise(part.cuda.step(part.launch, part.on_device, part.stream, &part.launches));
  });
  cuda_scalars_.clear();
  finish();
}

void run_cuda(const Launch& launch, int device, const py::function& current_stream) {
  // The GIL keeps calls apart. Never destroyed: at the end of the process CUDA may go first.
  static Devices& devices = *new Devices;
  int launches = 0;
  raise(device_of(&devices, device).step(launch, {}, stream_of(current_stream, device), &launches));
}

int cuda_devices() {
  int count = 0;
  raise(cuda::count_devices(&count));
  return count;
}

}  // namespace fused_momentum

#else

namespace fused_momentum {

void Plan::measure_cuda(const py::function&, bool, const std::optional<at::Tensor>&,
                        const std::optional<at::Tensor>&) {
  TORCH_CHECK(false, "backend='cuda': this build has no CUDA kernels");
}

void Plan::run_cuda(const py::function&, const std::optional<at::Tensor>&,
                    const std::optional<at::Tensor>&) {
  TORCH_CHECK(false, "backend='cuda': this build has no CUDA kernels");
}

void run_cuda(const Launch&, int, const py::function&) {
  TORCH_CHECK(false, "backend='cuda': this build has no CUDA kernels");
}

int cuda_devices() {
  TORCH_CHECK(false, "this build has no CUDA kernels: nvcc was not there when it was built");
}

}  // namespace fused_momentum

#endif
