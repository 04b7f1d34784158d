// Runs every block and thread of the CUDA kernels' own source on the CPU, one after the other in a
// shuffled order, through the same packing of tables as the GPU. Called from Python by ctypes.
#define FM_MACHINE "machine.h"
#include "toys.h"

#include <deque>
#include <memory>
#include <numeric>
#include <random>

#include "cuda/measure.cuh"
#include "cuda/pass.cuh"
#include "cuda/signatures.cuh"
#include "cuda/steps.h"
#include "layout.h"

using namespace fused_momentum;
using namespace fused_momentum::cuda;

extern "C" {

struct ShimTensor {
  void *data[kMaxStreams], *kept[kMaxKept];
  int64_t numel, sizes[kMaxDims], strides[kMaxStreams][kMaxDims];
  int32_t row, dims;
  uint8_t dtype[kMaxStreams], first;
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
  int32_t measures, updates;         // a measuring pass; whether the update follows
  double *tile_sums, *tensor_scalars;
  uint64_t generation;
};

struct ShimResult {
  int32_t code, launches, uploads, large, own_kernels, kept;
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

  Status start(int rule, bool measures, const Table& table, int* launches) override {
    *launches += measures ? 2 : 1;
    auto args = std::make_unique<LargeArgs>();
    if (table.words() > SmallArgs::kWords) {
      result->large++;
      fill(table, args.get());
    } else {  // the kernels for small arguments are the same but for their size: compiled once
      auto small = std::make_unique<SmallArgs>();
      fill(table, small.get());
      args->header = small->header;
      std::copy(small->words, std::end(small->words), args->words);
    }
    const auto drive = [&](auto types) {
      using Types = decltype(types);
      if (!measures)
        this->update<Pass<Types>>(*args);
      else if constexpr (!std::is_void_v<typename Types::Rule::Measure>)
        this->measure<Types>(*args);
    };
    const DType* dtype = args->header.dtype;
    const bool own = measures ? Measured::with_types(rule, dtype, drive)
                              : Singles::with_types(rule, dtype, drive) ||
                                    Halves::with_types(rule, dtype, drive);
    result->own_kernels += own;
    if (!own && !Others::with_types(rule, dtype, drive)) return {1, "no kernel"};
    return {};
  }

  // The numbers from `begin` on and below `end` in an order of no order.
  std::vector<uint32_t> shuffled(uint32_t end, uint32_t begin = 0) {
    std::vector<uint32_t> order(end - begin);
    std::iota(order.begin(), order.end(), begin);
    std::shuffle(order.begin(), order.end(), random);
    return order;
  }

  // The blocks that a launch over tiles runs, faults included.
  std::vector<uint32_t> blocks(const Header& header) {
    const uint32_t grid = blocks_of(header);
    result->blocks += grid;
    std::vector<uint32_t> order = shuffled(grid, uint32_t(launch.first_block));
    if (launch.repeat_block >= 0) order.push_back(launch.repeat_block);
    order.erase(std::remove(order.begin(), order.end(), uint32_t(launch.skip_block)), order.end());
    return order;
  }

  template <class P, class A>
  void update(const A& args) {
    for (uint32_t block : blocks(args.header)) {
      for_each_thread([&](int thread) { P::run(args, block, thread); });
      if (args.header.ticket == nullptr) continue;
      if ((*args.header.ticket)++ == blocks_of(args.header) - 1)
        for_each_thread([&](int thread) { clear_first(args, thread); });
    }
  }

  template <class F>
  void for_each_thread(F&& f) {
    for (uint32_t thread : shuffled(kThreads)) f(int(thread));
  }

  template <int kSums>
  void halve(Lanes<kSums>& lanes) {
    for (int h = kThreads / 2; h > 0; h /= 2)
      for_each_thread([&](int thread) { lanes.halve(h, thread); });
  }

  // Calls f for each thread; whether they all return true. All must return the same.
  template <class F>
  bool agree(F&& f) {
    int yes = 0;
    for_each_thread([&](int thread) { yes += f(thread) ? 1 : 0; });
    if (yes != 0 && yes != kThreads) result->code = 1;
    return yes == kThreads;
  }

  // The kernels of csrc/cuda/measure.cu.
  template <class Types, class A>
  void measure(const A& args) {
    using Tiles = TilePass<Types>;
    using Tensors = TensorPass<typename Types::Rule>;
    Lanes<Tiles::kSums> lanes;
    for (uint32_t block : is_skipped(args.header) ? std::vector<uint32_t>() : blocks(args.header)) {
      const auto tiles = tiles_of_block(args.header, block);
      std::deque<Tiles> threads;
      for (int thread = 0; thread < kThreads; thread++)
        threads.emplace_back(args, tiles.begin, thread);
      for (uint32_t tile = tiles.begin; tile < tiles.end; tile++) {
        if (!agree([&](int thread) { return threads[thread].gather(args, tile, lanes); })) continue;
        halve(lanes);
        Tiles::store(args, tile, lanes);
      }
    }
    for (uint32_t i : shuffled(args.header.tensor_count)) {
      const bool measured =
          agree([&](int thread) { return Tensors::gather(args, i, thread, lanes); });
      if (measured) halve(lanes);
      Tensors::settle(args, i, measured, lanes);
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
  segment->first = tensor.first != 0;
  std::copy(tensor.kept, tensor.kept + kMaxKept, segment->kept);
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
  const int streams = streams_of(rule_infos()[given->rule]);
  std::vector<Segment> segments(given->count);
  std::vector<Layout> layouts(given->count);
  for (int64_t i = 0; i < given->count; i++)
    if (!describe(given->tensors[i], streams, &segments[i], &layouts[i])) result->code = 1;
  Launch launch;
  launch.rule = given->rule;
  launch.segments = segments.data();
  launch.segment_count = given->count;
  launch.hyper = given->hyper;
  launch.hyper_stride = given->hyper_stride;
  launch.grad_multiplier = given->grad_multiplier;
  OnDevice on_device;
  on_device.grad_scale = given->grad_scale;
  on_device.found_inf = given->found_inf;
  on_device.first = given->first;
  on_device.ticket = given->ticket;
  on_device.lr = given->lr;
  on_device.lr_dtype = reinterpret_cast<const DType*>(given->lr_dtype);
  on_device.tensor_scalars = given->tensor_scalars;
  launch.generation = given->generation;
  // A machine that goes on from step to step.
  static Packed packed;
  Shim shim(*given, result);
  shim.packed = std::move(packed);
  bool kept = false;
  result->code |= is_packed(launch, shim, &kept).code;
  result->kept = kept;
  const Status status = given->measures ? run_measure(launch, on_device, given->updates,
                                                      given->tile_sums, shim, &result->launches)
                                        : run_step(launch, on_device, shim, &result->launches);
  result->code |= status.code;
  packed = std::move(shim.packed);
  result->strays = memory.strays;
  result->misaligned = memory.misaligned;
  result->vectors = memory.vectors;
  result->scalars = memory.scalars;
}
}
