// Activations that are not rounded, by products of bf16, where the processor has them. Included for AVX-512 alone.
//
// Every activation is the sum of one to three bf16 numbers, its terms, and every level (a trit, a sign, 2 to 8 bits less
// half of what they can be) is one bf16 number or the sum of two: products are exact, and summed in fp32.
//
// vpermw looks up 16 bits by 5 bits of an index. A lane of a block has the bytes of inputs 0 to 3 of a row in two words, so
// that what stands at one place of both is an entry of inputs 0 and 2, or of 1 and 3: the pair that a product of bf16 sums.

constexpr int kTermsAtOnce = 8;  // that a block is multiplied by

constexpr uint16_t bf16_of(int v) {  // a whole number up to 256
  const int size = v < 0 ? -v : v;
  if (size == 0) return 0;
  int exponent = 0;
  while (size >> (exponent + 1)) ++exponent;
  return static_cast<uint16_t>((v < 0 ? 0x8000 : 0) | (exponent + 127) << 7 | ((size << 7 >> exponent) & 0x7f));
}

// What an index stands for of whose 5 bits `width` count, from `low` on: `step` times these, less `less`.
struct Table {
  alignas(64) uint16_t value[32] = {};
  constexpr Table(int low, int width, int step, int less) {
    for (int i = 0; i < 32; ++i) value[i] = bf16_of(step * (i >> low & ((1 << width) - 1)) - less);
  }
};

// Where a plane's entries are found in the 16 bits of a word, and how its levels are made of them. A byte of 8 bits is
// looked up as five bits and three.
template <int KIND, int PLANE>
struct Plane {
  static constexpr int W = plane_bits(KIND, PLANE), F = 8 / W;
  static constexpr int lookups = W == 8 ? 4 : 2 * F;  // of a block
  static constexpr int place(int i) { return W == 8 ? i / 2 * 8 + i % 2 * 5 : W * i; }
  static constexpr int shift(int i) { return W == 1 ? i / 5 * 5 : W == 2 ? i / 2 * 4 : place(i); }
  static constexpr int table(int i) { return W == 8 ? i % 2 : place(i) - shift(i); }
  static constexpr int pair(int i) { return place(i) % 8 / W * 2 + place(i) / 8; }  // of inputs, from the block's first
  static constexpr int step = KIND == SIGN ? 2 : KIND == INT3 && PLANE == 1 ? 4 : 1;
  static constexpr int less = is_trits(KIND) || KIND == SIGN ? 1 : KIND == INT3 ? 2 : 1 << (W - 1);
  static constexpr Table made(int low) {
    return W != 8 ? Table(low, W, step, less) : low == 0 ? Table(0, 5, 1, 0) : Table(0, 3, 32, 128);
  }
  static constexpr Table tables[5] = {made(0), made(1), made(2), made(3), made(4)};
};

// sums[t] += levels of a block times inputs of term t; x: [pairs][T].
template <class P, int T, int A>
KBI void times_block(const uint8_t* block, const uint32_t* x, __m512 (&sums)[T][A]) {
  const __m512i v = _mm512_loadu_si512(block);
#pragma GCC unroll 16
  for (int i = 0; i < P::lookups; ++i) {
    const __m512i index = P::shift(i) ? _mm512_srli_epi16(v, P::shift(i)) : v;
    const __m512i levels = _mm512_permutexvar_epi16(index, _mm512_load_si512(P::tables[P::table(i)].value));
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
      // as assembler, with its operand in memory: compilers load inputs for all planes before, and have no room for them
      asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sums[t][i % A]) : "v"(levels), "m"(x[T * P::pair(i) + t]));
  }
}

template <int A>
KBI F16 sum_of_parts(const __m512 (&parts)[A]) {
  F16 all = (F16)parts[0];
#pragma GCC unroll 4
  for (int a = 1; a < A; ++a) all += (F16)parts[a];
  return all;
}

