// Row by row: a mask and what it marks, and plain rows of 16-bit numbers. Included once for each instruction set.

#if COMPRESSOR_LEVEL == 2
// 16 sums over a register each.
template <bool FLOATS>
KFN __m512i added(__m512i a, __m512i b) {
  return FLOATS ? _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b))) : _mm512_add_epi32(a, b);
}
template <bool FLOATS>
KFN __m512i sums_of(const __m512i* v) {
  __m512i a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    a[i] = added<FLOATS>(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    b[i] = added<FLOATS>(_mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1]));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    c[i] = added<FLOATS>(_mm512_shuffle_i32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_i32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return added<FLOATS>(_mm512_shuffle_i32x4(c[0], c[1], 0x88), _mm512_shuffle_i32x4(c[0], c[1], 0xdd));
}

// Sums over the marked inputs of 16 rows: of code times input, and of input. Returns the end of the codes.
KFN const uint8_t* marked(const uint8_t* masks, const uint8_t* codes, const int8_t* x, I16& product, I16& plain) {
  __m512i products[16], plains[16];
  const __m512i x0 = _mm512_loadu_si512(x), x1 = _mm512_loadu_si512(x + 64), one = _mm512_set1_epi8(1);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    const uint64_t m0 = load<uint64_t>(masks + 16 * r), m1 = load<uint64_t>(masks + 16 * r + 8);
    const __m512i c0 = _mm512_maskz_expand_epi8(m0, loaded(codes));
    codes += __builtin_popcountll(m0);
    const __m512i c1 = _mm512_maskz_expand_epi8(m1, loaded(codes));
    codes += __builtin_popcountll(m1);
    products[r] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), c0, x0), c1, x1);
    plains[r] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_maskz_mov_epi8(m0, one), x0),
                                    _mm512_maskz_mov_epi8(m1, one), x1);
  }
  product = (I16)sums_of<false>(products);
  plain = (I16)sums_of<false>(plains);
  return codes;
}
#elif COMPRESSOR_LEVEL == 1
KFN int32_t sum_of(__m256i v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

KFN const uint8_t* marked(const uint8_t* masks, const uint8_t* codes, const int8_t* x, I16& product, I16& plain) {
  int32_t products[16], plains[16];
  for (int r = 0; r < 16; ++r, masks += 16) {
    __m256i p = _mm256_setzero_si256(), s = p;
    for (int k = 0; k < 16; k += 2) {
      const int before = __builtin_popcount(masks[k]);
      const uint64_t first = load<uint64_t>(kExpansion.bytes[masks[k]]), second = load<uint64_t>(kExpansion.bytes[masks[k + 1]]);
      const __m128i index = _mm_set_epi64x(second + before * 0x0101010101010101ull, first);
      const __m128i found = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)codes), index);
      const __m128i in = _mm_loadu_si128((const __m128i*)(x + 8 * k));
      const __m128i seen = _mm_and_si128(in, _mm_cmpgt_epi8(index, _mm_set1_epi8(-1)));
      p = _mm256_add_epi32(p, _mm256_madd_epi16(_mm256_cvtepu8_epi16(found), _mm256_cvtepi8_epi16(in)));
      s = _mm256_add_epi32(s, wider(_mm256_cvtepi8_epi16(seen)));
      codes += before + __builtin_popcount(masks[k + 1]);
    }
    products[r] = sum_of(p);
    plains[r] = sum_of(s);
  }
  product = load<I16>(products);
  plain = load<I16>(plains);
  return codes;
}
#elif COMPRESSOR_LEVEL == 3
// Of four registers: four sums over one each.
KFN int32x4_t sums_of(const int32x4_t* v) { return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3])); }

