// How a step becomes kernels: which parts, which tables, in which memory. Plain C++, the same for
// the GPU and for the tests.
#pragma once

#include <algorithm>

#include "pack.h"

namespace fused_momentum::cuda {

// A GPU, or what stands for one in the tests.
class Machine {
 public:
  virtual int processors() = 0;
  virtual Status is_capturing(bool* capturing) = 0;
  // Brings words to the device; they stay until the next call with the same number.
  virtual Status upload(int number, const std::vector<uint64_t>& words,
                        const uint64_t** address) = 0;
  // Starts the kernels over a table: the rule's update, or the two of its measuring pass. Words
  // that are not on the device go into their arguments.
  virtual Status start(int rule, bool measures, const Table& table, int* launches) = 0;

  int tiles_per_block = 0;

 protected:
  ~Machine() = default;
};

// Blocks of a processor at a time, and how many such waves a launch should have at least: fewer
// leave processors idle at its end. More tiles in a block spare it the search for its tensor.
constexpr int kBlocksPerProcessor = 8, kWaves = 8, kMaxTilesPerBlock = 4;

inline uint32_t choose_tiles_per_block(uint32_t tiles, Machine& machine) {
  if (machine.tiles_per_block > 0) return uint32_t(machine.tiles_per_block);
  const uint32_t blocks = uint32_t(machine.processors()) * kBlocksPerProcessor * kWaves;
  return std::clamp<uint32_t>(tiles / blocks, 1, kMaxTilesPerBlock);
}

inline uint32_t blocks_of(const Header& header) {
  return (header.tiles - 1) / header.tiles_per_block + 1;
}

// Moves to the device what does not fit into the arguments.
inline Status place(int number, Table* table, Machine& machine) {
  if (table->words() <= LargeArgs::kWords) return {};
  const bool rows_too = table->rows.size() > size_t(LargeArgs::kWords);
  const size_t tensors_at = rows_too ? table->rows.size() : 0;
  std::vector<uint64_t> words;
  if (rows_too) words.swap(table->rows);
  words.insert(words.end(), table->tensors.begin(), table->tensors.end());
  const uint64_t* address = nullptr;
  const Status status = machine.upload(number, words, &address);
  if (status.code != 0) return status;
  table->tensors.clear();
  table->header.tensors = address + tensors_at;
  if (rows_too) table->header.rows = address;
  return {};
}

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

inline Status check(const Launch& launch) {
  int32_t row = 0;
  for (int64_t i = 0; i < launch.segment_count; i++) row = std::max(row, launch.segments[i].row);
  if (count_tiles(launch) >= kMaxTiles)
    return {kInvalidValue, "more than 2^41 elements in one step"};
  if (row >= int32_t(kMaxRows))
    return {kInvalidValue, "more than 2^20 parameter groups in one step"};
  return {};
}

// Makes everything that can fail before anything starts: a step happens whole or not at all.
inline Status make_tables(const Launch& launch, const OnDevice& on_device, Machine& machine,
                          std::vector<Table>* tables) {
  const RuleInfo& rule = rule_infos()[launch.rule];
  const Status checked = check(launch);
  if (checked.code != 0) return checked;
  std::vector<int> part_of;
  for (const Part& part : find_parts(launch, streams_of(rule), &part_of)) {
    int64_t begin = part.begin, end = end_of_arguments(launch, part, part_of, rule, begin);
    bool capturing = false;
    if (end < part.end) {
      const Status status = machine.is_capturing(&capturing);
      if (status.code != 0) return status;
      // A graph outlives tables, so it gets its words in arguments, by as many kernels as it takes.
      if (!capturing) end = part.end;
    }
    while (begin < part.end) {
      Table table;
      pack(launch, on_device, part, part_of, rule, begin, end, &table);
      table.header.tiles_per_block = choose_tiles_per_block(table.header.tiles, machine);
      const Status status = place(part.number, &table, machine);
      if (status.code != 0) return status;
      if (table.header.tiles != 0) tables->push_back(std::move(table));
      begin = end;
      if (begin < part.end) end = end_of_arguments(launch, part, part_of, rule, begin);
    }
  }
  return {};
}

inline Status run_step(const Launch& launch, const OnDevice& on_device, Machine& machine,
                       int* launches) {
  std::vector<Table> tables;
  *launches = 0;
  Status status = make_tables(launch, on_device, machine, &tables);
  for (size_t i = 0; status.code == 0 && i < tables.size(); i++)
    status = machine.start(launch.rule, false, tables[i], launches);
  return status;
}

// The kernels of one table after those of another, so that all may use the same tile sums.
inline Status run_measure(const Launch& launch, const OnDevice& on_device, bool updates,
                          double* tile_sums, Machine& machine, int* launches) {
  std::vector<Table> tables;
  *launches = 0;
  if (rule_infos()[launch.rule].sums == 0) return {kInvalidValue, "the rule measures nothing"};
  Status status = make_tables(launch, on_device, machine, &tables);
  for (size_t i = 0; status.code == 0 && i < tables.size(); i++) {
    tables[i].header.tile_sums = tile_sums;
    tables[i].header.updates = updates;
    status = machine.start(launch.rule, true, tables[i], launches);
  }
  return status;
}

}  // namespace fused_momentum::cuda