// 16 rows times T terms, x: [pairs][T], and their sums over records, xsum: [T][groups]. y[t][row].
template <int KIND, int T>
KBF void exact_tile_bf16(const Matrix& w, long tile, const uint32_t* x, const float* xsum, float* y) {
  constexpr int P = is_trits(KIND) ? planes(KIND) : 1, A = T == 1 ? 4 : T < 4 ? 2 : 1;
  constexpr int SECOND = planes(KIND) > 1 ? 1 : 0, THIRD = planes(KIND) > 2 ? 2 : 0;
  const uint8_t* block = w.data + tile * w.row_bytes();
  F16 out[T] = {};
  for (long g = 0; g < w.groups(); ++g) {
    __m512 sums[P][T][A] = {};
    for (int k = 0; k < w.kb; k += step(KIND), x += step(KIND) / 2 * T) {
      if (KIND == INT3) {
        times_block<Plane<KIND, 0>>(block, x, sums[0]);
        times_block<Plane<KIND, 0>>(block + 64, x + 8 * T, sums[0]);
        times_block<Plane<KIND, SECOND>>(block + 128, x, sums[0]);
        block += 192;
        continue;
      }
      times_block<Plane<KIND, 0>>(block, x, sums[0]);
      if (P > 1) times_block<Plane<KIND, SECOND>>(block + 64, x, sums[P > 1 ? 1 : 0]);
      if (P > 2) times_block<Plane<KIND, THIRD>>(block + 128, x, sums[P > 2 ? 2 : 0]);
      block += 64 * P;
    }
    const F16 scale = halves(block);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const F16 sum = sum_of_parts(sums[0][t]);
      if (KIND == SIGN) out[t] += scale * sum + halves(block + 32) * xsum[t * w.groups() + g];
      else if (!is_trits(KIND)) out[t] += scale * (sum - (floats(ints(block + 32)) - static_cast<float>(1 << (bits(KIND) - 1))) * xsum[t * w.groups() + g]);
      else out[t] += scale * sum;
#pragma GCC unroll 2
      for (int p = 1; p < P; ++p) out[t] += halves(block + 32 * p) * sum_of_parts(sums[p][t]);
    }
    block += tail_bytes(KIND);
  }
  std::memcpy(y, out, sizeof out);
}

// Sums over the marked inputs of 16 rows: of code times input, and of input, for T terms of inputs one after the other.
template <int T>
KBI const uint8_t* marked_exact(const uint8_t* masks, const uint8_t* codes, const uint16_t* x, long stride, F16* product, F16* plain) {
  static constexpr Table lower(0, 5, 1, 0), upper(0, 3, 32, 0);
  const __m512i one = _mm512_set1_epi16(bf16_of(1));
  __m512i products[T][16], plains[T][16];
  for (int r = 0; r < 16; ++r, masks += 16) {
    __m512 p[T] = {}, s[T] = {};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint32_t mask = load<uint32_t>(masks + 4 * i);
      const __m256i packed = _mm512_castsi512_si256(loaded(codes));
      const __m512i found = _mm512_cvtepu8_epi16(_mm256_maskz_expand_epi8(mask, packed));
      codes += __builtin_popcount(mask);
      const __m512i low = _mm512_permutexvar_epi16(found, _mm512_load_si512(lower.value));
      const __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(found, 5), _mm512_load_si512(upper.value));
#pragma GCC unroll 3
      for (int t = 0; t < T; ++t) {
        const __m512i in = _mm512_loadu_si512(x + t * stride + 32 * i);
        p[t] = _mm512_dpbf16_ps(_mm512_dpbf16_ps(p[t], (__m512bh)low, (__m512bh)in), (__m512bh)high, (__m512bh)in);
        s[t] = _mm512_dpbf16_ps(s[t], (__m512bh)_mm512_maskz_mov_epi16(mask, one), (__m512bh)in);
      }
    }
#pragma GCC unroll 3
    for (int t = 0; t < T; ++t) {
      products[t][r] = _mm512_castps_si512(p[t]);
      plains[t][r] = _mm512_castps_si512(s[t]);
    }
  }
  for (int t = 0; t < T; ++t) {
    product[t] = (F16)sums_of<true>(products[t]);
    plain[t] = (F16)sums_of<true>(plains[t]);
  }
  return codes;
}

// 16 rows of a sparse 8-bit matrix times T terms, rows of inputs. y[t][row].
template <int T>
KBF void sparse8_exact_tile(const Matrix& w, long tile, const uint16_t* x, float* y) {
  const uint8_t* at = w.data + w.starts()[tile];
  const F16 step = load<F16>(at), zero = load<F16>(at + 64);
  at += 128;
  F16 out[T] = {};
  for (long g = 0; g < w.groups(); ++g, x += 128) {
    F16 product[T], plain[T];
    at = marked_exact<T>(at, at + 256, x, 128 * w.groups(), product, plain);
    for (int t = 0; t < T; ++t) out[t] += step * (product[t] - zero * plain[t]);
  }
  std::memcpy(y, out, sizeof out);
}

