// What only the device has: its accesses to memory and its conversions. The tests put functions of
// the same names in their place (FM_MACHINE) and run the kernels on the CPU.
#pragma once

#include "table.h"

#ifdef FM_MACHINE
#include FM_MACHINE
#else

namespace fused_momentum::cuda {

// Addresses come from a table as integers: the compiler must be told what they point into.
template <class W>
FM_DEVICE W read(const W* at) {
  __builtin_assume(__isGlobal(at));
  return *at;
}

template <class W>
FM_DEVICE void write(W* at, const W& value) {
  __builtin_assume(__isGlobal(at));
  *at = value;
}

// A number beside the tensors, such as a learning rate.
template <class W>
FM_DEVICE W read_scalar(const W* at) {
  return read(at);
}

// Two floats rounded to nearest even, the first in the low half.
FM_DEVICE uint32_t bf16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

FM_DEVICE uint32_t f16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// In assembly, or the compiler pulls it in between loads that should all be on their way first.
FM_DEVICE float bf16_value(uint16_t half) {
  uint32_t bits;
  asm("shl.b32 %0, %1, 16;" : "=r"(bits) : "r"(uint32_t(half)));
  return __uint_as_float(bits);
}

FM_DEVICE float f16_value(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

FM_DEVICE float float_of(uint32_t bits) {
  return __uint_as_float(bits);
}

FM_DEVICE double double_of(uint64_t bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}

}  // namespace fused_momentum::cuda
#endif
