// Products with matrices of levels: one token straight from the packed planes, several through one byte a level.
// Included once for each instruction set.

// One level for all planes of trits: whole numbers a[p] near first scale[p] / max(scale), 8 bits in all.
template <int KIND>
struct Joined {
  I16 a[planes(KIND)];
  F16 unit;  // scale[p] is about unit a[p]
  KIN Joined(const uint8_t* tail, const uint8_t* numbers) {
    constexpr int P = planes(KIND);
    if (P == 1) {
      a[0] = splat(1);
      unit = halves(tail);
      return;
    }
    F16 scales[P], largest = splat(1e-30f);
    for (int p = 0; p < P; ++p) {
      scales[p] = halves(tail + 32 * p);
      largest = greater(largest, scales[p]);
    }
    const F16 first = floats(ints(numbers)), ratio = first / largest;
    for (int p = 0; p < P; ++p) a[p] = whole(scales[p] * ratio);
    unit = largest / first;
  }
};

template <int KIND>
KFN Grid grid(const uint8_t* tail, const uint8_t* numbers) {
  if (!is_trits(KIND)) return {halves(tail), floats(ints(tail + 32))};
  const Joined<is_trits(KIND) ? KIND : TRIT1> joined(tail, numbers);
  I16 zero = joined.a[0];
  for (int p = 1; p < planes(is_trits(KIND) ? KIND : TRIT1); ++p) zero += joined.a[p];
  return {joined.unit, floats(zero)};
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
    F16 value = halves(tail) * floats(sums[0].total(xsum) - xsum);
#pragma GCC unroll 3
    for (int p = 1; p < P; ++p) value += halves(tail + 32 * p) * floats(sums[p].total(xsum) - xsum);
    return value;
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

// Trits times a number of their row: a lane of 16 bytes holds four rows, four inputs each.
alignas(64) static constexpr uint8_t kRow[64] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 0, 0, 0, 0, 1, 1,
                                                 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2,
                                                 3, 3, 3, 3, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
struct Multiples {
  B64 even, odd;  // entry 4 row + u and entry row + 4 u are u times the row's number: two bits need not be moved
  B64 rows, rows_of_four;
  KIN Multiples() = default;
  KIN explicit Multiples(B64 of_rows) : even(of_rows), rows(load<B64>(kRow)), rows_of_four(times_four(rows)) {
    // byte 4 u + row of a lane is byte 4 row + u of it
    alignas(64) static constexpr uint8_t kTurned[64] = {
        0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
        0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    odd = lookup(even, load<B64>(kTurned));
  }
  // Of field f of a block of trits.
  KIN B64 of(B64 block, int f) const {
    const B64 two = field<4>(block, f / 2);
    return f % 2 == 0 ? lookup(even, (two & uint8_t{3}) | rows_of_four) : lookup(odd, (two & uint8_t{12}) | rows);
  }
};

// One record as levels [kb / 4][16 rows][4 inputs]. With PLANE, the entries of that plane of trits and not the level that
// joins all.
template <int KIND, int PLANE = -1>
KFN void decode(const uint8_t* data, const uint8_t* tail, const uint8_t* numbers, int kb, uint8_t* levels) {
  if (KIND == INT3) {
    for (int k = 0; k < kb; k += 32, data += 192) {
      const B64 high = load<B64>(data + 128);
      for (int f = 0; f < 8; ++f, levels += 64) {
        const B64 low = field<2>(load<B64>(data + 64 * (f / 4)), f % 4);
        const B64 level = low | times_four(field<1>(high, f));
        keep(levels, level);
      }
    }
    return;
  }
  constexpr int P = planes(KIND), W = plane_bits(KIND, 0);
  constexpr bool JOIN = is_trits(KIND) && PLANE < 0;
  Multiples tables[P];
  if (JOIN) {
    const Joined<is_trits(KIND) ? KIND : TRIT1> joined(tail, numbers);
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) tables[p] = Multiples(multiples(joined.a[p]));
  }
  for (int k = 0; k < kb; k += step(KIND), data += 64 * P) {
    B64 blocks[P];
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) __builtin_prefetch(data + 64 * p + record_bytes(KIND, kb));
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) blocks[p] = load<B64>(data + 64 * p);
#pragma GCC unroll 8
    for (int f = 0; f < 8 / W; ++f, levels += 64) {
      B64 level;
      if (JOIN) {
        level = tables[0].of(blocks[0], f);
#pragma GCC unroll 3
        for (int p = 1; p < P; ++p) level += tables[p].of(blocks[p], f);
      } else {
        level = field<W>(blocks[PLANE < 0 ? 0 : PLANE], f);
      }
      keep(levels, level);
    }
  }
}

// s (u - z) for one record of a plane, or of a kind that is one: levels times fp32 inputs.
KFN F16 exact_record(const uint8_t* levels, F16 scale, F16 zero, const float* x, int kb) {
  F16 a{}, b{}, c{}, d{};
  for (int k = 0; k < kb / 4; ++k, levels += 64, x += 4) {
    a += (floats(bytes_of(levels, 0)) - zero) * x[0];
    b += (floats(bytes_of(levels, 1)) - zero) * x[1];
    c += (floats(bytes_of(levels, 2)) - zero) * x[2];
    d += (floats(bytes_of(levels, 3)) - zero) * x[3];
  }
  return scale * ((a + b) + (c + d));
}

