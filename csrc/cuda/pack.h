// From a Launch to the tables of its kernels. Plain C++, the same for the GPU and for the tests.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../rule_info.h"
#include "../tiles.h"
#include "launch_cuda.h"
#include "table.h"

namespace fused_momentum::cuda {

inline int streams_of(const RuleInfo& rule) {
  return 2 + rule.states;
}

// Words of a row, and of a tensor besides its layout.
inline int row_words(const RuleInfo& rule) {
  return rule.hyper + 2;
}

inline int tensor_words(const RuleInfo& rule) {
  return 1 + streams_of(rule) + rule.kept;
}

inline int64_t count_tiles(const Launch& launch) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < launch.segment_count; i++) tiles += tiles_of(launch.segments[i].numel);
  return tiles;
}

// Segments of the same types, among [begin, end).
struct Part {
  int number;
  DType dtype[kMaxStreams];
  int64_t begin, end;
};

inline bool fits(const Segment& segment, const DType* dtype, int streams) {
  bool same = segment.dtype[0] == dtype[0] && segment.dtype[1] == dtype[1];
  for (int s = 2; s < streams; s++)
    same &= segment.data[s] == nullptr || segment.dtype[s] == dtype[s];
  return same;
}

inline bool is_complete(const Segment& segment, int streams) {
  for (int s = 0; s < streams; s++)
    if (segment.data[s] == nullptr) return false;
  return true;
}

// Sorts the segments into parts; part_of[i] is the number of segment i's, -1 where it is empty.
inline std::vector<Part> find_parts(const Launch& launch, int streams, std::vector<int>* part_of) {
  const int64_t count = launch.segment_count;
  constexpr int kOpen = -2;
  part_of->assign(count, kOpen);
  std::vector<Part> parts;
  for (const bool complete : {true, false}) {  // an absent state takes the type of the others
    for (int64_t i = 0; i < count; i++) {
      const Segment& seed = launch.segments[i];
      if (seed.numel == 0) (*part_of)[i] = -1;
      if ((*part_of)[i] != kOpen || is_complete(seed, streams) != complete) continue;
      Part part{int(parts.size()), {}, i, i + 1};
      DType absent = seed.dtype[0] == DType::f64 ? DType::f64 : DType::f32;
      for (int s = streams - 1; s >= 2; s--)
        if (seed.data[s] != nullptr) absent = seed.dtype[s];
      for (int s = 0; s < streams; s++)
        part.dtype[s] = s < 2 || seed.data[s] != nullptr ? seed.dtype[s] : absent;
      for (int64_t k = 0; k < count; k++) {
        const Segment& segment = launch.segments[k];
        if ((*part_of)[k] != kOpen || segment.numel == 0 || !fits(segment, part.dtype, streams))
          continue;
        (*part_of)[k] = part.number;
        part.begin = k < part.begin ? k : part.begin;
        part.end = k + 1 > part.end ? k + 1 : part.end;
      }
      parts.push_back(part);
    }
  }
  return parts;
}

inline int layout_words(const Layout* layout, int streams) {
  return layout ? streams + 1 + layout->dims * (2 + streams) : 0;
}

// Counts the words of a table as tensors are added to it.
struct Size {
  const RuleInfo& rule;
  int32_t first_row = INT32_MAX, last_row = -1;
  int64_t tensors = 0, tiles = 0;

  void add(const Segment& segment, bool in_part) {
    tensors += tensor_words(rule);
    if (!in_part) return;
    tensors += layout_words(segment.layout, streams_of(rule));
    tiles += tiles_of(segment.numel);
    first_row = segment.row < first_row ? segment.row : first_row;
    last_row = segment.row > last_row ? segment.row : last_row;
  }
  int64_t rows() const { return int64_t(last_row - first_row + 1) * row_words(rule); }
};

// How far the segments from `begin` on fit into the arguments of one kernel; at least one does.
inline int64_t end_of_arguments(const Launch& launch, const Part& part,
                                const std::vector<int>& part_of, const RuleInfo& rule,
                                int64_t begin) {
  Size size{rule};
  for (int64_t i = begin; i < part.end; i++) {
    size.add(launch.segments[i], part_of[i] == part.number);
    if (i > begin && size.rows() + size.tensors > LargeArgs::kWords) return i;
  }
  return part.end;
}

inline uint64_t word_of(double value) {
  uint64_t word;
  std::memcpy(&word, &value, sizeof(word));
  return word;
}

inline uint64_t word_of(const void* address) {
  return reinterpret_cast<uint64_t>(address);
}