// As sum_marked, of T terms of inputs one after the other.
template <int T>
KBI void sum_marked_exact(const Fours& fours, const uint16_t* x, long stride, F16* product, F16* plain) {
  static constexpr Table lower(0, 5, 1, 0), upper(0, 3, 32, 0);
  const __m512i one = _mm512_set1_epi16(bf16_of(1)), byte = _mm512_set1_epi16(255);
  __m512 p[T] = {}, s[T] = {};
  const uint8_t *places = fours.places, *codes = fours.codes;
  for (int i = 0; i < fours.rounds; ++i) {
    const unsigned rows = fours.rows_of(i), bytes = 4 * __builtin_popcount(rows);
    const __m512i all_places = _mm512_maskz_expand_epi32((__mmask16)rows, loaded(places));
    const __m512i all_codes = _mm512_maskz_expand_epi32((__mmask16)rows, loaded(codes));
    places += bytes;
    codes += bytes;
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {  // two of the four of a lane
      const __m512i place = odd ? _mm512_srli_epi16(all_places, 8) : _mm512_and_si512(all_places, byte);
      const __m512i code = odd ? _mm512_srli_epi16(all_codes, 8) : _mm512_and_si512(all_codes, byte);
      const __mmask32 real = _mm512_test_epi16_mask(place, _mm512_set1_epi16(128)), upper_half = _mm512_test_epi16_mask(place, _mm512_set1_epi16(64));
      const __m512bh low = (__m512bh)_mm512_permutexvar_epi16(code, _mm512_load_si512(lower.value));
      const __m512bh high = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(code, 5), _mm512_load_si512(upper.value));
      const __m512bh ones = (__m512bh)_mm512_maskz_mov_epi16(real, one);
#pragma GCC unroll 3
      for (int t = 0; t < T; ++t) {
        const uint16_t* const from = x + t * stride;
        const __m512i first = _mm512_maskz_permutex2var_epi16(real, _mm512_loadu_si512(from), place, _mm512_loadu_si512(from + 32));
        const __m512i second = _mm512_permutex2var_epi16(_mm512_loadu_si512(from + 64), place, _mm512_loadu_si512(from + 96));
        const __m512bh in = (__m512bh)_mm512_mask_mov_epi16(first, upper_half, second);
        p[t] = _mm512_dpbf16_ps(_mm512_dpbf16_ps(p[t], low, in), high, in);
        s[t] = _mm512_dpbf16_ps(s[t], ones, in);
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    product[t] = (F16)p[t];
    plain[t] = (F16)s[t];
  }
}

// The same of a partial binary matrix; terms also as pairs.
template <int T>
KBF void partial_exact_tile(const Matrix& w, long tile, const uint32_t* pairs, const uint16_t* x, const float* xsum, float* y) {
  const uint8_t* at = w.data + w.starts()[tile];
  const F16 step = load<F16>(at), zero = load<F16>(at + 64);
  at += 128;
  F16 out[T] = {};
  for (long g = 0; g < w.groups(); ++g, x += 128) {
    __m512 signs[T][T == 1 ? 4 : 2] = {};
    for (int k = 0; k < 4; ++k, pairs += 16 * T) times_block<Plane<SIGN, 0>>(at + 64 + 64 * k, pairs, signs);
    const Fours fours(at + 320);
    F16 product[T], plain[T];
    sum_marked_exact<T>(fours, x, 128 * w.groups(), product, plain);
    for (int t = 0; t < T; ++t) {  // where an entry is marked the plane says -1
      out[t] += step * (product[t] - zero * plain[t]) + halves(at) * (sum_of_parts(signs[t]) + plain[t]);
      out[t] += halves(at + 32) * (splat(xsum[t * w.groups() + g]) - plain[t]);
    }
    at = fours.end;
  }
  std::memcpy(y, out, sizeof out);
}

// How many terms are multiplied at once of so many that are left, `count` for an activation.
inline int terms_at_once(long left, int count) {
  return count == 3 ? 3 : left >= kTermsAtOnce ? kTermsAtOnce : left >= 4 ? 4 : static_cast<int>(left);
}

// Activations as their terms: bf16 numbers whose sum they are.
struct Terms {
  int count;              // of an activation
  const uint32_t* pairs;  // of those at once [padded / 2][terms]: of every four inputs 0 and 2, then 1 and 3
  const uint16_t* plain;  // [terms][padded]
  const float* sums;      // [terms][groups]
};

// The next term of a token, and in x what is left of it. `pairs` are `at_once` apart.
KBF void take_term(float* x, long groups, int kb, uint32_t* pairs, int at_once, uint16_t* plain, float* sums) {
  for (long g = 0; g < groups; ++g) {
    __m512 sum = _mm512_setzero_ps();
    for (long k = g * kb; k < (g + 1) * kb; k += 16) {
      const __m512 v = _mm512_loadu_ps(x + k);
      const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), finite = _knot_mask16(_mm512_fpclass_ps_mask(v, 0x99));
      const __m512i bits = _mm512_castps_si512(v), quiet = _mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x400000));
      const __m512 term = _mm512_castsi512_ps(_mm512_and_si512(quiet, _mm512_set1_epi32((int)0xffff0000)));
      _mm512_storeu_ps(x + k, _mm512_maskz_sub_ps(finite, v, term));
      sum = _mm512_add_ps(sum, term);
      const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16));
      _mm256_storeu_si256((__m256i*)(plain + k), narrow);
      uint32_t turned[8];
      _mm256_storeu_si256((__m256i*)turned, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(narrow, 0xd8), 0xd8));
      for (int i = 0; i < 8; ++i) pairs[(k / 2 + i) * at_once] = turned[i];
    }
    sums[g] = _mm512_reduce_add_ps(sum);
  }
}

