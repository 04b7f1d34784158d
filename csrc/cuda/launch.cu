// The CUDA runtime's side of the back-end: devices, tables in their memory, launches, errors.
#include <cuda_runtime.h>

#include "kernels.h"
#include "steps.h"

namespace fused_momentum::cuda {
namespace {

const char* what_to_do(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
      return "there is no NVIDIA driver, or one too old for this build (R580 or newer is needed "
             "for "
             "CUDA 13); install one, or use backend='auto'";
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
      return "no such CUDA device is visible; see nvidia-smi and CUDA_VISIBLE_DEVICES";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      return "this build holds no kernels for the device; install again with "
             "TORCH_CUDA_ARCH_LIST set to its compute capability";
    case cudaErrorMemoryAllocation:
      return "free device memory, or use fewer tensors per step";
    default:
      return "CUDA_LAUNCH_BLOCKING=1 and compute-sanitizer find the cause of errors in kernels";
  }
}

Status status_of(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // it has been reported; the next call must not report it again
  return {int(error), "the CUDA back-end could not " + what + ": " + cudaGetErrorString(error) +
                          " (" + cudaGetErrorName(error) + "); " + what_to_do(error)};
}

// Makes a device the current one until the end of a scope.
class Guard {
 public:
  explicit Guard(int device) {
    error_ = cudaGetDevice(&before_);
    changed_ = error_ == cudaSuccess && before_ != device;
    if (changed_) error_ = cudaSetDevice(device);
  }
  ~Guard() {
    if (changed_) cudaSetDevice(before_);
  }
  Status status(int device) const {
    return status_of(error_, "use device " + std::to_string(device));
  }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

struct DeviceTable {
  uint64_t* memory = nullptr;
  size_t capacity = 0;          // words
  std::vector<uint64_t> words;  // what it holds
};

const void* kernel_of(int rule, const DType* dtype, bool large) {
  for (const auto find : {single_pass, half_pass, other_pass})
    if (const void* kernel = find(rule, dtype, large)) return kernel;
  return nullptr;
}

}  // namespace

struct Cuda::Device final : Machine {
  explicit Device(int number) : number(number) {}

  ~Device() {
    if (tables.empty()) return;
    Guard guard(number);
    for (DeviceTable& table : tables) cudaFree(table.memory);
    cudaEventDestroy(used);
  }

  int processors() override {
    if (processors_ == 0 &&
        cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, number) != cudaSuccess)
      processors_ = 1;
    return processors_;
  }

  Status is_capturing(bool* capturing) override {
    cudaStreamCaptureStatus found;
    const cudaError_t error = cudaStreamIsCapturing(stream, &found);
    *capturing = error == cudaSuccess && found != cudaStreamCaptureStatusNone;
    return status_of(error, "ask whether a graph is being captured");
  }

  Status reserve(DeviceTable* table, size_t words) {
    if (words <= table->capacity) return {};
    // cudaFree waits until no kernel reads the old table.
    cudaFree(table->memory);
    *table = {};
    const size_t capacity = words + words / 2;
    const Status status =
        status_of(cudaMalloc(&table->memory, capacity * 8),
                  "allocate " + std::to_string(capacity * 8) + " bytes for the table of tensors");
    if (status.code != 0) return *table = {}, status;
    table->capacity = capacity;
    return {};
  }

  // A stream must not read or replace a table before the last stream is done with it.
  Status follow() {
    if (used == nullptr) {
      const auto error = cudaEventCreateWithFlags(&used, cudaEventDisableTiming);
      if (error != cudaSuccess) return status_of(error, "create an event");
    } else if (stream != last_stream) {
      const auto error = cudaStreamWaitEvent(stream, used);
      if (error != cudaSuccess) return status_of(error, "order two streams");
    }
    last_stream = stream;
    return {};
  }

