// AVX2: a block is two registers of eight rows. Products of two entries are summed in 16 bits, where they fit: 32 of
// two bits (3 x 127 x 2 x 32 < 2^15), one of four bits and more.

struct F16 {
  __m256 low{}, high{};
  KIN F16 operator+(F16 o) const { return {_mm256_add_ps(low, o.low), _mm256_add_ps(high, o.high)}; }
  KIN F16 operator-(F16 o) const { return {_mm256_sub_ps(low, o.low), _mm256_sub_ps(high, o.high)}; }
  KIN F16 operator*(F16 o) const { return {_mm256_mul_ps(low, o.low), _mm256_mul_ps(high, o.high)}; }
  KIN F16 operator/(F16 o) const { return {_mm256_div_ps(low, o.low), _mm256_div_ps(high, o.high)}; }
  KIN F16 operator*(float v) const { return *this * F16{_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  KIN void operator+=(F16 o) { *this = *this + o; }
};

struct I16 {
  __m256i low{}, high{};
  KIN I16 operator+(I16 o) const { return {_mm256_add_epi32(low, o.low), _mm256_add_epi32(high, o.high)}; }
  KIN I16 operator-(I16 o) const { return {_mm256_sub_epi32(low, o.low), _mm256_sub_epi32(high, o.high)}; }
  KIN I16 operator^(I16 o) const { return {_mm256_xor_si256(low, o.low), _mm256_xor_si256(high, o.high)}; }
  KIN I16 operator*(int32_t v) const {
    return {_mm256_mullo_epi32(low, _mm256_set1_epi32(v)), _mm256_mullo_epi32(high, _mm256_set1_epi32(v))};
  }
  KIN I16 operator+(int32_t v) const { return *this + I16{_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
  KIN I16 operator-(int32_t v) const { return *this + -v; }
  KIN void operator+=(I16 o) { *this = *this + o; }
};

struct B64 {
  __m256i low{}, high{};
  KIN B64 operator|(B64 o) const { return {_mm256_or_si256(low, o.low), _mm256_or_si256(high, o.high)}; }
  KIN B64 operator&(uint8_t most) const {
    const __m256i all = _mm256_set1_epi8(static_cast<char>(most));
    return {_mm256_and_si256(low, all), _mm256_and_si256(high, all)};
  }
  KIN void operator+=(B64 o) { *this = {_mm256_add_epi8(low, o.low), _mm256_add_epi8(high, o.high)}; }
};

// Registers directly: a copy of a pair of them goes through memory.
template <class T>
KFN T load(const void* from) {
  const char* const at = static_cast<const char*>(from);
  if constexpr (std::is_same_v<T, F16>) {
    return {_mm256_loadu_ps((const float*)at), _mm256_loadu_ps((const float*)(at + 32))};
  } else if constexpr (std::is_same_v<T, I16> || std::is_same_v<T, B64>) {
    return {_mm256_loadu_si256((const __m256i*)at), _mm256_loadu_si256((const __m256i*)(at + 32))};
  } else {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
}
template <class T>
KFN void keep(void* to, T v) {
  char* const at = static_cast<char*>(to);
  if constexpr (std::is_same_v<T, F16>) {
    _mm256_storeu_ps((float*)at, v.low);
    _mm256_storeu_ps((float*)(at + 32), v.high);
  } else {
    _mm256_storeu_si256((__m256i*)at, v.low);
    _mm256_storeu_si256((__m256i*)(at + 32), v.high);
  }
}

KFN F16 splat(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
KFN I16 splat(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
KFN F16 floats(I16 v) { return {_mm256_cvtepi32_ps(v.low), _mm256_cvtepi32_ps(v.high)}; }
KFN F16 as_floats(I16 bits) { return {_mm256_castsi256_ps(bits.low), _mm256_castsi256_ps(bits.high)}; }
KFN F16 greater(F16 a, F16 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
KFN I16 whole(F16 v) {  // nearest, of numbers that are not negative
  const F16 moved = v + splat(0.5f);
  return {_mm256_cvttps_epi32(moved.low), _mm256_cvttps_epi32(moved.high)};
}
KFN I16 pair(__m256i low, __m256i high) { return {low, high}; }
KFN I16 ints(const uint8_t* bytes) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes)),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(bytes + 8)))};
}
KFN F16 halves(const uint8_t* from) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 16)))};
}
KFN __m256i rounded_bf16(__m256 v) {  // to nearest, ties to even; NaN stays NaN; in the lower halves of 32 bits
  const __m256i word = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(word, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_or_si256(word, _mm256_set1_epi32(0x400000)), is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, nan, is_nan), 16);
}
KFN void keep_bf16(void* to, F16 v) {
  const __m256i packed = _mm256_packus_epi32(rounded_bf16(v.low), rounded_bf16(v.high));  // by halves of each register
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(packed, 0xd8));
}
KFN void keep_halves(void* to, F16 v) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)to + 1, _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT));
}
KFN F16 halves_in_software(const uint8_t* from) { return halves(from); }
KFN F16 from_bf16_bits(const uint8_t* from) {
  const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  const __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + 16)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
}
KFN I16 bytes_of(const uint8_t* from, int i) {
  const I16 v = load<I16>(from);
  const __m256i byte = _mm256_set1_epi32(255);
  return {_mm256_and_si256(_mm256_srli_epi32(v.low, 8 * i), byte), _mm256_and_si256(_mm256_srli_epi32(v.high, 8 * i), byte)};
}
template <int W>
KFN B64 field(B64 block, int f) {
  const __m256i most = _mm256_set1_epi8((char)((1 << W) - 1));
  return {_mm256_and_si256(_mm256_srli_epi16(block.low, W * f), most), _mm256_and_si256(_mm256_srli_epi16(block.high, W * f), most)};
}
KFN B64 times_four(B64 ones) { return {_mm256_slli_epi16(ones.low, 2), _mm256_slli_epi16(ones.high, 2)}; }
KFN B64 multiples(I16 a) {
  const I16 all = a * 0x03020100;
  return {all.low, all.high};
}
KFN __m256i inputs(const int8_t* x) { return _mm256_set1_epi32(load<int32_t>(x)); }
KFN __m256i wider(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

template <int W>
struct Dot {
  __m256i sum[2];
  KIN Dot() { sum[0] = sum[1] = _mm256_setzero_si256(); }
  KIN void step(const uint8_t* block, const int8_t* x) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256i v = _mm256_loadu_si256((const __m256i*)(block + 32 * h));
      if (W == 8) {  // as signed numbers, else a pair would not fit; total() puts it right
        const __m256i s = _mm256_xor_si256(v, _mm256_set1_epi8((char)128));
        sum[h] = _mm256_add_epi32(
            sum[h], wider(_mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(inputs(x), s))));
        continue;
      }
      __m256i part = _mm256_setzero_si256();
#pragma GCC unroll 8
      for (int f = 0; f < 8 / W; ++f) {
        const __m256i u = _mm256_and_si256(_mm256_srli_epi16(v, W * f), _mm256_set1_epi8((1 << W) - 1));
        part = _mm256_add_epi16(part, _mm256_maddubs_epi16(u, inputs(x + 4 * f)));
      }
      sum[h] = W == 4 ? _mm256_add_epi32(sum[h], wider(part)) : _mm256_add_epi16(sum[h], part);
    }
  }
  // `xsum`: of the inputs.
  KIN I16 total(int32_t xsum) const {
    if (W == 8) return pair(sum[0], sum[1]) + 128 * xsum;
    return W == 4 ? pair(sum[0], sum[1]) : pair(wider(sum[0]), wider(sum[1]));
  }
};