// Codes less 128, since products are of signed bytes; inputs that are not marked are zeros.
KFN const uint8_t* marked(const uint8_t* masks, const uint8_t* codes, const int8_t* x, I16& product, I16& plain) {
#pragma GCC unroll 4
  for (int four = 0; four < 4; ++four) {
    int32x4_t products[4], plains[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r, masks += 16) {
      int32x4_t p = vdupq_n_s32(0), s = p;
      for (int k = 0; k < 16; k += 2) {
        const int before = __builtin_popcount(masks[k]);
        const uint8x8_t first = vld1_u8(kExpansion.bytes[masks[k]]), second = vld1_u8(kExpansion.bytes[masks[k + 1]]);
        const uint8x16_t index = vcombine_u8(first, vadd_u8(second, vdup_n_u8(static_cast<uint8_t>(before))));
        const int8x16_t found = less_128(vqtbl1q_u8(vld1q_u8(codes), index));
        const int8x16_t seen = vandq_s8(vld1q_s8(x + 8 * k), as_signed(vcltq_u8(index, vdupq_n_u8(128))));
        p = vdotq_s32(p, found, seen);
        s = vdotq_s32(s, vdupq_n_s8(1), seen);
        codes += before + __builtin_popcount(masks[k + 1]);
      }
      products[r] = p;
      plains[r] = s;
    }
    plain.v[four] = sums_of(plains);
    product.v[four] = vaddq_s32(sums_of(products), vshlq_n_s32(plain.v[four], 7));
  }
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

// 16 rows of a sparse 8-bit matrix times one token.
KERNEL void sparse8_tile(const Matrix& w, long tile, const int8_t* x, const float* xscale, float* y) {
  const uint8_t* at = w.data + w.starts()[tile];
  const F16 step = load<F16>(at), zero = load<F16>(at + 64);
  at += 128;
  F16 sum = splat(0.0f);
  for (long g = 0; g < w.groups(); ++g, x += 128) {
    I16 product, plain;
    at = marked(at, at + 256, x, product, plain);
    sum += step * (floats(product) - zero * floats(plain)) * xscale[g];
  }
  keep(y, sum);
}

// 128 inputs of a row as fp32. Returns the end of the codes.
KERNEL const uint8_t* unpack_sparse8_row(const uint8_t* masks, const uint8_t* codes, float step, float zero, float* row) {
#if COMPRESSOR_LEVEL == 2
  for (int half = 0; half < 2; ++half, masks += 8) {
    const uint64_t all = load<uint64_t>(masks);
    alignas(64) uint8_t found[64];
    _mm512_store_si512(found, _mm512_maskz_expand_epi8(all, loaded(codes)));
    codes += __builtin_popcountll(all);
    for (int i = 0; i < 4; ++i, row += 16) {
      const F16 value = (floats(ints(found + 16 * i)) - zero) * step;
      _mm512_storeu_ps(row, _mm512_maskz_mov_ps(load<uint16_t>(masks + 2 * i), (__m512)value));
    }
  }
#else
  std::memset(row, 0, sizeof(float) * 128);
  for (int half = 0; half < 2; ++half)
    for (uint64_t m = load<uint64_t>(masks + 8 * half); m; m &= m - 1)
      row[64 * half + __builtin_ctzll(m)] = step * (static_cast<float>(*codes++) - zero);
#endif
  return codes;
}

// As UnpackLevels.
struct UnpackSparse8 {
  template <class Put>
  static void tile(const Matrix& w, long tile, Put&& put) {
    alignas(64) float block[128];
    const uint8_t* at = w.data + w.starts()[tile];
    const RowGrids grids(at);
    at += sizeof grids;
    for (long g = 0; g < w.groups(); ++g) {
      const uint8_t *const masks = at, *codes = at + 256;
      for (int r = 0; r < 16; ++r) {
        codes = unpack_sparse8_row(masks + 16 * r, codes, grids.step[r], grids.zero[r], block);
        put(r, 128 * g, block);
      }
      at = codes;
    }
  }
};

#if COMPRESSOR_LEVEL == 1 || COMPRESSOR_LEVEL == 2
KFN float total_of_eight(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#endif

KFN float total(F16 v) {
#if COMPRESSOR_LEVEL == 2
  return _mm512_reduce_add_ps((__m512)v);
#elif COMPRESSOR_LEVEL == 1
  return total_of_eight(_mm256_add_ps(v.low, v.high));
#else
  float lanes[16], sum = 0;
  std::memcpy(lanes, &v, sizeof lanes);
  for (int i = 0; i < 8; ++i) sum += lanes[i] + lanes[i + 8];
  return sum;
#endif
}

// The totals of four.
KFN void four_totals(const F16* v, float* out) {
#if COMPRESSOR_LEVEL == 2
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[0], (__m512)v[1]), _mm512_unpackhi_ps((__m512)v[0], (__m512)v[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[2], (__m512)v[3]), _mm512_unpackhi_ps((__m512)v[2], (__m512)v[3]));
  const __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
  const __m512 all = _mm512_add_ps((__m512)low, (__m512)high);
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
#elif COMPRESSOR_LEVEL == 1
  __m256 half[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) half[i] = _mm256_add_ps(v[i].low, v[i].high);
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = total(v[i]);
#endif
}

// 16 entries of a 16-bit type as fp32.
template <bool BF16>
KFN F16 sixteen(const uint8_t* from) {
  return BF16 ? from_bf16_bits(from) : halves(from);
}

#if COMPRESSOR_LEVEL == 1 || COMPRESSOR_LEVEL == 2
template <bool BF16>
KFN __m256 eight_expanded(const uint8_t* from, uint64_t mask) {
  const __m128i packed = _mm_loadu_si128((const __m128i*)from);
  if (!BF16) return _mm256_cvtph_ps(_mm_shuffle_epi8(packed, _mm_load_si128((const __m128i*)kExpansion.words[mask])));
  const __m256i twice = _mm256_broadcastsi128_si256(packed);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, _mm256_load_si256((const __m256i*)kWidening.from[mask])));
}
#endif

