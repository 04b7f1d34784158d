// One tensor of a launch as a kernel sees it: where its streams are and how its elements lie.
#pragma once

#include "codec.cuh"

namespace fused_momentum::cuda {

template <int kStreams>
struct Tensor {
  char* data[kStreams];  // nullptr: absent; it reads as zero and is not written
  uint64_t layout;       // the word at which sizes and strides begin
  int dims;              // 0: contiguous
};

template <int kStreams, class A>
FM_DEVICE Tensor<kStreams> tensor_at(const A& args, const Place& place) {
  const uint64_t count = args.header.tensor_count;
  Tensor<kStreams> tensor;
  tensor.dims = 0;
  uint64_t at = count + place.i, stride = count;
  if (place.entry.strided) {
    at = tensor_word(args, at);
    stride = 1;
    tensor.dims = int(tensor_word(args, at + kStreams));
    tensor.layout = at + kStreams + 1;
  }
#pragma unroll
  for (int s = 0; s < kStreams; s++)
    tensor.data[s] = reinterpret_cast<char*>(tensor_word(args, at + s * stride));
  return tensor;
}

// Whether every stream begins at a multiple of 16 bytes, as all its whole tiles then do.
template <int kStreams>
FM_DEVICE bool is_aligned(const Tensor<kStreams>& tensor) {
  uint64_t low = 0;
#pragma unroll
  for (int s = 0; s < kStreams; s++) low |= reinterpret_cast<uint64_t>(tensor.data[s]) & 15;
  return low == 0;
}

// A place of its own in each stream, in elements.
template <int kStreams>
struct Places {
  int64_t at[kStreams];
  FM_DEVICE bool has(int) const { return true; }
  FM_DEVICE int64_t place(int, int stream) const { return at[stream]; }
};

// Where element `index` of a tensor lies.
template <int kStreams, class A>
FM_DEVICE Places<kStreams> places_of(const A& args, const Tensor<kStreams>& tensor, int64_t index) {
  Places<kStreams> places;
#pragma unroll
  for (int s = 0; s < kStreams; s++) places.at[s] = tensor.dims == 0 ? index : 0;
#pragma unroll 1
  for (int d = tensor.dims - 1; d >= 0; d--) {
    const uint64_t at = tensor.layout + d * (kStreams + 2);
    const int64_t size = int64_t(tensor_word(args, at));
    // Division by way of the reciprocal: the quotient is off by one at most.
    int64_t quotient = int64_t(double(index) * double_of(tensor_word(args, at + 1)));
    int64_t coordinate = index - quotient * size;
    if (coordinate < 0) coordinate += size, quotient--;
    if (coordinate >= size) coordinate -= size, quotient++;
    index = quotient;
#pragma unroll
    for (int s = 0; s < kStreams; s++)
      places.at[s] += coordinate * int64_t(tensor_word(args, at + 2 + s));
  }
  return places;
}

}  // namespace fused_momentum::cuda
