// The CPU in place of csrc/cuda/machine.cuh: conversions of the CPU back-end, and memory that
// counts how often each byte is read and written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fused_momentum::cuda {

namespace cpu_codec {
#include "../../csrc/cpu/codec.h"
}

// Memory that kernels may touch, with one counter per byte.
struct Region {
  char* begin;
  int64_t bytes;
  uint8_t* reads;
  uint8_t* writes;
};

struct Memory {
  std::vector<Region> regions;
  int64_t strays = 0;      // accesses outside all regions
  int64_t misaligned = 0;  // not at a multiple of their own size
  int64_t vectors = 0, scalars = 0;

  // Regions are sorted by address and do not overlap.
  Region* find(const char* at, int64_t bytes) {
    const auto behind = [](const char* address, const Region& r) { return address < r.begin; };
    auto region = std::upper_bound(regions.begin(), regions.end(), at, behind);
    if (region == regions.begin()) return nullptr;
    --region;
    return at + bytes <= region->begin + region->bytes ? &*region : nullptr;
  }

  // Counts an access of 2, 4, 8 or 16 bytes; returns whether it may be made.
  template <class W>
  bool touch(const void* address, bool written) {
    const char* at = static_cast<const char*>(address);
    misaligned += reinterpret_cast<uint64_t>(at) % sizeof(W) != 0;
    (sizeof(W) == 16 ? vectors : scalars)++;
    Region* region = find(at, sizeof(W));
    if (region == nullptr) return strays++, false;
    uint8_t* counts = (written ? region->writes : region->reads) + (at - region->begin);
    for (size_t i = 0; i < sizeof(W); i++) counts[i]++;
    return true;
  }
};

inline Memory memory;

template <class W>
W read(const W* at) {
  W value{};
  if (memory.touch<W>(at, false)) std::memcpy(&value, at, sizeof(W));
  return value;
}

template <class W>
void write(W* at, const W& value) {
  if (memory.touch<W>(at, true)) std::memcpy(at, &value, sizeof(W));
}

// Read by every thread: not counted.
template <class W>
W read_scalar(const W* at) {
  if (memory.find(reinterpret_cast<const char*>(at), sizeof(W)) != nullptr) return *at;
  memory.strays++;
  return {};
}

inline uint32_t bf16_pair(float low, float high) {
  return cpu_codec::bf16::store(low) | uint32_t(cpu_codec::bf16::store(high)) << 16;
}

inline uint32_t f16_pair(float low, float high) {
  return cpu_codec::f16::store(low) | uint32_t(cpu_codec::f16::store(high)) << 16;
}

inline float bf16_value(uint16_t half) {
  return cpu_codec::bf16::load(half);
}

inline float f16_value(uint16_t half) {
  return cpu_codec::f16::load(half);
}

inline float float_of(uint32_t bits) {
  return cpu_codec::float_of(bits);
}

inline double double_of(uint64_t bits) {
  return __builtin_bit_cast(double, bits);
}

}  // namespace fused_momentum::cuda
