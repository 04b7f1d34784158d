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

}  // namespace

void Plan::run_cuda(const py::function& current_stream, const std::optional<at::Tensor>& grad_scale,
                    const std::optional<at::Tensor>& found_inf) {
  launches_ = 0;
  std::map<int, std::vector<Segment>> by_device;
  for_each_chosen([&](int64_t position) {
    if (segments_[position].numel == 0) return;
    const int index = THPVariable_Unpack(entries_[position].param.ptr()).device().index();
    by_device[index].push_back(segments_[position]);
  });
  for (auto& [index, segments] : by_device) {
    const at::Device device(at::kCUDA, at::DeviceIndex(index));
    auto& cuda_device = cuda_devices_[index];
    if (!cuda_device) {
      raise(cuda::check_device(index));
      cuda_device = std::make_unique<cuda::Cuda>(index);
    }
    std::vector<int64_t> tile_ends;
    count_tiles(segments, &tile_ends);
    const Launch launch = describe_launch(segments, tile_ends);
    std::vector<at::Tensor> alive;
    cuda::OnDevice on_device;
    on_device.grad_scale = scalar_on(grad_scale, device, &alive);
    on_device.found_inf = scalar_on(found_inf, device, &alive);
    on_device.lr = lr_.data();
    on_device.lr_dtype = lr_dtype_.data();
    const auto stream = py::cast<intptr_t>(current_stream(index));
    int launches = 0;
    raise(cuda_device->step(launch, on_device, reinterpret_cast<void*>(stream), &launches));
    launches_ += launches;
  }
  finish();
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

int cuda_devices() {
  TORCH_CHECK(false, "this build has no CUDA kernels: nvcc was not there when it was built");
}

}  // namespace fused_momentum

#endif
