// How a step becomes kernels: which parts, which tables, in which memory. Plain C++, the same for
// the GPU and for the tests.
#pragma once

#include <algorithm>

#include "pack.h"

namespace fused_momentum::cuda {

// The tables of the last step, with which the next one over the same tensors begins.
struct Packed {
  uint64_t generation = 0;  // of the launch; 0: of none
  int tiles_per_block = 0;
  bool fits = true;    // all of it into arguments,
  bool split = false;  // or into those of several kernels
  std::vector<Table> tables;
};

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
  Packed packed;

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

// Has on the device what does not fit into the arguments.
inline Status place(Table* table, Machine& machine) {
  Header& header = table->header;
  header.rows = header.tensors = nullptr;
  if (table->words() <= LargeArgs::kWords) return {};
  const uint64_t* address = nullptr;
  if (table->rows.size() <= size_t(LargeArgs::kWords)) {
    const Status status = machine.upload(table->part, table->tensors, &address);
    header.tensors = address;
    return status;
  }
  std::vector<uint64_t> words = table->rows;
  words.insert(words.end(), table->tensors.begin(), table->tensors.end());
  const Status status = machine.upload(table->part, words, &address);
  header.rows = address;
  header.tensors = address + table->rows.size();
  return status;
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

// Packs the tensors of a launch anew.
inline Status pack_launch(const Launch& launch, Machine& machine, Packed* packed) {
  const RuleInfo& rule = rule_infos()[launch.rule];
  Status status = check(launch);
  std::vector<int> part_of;
  for (const Part& part : find_parts(launch, streams_of(rule), &part_of)) {
    if (status.code != 0) return status;
    int64_t begin = part.begin, end = end_of_arguments(launch, part, part_of, rule, begin);
    if (end < part.end && packed->fits) status = machine.is_capturing(&packed->split);
    packed->fits &= end == part.end;
    // A graph outlives tables, so it gets its words in arguments, by as many kernels as it takes.
    if (!packed->split) end = part.end;
    while (begin < part.end) {
      Table table;
      pack_tensors(launch, part, part_of, rule, begin, end, &table);
      table.header.tiles_per_block = choose_tiles_per_block(table.header.tiles, machine);
      if (table.header.tiles != 0) packed->tables.push_back(std::move(table));
      begin = end;
      if (begin < part.end) end = end_of_arguments(launch, part, part_of, rule, begin);
    }
  }
  packed->generation = launch.generation;
  packed->tiles_per_block = machine.tiles_per_block;
  return status;
}

// Whether the machine's tables are those of the launch, but for its numbers.
inline Status is_packed(const Launch& launch, Machine& machine, bool* yes) {
  const Packed& packed = machine.packed;
  *yes = launch.generation != 0 && launch.generation == packed.generation &&
         machine.tiles_per_block == packed.tiles_per_block;
  if (!*yes || packed.fits) return {};
  bool capturing = false;
  const Status status = machine.is_capturing(&capturing);
  *yes = capturing == packed.split;
  return status;
}

// Makes everything that can fail before anything starts: a step happens whole or not at all.
inline Status make_tables(const Launch& launch, const OnDevice& on_device, Machine& machine) {
  bool packed = false;
  Status status = is_packed(launch, machine, &packed);
  if (status.code == 0 && !packed) {
    machine.packed = {};
    status = pack_launch(launch, machine, &machine.packed);
  }
  for (Table& table : machine.packed.tables) {
    if (status.code != 0) break;
    pack_numbers(launch, on_device, rule_infos()[launch.rule], &table);
    status = place(&table, machine);
  }
  if (status.code != 0) machine.packed = {};
  return status;
}

inline Status run_step(const Launch& launch, const OnDevice& on_device, Machine& machine,
                       int* launches) {
  *launches = 0;
  Status status = make_tables(launch, on_device, machine);
  for (const Table& table : machine.packed.tables)
    if (status.code == 0) status = machine.start(launch.rule, false, table, launches);
  return status;
}

// The kernels of one table after those of another, so that all may use the same tile sums.
inline Status run_measure(const Launch& launch, const OnDevice& on_device, bool updates,
                          double* tile_sums, Machine& machine, int* launches) {
  *launches = 0;
  if (rule_infos()[launch.rule].sums == 0) return {kInvalidValue, "the rule measures nothing"};
  Status status = make_tables(launch, on_device, machine);
  for (Table& table : machine.packed.tables) {
    table.header.tile_sums = tile_sums;
    table.header.updates = updates;
    if (status.code == 0) status = machine.start(launch.rule, true, table, launches);
  }
  return status;
}

}  // namespace fused_momentum::cuda