// Eight entries of a 16-bit type where `mask` has bits, zeros elsewhere.
template <bool BF16>
KFN void expand_eight(const uint8_t* from, int mask, float* to) {
#if COMPRESSOR_LEVEL == 3
  const uint16x8_t found = vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(from), vld1q_u8(kExpansion.words[mask])));
  vst1q_f32(to, BF16 ? lower_bf16(found) : lower_halves(found));
  vst1q_f32(to + 4, BF16 ? upper_bf16(found) : upper_halves(found));
#elif COMPRESSOR_LEVEL > 0
  _mm256_storeu_ps(to, eight_expanded<BF16>(from, mask));
#else
  for (int i = 0; i < 8; ++i) {
    to[i] = 0;
    if (!(mask >> i & 1)) continue;
    to[i] = BF16 ? from_bf16(load<uint16_t>(from)) : from_fp16(load<uint16_t>(from));
    from += 2;
  }
#endif
}

// 128 inputs of a row of a sparse 16-bit matrix as fp32. Returns where the next ones begin.
template <bool BF16>
KERNEL const uint8_t* unpack_sparse_row(const uint8_t* at, float* out) {
  const uint8_t* const masks = at;
  at += 16;
#if COMPRESSOR_LEVEL == 2
  for (int i = 0; i < 4; ++i) {
    const uint32_t mask = load<uint32_t>(masks + 4 * i);
    alignas(64) uint8_t found[64];
    _mm512_store_si512(found, _mm512_maskz_expand_epi16(mask, loaded(at)));
    keep(out + 32 * i, sixteen<BF16>(found));
    keep(out + 32 * i + 16, sixteen<BF16>(found + 32));
    at += 2 * __builtin_popcount(mask);
  }
#else
  for (int i = 0; i < 16; ++i) {
    expand_eight<BF16>(at, masks[i], out + 8 * i);
    at += 2 * __builtin_popcount(masks[i]);
  }
#endif
  return at;
}

// As UnpackLevels.
template <int KIND>
struct UnpackSparse {
  template <class Put>
  static void tile(const Matrix& w, long tile, Put&& put) {
    alignas(64) float block[128];
    const uint8_t* at = w.data + w.starts()[tile];
    for (int r = 0; r < 16 && 16 * tile + r < w.m; ++r)
      for (long g = 0; g < w.groups(); ++g) {
        at = unpack_sparse_row<KIND == SPARSE_BF16>(at, block);
        put(r, 128 * g, block);
      }
  }
};

// 128 numbers, zeros beyond `count`.
template <bool BF16>
KERNEL void unpack_plain(const uint8_t* at, long count, float* out) {
  uint8_t rest[256] = {};
  if (count < 128) std::memcpy(rest, at, 2 * count);
  for (int i = 0; i < 128; i += 16) keep(out + i, sixteen<BF16>((count < 128 ? rest : at) + 2 * i));
}

// The same of a matrix of 16-bit numbers that is not packed.
template <int KIND>
struct UnpackPlain {
  template <class Put>
  static void tile(const Matrix& w, long tile, Put&& put) {
    alignas(64) float block[128];
    for (long r = 0; r < 16 && 16 * tile + r < w.m; ++r)
      for (long k = 0; k < w.n; k += 128) {
        unpack_plain<KIND == DENSE_BF16>(w.data + 2 * ((16 * tile + r) * w.n + k), w.n - k < 128 ? w.n - k : 128, block);
        put(r, k, block);
      }
  }
};

