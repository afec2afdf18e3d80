// Row by row: a mask and what it marks, and plain rows of 16-bit numbers. Included once for each instruction set.

#if COMPRESSOR_AVX512
// 16 sums over a register each.
KFN I16 sums_of(const __m512i* v) {
  __m512i a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    b[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1]));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_i32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return (I16)_mm512_add_epi32(_mm512_shuffle_i32x4(c[0], c[1], 0x88), _mm512_shuffle_i32x4(c[0], c[1], 0xdd));
}

// Sums over the marked inputs of 16 rows: of code times input, and of input. Returns the end of the codes.
KFN const uint8_t* marked(const uint8_t* masks, const uint8_t* codes, const int8_t* x, I16& product, I16& plain) {
  __m512i products[16], plains[16];
  const __m512i x0 = _mm512_loadu_si512(x), x1 = _mm512_loadu_si512(x + 64), one = _mm512_set1_epi8(1);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    const uint64_t m0 = load<uint64_t>(masks + 16 * r), m1 = load<uint64_t>(masks + 16 * r + 8);
    const __m512i c0 = _mm512_maskz_expand_epi8(m0, _mm512_loadu_si512(codes));
    codes += __builtin_popcountll(m0);
    const __m512i c1 = _mm512_maskz_expand_epi8(m1, _mm512_loadu_si512(codes));
    codes += __builtin_popcountll(m1);
    products[r] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), c0, x0), c1, x1);
    plains[r] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_maskz_mov_epi8(m0, one), x0),
                                    _mm512_maskz_mov_epi8(m1, one), x1);
  }
  product = sums_of(products);
  plain = sums_of(plains);
  return codes;
}
#else
KFN const uint8_t* marked(const uint8_t* masks, const uint8_t* codes, const int8_t* x, I16& product, I16& plain) {
  int32_t products[16], plains[16];
  for (int r = 0; r < 16; ++r) {
    int32_t p = 0, s = 0;
    for (int half = 0; half < 2; ++half)
      for (uint64_t m = load<uint64_t>(masks + 16 * r + 8 * half); m; m &= m - 1) {
        const int at = 64 * half + __builtin_ctzll(m);
        p += *codes++ * x[at];
        s += x[at];
      }
    products[r] = p;
    plains[r] = s;
  }
  product = load<I16>(products);
  plain = load<I16>(plains);
  return codes;
}
#endif

// 16 rows of a partial or sparse 8-bit matrix times one token.
template <bool SIGNS>
KERNEL void partial_tile(const Matrix& w, long tile, const int8_t* x, const float* xscale, const int32_t* xsum, float* y) {
  const uint8_t* at = w.data + w.starts()[tile];
  const F16 step = load<F16>(at), zero = load<F16>(at + 64);
  at += 128;
  F16 sum = splat(0.0f);
  for (long g = 0; g < w.groups(); ++g, x += 128) {
    F16 value{};
    const uint8_t* const tail = at;
    Dot<1> dot;
    if (SIGNS) {
      at += 64;
      for (int k = 0; k < 128; k += 32, at += 64) dot.step(at, x + k);
    }
    I16 product, plain;
    at = marked(at, at + 256, x, product, plain);
    value = step * (floats(product) - zero * floats(plain));
    if (SIGNS) {  // the plane has no bit where an entry is marked
      const I16 rest = splat(xsum[g]) - plain;
      value += halves(tail) * floats(dot.total(xsum[g]) * 2 - rest) + halves(tail + 32) * floats(rest);
    }
    sum += value * xscale[g];
  }
  std::memcpy(y, &sum, sizeof sum);
}

// Rows 16 tile .. of a partial or sparse 8-bit matrix as fp32 (16, padded inputs).
template <bool SIGNS>
KERNEL void unpack_partial(const Matrix& w, long tile, float* out) {
  const uint8_t* at = w.data + w.starts()[tile];
  float step[16], zero[16];
  std::memcpy(step, at, sizeof step);
  std::memcpy(zero, at + 64, sizeof zero);
  at += 128;
  const long width = w.groups() * 128;
  for (long g = 0; g < w.groups(); ++g) {
    float s[16] = {}, c[16] = {};
    const uint8_t* const plane = at + 64;
    if (SIGNS) {
      const F16 scale = halves(at), mean = halves(at + 32);
      std::memcpy(s, &scale, sizeof s);
      std::memcpy(c, &mean, sizeof c);
      at += 64 + 256;
    }
    const uint8_t *masks = at, *codes = at + 256;
    for (int r = 0; r < 16; ++r)
      for (int k = 0; k < 128; ++k) {
        float& to = out[r * width + g * 128 + k];
        if (masks[16 * r + k / 8] >> (k % 8) & 1) {
          to = step[r] * (*codes++ - zero[r]);
        } else {
          const int u = plane[k / 32 * 64 + 4 * r + k % 4] >> (k % 32 / 4) & 1;
          to = SIGNS ? s[r] * (2 * u - 1) + c[r] : 0.0f;
        }
      }
    at = codes;
  }
}

// One 16-bit row as fp32 (padded inputs); returns the end of the row.
template <int KIND>
KFN const uint8_t* unpack_row(const uint8_t* at, long groups, float* out) {
  for (long g = 0; g < groups; ++g, out += 128) {
    const uint8_t* const masks = at;
    at += 16;
    for (int k = 0; k < 128; ++k) {
      out[k] = 0;
      if (!(masks[k / 8] >> (k % 8) & 1)) continue;
      out[k] = KIND == SPARSE_BF16 ? from_bf16(load<uint16_t>(at)) : from_fp16(load<uint16_t>(at));
      at += 2;
    }
  }
  return at;
}