// The table of one kernel, over segments from `begin` on and rows [first_row, end_row).
struct Table {
  Header header;
  std::vector<uint64_t> rows, tensors;
  int part;
  int64_t begin;
  int32_t first_row, end_row;

  // What goes into the arguments: all that is not on the device.
  int64_t words() const {
    return int64_t((header.rows ? 0 : rows.size()) + (header.tensors ? 0 : tensors.size()));
  }
};

// Arguments from a table whose words fit into them.
template <class A>
void fill(const Table& table, A* args) {
  args->header = table.header;
  uint64_t* words = args->words;
  if (!table.header.rows) words = std::copy(table.rows.begin(), table.rows.end(), words);
  args->header.tensors_at = uint32_t(words - args->words);
  if (!table.header.tensors) std::copy(table.tensors.begin(), table.tensors.end(), words);
}

// What may be another at every step: hyper-parameters, and where numbers are on the device.
inline void pack_numbers(const Launch& launch, const OnDevice& on_device, const RuleInfo& rule,
                         Table* table) {
  std::vector<uint64_t>& words = table->rows;
  words.clear();
  for (int32_t row = table->first_row; row < table->end_row; row++) {
    for (int k = 0; k < rule.hyper; k++)
      words.push_back(word_of(launch.hyper[int64_t(row) * launch.hyper_stride + k]));
    words.push_back(word_of(launch.grad_multiplier[row]));
    const uint64_t lr = on_device.lr ? word_of(on_device.lr[row]) : 0;
    words.push_back(lr && on_device.lr_dtype[row] == DType::f64 ? lr | 1 : lr);
  }
  Header& header = table->header;
  header.grad_scale = on_device.grad_scale;
  header.found_inf = on_device.found_inf;
  header.first = on_device.first ? on_device.first + table->begin : nullptr;
  header.ticket = on_device.first ? on_device.ticket : nullptr;
  header.tile_sums = header.tensor_scalars = nullptr;
  header.updates = false;
  if (on_device.tensor_scalars != nullptr)
    header.tensor_scalars = on_device.tensor_scalars + table->begin * rule.tensor_scalars;
}

// Appends the words of a strided tensor; returns where they begin.
inline uint64_t pack_layout(const Segment& segment, int streams, std::vector<uint64_t>* words) {
  const uint64_t at = words->size();
  const Layout& layout = *segment.layout;
  for (int s = 0; s < streams; s++) words->push_back(word_of(segment.data[s]));
  words->push_back(uint64_t(layout.dims));
  for (int d = 0; d < layout.dims; d++) {
    words->push_back(uint64_t(layout.sizes[d]));
    words->push_back(word_of(1.0 / double(layout.sizes[d])));
    for (int s = 0; s < streams; s++) words->push_back(uint64_t(layout.strides[s][d]));
  }
  return at;
}

// Tensor i of the table is segment begin + i; those of other parts have no tiles.
inline void pack_tensors(const Launch& launch, const Part& part, const std::vector<int>& part_of,
                         const RuleInfo& rule, int64_t begin, int64_t end, Table* table) {
  Size size{rule};
  for (int64_t i = begin; i < end; i++) size.add(launch.segments[i], part_of[i] == part.number);
  table->part = part.number;
  table->begin = begin;
  table->first_row = size.first_row;
  table->end_row = size.last_row + 1;
  const int64_t count = end - begin;
  const int streams = streams_of(rule);
  std::vector<uint64_t>& words = table->tensors;
  words.reserve(size.tensors);
  words.resize(count * tensor_words(rule));
  uint32_t tiles = 0;
  for (int64_t i = 0; i < count; i++) {
    const Segment& segment = launch.segments[begin + i];
    Entry entry{tiles, 1, false, false, 0};
    if (part_of[begin + i] == part.number) {
      const int64_t own = tiles_of(segment.numel);
      entry = {tiles += uint32_t(own), int(segment.numel - (own - 1) * kTile), segment.first,
               segment.layout != nullptr, uint32_t(segment.row - size.first_row)};
      for (int s = 0; s < streams; s++) words[count * (1 + s) + i] = word_of(segment.data[s]);
      for (int k = 0; k < rule.kept; k++)
        words[count * (1 + streams + k) + i] = word_of(segment.kept[k]);
      if (entry.strided) words[count + i] = pack_layout(segment, streams, &words);
    }
    words[i] = word_of(entry);
  }
  Header& header = table->header;
  header.tensor_count = uint32_t(count);
  header.tiles = tiles;
  std::memcpy(header.dtype, part.dtype, sizeof(header.dtype));
}

}  // namespace fused_momentum::cuda
