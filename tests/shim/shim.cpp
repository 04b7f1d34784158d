// Runs every block and thread of the CUDA kernels' own source on the CPU, one after the other in a
// shuffled order, through the same packing of tables as the GPU. Called from Python by ctypes.
#define FM_MACHINE "machine.h"

#include <deque>
#include <memory>
#include <numeric>
#include <random>

#include "cuda/signatures.cuh"
#include "cuda/steps.h"
#include "cuda/sums.cuh"
#include "layout.h"

using namespace fused_momentum;
using namespace fused_momentum::cuda;

extern "C" {

struct ShimTensor {
  void* data[kMaxStreams];
  int64_t numel, sizes[kMaxDims], strides[kMaxStreams][kMaxDims];
  double first;
  int32_t row, dims;
  uint8_t dtype[kMaxStreams];
};

struct ShimLaunch {
  const ShimTensor* tensors;
  int64_t count;
  const double *hyper, *grad_multiplier;
  int32_t rule, hyper_stride;
  const float *grad_scale, *found_inf;
  uint8_t* first;
  uint32_t* ticket;
  const void* const* lr;
  const uint8_t* lr_dtype;
  int32_t capturing, tiles_per_block, seed;
  int32_t skip_block, repeat_block;  // -1, or a fault to make
  int64_t first_block;               // blocks before it are left out
  double *tile_sums, *sums;
};

struct ShimResult {
  int32_t code, launches, uploads, large, own_kernels;
  int64_t blocks, strays, misaligned, vectors, scalars;
};
}

namespace {

struct Shim final : Machine {
  Shim(const ShimLaunch& launch, ShimResult* result) : launch(launch), result(result) {
    tiles_per_block = launch.tiles_per_block;
    random.seed(launch.seed);
  }

  int processors() override { return 1; }

  Status is_capturing(bool* capturing) override {
    *capturing = launch.capturing;
    return {};
  }

  Status upload(int, const std::vector<uint64_t>& words, const uint64_t** address) override {
    uploaded.push_back(words);
    *address = uploaded.back().data();
    result->uploads++;
    return {};
  }

  Status start(int rule, const Table& table) override {
    if (table.words() > SmallArgs::kWords) {
      result->large++;
      return start_with<LargeArgs>(rule, table);
    }
    return start_with<SmallArgs>(rule, table);
  }

  template <class A>
  Status start_with(int rule, const Table& table) {
    auto args = std::make_unique<A>();
    fill(table, args.get());
    if (rule == kGradSums) {
      sum<GradTerms>(*args);
      return {};
    }
    const auto drive = [&](auto pass) { this->drive<decltype(pass)>(*args); };
    const DType* dtype = args->header.dtype;
    const bool own =
        Singles::with_pass(rule, dtype, drive) || Halves::with_pass(rule, dtype, drive);
    result->own_kernels += own;
    if (!own && !Others::with_pass(rule, dtype, drive)) return {1, "no kernel"};
    return {};
  }

  // The numbers from `begin` on and below `end` in an order of no order.
  std::vector<uint32_t> shuffled(uint32_t end, uint32_t begin = 0) {
    std::vector<uint32_t> order(end - begin);
    std::iota(order.begin(), order.end(), begin);
    std::shuffle(order.begin(), order.end(), random);
    return order;
  }

  template <class P, class A>
  void drive(const A& args) {
    const uint32_t grid = blocks_of(args.header);
    std::vector<uint32_t> blocks = shuffled(grid, uint32_t(launch.first_block));
    result->blocks += grid;
    if (launch.repeat_block >= 0) blocks.push_back(launch.repeat_block);
    for (uint32_t block : blocks) {
      if (int64_t(block) == launch.skip_block) continue;
      for (uint32_t thread : shuffled(kThreads)) P::run(args, block, int(thread));
      if (args.header.ticket == nullptr) continue;
      if ((*args.header.ticket)++ == grid - 1)
        for (uint32_t thread : shuffled(kThreads)) clear_first(args, int(thread));
    }
  }

  template <class F>
  void for_each_thread(F&& f) {
    for (uint32_t thread : shuffled(kThreads)) f(int(thread));
  }

  template <class Terms, class A>
  void sum(const A& args) {
    using S = Sums<Terms>;
    Lanes<S::kSums> lanes;
    const auto halve = [&] {
      for (int h = kThreads / 2; h > 0; h /= 2)
        for_each_thread([&](int thread) { S::halve_lanes(h, thread, lanes); });
    };
    for (uint32_t tile : shuffled(args.header.tiles)) {
      for_each_thread([&](int thread) { S::gather_tile(args, tile, thread, lanes); });
      halve();
      S::store_tile(args, tile, lanes);
    }
    for (uint32_t i : shuffled(args.header.tensor_count)) {
      for_each_thread([&](int thread) { S::gather_tensor(args, i, thread, lanes); });
      halve();
      S::store_tensor(args, i, lanes);
    }
  }

  const ShimLaunch& launch;
  ShimResult* result;
  std::mt19937 random;
  std::deque<std::vector<uint64_t>> uploaded;
};

// The segment of a tensor, as csrc/describe.cpp makes it.
bool describe(const ShimTensor& tensor, int streams, Segment* segment, Layout* layout) {
  std::vector<Strided> strided;
  for (int s = 0; s < streams; s++) {
    segment->data[s] = tensor.numel == 0 ? nullptr : tensor.data[s];
    segment->dtype[s] = DType(tensor.dtype[s]);
    strided.push_back({tensor.sizes, tensor.strides[tensor.data[s] == nullptr ? 0 : s]});
  }
  segment->numel = tensor.numel;
  segment->row = tensor.row;
  segment->tensor[0] = tensor.first;
  const auto kind = make_layout(tensor.dims, strided, false, layout);
  segment->layout = kind == LayoutKind::strided ? layout : nullptr;
  return kind != LayoutKind::too_many_dims;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void shim_memory(const Region* regions, int count) {
  memory = {};
  memory.regions.assign(regions, regions + count);
}

// Words of arguments, and of a row: what Python needs to know how many tensors fit.
__attribute__((visibility("default"))) int shim_words(int large) {
  return large ? LargeArgs::kWords : SmallArgs::kWords;
}

__attribute__((visibility("default"))) void shim_run(const ShimLaunch* given, ShimResult* result) {
  *result = {};
  const bool sums = given->rule == kGradSums;
  const Shape shape = sums ? Shape{} : shape_of(given->rule);
  std::vector<Segment> segments(given->count);
  std::vector<Layout> layouts(given->count);
  for (int64_t i = 0; i < given->count; i++)
    if (!describe(given->tensors[i], shape.streams, &segments[i], &layouts[i])) result->code = 1;
  Launch launch;
  launch.rule = given->rule;
  launch.segments = segments.data();
  launch.segment_count = given->count;
  launch.hyper = given->hyper;
  launch.hyper_stride = given->hyper_stride;
  launch.grad_multiplier = given->grad_multiplier;
  OnDevice on_device{given->grad_scale, given->found_inf, given->first,
                     given->ticket,     given->lr,        nullptr};
  on_device.lr_dtype = reinterpret_cast<const DType*>(given->lr_dtype);
  Shim shim(*given, result);
  const Status status = sums ? run_grad_sums(launch, given->tile_sums, given->sums, shim)
                             : run_step(launch, on_device, shim, &result->launches);
  result->code |= status.code;
  result->strays = memory.strays;
  result->misaligned = memory.misaligned;
  result->vectors = memory.vectors;
  result->scalars = memory.scalars;
}
}