template <int KIND>
KERNEL void unpack_sparse(const Matrix& w, long tile, float* out) {
  const uint8_t* at = w.data + w.starts()[tile];
  for (long r = 16 * tile; r < 16 * tile + 16 && r < w.m; ++r, out += 128 * w.groups())
    at = unpack_row<KIND>(at, w.groups(), out);
}

KFN float total(F16 v) {
  float lanes[16], sum = 0;
  std::memcpy(lanes, &v, sizeof lanes);
  for (int i = 0; i < 8; ++i) sum += lanes[i] + lanes[i + 8];
  return sum;
}

// 16 entries of a 16-bit type as fp32.
template <bool BF16>
KFN F16 sixteen(const uint8_t* from) {
  return BF16 ? from_bf16_bits(from) : halves(from);
}

// Rows of a sparse 16-bit matrix times one token of fp32 inputs (padded inputs).
template <int KIND>
KERNEL void sparse_tile(const Matrix& w, long tile, const float* x, float* y) {
  const uint8_t* at = w.data + w.starts()[tile];
  for (int r = 0; r < 16 && 16 * tile + r < w.m; ++r) {
    F16 sums[2] = {};
    for (long k = 0; k < 128 * w.groups(); k += 128) {
      const uint8_t* const masks = at;
      at += 16;
      for (int i = 0; i < 128; i += 32) {
        const uint32_t m = load<uint32_t>(masks + i / 8);
#if COMPRESSOR_AVX512
        alignas(64) uint8_t v[64];
        const __m512i all = _mm512_maskz_expand_epi16(m, _mm512_loadu_si512(at));
        _mm512_store_si512(v, all);
#else
        uint16_t v[32] = {};
        const uint8_t* from = at;
        for (uint32_t left = m; left; left &= left - 1, from += 2) std::memcpy(v + __builtin_ctz(left), from, 2);
#endif
        at += 2 * __builtin_popcount(m);
        sums[0] += sixteen<KIND == SPARSE_BF16>((const uint8_t*)v) * load<F16>(x + k + i);
        sums[1] += sixteen<KIND == SPARSE_BF16>((const uint8_t*)v + 32) * load<F16>(x + k + i + 16);
      }
    }
    y[r] = total(sums[0] + sums[1]);
  }
}

KERNEL float dot(const float* a, const float* b, long n) {
  F16 sums[2] = {};
  long k = 0;
  for (; k + 32 <= n; k += 32) {
    sums[0] += load<F16>(a + k) * load<F16>(b + k);
    sums[1] += load<F16>(a + k + 16) * load<F16>(b + k + 16);
  }
  float sum = total(sums[0] + sums[1]);
  for (; k < n; ++k) sum += a[k] * b[k];
  return sum;
}

// One row of 16-bit numbers times one token of fp32 inputs.
template <bool BF16>
KERNEL float dense_row(const uint8_t* row, const float* x, long n) {
  F16 sums[4] = {};
  long k = 0;
  for (; k + 64 <= n; k += 64)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] += sixteen<BF16>(row + 2 * (k + 16 * i)) * load<F16>(x + k + 16 * i);
  float sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; k < n; ++k) {
    const uint16_t bits = load<uint16_t>(row + 2 * k);
    sum += (BF16 ? from_bf16(bits) : from_fp16(bits)) * x[k];
  }
  return sum;
}

#if COMPRESSOR_AVX512
#define KBF __attribute__((target(COMPRESSOR_TARGET ",avx512bf16")))
// The same of bf16 rows with inputs rounded to bf16, where the processor multiplies those.
static KBF __attribute__((noinline)) float dense_row_bf16(const uint8_t* row, const uint16_t* x, long n) {
  __m512 s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  long k = 0;
  for (; k + 128 <= n; k += 128)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      s[i] = _mm512_dpbf16_ps(s[i], (__m512bh)_mm512_loadu_si512(row + 2 * (k + 32 * i)), (__m512bh)_mm512_loadu_si512(x + k + 32 * i));
  for (; k < n; k += 32) {
    const __mmask32 m = n - k >= 32 ? ~0u : (1u << (n - k)) - 1;
    s[0] = _mm512_dpbf16_ps(s[0], (__m512bh)_mm512_maskz_loadu_epi16(m, row + 2 * k), (__m512bh)_mm512_maskz_loadu_epi16(m, x + k));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
}

static KBF __attribute__((noinline)) void sparse_tile_bf16(const Matrix& w, long tile, const uint16_t* x, float* y) {
  const uint8_t* at = w.data + w.starts()[tile];
  for (int r = 0; r < 16 && 16 * tile + r < w.m; ++r) {
    __m512 s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (long k = 0; k < 128 * w.groups(); k += 128) {
      uint32_t m[4];
      std::memcpy(m, at, 16);
      at += 16;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i v = _mm512_maskz_expand_epi16(m[i], _mm512_loadu_si512(at));
        at += 2 * __builtin_popcount(m[i]);
        s[i] = _mm512_dpbf16_ps(s[i], (__m512bh)v, (__m512bh)_mm512_loadu_si512(x + k + 32 * i));
      }
    }
    y[r] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
  }
}
#undef KBF
#endif
