// The CUDA back-end as the rest of the extension sees it: plain C++, no torch, no CUDA headers.
//
// Every failure comes back as a Status that says what failed and what to do; a step whose tables
// could not be made has changed nothing. Nothing here waits for the device.
#pragma once

#include <memory>
#include <string>

#include "../launch.h"

namespace fused_momentum::cuda {

struct Status {
  int code = 0;         // 0, else a cudaError_t
  std::string message;  // empty where code is 0
};

// How many CUDA devices there are; where there is none, the status says why.
Status count_devices(int* count);

// Whether the kernels of this build run on a device.
Status check_device(int device);

// What the kernels of a step read from device memory, in stream order. All optional.
struct OnDevice {
  const float* grad_scale = nullptr;  // gradients are multiplied by float(1 / grad_scale)
  const float* found_inf = nullptr;   // not zero: the step changes nothing
  // Per segment of the launch, instead of Segment::first: 1 where it takes its first step, cleared
  // once it has taken it. ticket: one number that is 0 and returns to 0. Both or neither.
  uint8_t* first = nullptr;
  uint32_t* ticket = nullptr;
  // Per row (arrays on the host): where its learning rate is; nullptr: hyper[0] of the row. dtype
  // is f32 or f64.
  const void* const* lr = nullptr;
  const DType* lr_dtype = nullptr;
  // Per segment the rule's kTensor scalars of this step: `measure` writes them, `step` reads them.
  // nullptr: `first`, then zeros.
  double* tensor_scalars = nullptr;
};

// How many doubles a measuring pass needs on the device: to work in, and for what it finds.
struct Scratch {
  int64_t tile_sums, tensor_scalars;
};
Scratch scratch_of(const Launch& launch);

// One device, and the tables on it for launches of more tensors than fit into kernel arguments.
// A plan has one per device; calls on it must not overlap. `stream` is a cudaStream_t.
class Cuda {
 public:
  explicit Cuda(int device);
  ~Cuda();

  // One kernel for all segments of the same types; *launches is how many there were. While a graph
  // is captured, and the tensors do not fit into kernel arguments, one kernel for each part that
  // does.
  Status step(const Launch& launch, const OnDevice& on_device, void* stream, int* launches);

  // The rule's pass before the update, in two kernels where `step` has one.
  // - The first sums the rule's terms over each segment in float64, in an order that depends on the
  //   segment's size alone (sums.cuh), and writes the states that the pass writes.
  // - The second works out the segment's tensor scalars and kept numbers, and writes them.
  // - Segments that are settled, and all of them where found_inf is not zero, are left as they are:
  //   their scalars are those they came with. Segments without elements have none.
  // updates: whether `step` follows. tile_sums is free again when the pass is done. An error for a
  // rule that measures nothing.
  Status measure(const Launch& launch, const OnDevice& on_device, bool updates, double* tile_sums,
                 void* stream, int* launches);

  // Tiles that a block works on; 0: chosen by the number of tiles. For measurements.
  int tiles_per_block = 0;

 private:
  template <class F>
  Status on(void* stream, F&& run);

  struct Device;
  std::unique_ptr<Device> device_;
};

}  // namespace fused_momentum::cuda
