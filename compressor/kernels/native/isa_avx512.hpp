// AVX-512 with VNNI: one 64-byte register is a block, and one instruction multiplies it by four inputs.

KFN F16 halves(const uint8_t* from) { return (F16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
KFN void keep_halves(void* to, F16 v) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Products of a plane's entries with inputs. Entries stay where they are in their bytes: what their place has
// multiplied is divided out of the sum at the end, which is exact.
template <int W>
struct Dot {
  static constexpr int F = 8 / W;
  __m512i sum[F];
  KIN Dot() {
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) sum[f] = _mm512_setzero_si512();
  }
  KIN void step(const uint8_t* block, const int8_t* x) {
    const __m512i v = _mm512_loadu_si512(block);
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) {
      const __m512i u = W == 8 ? v : _mm512_and_si512(v, _mm512_set1_epi8((char)(((1 << W) - 1) << (W * f))));
      sum[f] = _mm512_dpbusd_epi32(sum[f], u, _mm512_set1_epi32(load<int32_t>(x + 4 * f)));
    }
  }
  KIN I16 total(int32_t = 0) const {
    __m512i all = sum[0];
#pragma GCC unroll 8
    for (int f = 1; f < F; ++f) all = _mm512_add_epi32(all, _mm512_srai_epi32(sum[f], W * f));
    return (I16)all;
  }
};

// table[16 l + index & 15] of every byte, l the quarter of the register that the byte is in.
KFN B64 lookup(B64 table, B64 index) { return (B64)_mm512_shuffle_epi8((__m512i)table, (__m512i)index); }

// Loaded first, and kept from becoming one instruction again: an expansion from memory takes half as long again.
KFN __m512i loaded(const void* from) {
  __m512i v = _mm512_loadu_si512(from);
  asm("" : "+v"(v));
  return v;
}

// scale and zero of a record's rows, for one byte a level: value = scale (level - zero).
struct Grid {
  F16 scale, zero;
};

constexpr int kTileTokens = 12;  // times two tiles of rows: 24 sums, two registers of levels, one of inputs
constexpr bool is_wide(int) { return false; }  // all levels are the same to it

// Two tiles of rows times T tokens:
// y[t][row] += scale[row] xscale[t] (sum over k of levels[k / 4][row][k % 4] x[k / 4][t][k % 4] - zero[row] xsum[t])
template <int T, bool WIDE>
KFN void tile(const uint8_t* levels, const int8_t* x, int kb, const Grid* grids, const float* xscale, const int32_t* xsum,
              float* y) {
  __m512i sum[2][T];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) sum[0][t] = sum[1][t] = _mm512_setzero_si512();
  for (int k = 0; k < kb / 4; ++k) {
    const __m512i v0 = _mm512_load_si512(levels + 64 * k), v1 = _mm512_load_si512(levels + kLevels + 64 * k);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const __m512i in = _mm512_set1_epi32(load<int32_t>(x + (k * T + t) * 4));
      // as assembler: from the intrinsic some compilers move sums to memory and back
      asm("vpdpbusd %2, %1, %0" : "+v"(sum[0][t]) : "v"(v0), "v"(in));
      asm("vpdpbusd %2, %1, %0" : "+v"(sum[1][t]) : "v"(v1), "v"(in));
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r)
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const F16 value = (floats((I16)sum[r][t]) - grids[r].zero * static_cast<float>(xsum[t])) * (grids[r].scale * xscale[t]);
      float* const to = y + t * kStride + 16 * r;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), (__m512)value));
    }
}