template <int KIND, int P>
KFN void exact_plane(const uint8_t* record, const uint8_t* tail, int kb, const float* x, long stride, long tokens, float* y) {
  alignas(64) uint8_t levels[kLevels];
  decode<KIND, P>(record, tail, nullptr, kb, levels);
  F16 scale = halves(tail + (is_trits(KIND) ? 32 * P : 0)), zero = splat(1.0f);
  if (KIND == SIGN) {  // s (2 u - 1) + c
    const F16 mean = halves(tail + 32);
    for (long t = 0; t < tokens; ++t) {
      F16 all{};
      for (int k = 0; k < kb; ++k) all += splat(x[t * stride + k]);
      const F16 sum = load<F16>(y + 16 * t) + mean * all;
      keep(y + 16 * t, sum);
    }
    scale = scale * 2.0f;
    zero = splat(0.5f);
  } else if (!is_trits(KIND)) {
    zero = floats(ints(tail + 32));
  }
  for (long t = 0; t < tokens; ++t) {
    const F16 sum = load<F16>(y + 16 * t) + exact_record(levels, scale, zero, x + t * stride, kb);
    keep(y + 16 * t, sum);
  }
}

// 16 rows times fp32 inputs that are not rounded, `tokens` of them in rows of `stride`; y[t][row].
template <int KIND>
KERNEL void exact_tile(const Matrix& w, long tile, const float* x, long stride, long tokens, float* y) {
  const uint8_t* record = w.data + tile * w.row_bytes();
  const long data = data_bytes(KIND, w.kb);
  std::memset(y, 0, sizeof(float) * 16 * tokens);
  for (long g = 0; g < w.groups(); ++g, record += record_bytes(KIND, w.kb), x += w.kb) {
    exact_plane<KIND, 0>(record, record + data, w.kb, x, stride, tokens, y);
    if (KIND == TRIT2 || KIND == TRIT3) exact_plane<KIND, planes(KIND) == 1 ? 0 : 1>(record, record + data, w.kb, x, stride, tokens, y);
    if (KIND == TRIT3) exact_plane<KIND, planes(KIND) == 3 ? 2 : 0>(record, record + data, w.kb, x, stride, tokens, y);
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
      const uint8_t* const numbers = planes(KIND) > 1 && is_trits(KIND) ? w.numbers(first + r, g) : nullptr;
      decode<KIND>(record, record + data, numbers, w.kb, levels + r * kLevels);
      if (KIND != SIGN) {
        grids[r] = grid<KIND>(record + data, numbers);
      } else {  // s (2 u - 1) + c = 2 s u + (c - s)
        const F16 s = halves(record + data);
        grids[r].scale = s * 2.0f;
        means[r] = halves(record + data + 32) - s;
      }
    }
    for (long t = from; t < to; t += kTileTokens) {
      const int count = static_cast<int>(to - t < kTileTokens ? to - t : kTileTokens);
      const Tile run = choose_tile<is_wide(KIND)>(count, std::make_integer_sequence<int, kTileTokens>());
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
            keep(row, sum);
          }
      }
    }
  }
}

// 16 inputs of one row of decoded levels, the first of which is `levels`.
KFN F16 of_row(const uint8_t* levels) {
  typedef uint32_t Four __attribute__((vector_size(16)));
  const Four inputs = {load<uint32_t>(levels), load<uint32_t>(levels + 64), load<uint32_t>(levels + 128), load<uint32_t>(levels + 192)};
  return floats(ints(reinterpret_cast<const uint8_t*>(&inputs)));
}

// s u + c of a record, of a plane of trits or of another kind, as fp32 (16, kb); second and third planes are added.
template <int KIND, int P>
KFN void unpack_plane(const uint8_t* record, const uint8_t* tail, int kb, float* out) {
  alignas(64) uint8_t levels[kLevels];
  decode<KIND, P>(record, tail, nullptr, kb, levels);
  const F16 scale = halves(tail + (is_trits(KIND) ? 32 * P : 0));
  F16 start = scale * -1.0f;
  if (KIND == SIGN) start += halves(tail + 32);
  else if (!is_trits(KIND)) start = scale * floats(ints(tail + 32)) * -1.0f;
  float s[16], c[16];
  keep(s, KIND == SIGN ? scale * 2.0f : scale);
  keep(c, start);
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < kb; k += 16, out += 16) {
      const F16 value = of_row(levels + 16 * k + 4 * r) * s[r] + splat(c[r]);
      keep(out, P > 0 ? load<F16>(out) + value : value);
    }
}

template <int KIND>
KERNEL void unpack_record(const uint8_t* record, int kb, float* out) {
  const uint8_t* const tail = record + data_bytes(KIND, kb);
  unpack_plane<KIND, 0>(record, tail, kb, out);
  if (KIND == TRIT2 || KIND == TRIT3) unpack_plane<KIND, planes(KIND) == 1 ? 0 : 1>(record, tail, kb, out);
  if (KIND == TRIT3) unpack_plane<KIND, planes(KIND) == 3 ? 2 : 0>(record, tail, kb, out);
}

// The matrix itself, rows 16 tile ..: put(row of the tile, input, values) gets kb inputs of a row in fp32.
template <int KIND>
struct UnpackLevels {
  template <class Put>
  static void tile(const Matrix& w, long tile, Put&& put) {
    alignas(64) float block[16 * kMostInputs];
    const uint8_t* record = w.data + tile * w.row_bytes();
    for (long g = 0; g < w.groups(); ++g, record += record_bytes(KIND, w.kb)) {
      unpack_record<KIND>(record, w.kb, block);
      for (int r = 0; r < 16; ++r) put(r, g * w.kb, block + r * w.kb);
    }
  }
};
