// Partial binary: signs, and a few marked entries in 8 bits. Included once for each instruction set.
//
// Marked entries come by fours: a lane of 32 bits has four places of its row, and another their codes. Inputs are looked up
// by place, so that what is multiplied stands beside each other, whatever was marked. A lane without a row, and a place
// that stands for nothing, gets zeros.

#if COMPRESSOR_LEVEL == 2
// Sums over the marked inputs of 16 rows: of code times input, and of input.
KFN void sum_marked(const Fours& fours, const int8_t* x, I16& product, I16& plain) {
  const __m512i x0 = _mm512_loadu_si512(x), x1 = _mm512_loadu_si512(x + 64), real = _mm512_set1_epi8((char)128);
  __m512i products = _mm512_setzero_si512(), plains = products;
  const uint8_t *places = fours.places, *codes = fours.codes;
  for (int i = 0; i < fours.rounds; i += 2)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const unsigned rows = fours.rows_of(i + j), bytes = 4 * __builtin_popcount(rows);
      const __m512i place = _mm512_maskz_expand_epi32((__mmask16)rows, loaded(places));
      const __m512i code = _mm512_maskz_expand_epi32((__mmask16)rows, loaded(codes));
      const __m512i in = _mm512_permutex2var_epi8(x0, place, x1);
      products = _mm512_dpbusd_epi32(products, code, in);
      plains = _mm512_dpbusd_epi32(plains, _mm512_and_si512(place, real), in);  // 128 where there is an input
      places += bytes;
      codes += bytes;
    }
  product = (I16)products;
  plain = (I16)_mm512_srai_epi32(plains, 7);
}
#elif COMPRESSOR_LEVEL == 1
// table[index] of 128 bytes; 0 where an index is 128 or more. Table: every 16 bytes twice.
KFN __m256i lookup_128(const __m256i* table, __m256i index) {
  __m256i found[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) found[i] = _mm256_shuffle_epi8(table[i], index);
  const __m256i by_16 = _mm256_slli_epi16(index, 3), by_32 = _mm256_slli_epi16(index, 2), by_64 = _mm256_slli_epi16(index, 1);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) found[i] = _mm256_blendv_epi8(found[2 * i], found[2 * i + 1], by_16);
  const __m256i low = _mm256_blendv_epi8(found[0], found[1], by_32), high = _mm256_blendv_epi8(found[2], found[3], by_32);
  return _mm256_blendv_epi8(low, high, by_64);
}

KFN void sum_marked(const Fours& fours, const int8_t* x, I16& product, I16& plain) {
  __m256i table[8], products[2] = {}, plains[2] = {};
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) table[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(x + 16 * i)));
  const __m256i one = _mm256_set1_epi8(1), real = _mm256_set1_epi8((char)128);
  const uint8_t *places = fours.places, *codes = fours.codes;
  for (int i = 0; i < fours.rounds; ++i) {
    unsigned rows = fours.rows_of(i);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h, rows >>= 8) {
      const int bytes = 4 * __builtin_popcount(rows & 255);
      const __m256i from = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)kExpansion.bytes[rows & 255]));
      const __m256i none = _mm256_cmpgt_epi32(from, _mm256_set1_epi32(7));
      const __m256i place = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)places), from);
      const __m256i code = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)codes), from);
      const __m256i in = lookup_128(table, _mm256_or_si256(_mm256_xor_si256(place, real), none));
      const __m256i less = _mm256_xor_si256(code, real);  // less 128, else a pair of products would not fit 16 bits
      products[h] = _mm256_add_epi32(products[h], wider(_mm256_maddubs_epi16(_mm256_abs_epi8(less), _mm256_sign_epi8(in, less))));
      plains[h] = _mm256_add_epi32(plains[h], wider(_mm256_maddubs_epi16(one, in)));
      places += bytes;
      codes += bytes;
    }
  }
  plain = pair(plains[0], plains[1]);
  product = pair(products[0], products[1]) + plain * 128;
}
#elif COMPRESSOR_LEVEL == 3
// Bytes of four lanes by a mask of them: from which byte each comes, 255 where from none.
struct FourLanes {
  alignas(16) uint8_t from[16][16];
  constexpr FourLanes() : from() {
    for (int mask = 0; mask < 16; ++mask)
      for (int lane = 0, next = 0; lane < 4; ++lane) {
        const bool has = mask >> lane & 1;
        for (int i = 0; i < 4; ++i) from[mask][4 * lane + i] = static_cast<uint8_t>(has ? 4 * next + i : 255);
        next += has;
      }
  }
};