  Status upload(int index, const std::vector<uint64_t>& words, const uint64_t** address) override {
    if (size_t(index) >= tables.size()) tables.resize(index + 1);
    DeviceTable& table = tables[index];
    Status status = follow();
    if (status.code == 0) status = reserve(&table, words.size());
    if (status.code != 0) return status;
    tables_used = true;
    *address = table.memory;
    if (table.words == words) return {};
    table.words.clear();
    // From pageable memory, which is free again when the call returns.
    status = status_of(cudaMemcpyAsync(table.memory, words.data(), words.size() * 8,
                                       cudaMemcpyHostToDevice, stream),
                       "copy the table of tensors to the device");
    if (status.code == 0) table.words = words;
    return status;
  }

  Status start(int rule, bool measures, const Table& table, int* launches) override {
    const bool large = table.words() > SmallArgs::kWords;
    if (large)
      fill(table, &arguments.large);
    else
      fill(table, &arguments.small);
    const Header& header = table.header;
    const uint32_t blocks = blocks_of(header);
    if (!measures) return start(kernel_of(rule, header.dtype, large), blocks, launches);
    const Status status = start(tile_pass(rule, header.dtype, large), blocks, launches);
    if (status.code != 0) return status;
    return start(tensor_pass(rule, large), header.tensor_count, launches);
  }

  Status start(const void* kernel, uint32_t blocks, int* launches) {
    void* parameters[] = {&arguments};
    ++*launches;
    return status_of(cudaLaunchKernel(kernel, blocks, kThreads, parameters, 0, stream),
                     "launch a kernel on device " + std::to_string(number));
  }

  // After the last kernel of a step: from here on another stream may touch the tables.
  Status finish(Status status) {
    if (tables_used && status.code == 0)
      status = status_of(cudaEventRecord(used, stream), "record an event");
    tables_used = false;
    return status;
  }

  const int number;
  cudaStream_t stream = nullptr, last_stream = nullptr;
  cudaEvent_t used = nullptr;
  bool tables_used = false;
  std::vector<DeviceTable> tables;
  union Arguments {
    Arguments() {}
    SmallArgs small;
    LargeArgs large;
  } arguments;

 private:
  int processors_ = 0;
};

Cuda::Cuda(int device) : device_(new Device(device)) {}
Cuda::~Cuda() = default;

template <class F>
Status Cuda::on(void* stream, F&& run) {
  Guard guard(device_->number);
  const Status status = guard.status(device_->number);
  if (status.code != 0) return status;
  device_->stream = static_cast<cudaStream_t>(stream);
  device_->tiles_per_block = tiles_per_block;
  return device_->finish(run(*device_));
}

Status Cuda::step(const Launch& launch, const OnDevice& on_device, void* stream, int* launches) {
  return on(stream,
            [&](Machine& machine) { return run_step(launch, on_device, machine, launches); });
}

Status Cuda::measure(const Launch& launch, const OnDevice& on_device, bool updates,
                     double* tile_sums, void* stream, int* launches) {
  return on(stream, [&](Machine& machine) {
    return run_measure(launch, on_device, updates, tile_sums, machine, launches);
  });
}

Scratch scratch_of(const Launch& launch) {
  const RuleInfo& rule = rule_infos()[launch.rule];
  return {rule.sums * count_tiles(launch), rule.tensor_scalars * launch.segment_count};
}

Status count_devices(int* count) {
  *count = 0;
  Status status = status_of(cudaGetDeviceCount(count), "find a device");
  if (status.code == 0 && *count == 0) status = status_of(cudaErrorNoDevice, "find a device");
  return status;
}

Status check_device(int device) {
  Guard guard(device);
  const Status status = guard.status(device);
  if (status.code != 0) return status;
  const DType single[kMaxStreams] = {};
  cudaFuncAttributes attributes;
  return status_of(cudaFuncGetAttributes(&attributes, kernel_of(0, single, false)),
                   "load its kernels for device " + std::to_string(device));
}

}  // namespace fused_momentum::cuda
