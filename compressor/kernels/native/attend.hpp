// Attention of one token with all before it, which is reading keys and values once. Numbers become fp32, and so are all sums.
// Included once for each instruction set.
//
// Keys are cut into spans of a fixed length, each with a softmax of its own; these are put together in order, so that the
// number of threads does not change a bit (the online softmax of Milakov and Gimelshein 2018, by spans as in Flash-Decoding).

constexpr long kSpan = 256;                            // of keys
constexpr int kHeads = COMPRESSOR_LEVEL == 2 ? 4 : 2;  // that are multiplied together, by as many keys, and by as many
                                                       // registers of a value: their sums fill the registers

// 16 numbers, infinities and NaNs included.
template <int DTYPE>
KFN F16 number16(const char* from) {
  if (DTYPE == FLOAT32) return load<F16>(from);
  if (DTYPE == BFLOAT16) return from_bf16_bits((const uint8_t*)from);
#if COMPRESSOR_LEVEL == 0
  float wide[16];
  widen(from, FLOAT16, 0, 16, 16, wide);
  return load<F16>(wide);
#else
  return halves((const uint8_t*)from);
#endif
}

// e^x for x <= 0, to 2e-7 of it; below -87 as for -87; NaN stays NaN.
KFN F16 exp_of(F16 x) {
  const F16 y = greater(splat(-87.0f), x) * -1.44269504f;
  const I16 n = whole(greater(y, splat(0.0f)));  // 0 for NaN
  const F16 f = floats(n) - y;  // e^x = 2^f / 2^n; the series of 2^f, |f| <= 0.5
  F16 sum = f * 1.5403530e-4f + splat(1.3333558e-3f);
  sum = sum * f + splat(9.6181291e-3f);
  sum = sum * f + splat(5.5504109e-2f);
  sum = sum * f + splat(2.4022651e-1f);
  sum = sum * f + splat(6.9314718e-1f);
  sum = sum * f + splat(1.0f);
  return sum * as_floats((splat(int32_t{127}) - n) * (1 << 23));
}

// What is read next: keys, or values, and how many bytes they are apart. A head's keys are so short a stream that asking for
// what follows in it would often ask for what follows its end: memory for the values is asked for with the keys, row for
// row, and for the next head's keys with the values.
struct Rows {
  const char* at;
  long step;
};

// s[h][t] = q[h] k[t], and some more behind the last one. q: fp32 (H, d); `step`: bytes from key to key.
template <int DTYPE, int H>
KERNEL void span_scores(const char* k, long step, long count, const float* q, long d, float* s, Rows next) {
  constexpr int K = kHeads;
  for (long t = 0; t < count; t += K) {
    const char* row[K];
    for (long j = 0; j < K; ++j) row[j] = k + (t + j < count ? t + j : count - 1) * step;
    F16 sums[H * K] = {};
    for (long i = 0; i < d; i += 16) {
      F16 key[K];
#pragma GCC unroll 4
      for (int j = 0; j < K; ++j) {
        const long byte = i * width(DTYPE);
        if (byte % 64 == 0) ask_for(next.at + (t + j) * next.step + byte);
        key[j] = number16<DTYPE>(row[j] + i * width(DTYPE));
      }
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) {
        const F16 v = load<F16>(q + h * d + i);
#pragma GCC unroll 4
        for (int j = 0; j < K; ++j) sums[h * K + j] += key[j] * v;
      }
    }
    float found[H * K];
#pragma GCC unroll 4
    for (int i = 0; i + 4 <= H * K; i += 4) four_totals(sums + i, found + i);
    for (int i = H * K / 4 * 4; i < H * K; ++i) found[i] = total(sums[i]);
    for (int h = 0; h < H; ++h) std::memcpy(s + h * kSpan + t, found + h * K, sizeof(float) * K);
  }
}

