// Panels in bf16, for activations of that dtype, where the processor multiplies them. Included for AVX-512 alone.

// As times_rows, rows of the panel `apart` numbers from each other; inputs a multiple of 32.
KBF void times_panel(const uint16_t* panel, long apart, const uint16_t* x, long stride, long inputs, long tokens, float* y) {
  for (long t = 0; t < tokens; t += 4) {
    const uint16_t* in[4];
    for (long j = 0; j < 4; ++j) in[j] = x + (t + j < tokens ? t + j : tokens - 1) * stride;
    for (int r = 0; r < 16; r += 4) {
      const uint16_t* const rows = panel + r * apart;
      __m512 sums[16] = {};
      for (long k = 0; k < inputs; k += 32) {
        __m512bh w[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) w[i] = (__m512bh)_mm512_loadu_si512(rows + i * apart + k);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const __m512bh v = (__m512bh)_mm512_loadu_si512(in[j] + k);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sums[4 * j + i] = _mm512_dpbf16_ps(sums[4 * j + i], w[i], v);
        }
      }
      __m512i words[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) words[i] = _mm512_castps_si512(sums[i]);
      float all[16];
      keep(all, (F16)sums_of<true>(words));
      for (long j = 0; j < 4 && t + j < tokens; ++j) std::memcpy(y + (t + j) * 16 + r, all + 4 * j, 4 * sizeof(float));
    }
  }
}

KBF void narrow(const float* from, int count, uint16_t* to) {
  for (int i = 0; i < count; i += 32)
    _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i)));
}

// Rows 16 tile .. of a matrix in bf16 (16, inputs), `stride` apart; rows beyond the last stay as they are.
template <class Unpack>
struct Panel {
  static void fill(const Matrix& w, long tile, uint16_t* panel, long stride) {
    Unpack::tile(w, tile, [&](int r, long input, const float* values) { narrow(values, w.kb, panel + r * stride + input); });
  }
};

template <>
struct Panel<UnpackSparse<SPARSE_BF16>> {
  KBF void fill(const Matrix& w, long tile, uint16_t* panel, long stride) {
    const uint8_t* at = w.data + w.starts()[tile];
    const long groups = w.groups(), rows = w.m - 16 * tile < 16 ? w.m - 16 * tile : 16;
    for (long r = 0; r < rows; ++r)
      for (long g = 0; g < groups; ++g) {
        uint32_t masks[4];
        std::memcpy(masks, at, 16);
        at += 16;
#pragma GCC unroll 4
        for (long i = 0; i < 4; ++i) {
          ask(at);
          _mm512_storeu_si512(panel + r * stride + 128 * g + 32 * i, _mm512_maskz_expand_epi16(masks[i], loaded(at)));
          at += 2 * __builtin_popcount(masks[i]);
        }
      }
  }
};

template <>
struct Panel<UnpackSparse8> {
  KBF void fill(const Matrix& w, long tile, uint16_t* panel, long stride) {
    const uint8_t* at = w.data + w.starts()[tile];
    const uint8_t* const head = at;
    at += 128;
    for (long g = 0; g < w.groups(); ++g) {
      const uint8_t *const masks = at, *codes = at + 256;
      for (int r = 0; r < 16; ++r) {
        const __m512 step = _mm512_set1_ps(load<float>(head + 4 * r)), zero = _mm512_set1_ps(load<float>(head + 64 + 4 * r));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const uint32_t mask = load<uint32_t>(masks + 16 * r + 4 * i);
          const __m256i found = _mm256_maskz_expand_epi8(mask, _mm512_castsi512_si256(loaded(codes)));
          const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(found)));
          const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(found, 1)));
          const __m512bh both = _mm512_cvtne2ps_pbh((high - zero) * step, (low - zero) * step);
          _mm512_storeu_si512(panel + r * stride + 128 * g + 32 * i, _mm512_maskz_mov_epi16(mask, (__m512i)both));
          codes += __builtin_popcount(mask);
        }
      }
      at = codes;
    }
  }
};

// Where 32 inputs of a row find their sign in a block: in which of the row's two words, and in which bit of it.
struct Signs {
  alignas(64) uint16_t word[32] = {}, bit[32] = {};
  constexpr Signs() {
    for (int input = 0; input < 32; ++input) {
      word[input] = static_cast<uint16_t>(input % 4 / 2);
      bit[input] = static_cast<uint16_t>(1 << (8 * (input % 2) + input / 4));
    }
  }
};

