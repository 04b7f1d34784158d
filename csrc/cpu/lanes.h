// Several elements of a stream at a time, by instructions that compilers do not find by themselves;
// the same bits as from the codecs. Included inside an anonymous namespace.

// How kCount elements of this codec are loaded and stored at once; 0: they go one by one.
template <class Codec>
struct Lanes {
  static constexpr int kCount = 0;
};

#ifdef FM_BF16_LANES
template <>
struct Lanes<bf16> {
  static constexpr int kCount = 32, kHalf = 16;  // in two registers

  static inline void load(f32, const float* in, float* out) {
    for (int k = 0; k < kCount; k += kHalf) _mm512_store_ps(out + k, _mm512_loadu_ps(in + k));
  }

  static inline void store(f32, const float* in, float* out) {
    for (int k = 0; k < kCount; k += kHalf) _mm512_storeu_ps(out + k, _mm512_load_ps(in + k));
  }

  static inline void load(bf16, const uint16_t* in, float* out) {
    // One instruction takes a word to the upper half of its float and clears the lower half.
    const __m512i words = _mm512_loadu_si512(in);
    for (int k = 0; k < kCount; k += kHalf) {
      const __m512i bits = _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, upper_halves(k), words);
      _mm512_store_ps(out + k, _mm512_castsi512_ps(bits));
    }
  }

  static inline void store(bf16, const float* in, uint16_t* out) {
    // The instruction takes a subnormal number for a zero, and keeps the payload of a NaN.
    constexpr int others = 0x01 | 0x20 | 0x80;  // quiet NaN, subnormal, signalling NaN
    const __m512 low = _mm512_load_ps(in), high = _mm512_load_ps(in + kHalf);
    const __mmask16 low_others = _mm512_fpclass_ps_mask(low, others);
    const __mmask16 high_others = _mm512_fpclass_ps_mask(high, others);
    if (__builtin_expect(!_mm512_kortestz(low_others, high_others), false))
      return store_others(low, high, out);
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    std::memcpy(out, &rounded, sizeof rounded);
  }

 private:
  // For each float of a register, in its upper half, the number of the word that it is made of.
  static inline __m512i upper_halves(int first) {
    const __m512i numbers = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_slli_epi32(_mm512_add_epi32(numbers, _mm512_set1_epi32(first)), 16);
  }

  __attribute__((noinline, cold)) static void store_others(__m512 low, __m512 high, uint16_t* out) {
    alignas(64) float in[kCount];
    _mm512_store_ps(in, low);
    _mm512_store_ps(in + kHalf, high);
    for (int i = 0; i < kCount; i++) out[i] = bf16::store(in[i]);
  }
};
#endif