// out[h][0 .. 16 C) = sum over t of p[h][t] v[t]
template <int DTYPE, int H, int C>
KFN void some_columns(const char* v, long step, long count, const float* p, long dv, float* out, Rows next) {
  F16 sums[H][C] = {};
  for (long t = 0; t < count; ++t) {
    F16 value[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const char* const at = v + t * step + 16 * c * width(DTYPE);
      if (16 * c * width(DTYPE) % 64 == 0) ask_for(next.at + t * next.step + 16 * c * width(DTYPE));
      value[c] = number16<DTYPE>(at);
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[h][c] += value[c] * p[h * kSpan + t];
  }
  for (int h = 0; h < H; ++h)
    for (int c = 0; c < C; ++c) keep(out + h * dv + 16 * c, sums[h][c]);
}

template <int DTYPE, int H>
KERNEL void span_values(const char* v, long step, long count, const float* p, long dv, float* out, Rows next) {
  long column = 0;
  for (; column + 16 * kHeads <= dv; column += 16 * kHeads, next.at += 16 * kHeads * width(DTYPE))
    some_columns<DTYPE, H, kHeads>(v + column * width(DTYPE), step, count, p, dv, out + column, next);
  for (; column < dv; column += 16, next.at += 16 * width(DTYPE))
    some_columns<DTYPE, H, 1>(v + column * width(DTYPE), step, count, p, dv, out + column, next);
}

// Scores to e^(score - largest), 0 for those that are not looked at; returns {largest, sum}. `mask`: of these keys, or null.
KERNEL std::pair<float, float> span_softmax(float* s, long count, const uint8_t* mask, long step) {
  bool any = !mask;
  if (mask)
    for (long t = 0; t < count; ++t) {
      if (mask[t * step]) any = true;
      else s[t] = -INFINITY;
    }
  const long whole_count = (count + 15) / 16 * 16;
  for (long t = count; t < whole_count; ++t) s[t] = -INFINITY;
  if (!any) {
    for (long t = 0; t < count; ++t) s[t] = 0;
    return {-INFINITY, 0.0f};
  }
  F16 most = splat(-INFINITY);
  for (long t = 0; t < whole_count; t += 16) most = greater(most, load<F16>(s + t));
  float lanes[16], largest = -INFINITY;
  keep(lanes, most);
  for (const float lane : lanes) largest = lane > largest ? lane : largest;
  const F16 base = splat(largest);
  for (long t = 0; t < whole_count; t += 16) keep(s + t, exp_of(load<F16>(s + t) - base));
  for (long t = count; t < whole_count; ++t) s[t] = 0;
  if (mask)
    for (long t = 0; t < count; ++t)
      if (!mask[t * step]) s[t] = 0;
  F16 sums = splat(0.0f);
  for (long t = 0; t < whole_count; t += 16) sums += load<F16>(s + t);
  return {largest, total(sums)};
}

// H heads from `head` on, which share their keys, in one span of keys; to each head's {largest, sum, weighted values (dv)}.
// `next`: the keys that are read after these.
template <int DTYPE, int H>
KERNEL void attend_span(const Attention& a, long row, long head, long first, long last, const char* next, const float* q, float* to, long stride) {
  const long kv = head / a.shared();
  const uint8_t* mask = a.mask ? a.mask + row * a.mask_row + head * a.mask_head : nullptr;
  if (mask && (H == 1 || a.mask_head == 0)) {  // keys at the ends that nobody looks at are not read
    while (first < last && !mask[first * a.mask_key]) ++first;
    while (first < last && !mask[(last - 1) * a.mask_key]) --last;
  }
  alignas(64) float s[kHeads * kSpan];
  float* const values = to + 2;
  if (first == last) {
    for (int h = 0; h < H; ++h) {
      to[h * stride] = -INFINITY;
      std::memset(to + h * stride + 1, 0, sizeof(float) * (a.dv + 1));
    }
    return;
  }
  const long count = last - first;
  const char* const k = a.k + (row * a.k_row + kv * a.k_head + first * a.k_key) * width(DTYPE);
  const char* const v = a.v + (row * a.v_row + kv * a.v_head + first * a.v_key) * width(DTYPE);
  const Rows keys{next, a.k_key * width(DTYPE)}, its_values{v, a.v_key * width(DTYPE)};
  span_scores<DTYPE, H>(k, keys.step, count, q, a.d, s, its_values);
  for (int h = 0; h < H; ++h) {
    const uint8_t* const mine = mask ? mask + h * a.mask_head + first * a.mask_key : nullptr;
    const auto [largest, sum] = span_softmax(s + h * kSpan, count, mine, a.mask_key);
    to[h * stride] = largest;
    to[h * stride + 1] = sum;
  }
  float out[kHeads * kMostWidth];
  span_values<DTYPE, H>(v, its_values.step, count, s, a.dv, out, keys);
  for (int h = 0; h < H; ++h) std::memcpy(values + h * stride, out + h * a.dv, sizeof(float) * a.dv);
}

// One head's spans, as `attend_span` left them, to its output.
KERNEL void join_spans(const Attention& a, const float* from, long stride, long spans, char* out) {
  float largest = -INFINITY, sum = 0;
  for (long i = 0; i < spans; ++i) largest = from[i * stride] > largest ? from[i * stride] : largest;
  float y[kMostWidth] = {};
  for (long i = 0; i < spans; ++i) {
    const float* const one = from + i * stride;
    if (one[1] == 0) continue;  // nobody looked there
    const float weight = std::exp(one[0] - largest);
    sum += weight * one[1];
    for (long c = 0; c < a.dv; ++c) y[c] += weight * one[2 + c];
  }
  convert(y, a.dv, sum == 0 ? 0.0f : 1 / sum, a.dtype, out);
}

template <int DTYPE>
static void attend_in(const Attention& a) {
  const long spans = (a.keys + kSpan - 1) / kSpan, shared = a.shared(), stride = a.dv + 2;
  const long rows = a.batch * a.heads;
  float* const q = Scratch::mine().floats(rows * a.d + rows * spans * stride);
  float* const parts = q + rows * a.d;  // (batch, heads, spans, stride)
  for (long row = 0; row < a.batch; ++row)
    for (long head = 0; head < a.heads; ++head) {
      float* const to = q + (row * a.heads + head) * a.d;
      const char* const from = a.q + (row * a.q_row + head * a.q_head) * width(DTYPE);
      widen_tokens(from, DTYPE, 0, 1, a.d, static_cast<int>(a.d), 1, to);
      for (long i = 0; i < a.d; ++i) to[i] *= a.scale;
    }
  const long items = a.batch * a.kv_heads * spans;
  const long bytes = a.batch * a.kv_heads * a.keys * (a.d + a.dv) * width(DTYPE);
  const int threads = bytes < (1 << 16) ? 1 : a.threads;  // what is done before others are awake
  const long chunks = chunks_of(items, threads);
  pool::each(chunks, threads, [&](long chunk) {
    const auto [from, to] = span(items, chunks, chunk);
    for (long item = from; item < to; ++item) {
      const long part = item % spans, kv = item / spans % a.kv_heads, row = item / spans / a.kv_heads;
      const long first = part * kSpan, last = first + kSpan < a.keys ? first + kSpan : a.keys;
      const long after = item + 1 < items ? item + 1 : item;  // whose keys are read next
      const long its_head = after / spans / a.kv_heads * a.k_row + after / spans % a.kv_heads * a.k_head;
      const char* const next = a.k + (its_head + after % spans * kSpan * a.k_key) * width(DTYPE);
      for (long h = 0; h < shared;) {
        const long head = kv * shared + h, place = row * a.heads + head;
        float* const out = parts + (place * spans + part) * stride;
        const long heads = shared - h < kHeads ? shared - h : kHeads;
        const auto some = heads == 1 ? attend_span<DTYPE, 1> : heads == 2 ? attend_span<DTYPE, 2>
                        : heads == 3 ? attend_span<DTYPE, kHeads < 3 ? kHeads : 3> : attend_span<DTYPE, kHeads>;
        some(a, row, head, first, last, next, q + place * a.d, out, spans * stride);
        h += heads;
      }
    }
  });
  for (long place = 0; place < rows; ++place)
    join_spans(a, parts + place * spans * stride, stride, spans, a.out + place * a.dv * width(DTYPE));
}

static void attend(const Attention& a) {
  if (a.dtype == FLOAT32) return attend_in<FLOAT32>(a);
  if (a.dtype == BFLOAT16) return attend_in<BFLOAT16>(a);
  attend_in<FLOAT16>(a);
}
