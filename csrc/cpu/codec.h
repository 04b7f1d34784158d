// How a stream is stored: loads turn stored elements into the type T that a rule computes in,
// stores round back (to nearest even). Written in integer and float arithmetic that every
// instruction set vectorises, so that all levels give the same bits. Included inside an anonymous
// namespace.

inline uint32_t bits_of(float x) {
  return __builtin_bit_cast(uint32_t, x);
}
inline float float_of(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}

struct f32 {
  static constexpr DType dtype = DType::f32;
  using storage = float;
  static inline float load(float x) { return x; }
  static inline float store(float x) { return x; }
};

struct f64 {
  static constexpr DType dtype = DType::f64;
  using storage = double;
  static inline double load(double x) { return x; }
  static inline double store(double x) { return x; }
};

struct bf16 {
  static constexpr DType dtype = DType::bf16;
  using storage = uint16_t;
  static inline float load(uint16_t x) { return float_of(uint32_t(x) << 16); }
  static inline uint16_t store(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t(x != x ? 0x7fc0 : rounded);
  }
};

struct f16 {
  static constexpr DType dtype = DType::f16;
  using storage = uint16_t;
  // No float here is subnormal: torch.set_flush_denormal would make it zero, in some threads.
  static inline float load(uint16_t x) {
    const uint32_t magnitude = (uint32_t(x) & 0x7fff) << 13;
    const uint32_t normal = magnitude + (112u << 23);  // by which the exponents differ
    // 0.5 has the last bit of the smallest half: what is added to its bits is added to its value.
    const uint32_t subnormal = bits_of(float_of((uint32_t(x) & 0x7fff) + bits_of(0.5f)) - 0.5f);
    const uint32_t special = magnitude | 0x7f800000;  // infinity and nan
    uint32_t bits = magnitude < 0x00800000 ? subnormal : normal;
    bits = magnitude >= 0x0f800000 ? special : bits;
    return float_of(bits | (uint32_t(x) & 0x8000) << 16);
  }
  static inline uint16_t store(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000;
    const uint32_t magnitude = bits_of(x) & 0x7fffffff;
    // Normal halves: round the 13 dropped bits to nearest even, then move the exponent.
    const uint32_t normal = (magnitude + 0x0fff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    // Subnormal halves: adding 0.5 leaves their value in the low bits, rounded by the addition.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    uint32_t half = magnitude < 0x38800000 ? subnormal : normal;  // 2^-14
    half = magnitude >= 0x477ff000 ? special : half;              // 65520
    return uint16_t(half | sign);
  }
};

// Elements [begin, begin + n) of one stream of a segment.
struct Span {
  void* data;
  const Layout* layout;  // nullptr: contiguous
  int stream;
  int64_t begin;
  int n;
};

// Calls f(i, offset) for element i of the span, at `offset` elements from the start of the data.
template <class F>
inline void for_each_offset(const Span& span, F&& f) {
  const Layout& layout = *span.layout;
  const int64_t* strides = layout.strides[span.stream];
  const int last = layout.dims - 1;
  int64_t index[kMaxDims];
  int64_t rest = span.begin, offset = 0;
  for (int d = last; d >= 0; d--) {
    index[d] = rest % layout.sizes[d];
    rest /= layout.sizes[d];
    offset += index[d] * strides[d];
  }
  for (int i = 0; i < span.n;) {
    const int64_t left = layout.sizes[last] - index[last];
    const int run = left < span.n - i ? int(left) : span.n - i;
    for (int k = 0; k < run; k++) f(i + k, offset + k * strides[last]);
    i += run;
    index[last] += run;
    offset += run * strides[last];
    for (int d = last; d > 0 && index[d] == layout.sizes[d]; d--) {
      index[d] = 0;
      offset += strides[d - 1] - layout.sizes[d] * strides[d];
      index[d - 1]++;
    }
  }
}

template <class Codec, class T>
inline void load_as(const Span& span, T* __restrict out) {
  const auto* data = static_cast<const typename Codec::storage*>(span.data);
  if (span.layout) {
    for_each_offset(span, [&](int i, int64_t offset) { out[i] = T(Codec::load(data[offset])); });
  } else {
    data += span.begin;
    for (int i = 0; i < span.n; i++) out[i] = T(Codec::load(data[i]));
  }
}

template <class Codec, class T>
inline void store_as(const Span& span, const T* __restrict in) {
  using loaded = decltype(Codec::load({}));
  auto* data = static_cast<typename Codec::storage*>(span.data);
  if (span.layout) {
    for_each_offset(span,
                    [&](int i, int64_t offset) { data[offset] = Codec::store(loaded(in[i])); });
  } else {
    data += span.begin;
    for (int i = 0; i < span.n; i++) data[i] = Codec::store(loaded(in[i]));
  }
}

template <class F>
inline void with_codec(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(f32{});
    case DType::f64:
      return f(f64{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
  }
}

template <class T>
void load(DType dtype, const Span& span, T* out) {
  with_codec(dtype, [&](auto codec) { load_as<decltype(codec)>(span, out); });
}

template <class T>
void store(DType dtype, const Span& span, const T* in) {
  with_codec(dtype, [&](auto codec) { store_as<decltype(codec)>(span, in); });
}