// A row of a sparse 16-bit matrix times fp32 inputs, a multiple of 128 of them; `at` goes to where the next row begins.
template <bool BF16>
KFN float sparse_row(const uint8_t*& at, const float* x, long inputs) {
#if COMPRESSOR_LEVEL == 1 || COMPRESSOR_LEVEL == 2
  __m256 s[4] = {};
#else
  F16 s[2] = {};
#endif
  for (long k = 0; k < inputs; k += 128) {
    const uint8_t* const masks = at;
    at += 16;
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      ask(at);
#if COMPRESSOR_LEVEL == 1 || COMPRESSOR_LEVEL == 2
      uint32_t four = load<uint32_t>(masks + i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, four >>= 8) {
        const uint64_t mask = four & 255;
        s[j] = _mm256_fmadd_ps(eight_expanded<BF16>(at, mask), _mm256_loadu_ps(x + k + 8 * (i + j)), s[j]);
        at += 2 * static_cast<uint64_t>(__builtin_popcountll(mask));
      }
#else
      alignas(64) float v[32];
      for (int j = 0; j < 4; ++j) {
        expand_eight<BF16>(at, masks[i + j], v + 8 * j);
        at += 2 * __builtin_popcount(masks[i + j]);
      }
      for (int j = 0; j < 2; ++j) s[j] += load<F16>(v + 16 * j) * load<F16>(x + k + 8 * i + 16 * j);
#endif
    }
  }
#if COMPRESSOR_LEVEL == 1 || COMPRESSOR_LEVEL == 2
  return total_of_eight(_mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3])));
#else
  return total(s[0] + s[1]);
#endif
}

// Rows of a sparse 16-bit matrix times one token of fp32 inputs (padded inputs).
template <int KIND>
KERNEL void sparse_tile(const Matrix& w, long tile, const float* x, float* y) {
  const uint8_t* at = w.data + w.starts()[tile];
  for (int r = 0; r < 16 && 16 * tile + r < w.m; ++r) y[r] = sparse_row<KIND == SPARSE_BF16>(at, x, 128 * w.groups());
}

// Rows of 16-bit numbers that are multiplied together, so that they share what is read of the inputs: where these would
// otherwise be driven out of the first cache by each row. Where they are not, several rows are read slower than one.
constexpr int kRowsAtOnce = COMPRESSOR_LEVEL == 2 ? 4 : 2;
template <class T>
constexpr bool together(long n) {
  return n * static_cast<long>(sizeof(T)) > (16 << 10);
}

// R rows of at least 16 16-bit numbers times one token of fp32 inputs; `last`: the last 16 of these, but zeros where they are
// among the first n / 16 x 16.
template <bool BF16, int R>
KERNEL void dense_rows(const uint8_t* row, const float* x, const float* last, long n, float* y) {
  constexpr int A = R == 1 ? 4 : kRowsAtOnce;  // sums of a row
  F16 s[R][A] = {};
  long k = 0;
  for (; k + 16 * A <= n; k += 16 * A)
#pragma GCC unroll 4
    for (int i = 0; i < A; ++i) {
      const F16 in = load<F16>(x + k + 16 * i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint8_t* const at = row + 2 * (r * n + k + 16 * i);
        if (i % 2 == 0) ask(at);
        s[r][i] += sixteen<BF16>(at) * in;
      }
    }
  for (; k + 16 <= n; k += 16) {
    const F16 in = load<F16>(x + k);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) s[r][0] += sixteen<BF16>(row + 2 * (r * n + k)) * in;
  }
  if (k < n) {  // the last 16 once more, without those that are in the sums
    const F16 in = load<F16>(last);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) s[r][0] += sixteen<BF16>(row + 2 * (r * n + n - 16)) * in;
  }
  for (int r = 0; r < R; ++r) {
    F16 all = s[r][0];
#pragma GCC unroll 4
    for (int i = 1; i < A; ++i) all += s[r][i];
    y[r] = total(all);
  }
}

template <bool BF16>
KERNEL void dense_tile(const uint8_t* row, const float* x, long n, long rows, float* y) {
  if (n < 16) {
    for (long r = 0; r < rows; ++r) {
      y[r] = 0;
      for (long k = 0; k < n; ++k) {
        const uint16_t bits = load<uint16_t>(row + 2 * (r * n + k));
        y[r] += (BF16 ? from_bf16(bits) : from_fp16(bits)) * x[k];
      }
    }
    return;
  }
  float last[16];
  for (long k = n - 16; k < n; ++k) last[k - n + 16] = k < n / 16 * 16 ? 0 : x[k];
  long r = 0;
  for (; together<float>(n) && r + kRowsAtOnce <= rows; r += kRowsAtOnce) dense_rows<BF16, kRowsAtOnce>(row + 2 * r * n, x, last, n, y + r);
  for (; r < rows; ++r) dense_rows<BF16, 1>(row + 2 * r * n, x, last, n, y + r);
}

