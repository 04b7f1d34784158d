// The table that a kernel reads its work from: 64-bit words, in the kernel's arguments where they
// fit, else in device memory. Plain C++ that the host and the device compile.
//
// Words of a row of hyper-parameters (stride kHyper + 2):
//   hyper-parameters as doubles, gradient multiplier as a double,
//   address of a learning rate on the device (lowest bit set: a double, else a float) or 0.
// Words of n tensors:
//   n of `Entry`, then n addresses for each stream in turn, then n for each kept number in turn (0:
//   absent). Where the entry says `strided`, the address of stream 0 is the number of the word at
//   which its layout begins:
//   address of each stream, dims, and for each dimension: size, 1 / size, stride in each stream.
#pragma once

#include "../launch.h"

#ifdef __CUDACC__
#define FM_HOST_DEVICE __host__ __device__ __forceinline__
#define FM_DEVICE __device__ __forceinline__
#else
#define FM_HOST_DEVICE inline
#define FM_DEVICE inline
#endif

namespace fused_momentum::cuda {

constexpr int kThreads = 128;
constexpr int kPerThread = kTile / kThreads;

// One tensor in one word: tile_end is the number of tiles of the launch up to and including it.
struct Entry {
  uint32_t tile_end;
  int tail;  // elements in its last tile
  bool first, strided;
  uint32_t row;
};

constexpr uint32_t kMaxRows = 1u << 20;
constexpr int64_t kMaxTiles = int64_t(1) << 31;  // 2^41 elements

FM_HOST_DEVICE uint64_t word_of(const Entry& entry) {
  return uint64_t(entry.tile_end) << 32 | uint64_t(entry.row) << 12 |
         uint64_t(entry.strided) << 11 | uint64_t(entry.first) << 10 | uint64_t(entry.tail - 1);
}

FM_HOST_DEVICE Entry entry_of(uint64_t word) {
  return {uint32_t(word >> 32), int(word & 1023) + 1, (word >> 10 & 1) != 0, (word >> 11 & 1) != 0,
          uint32_t(word) >> 12};
}

struct Header {
  const uint64_t* rows = nullptr;     // on the device; nullptr: words[0] on
  const uint64_t* tensors = nullptr;  // on the device; nullptr: words[tensors_at] on
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;
  uint8_t* first = nullptr;  // per tensor, instead of Entry::first; cleared at the end
  uint32_t* ticket = nullptr;
  double* tile_sums = nullptr;  // of a measuring pass: `tiles` of each sum in turn
  double* tensor_scalars =
      nullptr;  // kTensor per tensor: measuring writes them, updating reads them
  uint32_t tensor_count = 0, tiles = 0, tiles_per_block = 1, tensors_at = 0;
  DType dtype[kMaxStreams] = {};
  bool updates = false;  // an update follows the measuring pass
};

// Whether the step must change nothing.
FM_DEVICE bool is_skipped(const Header& header) {
  return header.found_inf != nullptr && *header.found_inf != 0.0f;
}

// The tiles [begin, end) of a block.
struct Tiles {
  uint32_t begin, end;
};

FM_DEVICE Tiles tiles_of_block(const Header& header, uint32_t block) {
  const uint32_t begin = block * header.tiles_per_block, rest = header.tiles - begin;
  return {begin, rest < header.tiles_per_block ? header.tiles : begin + header.tiles_per_block};
}

// The arguments of a kernel. CUDA takes 32,764 bytes of them; a call that needs few is cheaper with
// the small ones.
template <int kBytes>
struct Args {
  static constexpr int kWords = (kBytes - int(sizeof(Header))) / 8;
  Header header;
  uint64_t words[kWords];
};
using SmallArgs = Args<8192>;
using LargeArgs = Args<32760>;
static_assert(sizeof(LargeArgs) <= 32764);

template <class A>
FM_DEVICE uint64_t row_word(const A& args, uint32_t i) {
  return args.header.rows ? args.header.rows[i] : args.words[i];
}

template <class A>
FM_DEVICE uint64_t tensor_word(const A& args, uint64_t i) {
  return args.header.tensors ? args.header.tensors[i] : args.words[args.header.tensors_at + i];
}

template <class A>
FM_DEVICE Entry entry_at(const A& args, uint32_t i) {
  return entry_of(tensor_word(args, i));
}

// Tensor i of the table, and its tiles [start, entry.tile_end); those of other parts have none.
struct Place {
  uint32_t i, start;
  Entry entry;

  FM_DEVICE bool is_empty() const { return start == entry.tile_end; }
  FM_DEVICE int64_t begin(uint32_t tile) const { return int64_t(tile - start) * kTile; }
  FM_DEVICE int elements(uint32_t tile) const {
    return tile + 1 == entry.tile_end ? entry.tail : kTile;
  }
  FM_DEVICE int64_t numel() const { return begin(entry.tile_end - 1) + entry.tail; }
};

template <class A>
FM_DEVICE Place place_at(const A& args, uint32_t i) {
  return {i, i == 0 ? 0 : entry_at(args, i - 1).tile_end, entry_at(args, i)};
}

// The tensor that a tile belongs to: the first whose tile_end exceeds it.
template <class A>
FM_DEVICE Place place_of(const A& args, uint32_t tile) {
  uint32_t low = 0, high = args.header.tensor_count;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (entry_at(args, middle).tile_end > tile)
      high = middle;
    else
      low = middle + 1;
  }
  return place_at(args, low);
}

// The next tensor that has tiles.
template <class A>
FM_DEVICE Place place_after(const A& args, const Place& place) {
  Place next = place;
  do {
    next = {next.i + 1, next.entry.tile_end, entry_at(args, next.i + 1)};
  } while (next.is_empty());
  return next;
}

}  // namespace fused_momentum::cuda