static Terms terms_of(const Call& c, bool streams) {
  const long groups = c.w.groups(), padded = groups * c.w.kb;
  const int count = c.dtype == BFLOAT16 ? 1 : c.dtype == FLOAT16 ? 2 : 3;
  const long all = c.tokens * count;
  float* const x = Scratch::mine().floats(padded + all * (padded + groups));
  uint32_t* const pairs = reinterpret_cast<uint32_t*>(x + padded);
  uint16_t* const plain = reinterpret_cast<uint16_t*>(pairs + all * padded / 2);
  float* const sums = reinterpret_cast<float*>(plain + all * padded);
  long first = 0;  // of those at once
  for (long term = 0; term < all; ++term) {
    if (term % count == 0) {
      const char* const from = static_cast<const char*>(c.x) + term / count * c.w.n * width(c.dtype);
      widen_tokens(from, c.dtype, 0, 1, c.w.n, c.w.kb, groups, x);
    }
    const int at_once = streams ? count : terms_at_once(all - first, count);
    take_term(x, groups, c.w.kb, pairs + first * padded / 2 + (term - first), at_once, plain + term * padded, sums + term * groups);
    if (term + 1 == first + at_once) first = term + 1;
  }
  return {count, pairs, plain, sums};
}

// y[t * count ..] of 16 numbers: terms of a token to their sum.
static void add_terms(float* y, long tokens, int count) {
  for (long t = 0; t < tokens; ++t)
    for (int i = 0; i < 16; ++i) {
      float sum = y[16 * t * count + i];
      for (int term = 1; term < count; ++term) sum += y[16 * (t * count + term) + i];
      y[16 * t + i] = sum;
    }
}

template <int KIND>
static void run_exact(const Call& c) {
  const Matrix& w = c.w;
  const Terms x = terms_of(c, false);
  const long groups = w.groups(), pairs = groups * w.kb / 2, tiles = w.tiles(), chunks = chunks_of(tiles, c.threads);
  pool::each(chunks, c.threads, [&](long chunk) {
    const auto [first, last] = span(tiles, chunks, chunk);
    for (long tile = first; tile < last; ++tile)
      for (long token = 0; token < c.tokens;) {
        const long from = token * x.count;
        const int at_once = terms_at_once(c.tokens * x.count - from, x.count);
        float y[16 * kTermsAtOnce];
        const auto run = at_once == 8 ? exact_tile_bf16<KIND, 8> : at_once == 4 ? exact_tile_bf16<KIND, 4>
                       : at_once == 3 ? exact_tile_bf16<KIND, 3> : at_once == 2 ? exact_tile_bf16<KIND, 2> : exact_tile_bf16<KIND, 1>;
        run(w, tile, x.pairs + from * pairs, x.sums + from * groups, y);
        const long tokens = at_once / x.count;
        add_terms(y, tokens, x.count);
        write_out(c, y, 16, 16 * tile, w.m - 16 * tile < 16 ? w.m - 16 * tile : 16, token, token + tokens);
        token += tokens;
      }
  });
}

template <int KIND, int T>
static void codes_exact_tile(const Matrix& w, long tile, const Terms& x, long first, float* y) {
  const long groups = w.groups(), padded = 128 * groups;
  const uint16_t* const rows = x.plain + first * padded;
  if (KIND == SPARSE8) return sparse8_exact_tile<T>(w, tile, rows, y);
  partial_exact_tile<T>(w, tile, x.pairs + first * padded / 2, rows, x.sums + first * groups, y);
}

template <int KIND>
static void run_codes_exact(const Call& c) {
  const Terms x = terms_of(c, true);
  const auto run = x.count == 1 ? codes_exact_tile<KIND, 1> : x.count == 2 ? codes_exact_tile<KIND, 2> : codes_exact_tile<KIND, 3>;
  each_tile(c, [&](long tile, long t, float* y) {
    float parts[3 * 16];
    run(c.w, tile, x, t * x.count, parts);
    add_terms(parts, 1, x.count);
    std::memcpy(y, parts, 16 * sizeof(float));
  });
}
