// RMS norm of rows, in fp32 but for the roundings that are asked for. Included once for each instruction set.

// 16 numbers of a row in its dtype as fp32.
KFN F16 sixteen_of(const char* from, int dtype) {
#if COMPRESSOR_LEVEL == 0  // whose fp16 knows no infinity
  float wide[16];
  widen(from, dtype, 0, 16, 16, wide);
  return load<F16>(wide);
#endif
  const uint8_t* const at = reinterpret_cast<const uint8_t*>(from);
  return dtype == FLOAT32 ? load<F16>(at) : dtype == BFLOAT16 ? from_bf16_bits(at) : halves(at);
}

KERNEL void normalize(const Norm& c) {
  const long bytes = c.n * width(c.dtype);
  float* const row = Scratch::mine().floats(c.n);
  for (long r = 0; r < c.rows; ++r) {
    widen(c.x, c.dtype, r * c.n, c.n, static_cast<int>(c.n), row);
    F16 sums[4] = {};
    for (long k = 0; k < c.n; k += 16) {
      const F16 v = load<F16>(row + k);
      sums[k / 16 % 4] += v * v;
    }
    const float square = total((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(c.n);
    const F16 inverse = splat(1.0f / std::sqrt(square + c.eps));
    char* const out = c.out + r * bytes;
    for (long k = 0; k < c.n; k += 16) {
      const long at = k * width(c.dtype);
      F16 v = load<F16>(row + k) * inverse, weight = sixteen_of(c.weight + at, c.dtype);
      if (c.more) weight += splat(1.0f);
      if (c.rounded) {
        keep_as(c.dtype, v, out + at);
        v = sixteen_of(out + at, c.dtype);
      }
      keep_as(c.dtype, v * weight, out + at);
    }
  }
}
