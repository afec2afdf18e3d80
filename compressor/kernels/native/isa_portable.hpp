// Plain C++ for any processor; the compiler finds what vectors it can.

KFN F16 halves(const uint8_t* from) { return halves_in_software(from); }
KFN void keep_halves(void* to, F16 v) {
  uint16_t narrow[16];
  for (int i = 0; i < 16; ++i) narrow[i] = to_fp16(v[i]);
  std::memcpy(to, narrow, sizeof narrow);
}

template <int W>
struct Dot {
  int32_t sum[16] = {};
  KIN void step(const uint8_t* block, const int8_t* x) {
    for (int f = 0; f < 8 / W; ++f)
      for (int r = 0; r < 16; ++r)
        for (int i = 0; i < 4; ++i) sum[r] += ((block[4 * r + i] >> (W * f)) & ((1 << W) - 1)) * x[4 * f + i];
  }
  KIN I16 total(int32_t = 0) const { return load<I16>(sum); }
};

KFN B64 lookup(B64 table, B64 index) {
  B64 out;
  for (int at = 0; at < 64; ++at) out[at] = table[(at & ~15) | (index[at] & 15)];
  return out;
}

// scale and zero of a record's rows, for one byte a level: value = scale (level - zero).
struct Grid {
  F16 scale, zero;
};

constexpr int kTileTokens = 4;
constexpr bool is_wide(int) { return false; }  // all levels are the same to it

template <int T, bool WIDE>
KFN void one_tile(const uint8_t* levels, const int8_t* x, int kb, F16 scale, F16 zero, const float* xscale,
                  const int32_t* xsum, float* y) {
  int32_t sum[T][16] = {};
  for (int k = 0; k < kb / 4; ++k)
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < 16; ++r)
        for (int i = 0; i < 4; ++i) sum[t][r] += levels[64 * k + 4 * r + i] * x[(k * T + t) * 4 + i];
  for (int t = 0; t < T; ++t) {
    const F16 value = (floats(load<I16>(sum[t])) - zero * static_cast<float>(xsum[t])) * (scale * xscale[t]);
    for (int r = 0; r < 16; ++r) y[t * kStride + r] += value[r];
  }
}

template <int T, bool WIDE>
KFN void tile(const uint8_t* levels, const int8_t* x, int kb, const Grid* grids, const float* xscale, const int32_t* xsum,
              float* y) {
  for (int r = 0; r < 2; ++r)
    one_tile<T, WIDE>(levels + kLevels * r, x, kb, grids[r].scale, grids[r].zero, xscale, xsum, y + 16 * r);
}
