// Activations as 8-bit integers, one scale a token and group. Included once for each instruction set.
//
// q = round to nearest, ties to even, of x 127 / max |x|. A group with an infinity or a NaN gets the scale NaN, which
// makes every output of its token NaN. A group below 1e-30 everywhere counts as zero.

// One group as fp32, filled up with zeros.
KFN void widen(const void* x, int dtype, long from, long count, int kb, float* out) {
  if (dtype == FLOAT32) {
    std::memcpy(out, (const float*)x + from, sizeof(float) * count);
  } else if (dtype == BFLOAT16) {
    const uint16_t* const in = (const uint16_t*)x + from;
    uint32_t* const words = (uint32_t*)out;
    for (long i = 0; i < count; ++i) words[i] = (uint32_t)in[i] << 16;
  } else {
    const uint16_t* const in = (const uint16_t*)x + from;
    for (long i = 0; i < count; i += 16) {
      uint16_t sixteen[16] = {};
      std::memcpy(sixteen, in + i, 2 * (count - i < 16 ? count - i : 16));
      F16 all = halves_in_software((const uint8_t*)sixteen);
      float v[16];
      keep(v, all);
      for (int j = 0; j < 16; ++j)  // the trick with the product knows no infinity
        if ((sixteen[j] & 0x7c00) == 0x7c00) v[j] = sixteen[j] & 0x3ff ? NAN : sixteen[j] & 0x8000 ? -INFINITY : INFINITY;
      std::memcpy(out + i, v, sizeof(float) * (count - i < 16 ? count - i : 16));
    }
  }
  for (long i = count; i < kb; ++i) out[i] = 0;
}

// q[i] goes to out[i / 4 * stride + i % 4].
KFN void quantize_group(const float* x, int kb, int8_t* out, long stride, float* scale, int32_t* sum) {
  int32_t most = 0;
  for (int i = 0; i < kb; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float largest;
  std::memcpy(&largest, &most, 4);
  const bool finite = most < 0x7f800000, zero = !finite || largest < 1e-30f;
  *scale = !finite ? NAN : zero ? 0.0f : largest / 127.0f;
  const float inverse = zero ? 0.0f : 127.0f / largest;
  alignas(64) int8_t q[kMostInputs];
  alignas(64) float products[kMostInputs];
  for (int i = 0; i < kb; ++i) products[i] = zero ? 0.0f : x[i] * inverse;
  asm volatile("" : : "r"(products) : "memory");  // rounded here on every processor, also on those that could fuse it
  int32_t total = 0;
  for (int i = 0; i < kb; ++i) {
    const float moved = products[i] + 12582912.0f;  // 1.5 x 2^23: what is left are integers
    int32_t bits;
    std::memcpy(&bits, &moved, 4);
    bits -= 0x4b400000;
    total += bits;
    q[i] = (int8_t)bits;
  }
  *sum = total;
  if (stride == 4) {
    std::memcpy(out, q, kb);
    return;
  }
  for (int i = 0; i < kb; i += 4) std::memcpy(out + i / 4 * stride, q + i, 4);
}

// Tokens first .. first + count of x (tokens, n), in the order in which a tile of that many reads them.
KERNEL void quantize_tile(const void* x, int dtype, long first, int count, long n, int kb, long groups, const Tokens& to) {
  alignas(64) float wide[kMostInputs];
  for (int t = 0; t < count; ++t)
    for (long g = 0; g < groups; ++g) {
      widen(x, dtype, (first + t) * n + g * kb, n - g * kb < kb ? n - g * kb : kb, kb, wide);
      quantize_group(wide, kb, to.q + first * groups * kb + g * kb * count + 4 * t, 4L * count,
                     to.scale + first * groups + g * count + t, to.sum + first * groups + g * count + t);
    }
}

// Tokens first .. last of x as fp32 rows of groups x kb.
KERNEL void widen_tokens(const void* x, int dtype, long first, long last, long n, int kb, long groups, float* out) {
  for (long t = first; t < last; ++t)
    for (long g = 0; g < groups; ++g)
      widen(x, dtype, t * n + g * kb, n - g * kb < kb ? n - g * kb : kb, kb, out + (t * groups + g) * kb);
}

// fp32 to bf16, a multiple of 16 of them: 16 are read before any of them is written, to where others were.
KERNEL void narrow_in_place(float* x, long count) {
  for (long i = 0; i < count; i += 16) keep_bf16((uint16_t*)x + i, load<F16>(x + i));
}