KFN B64 lookup(B64 table, B64 index) {
  return {_mm256_shuffle_epi8(table.low, index.low), _mm256_shuffle_epi8(table.high, index.high)};
}

// scale and zero of a record's rows, for one byte a level: value = scale (level - zero).
struct Grid {
  F16 scale, zero;
};

constexpr int kTileTokens = 4;
constexpr bool is_wide(int kind) { return kind == INT8; }

// As for AVX-512. WIDE: levels above 128 occur; the others fit a pair into 16 bits (126 x 127 x 2 < 2^15).
template <int T, bool WIDE>
KFN void one_tile(const uint8_t* levels, const int8_t* x, int kb, F16 scale, F16 zero, const float* xscale,
                  const int32_t* xsum, float* y) {
  __m256i sum[T][2];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
  for (int k = 0; k < kb / 4; ++k) {
    __m256i v[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      v[h] = _mm256_load_si256((const __m256i*)(levels + 64 * k + 32 * h));
      if (WIDE) v[h] = _mm256_xor_si256(v[h], _mm256_set1_epi8((char)128));
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m256i in = inputs(x + (k * T + t) * 4);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256i pairs = WIDE ? _mm256_maddubs_epi16(_mm256_abs_epi8(v[h]), _mm256_sign_epi8(in, v[h]))
                                   : _mm256_maddubs_epi16(v[h], in);
        sum[t][h] = _mm256_add_epi32(sum[t][h], wider(pairs));
      }
    }
  }
  const F16 base = WIDE ? zero - splat(128.0f) : zero;
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const F16 value = (floats(pair(sum[t][0], sum[t][1])) - base * static_cast<float>(xsum[t])) * (scale * xscale[t]);
    float* const to = y + t * kStride;
    keep(to, load<F16>(to) + value);
  }
}

template <int T, bool WIDE>
KFN void tile(const uint8_t* levels, const int8_t* x, int kb, const Grid* grids, const float* xscale, const int32_t* xsum,
              float* y) {
  for (int r = 0; r < 2; ++r)
    one_tile<T, WIDE>(levels + kLevels * r, x, kb, grids[r].scale, grids[r].zero, xscale, xsum, y + 16 * r);
}
