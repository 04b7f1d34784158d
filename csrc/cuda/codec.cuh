// How a stream is stored: loads turn stored elements into the type T that a rule computes in,
// stores round back to nearest even. A codec moves V elements at once: 1, or a multiple of 16
// bytes.
#pragma once

#include <type_traits>

#include "machine.cuh"

namespace fused_momentum::cuda {

// One type of element. Word: what 16 bytes are an array of; a word holds kPerWord elements.
struct Float {
  static constexpr DType dtype = DType::f32;
  using Value = float;
  using Element = float;
  using Word = float;
  FM_DEVICE static float load(float x) { return x; }
  FM_DEVICE static float store(float x) { return x; }
  FM_DEVICE static void unpack(float word, float* x) { *x = word; }
  FM_DEVICE static float pack(const float* x) { return *x; }
};

struct Double {
  static constexpr DType dtype = DType::f64;
  using Value = double;
  using Element = double;
  using Word = double;
  FM_DEVICE static double load(double x) { return x; }
  FM_DEVICE static double store(double x) { return x; }
  FM_DEVICE static void unpack(double word, double* x) { *x = word; }
  FM_DEVICE static double pack(const double* x) { return *x; }
};

struct BFloat16 {
  static constexpr DType dtype = DType::bf16;
  using Value = float;
  using Element = uint16_t;
  using Word = uint32_t;
  FM_DEVICE static float load(uint16_t x) { return bf16_value(x); }
  FM_DEVICE static uint16_t store(float x) { return uint16_t(bf16_pair(x, 0.0f)); }
  FM_DEVICE static void unpack(uint32_t word, float* x) {
    x[0] = float_of(word << 16);
    x[1] = float_of(word & 0xffff0000);
  }
  FM_DEVICE static uint32_t pack(const float* x) { return bf16_pair(x[0], x[1]); }
};

struct Half {
  static constexpr DType dtype = DType::f16;
  using Value = float;
  using Element = uint16_t;
  using Word = uint32_t;
  FM_DEVICE static float load(uint16_t x) { return f16_value(x); }
  FM_DEVICE static uint16_t store(float x) { return uint16_t(f16_pair(x, 0.0f)); }
  FM_DEVICE static void unpack(uint32_t word, float* x) {
    x[0] = f16_value(uint16_t(word));
    x[1] = f16_value(uint16_t(word >> 16));
  }
  FM_DEVICE static uint32_t pack(const float* x) { return f16_pair(x[0], x[1]); }
};

template <class Word>
struct alignas(16) Vector {
  Word word[16 / sizeof(Word)];
};

template <class Word, int kCount>
struct Vectors {
  Vector<Word> vector[kCount];
};

// A codec of elements that are all E. Loads come in two halves, fetch and decode, so that many may
// be in flight before the first is waited for.
template <class E>
struct Codec {
  using Element = typename E::Element;
  using Word = typename E::Word;
  using Value = typename E::Value;
  static constexpr int kBytes = int(sizeof(Element));
  static constexpr int kVector = 16 / kBytes;  // elements in 16 bytes
  static constexpr int kPerWord = int(sizeof(Word) / sizeof(Element));

  // V elements as they are stored, a single one in a word; all bits zero: zeros.
  template <int V>
  using Raw = std::conditional_t<V == 1, Word, Vectors<Word, (V - 1) / kVector + 1>>;

  FM_HOST_DEVICE static bool matches(DType dtype) { return dtype == E::dtype; }
  FM_DEVICE explicit Codec(DType) {}

  template <int V>
  FM_DEVICE void fetch(const void* data, int64_t at, Raw<V>* raw) const {
    const Element* from = static_cast<const Element*>(data) + at;
    if constexpr (V == 1) {
      *raw = read(from);
    } else {
#pragma unroll
      for (int v = 0; v < V; v += kVector)
        raw->vector[v / kVector] = read(reinterpret_cast<const Vector<Word>*>(from + v));
    }
  }

  template <int V, class T>
  FM_DEVICE void decode(const Raw<V>& raw, T* out) const {
    if constexpr (V == 1) {
      out[0] = T(E::load(Element(raw)));
    } else {
#pragma unroll
      for (int v = 0; v < V; v += kPerWord) {
        Value values[kPerWord];
        E::unpack(raw.vector[v / kVector].word[v % kVector / kPerWord], values);
#pragma unroll
        for (int j = 0; j < kPerWord; j++) out[v + j] = T(values[j]);
      }
    }
  }

  template <int V, class T>
  FM_DEVICE void store(void* data, int64_t at, const T* in) const {
    Element* to = static_cast<Element*>(data) + at;
    if constexpr (V == 1) {
      write(to, Element(E::store(Value(in[0]))));
    } else {
#pragma unroll
      for (int v = 0; v < V; v += kVector) {
        Vector<Word> vector;
#pragma unroll
        for (int k = 0; k < kVector; k += kPerWord) {
          Value values[kPerWord];
#pragma unroll
          for (int j = 0; j < kPerWord; j++) values[j] = Value(in[v + k + j]);
          vector.word[k / kPerWord] = E::pack(values);
        }
        write(reinterpret_cast<Vector<Word>*>(to + v), vector);
      }
    }
  }
};

using F32 = Codec<Float>;
using F64 = Codec<Double>;
using BF16 = Codec<BFloat16>;
using F16 = Codec<Half>;

// A codec of elements whose type is known when the kernel runs.
struct AnyCodec {
  static constexpr int kBytes = 8;   // at most
  static constexpr int kVector = 8;  // enough for every type
  DType dtype;

  // The widest first: it is the one that an initializer fills.
  template <int V>
  union Raw {
    F64::Raw<V> f64;
    F32::Raw<V> f32;
    BF16::Raw<V> bf16;
    F16::Raw<V> f16;
  };

  FM_HOST_DEVICE static bool matches(DType) { return true; }
  FM_DEVICE explicit AnyCodec(DType dtype) : dtype(dtype) {}

  template <int V>
  FM_DEVICE void fetch(const void* data, int64_t at, Raw<V>* raw) const {
    switch (dtype) {
      case DType::f32:
        return F32(dtype).fetch<V>(data, at, &raw->f32);
      case DType::f64:
        return F64(dtype).fetch<V>(data, at, &raw->f64);
      case DType::bf16:
        return BF16(dtype).fetch<V>(data, at, &raw->bf16);
      case DType::f16:
        return F16(dtype).fetch<V>(data, at, &raw->f16);
    }
  }

  template <int V, class T>
  FM_DEVICE void decode(const Raw<V>& raw, T* out) const {
    switch (dtype) {
      case DType::f32:
        return F32(dtype).decode<V>(raw.f32, out);
      case DType::f64:
        return F64(dtype).decode<V>(raw.f64, out);
      case DType::bf16:
        return BF16(dtype).decode<V>(raw.bf16, out);
      case DType::f16:
        return F16(dtype).decode<V>(raw.f16, out);
    }
  }

  template <int V, class T>
  FM_DEVICE void store(void* data, int64_t at, const T* in) const {
    switch (dtype) {
      case DType::f32:
        return F32(dtype).store<V>(data, at, in);
      case DType::f64:
        return F64(dtype).store<V>(data, at, in);
      case DType::bf16:
        return BF16(dtype).store<V>(data, at, in);
      case DType::f16:
        return F16(dtype).store<V>(data, at, in);
    }
  }
};

}  // namespace fused_momentum::cuda
