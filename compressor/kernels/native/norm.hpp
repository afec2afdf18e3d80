// RMS norm of rows, in fp32 but for the roundings that are asked for. Included once for each instruction set.

template <int DTYPE>
KERNEL void normalize_in(const Norm& c) {
  constexpr long kWidth = width(DTYPE);
  for (long r = 0; r < c.rows; ++r) {
    const char* const x = c.x + r * c.n * kWidth;
    char* const out = c.out + r * c.n * kWidth;
    F16 sums[4] = {};
    for (long k = 0; k < c.n; k += 16) {
      const F16 v = number16<DTYPE>(x + k * kWidth);
      sums[k / 16 % 4] += v * v;
    }
    const float square = total((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(c.n);
    const F16 inverse = splat(1.0f / std::sqrt(square + c.eps));
    for (long at = 0; at < c.n * kWidth; at += 16 * kWidth) {
      F16 v = number16<DTYPE>(x + at) * inverse, weight = number16<DTYPE>(c.weight + at);
      if (c.more) weight += splat(1.0f);
      if (c.rounded) {
        keep_as(DTYPE, v, out + at);
        v = number16<DTYPE>(out + at);
      }
      keep_as(DTYPE, v * weight, out + at);
    }
  }
}

static void normalize(const Norm& c) {
  if (c.dtype == FLOAT32) return normalize_in<FLOAT32>(c);
  if (c.dtype == BFLOAT16) return normalize_in<BFLOAT16>(c);
  normalize_in<FLOAT16>(c);
}
