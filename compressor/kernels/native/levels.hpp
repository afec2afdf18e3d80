// Products with matrices of levels: one token straight from the packed planes, several through one byte a level.
// Included once for each instruction set.

template <int KIND>
KFN Grid grid(const uint8_t* tail) {
  const F16 scale = halves(tail);
  I16 zero = ints(tail + 32);
  for (int p = 1; is_trits(KIND) && p < planes(KIND); ++p) zero += ints(tail + 32 + 16 * p);
  return {scale, floats(zero)};
}

// One record times quantized inputs x, to be multiplied by the scale of these.
template <int KIND>
KFN F16 record_dot(const uint8_t* data, const uint8_t* tail, const int8_t* x, int kb, int32_t xsum) {
  if (KIND == INT3) {
    Dot<2> low;
    Dot<1> high;
    for (int k = 0; k < kb; k += 32, data += 192) {
      low.step(data, x + k);
      low.step(data + 64, x + k + 16);
      high.step(data + 128, x + k);
    }
    const I16 sum = low.total(xsum) + high.total(xsum) * 4;
    return halves(tail) * floats(sum - ints(tail + 32) * xsum);
  }
  constexpr int P = planes(KIND), W = plane_bits(KIND, 0);
  Dot<W> sums[P];
  for (int k = 0; k < kb; k += step(KIND)) {
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p, data += 64) sums[p].step(data, x + k);
  }
  if (KIND == SIGN) {
    return halves(tail) * floats(sums[0].total(xsum) * 2 - xsum) + halves(tail + 32) * static_cast<float>(xsum);
  }
  if (is_trits(KIND)) {
    F16 value = floats(ints(tail + 32)) * floats(sums[0].total(xsum) - xsum);
#pragma GCC unroll 3
    for (int p = 1; p < P; ++p) value += floats(ints(tail + 32 + 16 * p)) * floats(sums[p].total(xsum) - xsum);
    return halves(tail) * value;
  }
  return halves(tail) * floats(sums[0].total(xsum) - ints(tail + 32) * xsum);
}

// 16 rows times T tokens, quantized each by itself; y[t][row]. A record is read from memory once.
template <int KIND, int T>
KERNEL void gemv_tile(const Matrix& w, long tile, const Tokens& x, float* y) {
  const uint8_t* record = w.data + tile * w.row_bytes();
  const long groups = w.groups(), data = data_bytes(KIND, w.kb), whole = record_bytes(KIND, w.kb);
  F16 sums[T] = {};
  for (long g = 0; g < groups; ++g, record += whole)
#pragma GCC unroll 3
    for (int t = 0; t < T; ++t) {
      const long at = t * groups + g;
      sums[t] += record_dot<KIND>(record, record + data, x.q + at * w.kb, w.kb, x.sum[at]) * x.scale[at];
    }
  std::memcpy(y, sums, sizeof sums);
}

// One record as levels [kb / 4][16 rows][4 inputs].
template <int KIND>
KFN void decode(const uint8_t* data, const uint8_t* tail, int kb, uint8_t* levels) {
  if (KIND == INT3) {
    for (int k = 0; k < kb; k += 32, data += 192) {
      const B64 high = load<B64>(data + 128);
      for (int f = 0; f < 8; ++f, levels += 64) {
        const B64 low = field<2>(load<B64>(data + 64 * (f / 4)), f % 4);
        const B64 level = low | times_four(field<1>(high, f));
        std::memcpy(levels, &level, 64);
      }
    }
    return;
  }
  constexpr int P = planes(KIND), W = plane_bits(KIND, 0);
  // a lane of 16 bytes holds four rows, four inputs each: entry 4 row + u of its table is u times the row's number
  alignas(64) static constexpr uint8_t kRowOfFour[64] = {
      0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12, 0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12,
      0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12, 0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
  B64 tables[P];
  const B64 rows = load<B64>(kRowOfFour);
  if (is_trits(KIND))
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) tables[p] = multiples(ints(tail + 32 + 16 * p));
  for (int k = 0; k < kb; k += step(KIND), data += 64 * P) {
    B64 blocks[P];
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) __builtin_prefetch(data + 64 * p + record_bytes(KIND, kb));
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) blocks[p] = load<B64>(data + 64 * p);
#pragma GCC unroll 8
    for (int f = 0; f < 8 / W; ++f, levels += 64) {
      B64 level = field<W>(blocks[0], f);
      if (is_trits(KIND)) {
        level = lookup(tables[0], level | rows);
#pragma GCC unroll 3
        for (int p = 1; p < P; ++p) level += lookup(tables[p], field<W>(blocks[p], f) | rows);
      }
      std::memcpy(levels, &level, 64);
    }
  }
}