KFN void sum_marked(const Fours& fours, const int8_t* x, I16& product, I16& plain) {
  static constexpr FourLanes kLanes{};
  const int8x16x4_t low = {{vld1q_s8(x), vld1q_s8(x + 16), vld1q_s8(x + 32), vld1q_s8(x + 48)}};
  const int8x16x4_t high = {{vld1q_s8(x + 64), vld1q_s8(x + 80), vld1q_s8(x + 96), vld1q_s8(x + 112)}};
  product = plain = splat(0);
  const uint8_t *places = fours.places, *codes = fours.codes;
  for (int i = 0; i < fours.rounds; ++i) {
    unsigned rows = fours.rows_of(i);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q, rows >>= 4) {
      const uint8x16_t from = vld1q_u8(kLanes.from[rows & 15]);
      // without 128: an index into 128 inputs, and beyond them where a place stands for nothing
      const uint8x16_t place = veorq_u8(vqtbl1q_u8(vld1q_u8(places), from), vdupq_n_u8(128));
      const int8x16_t code = less_128(vqtbl1q_u8(vld1q_u8(codes), from));
      const int8x16_t in = vqtbx4q_s8(vqtbl4q_s8(low, place), high, vsubq_u8(place, vdupq_n_u8(64)));
      product.v[q] = vdotq_s32(product.v[q], code, in);
      plain.v[q] = vdotq_s32(plain.v[q], vdupq_n_s8(1), in);
      const int bytes = 4 * __builtin_popcount(rows & 15);
      places += bytes;
      codes += bytes;
    }
  }
  product += plain * 128;
}
#else
KFN void sum_marked(const Fours& fours, const int8_t* x, I16& product, I16& plain) {
  int32_t products[16] = {}, plains[16] = {};
  const uint8_t *place = fours.places, *code = fours.codes;
  for (int i = 0; i < fours.rounds; ++i)
    for (unsigned rows = fours.rows_of(i); rows; rows &= rows - 1) {
      const int r = __builtin_ctz(rows);
      for (int j = 0; j < 4; ++j, ++place, ++code) {
        if (*place < 128) continue;
        products[r] += *code * x[*place - 128];
        plains[r] += x[*place - 128];
      }
    }
  product = load<I16>(products);
  plain = load<I16>(plains);
}
#endif

// 16 rows times one token.
KERNEL void partial_tile(const Matrix& w, long tile, const int8_t* x, const float* xscale, const int32_t* xsum, float* y) {
  const uint8_t* at = w.data + w.starts()[tile];
  const F16 step = load<F16>(at), zero = load<F16>(at + 64);
  at += 128;
  F16 sum = splat(0.0f);
  for (long g = 0; g < w.groups(); ++g, x += 128) {
    Dot<1> dot;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) dot.step(at + 64 + 64 * k, x + 32 * k);
    const Fours fours(at + 320);
    I16 product, plain;
    sum_marked(fours, x, product, plain);
    const I16 rest = splat(xsum[g]) - plain;  // the plane has no bit where an entry is marked
    F16 value = step * (floats(product) - zero * floats(plain));
    value += halves(at) * floats(dot.total(xsum[g]) * 2 - rest) + halves(at + 32) * floats(rest);
    sum += value * xscale[g];
    at = fours.end;
  }
  keep(y, sum);
}

// A record as fp32 (16, 128). Returns where the next one begins.
KERNEL const uint8_t* unpack_partial_record(const uint8_t* at, const RowGrids& grids, float* out) {
  unpack_plane<SIGN, 0>(at + 64, at, 128, out);
  const Fours fours(at + 320);
  const uint8_t *place = fours.places, *code = fours.codes;
  for (int i = 0; i < fours.rounds; ++i)
    for (unsigned rows = fours.rows_of(i); rows; rows &= rows - 1) {
      const int r = __builtin_ctz(rows);
      for (int j = 0; j < 4; ++j, ++place, ++code)
        if (*place >= 128) out[128 * r + *place - 128] = grids.step[r] * (static_cast<float>(*code) - grids.zero[r]);
    }
  return fours.end;
}

// As UnpackLevels.
struct UnpackPartial {
  template <class Put>
  static void tile(const Matrix& w, long tile, Put&& put) {
    alignas(64) float block[16 * 128];
    const uint8_t* at = w.data + w.starts()[tile];
    const RowGrids grids(at);
    at += sizeof grids;
    for (long g = 0; g < w.groups(); ++g) {
      at = unpack_partial_record(at, grids, block);
      for (int r = 0; r < 16; ++r) put(r, 128 * g, block + 128 * r);
    }
  }
};