#if COMPRESSOR_LEVEL == 2
// The same of bf16 and inputs rounded to bf16, where the processor multiplies those.
template <int R>
KBF void dense_rows_bf16(const uint8_t* row, const uint16_t* x, long n, float* y) {
  constexpr int A = R == 1 ? 4 : 2;  // sums of a row
  __m512 s[R][A] = {};
  long k = 0;
  for (; k + 32 * A <= n; k += 32 * A)
#pragma GCC unroll 4
    for (int i = 0; i < A; ++i) {
      const __m512i in = _mm512_loadu_si512(x + k + 32 * i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint8_t* const at = row + 2 * (r * n + k + 32 * i);
        ask(at);
        // as assembler, so that it stays beside its request
        asm volatile("vdpbf16ps %2, %1, %0" : "+v"(s[r][i]) : "v"(in), "m"(*(const __m512i_u*)at));
      }
    }
  for (; k < n; k += 32) {
    const __m512i in = _mm512_loadu_si512(x + k);
    const __mmask32 m = n - k >= 32 ? ~0u : (1u << (n - k)) - 1;
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
      s[r][0] = _mm512_dpbf16_ps(s[r][0], (__m512bh)_mm512_maskz_loadu_epi16(m, row + 2 * (r * n + k)), (__m512bh)in);
  }
  for (int r = 0; r < R; ++r) {
    __m512 all = s[r][0];
#pragma GCC unroll 4
    for (int i = 1; i < A; ++i) all = _mm512_add_ps(all, s[r][i]);
    y[r] = _mm512_reduce_add_ps(all);
  }
}

KBF void dense_tile_bf16(const uint8_t* row, const uint16_t* x, long n, long rows, float* y) {
  long r = 0;
  for (; together<uint16_t>(n) && r + 2 <= rows; r += 2) dense_rows_bf16<2>(row + 2 * r * n, x, n, y + r);
  for (; r < rows; ++r) dense_rows_bf16<1>(row + 2 * r * n, x, n, y + r);
}

// Which of 32 entries a place of theirs takes: how many marked places are before it.
KBI __m512i ranks(const uint8_t* mask) {
  const __m512i low = _mm512_set1_epi16(load<int16_t>(mask)), high = _mm512_set1_epi16(load<int16_t>(mask + 2));
  return _mm512_add_epi16(_mm512_popcnt_epi16(_mm512_and_si512(low, _mm512_load_si512(kBefore.low))),
                          _mm512_popcnt_epi16(_mm512_and_si512(high, _mm512_load_si512(kBefore.high))));
}

// Where every 32 inputs begin is known before any of them is moved, and where the next 128 do.
KBF void sparse_tile_bf16(const Matrix& w, long tile, const uint16_t* x, float* y) {
  const uint8_t* at = w.data + w.starts()[tile];
  const long rows = w.m - 16 * tile < 16 ? w.m - 16 * tile : 16, inputs = 128 * w.groups();
  __m512i all[16] = {};
  for (long r = 0; r < rows; ++r) {
    __m512 s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (long k = 0; k < inputs; k += 128) {
      const uint8_t* const masks = at;
      uint32_t m[4];
      std::memcpy(m, masks, 16);
      const uint8_t* from[4];
      from[0] = at + 16;
      from[1] = from[0] + 2 * __builtin_popcount(m[0]);
      from[2] = from[0] + 2 * __builtin_popcountll(load<uint64_t>(masks));
      from[3] = from[2] + 2 * __builtin_popcount(m[2]);
      at = from[2] + 2 * __builtin_popcountll(load<uint64_t>(masks + 8));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        ask(from[i]);
        const __m512i in = loaded(from[i]);
        // an expansion keeps its unit busy for some cycles: one of four is done by others meanwhile
        const __m512i v = i == 0 ? _mm512_maskz_permutexvar_epi16(m[i], ranks(masks), in) : _mm512_maskz_expand_epi16(m[i], in);
        s[i] = _mm512_dpbf16_ps(s[i], (__m512bh)v, (__m512bh)_mm512_loadu_si512(x + k + 32 * i));
      }
    }
    all[r] = _mm512_castps_si512(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
  }
  keep(y, (F16)sums_of<true>(all));
}
#endif

// Exclusive or of all 32-bit words: next to nothing but the reading.
KERNEL uint32_t read_blocks(const uint8_t* data, long blocks) {
  I16 a{}, b{}, c{}, d{};
  for (long block = 0; block < blocks; ++block)
    for (int i = 0; i < kReadAtOnce; i += 256, data += 256) {
      for (int line = 0; line < 256; line += 64) ask(data + line);
      a = a ^ load<I16>(data);
      b = b ^ load<I16>(data + 64);
      c = c ^ load<I16>(data + 128);
      d = d ^ load<I16>(data + 192);
    }
  uint32_t words[16], all = 0;
  keep(words, (a ^ b) ^ (c ^ d));
  for (const uint32_t word : words) all ^= word;
  return all;
}