// 16 rows times fp32 inputs that are not rounded, `tokens` of them in rows of `stride`; y[t][row].
template <int KIND>
KERNEL void exact_tile(const Matrix& w, long tile, const float* x, long stride, long tokens, float* y) {
  alignas(64) uint8_t levels[kLevels];
  const uint8_t* record = w.data + tile * w.row_bytes();
  const long data = data_bytes(KIND, w.kb), whole = record_bytes(KIND, w.kb);
  std::memset(y, 0, sizeof(float) * 16 * tokens);
  for (long g = 0; g < w.groups(); ++g, record += whole) {
    decode<KIND>(record, record + data, w.kb, levels);
    Grid grids{};
    if (KIND != SIGN) grids = grid<KIND>(record + data);
    for (long t = 0; t < tokens; ++t) {
      const float* const at = x + t * stride + g * w.kb;
      F16 sums[4] = {}, all = {};
      for (int k = 0; k < w.kb / 4; ++k) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[i] += (floats(bytes_of(levels + 64 * k, i)) - grids.zero) * at[4 * k + i];
      }
      if (KIND == SIGN)
        for (int k = 0; k < w.kb; ++k) all += splat(at[k]);
      const F16 sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      const F16 value = KIND == SIGN ? halves(record + data) * (sum * 2.0f - all) + halves(record + data + 32) * all : grids.scale * sum;
      const F16 before = load<F16>(y + 16 * t) + value;
      std::memcpy(y + 16 * t, &before, sizeof before);
    }
  }
}

template <int T, bool WIDE>
KERNEL void tile_of(const uint8_t* levels, const int8_t* x, int kb, const Grid* grids, const float* xscale,
                    const int32_t* xsum, float* y) {
  tile<T, WIDE>(levels, x, kb, grids, xscale, xsum, y);
}

using Tile = void (*)(const uint8_t*, const int8_t*, int, const Grid*, const float*, const int32_t*, float*);
template <bool WIDE, int... T>
KFN Tile choose_tile(int tokens, std::integer_sequence<int, T...>) {
  static constexpr Tile all[] = {tile_of<T + 1, WIDE>...};
  return all[tokens - 1];
}

// Tiles of rows first .. last, kTilesAtOnce at most, times quantized tokens in tiles of kTileTokens; y[t][row], rows of
// kStride. Where the number of tiles is odd, what is computed for the missing one is nobody's.
template <int KIND>
KERNEL void gemm_tiles(const Matrix& w, long first, long last, const Tokens& x, long from, long to, float* y) {
  alignas(64) uint8_t levels[kTilesAtOnce * kLevels] = {};
  Grid grids[kTilesAtOnce] = {};
  F16 means[kTilesAtOnce] = {};
  const long data = data_bytes(KIND, w.kb), whole = record_bytes(KIND, w.kb), groups = w.groups();
  for (long g = 0; g < groups; ++g) {
    for (long r = 0; r < last - first; ++r) {
      const uint8_t* const record = w.data + (first + r) * w.row_bytes() + g * whole;
      decode<KIND>(record, record + data, w.kb, levels + r * kLevels);
      if (KIND != SIGN) {
        grids[r] = grid<KIND>(record + data);
      } else {  // s (2 u - 1) + c = 2 s u + (c - s)
        const F16 s = halves(record + data);
        grids[r].scale = s * 2.0f;
        means[r] = halves(record + data + 32) - s;
      }
    }
    for (long t = from; t < to; t += kTileTokens) {
      const int count = static_cast<int>(to - t < kTileTokens ? to - t : kTileTokens);
      const Tile run = choose_tile<KIND == INT8>(count, std::make_integer_sequence<int, kTileTokens>());
      const int8_t* const q = x.q + t * groups * w.kb + g * w.kb * count;
      const float* const xscale = x.scale + t * groups + g * count;
      const int32_t* const xsum = x.sum + t * groups + g * count;
      for (long r = 0; r < last - first; r += 2) {
        float* const at = y + (t - from) * kStride + 16 * r;
        run(levels + r * kLevels, q, w.kb, grids + r, xscale, xsum, at);
        if (KIND == SIGN)
          for (int i = 0; i < 2 * count; ++i) {
            float* const row = at + i / 2 * kStride + 16 * (i % 2);
            const F16 sum = load<F16>(row) + means[r + i % 2] * (xscale[i / 2] * static_cast<float>(xsum[i / 2]));
            std::memcpy(row, &sum, sizeof sum);
          }
      }
    }
  }
}

// The matrix itself, rows 16 tile .., as fp32 (16, n).
template <int KIND>
KERNEL void unpack_tile(const Matrix& w, long tile, float* out) {
  alignas(64) uint8_t levels[kLevels];
  const uint8_t* record = w.data + tile * w.row_bytes();
  const long data = data_bytes(KIND, w.kb);
  for (long g = 0; g < w.groups(); ++g, record += record_bytes(KIND, w.kb)) {
    decode<KIND>(record, record + data, w.kb, levels);
    Grid grids{};
    if (KIND != SIGN) grids = grid<KIND>(record + data);
    float s[16], c[16] = {}, zero[16];
    const F16 scale = halves(record + data);
    std::memcpy(s, &scale, sizeof s);
    std::memcpy(zero, &grids.zero, sizeof zero);
    if (KIND == SIGN) {
      const F16 mean = halves(record + data + 32);
      std::memcpy(c, &mean, sizeof c);
    }
    for (int k = 0; k < w.kb && g * w.kb + k < w.n; ++k)
      for (int r = 0; r < 16; ++r) {
        const int level = levels[64 * (k / 4) + 4 * r + k % 4];
        out[r * w.n + g * w.kb + k] = (KIND == SIGN ? s[r] * (2 * level - 1) + c[r] : s[r] * (level - zero[r])) * w.factor;
      }
  }
}
