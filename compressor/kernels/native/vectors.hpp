// Sixteen lanes at a time, one a row, in the vector types of GCC and Clang. Included once for each instruction set (but
// AVX2, for which compilers cut such vectors badly); KFN marks its functions, KIN those of classes.

typedef int32_t I16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t W16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float F16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint8_t B64 __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint8_t B16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t H16 __attribute__((vector_size(32), aligned(1), may_alias));

template <class T>
KFN T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
KFN void keep(void* to, T value) {
  std::memcpy(to, &value, sizeof value);
}
#if COMPRESSOR_LEVEL == 2  // by name: of the general form some compilers take 16 numbers apart, one after the other
KFN I16 ints(const uint8_t* bytes) { return (I16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes)); }
KFN W16 words(const uint8_t* halves) { return (W16)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)halves)); }
KFN void keep_lower(void* to, W16 v) { _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)v)); }
#else
KFN I16 ints(const uint8_t* bytes) { return __builtin_convertvector(load<B16>(bytes), I16); }
KFN W16 words(const uint8_t* halves) { return __builtin_convertvector(load<H16>(halves), W16); }
KFN void keep_lower(void* to, W16 v) { keep(to, __builtin_convertvector(v, H16)); }
#endif
KFN F16 floats(I16 v) { return __builtin_convertvector(v, F16); }
KFN F16 as_floats(I16 bits) { return (F16)bits; }
KFN F16 greater(F16 a, F16 b) { return a > b ? a : b; }
KFN I16 whole(F16 v) { return __builtin_convertvector(v + 0.5f, I16); }  // nearest, of numbers that are not negative
KFN F16 splat(float v) { return F16{} + v; }
KFN I16 splat(int32_t v) { return I16{} + v; }

// Byte i of every lane of 64.
KFN I16 bytes_of(const uint8_t* from, int i) { return (I16)((load<W16>(from) >> (8 * i)) & 255u); }

// Entries of `W` bits in place `f` of every byte.
template <int W>
KFN B64 field(B64 block, int f) {
  if (W == 8) return block;
  const W16 moved = (W16)block >> (W * f);
  return (B64)moved & (uint8_t)((1 << W) - 1);
}
KFN B64 times_four(B64 ones) { return (B64)((W16)ones << 2); }

// Four bytes a lane: 0, a, 2 a, 3 a. The last may overflow, and is then not used.
KFN B64 multiples(I16 a) { return (B64)((W16)a * 0x03020100u); }

KFN F16 from_bf16_bits(const uint8_t* from) { return (F16)(words(from) << 16); }

// To nearest, ties to even; NaN stays NaN.
KFN void keep_bf16(void* to, F16 v) {
  const W16 word = (W16)v, rounded = word + 0x7fffu + (word >> 16 & 1u), nan = word | 0x400000u;
  const W16 all = (word & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
  keep_lower(to, all >> 16);
}

// fp16 to fp32, subnormal numbers included: the exponent is put right by a product.
KFN F16 halves_in_software(const uint8_t* from) {
  const W16 h = words(from);
  const W16 size = (h & 0x7fffu) << 13;
  const F16 value = reinterpret_cast<const F16&>(size) * 0x1p112f;
  const W16 out = reinterpret_cast<const W16&>(value) | ((h & 0x8000u) << 16);
  return reinterpret_cast<const F16&>(out);
}