template <>
struct Panel<UnpackPartial> {
  // First the signs of a row, then what is marked in their places.
  KBF void fill(const Matrix& w, long tile, uint16_t* panel, long stride) {
    static constexpr Signs kSigns{};
    const uint8_t* at = w.data + w.starts()[tile];
    float steps[4 * 16], zeros[4 * 16];  // of rows, four times each
    for (int i = 0; i < 4 * 16; ++i) {
      steps[i] = load<float>(at + 4 * (i / 4));
      zeros[i] = load<float>(at + 64 + 4 * (i / 4));
    }
    at += 128;
    for (long g = 0; g < w.groups(); ++g, panel += 128) {
      uint16_t plus[16], minus[16];
      const F16 scale = halves(at), mean = halves(at + 32);
      _mm256_storeu_si256((__m256i*)plus, (__m256i)_mm512_cvtneps_pbh((__m512)(mean + scale)));
      _mm256_storeu_si256((__m256i*)minus, (__m256i)_mm512_cvtneps_pbh((__m512)(mean - scale)));
      for (int r = 0; r < 16; ++r) {
        const __m512i words = _mm512_add_epi16(_mm512_load_si512(kSigns.word), _mm512_set1_epi16(static_cast<short>(2 * r)));
        const __m512i high = _mm512_set1_epi16(static_cast<short>(plus[r])), low = _mm512_set1_epi16(static_cast<short>(minus[r]));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m512i block = _mm512_permutexvar_epi16(words, _mm512_loadu_si512(at + 64 + 64 * i));
          const __mmask32 positive = _mm512_test_epi16_mask(block, _mm512_load_si512(kSigns.bit));
          _mm512_storeu_si512(panel + r * stride + 32 * i, _mm512_mask_blend_epi16(positive, low, high));
        }
      }
      const Fours fours(at + 320);
      const uint8_t *place = fours.places, *code = fours.codes;
      for (int i = 0; i < fours.rounds; ++i) {
        unsigned rows = fours.rows_of(i);
        alignas(64) uint8_t levels[64];
        uint16_t values[64];
        _mm512_store_si512(levels, _mm512_maskz_expand_epi32((__mmask16)rows, loaded(code)));
        code += 4 * __builtin_popcount(rows);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          const F16 value = (floats(ints(levels + 16 * q)) - load<F16>(zeros + 16 * q)) * load<F16>(steps + 16 * q);
          _mm256_storeu_si256((__m256i*)(values + 16 * q), (__m256i)_mm512_cvtneps_pbh((__m512)value));
        }
        for (; rows; rows &= rows - 1, place += 4) {
          const int r = __builtin_ctz(rows);
          uint16_t* const row = panel + r * stride;
          const uint32_t to = load<uint32_t>(place) ^ 0x80808080u;  // what is nowhere goes to where the next record begins
          const uint64_t four = load<uint64_t>(values + 4 * r);
          row[to & 255] = static_cast<uint16_t>(four);
          row[to >> 8 & 255] = static_cast<uint16_t>(four >> 16);
          row[to >> 16 & 255] = static_cast<uint16_t>(four >> 32);
          row[to >> 24] = static_cast<uint16_t>(four >> 48);
        }
      }
      at = fours.end;
    }
  }
};

template <class Unpack>
struct InBf16 {
  using Number = uint16_t;
  static void token(const Call& c, long t, Number* to) {
    const long n = c.w.n;
    std::memcpy(to, static_cast<const uint16_t*>(c.x) + t * n, 2 * n);
    std::memset(to + n, 0, 2 * (c.w.groups() * c.w.kb - n));
  }
  // A matrix that is in bf16 is multiplied where it is.
  static const Number* rows(const Matrix& w, long tile, Number* panel, long stride) {
    const bool there = std::is_same_v<Unpack, UnpackPlain<DENSE_BF16>> && w.m - 16 * tile >= 16 && w.n % 128 == 0;
    if (there) return reinterpret_cast<const uint16_t*>(w.data) + 16 * tile * w.n;
    Panel<Unpack>::fill(w, tile, panel, stride);
    return panel;
  }
  static void times(const Matrix& w, const Number* panel, const Number* room, const Number* x, long stride, long tokens, float* y) {
    times_panel(panel, panel == room ? stride : w.n, x, stride, w.groups() * w.kb, tokens, y);
  }
};
