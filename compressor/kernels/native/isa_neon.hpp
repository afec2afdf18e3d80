// NEON with the dot product of bytes: a block is four registers of four rows. That product is of signed bytes. Levels above
// 127 are taken less 128, which the sum of the inputs puts right; all others are the same numbers signed or not.

struct F16 {
  float32x4_t v[4]{};
  KIN F16 operator+(F16 o) const { return {{v[0] + o.v[0], v[1] + o.v[1], v[2] + o.v[2], v[3] + o.v[3]}}; }
  KIN F16 operator-(F16 o) const { return {{v[0] - o.v[0], v[1] - o.v[1], v[2] - o.v[2], v[3] - o.v[3]}}; }
  KIN F16 operator*(F16 o) const { return {{v[0] * o.v[0], v[1] * o.v[1], v[2] * o.v[2], v[3] * o.v[3]}}; }
  KIN F16 operator/(F16 o) const { return {{v[0] / o.v[0], v[1] / o.v[1], v[2] / o.v[2], v[3] / o.v[3]}}; }
  KIN F16 operator*(float s) const {
    const float32x4_t all = vdupq_n_f32(s);
    return *this * F16{{all, all, all, all}};
  }
  KIN void operator+=(F16 o) { *this = *this + o; }
};

struct I16 {
  int32x4_t v[4]{};
  KIN I16 operator+(I16 o) const { return {{v[0] + o.v[0], v[1] + o.v[1], v[2] + o.v[2], v[3] + o.v[3]}}; }
  KIN I16 operator-(I16 o) const { return {{v[0] - o.v[0], v[1] - o.v[1], v[2] - o.v[2], v[3] - o.v[3]}}; }
  KIN I16 operator^(I16 o) const { return {{v[0] ^ o.v[0], v[1] ^ o.v[1], v[2] ^ o.v[2], v[3] ^ o.v[3]}}; }
  KIN I16 operator*(I16 o) const { return {{v[0] * o.v[0], v[1] * o.v[1], v[2] * o.v[2], v[3] * o.v[3]}}; }
  KIN I16 operator*(int32_t s) const { return *this * same(s); }
  KIN I16 operator+(int32_t s) const { return *this + same(s); }
  KIN I16 operator-(int32_t s) const { return *this - same(s); }
  KIN void operator+=(I16 o) { *this = *this + o; }
  static KIN I16 same(int32_t s) {
    const int32x4_t all = vdupq_n_s32(s);
    return {{all, all, all, all}};
  }
};

struct B64 {
  uint8x16_t v[4]{};
  KIN B64 operator|(B64 o) const { return {{v[0] | o.v[0], v[1] | o.v[1], v[2] | o.v[2], v[3] | o.v[3]}}; }
  KIN B64 operator&(uint8_t most) const {
    const uint8x16_t all = vdupq_n_u8(most);
    return {{v[0] & all, v[1] & all, v[2] & all, v[3] & all}};
  }
  KIN void operator+=(B64 o) { *this = {{v[0] + o.v[0], v[1] + o.v[1], v[2] + o.v[2], v[3] + o.v[3]}}; }
};

// Bytes, at any address.
template <class T>
KFN T load(const void* from) {
  const uint8_t* const at = static_cast<const uint8_t*>(from);
  if constexpr (std::is_same_v<T, F16>) {
    return {{vreinterpretq_f32_u8(vld1q_u8(at)), vreinterpretq_f32_u8(vld1q_u8(at + 16)),
             vreinterpretq_f32_u8(vld1q_u8(at + 32)), vreinterpretq_f32_u8(vld1q_u8(at + 48))}};
  } else if constexpr (std::is_same_v<T, I16>) {
    return {{vreinterpretq_s32_u8(vld1q_u8(at)), vreinterpretq_s32_u8(vld1q_u8(at + 16)),
             vreinterpretq_s32_u8(vld1q_u8(at + 32)), vreinterpretq_s32_u8(vld1q_u8(at + 48))}};
  } else if constexpr (std::is_same_v<T, B64>) {
    return {{vld1q_u8(at), vld1q_u8(at + 16), vld1q_u8(at + 32), vld1q_u8(at + 48)}};
  } else {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
}
template <class T>
KFN void keep(void* to, T value) {
  uint8_t* const at = static_cast<uint8_t*>(to);
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    if constexpr (std::is_same_v<T, F16>) vst1q_u8(at + 16 * q, vreinterpretq_u8_f32(value.v[q]));
    else if constexpr (std::is_same_v<T, I16>) vst1q_u8(at + 16 * q, vreinterpretq_u8_s32(value.v[q]));
    else vst1q_u8(at + 16 * q, value.v[q]);
  }
}

KFN F16 splat(float s) {
  const float32x4_t all = vdupq_n_f32(s);
  return {{all, all, all, all}};
}
KFN I16 splat(int32_t s) { return I16::same(s); }
KFN F16 floats(I16 a) {
  return {{vcvtq_f32_s32(a.v[0]), vcvtq_f32_s32(a.v[1]), vcvtq_f32_s32(a.v[2]), vcvtq_f32_s32(a.v[3])}};
}
KFN F16 as_floats(I16 bits) {
  return {{vreinterpretq_f32_s32(bits.v[0]), vreinterpretq_f32_s32(bits.v[1]), vreinterpretq_f32_s32(bits.v[2]),
           vreinterpretq_f32_s32(bits.v[3])}};
}
KFN F16 greater(F16 a, F16 b) {
  return {{vmaxq_f32(a.v[0], b.v[0]), vmaxq_f32(a.v[1], b.v[1]), vmaxq_f32(a.v[2], b.v[2]), vmaxq_f32(a.v[3], b.v[3])}};
}
KFN I16 whole(F16 a) {  // nearest, of numbers that are not negative
  const F16 moved = a + splat(0.5f);
  return {{vcvtq_s32_f32(moved.v[0]), vcvtq_s32_f32(moved.v[1]), vcvtq_s32_f32(moved.v[2]), vcvtq_s32_f32(moved.v[3])}};
}

// Numbers of 16 bits: the lower and the upper four of eight.
KFN uint32x4_t lower(uint16x8_t a) { return vmovl_u16(vget_low_u16(a)); }
KFN uint32x4_t upper(uint16x8_t a) { return vmovl_high_u16(a); }
KFN uint16x8_t eight(const uint8_t* from) { return vreinterpretq_u16_u8(vld1q_u8(from)); }
KFN float32x4_t lower_halves(uint16x8_t a) { return vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(a))); }
KFN float32x4_t upper_halves(uint16x8_t a) { return vcvt_high_f32_f16(vreinterpretq_f16_u16(a)); }
KFN float32x4_t lower_bf16(uint16x8_t a) { return vreinterpretq_f32_u32(vshlq_n_u32(lower(a), 16)); }
KFN float32x4_t upper_bf16(uint16x8_t a) { return vreinterpretq_f32_u32(vshlq_n_u32(upper(a), 16)); }

KFN I16 ints(const uint8_t* bytes) {
  const uint8x16_t all = vld1q_u8(bytes);
  const uint16x8_t low = vmovl_u8(vget_low_u8(all)), high = vmovl_high_u8(all);
  return {{vreinterpretq_s32_u32(lower(low)), vreinterpretq_s32_u32(upper(low)), vreinterpretq_s32_u32(lower(high)),
           vreinterpretq_s32_u32(upper(high))}};
}
KFN F16 halves(const uint8_t* from) {
  const uint16x8_t low = eight(from), high = eight(from + 16);
  return {{lower_halves(low), upper_halves(low), lower_halves(high), upper_halves(high)}};
}
KFN void keep_bf16(void* to, F16 v) {  // to nearest, ties to even; NaN stays NaN
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t word = vreinterpretq_u32_f32(v.v[i]), odd = vandq_u32(vshrq_n_u32(word, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(word, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t all = vbslq_u32(vceqq_f32(v.v[i], v.v[i]), rounded, vorrq_u32(word, vdupq_n_u32(0x400000)));
    vst1_u8(static_cast<uint8_t*>(to) + 8 * i, vreinterpret_u8_u16(vshrn_n_u32(all, 16)));
  }
}
KFN void keep_halves(void* to, F16 v) {
  for (int i = 0; i < 2; ++i) {
    const float16x8_t eight = vcombine_f16(vcvt_f16_f32(v.v[2 * i]), vcvt_f16_f32(v.v[2 * i + 1]));
    vst1q_u8(static_cast<uint8_t*>(to) + 16 * i, vreinterpretq_u8_f16(eight));
  }
}
KFN F16 halves_in_software(const uint8_t* from) { return halves(from); }
KFN F16 from_bf16_bits(const uint8_t* from) {
  const uint16x8_t low = eight(from), high = eight(from + 16);
  return {{lower_bf16(low), upper_bf16(low), lower_bf16(high), upper_bf16(high)}};
}
KFN I16 bytes_of(const uint8_t* from, int i) {
  const I16 a = load<I16>(from);
  const int32x4_t down = vdupq_n_s32(-8 * i), byte = vdupq_n_s32(255);
  I16 out;
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q)
    out.v[q] = vandq_s32(vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a.v[q]), down)), byte);
  return out;
}
template <int W>
KFN B64 field(B64 block, int f) {
  const int8x16_t down = vdupq_n_s8(static_cast<int8_t>(-W * f));
  const uint8x16_t most = vdupq_n_u8((1 << W) - 1);
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) block.v[q] = vandq_u8(vshlq_u8(block.v[q], down), most);
  return block;
}
KFN B64 times_four(B64 a) {
  return {{vshlq_n_u8(a.v[0], 2), vshlq_n_u8(a.v[1], 2), vshlq_n_u8(a.v[2], 2), vshlq_n_u8(a.v[3], 2)}};
}
KFN B64 multiples(I16 a) {
  const I16 all = a * 0x03020100;
  return {{vreinterpretq_u8_s32(all.v[0]), vreinterpretq_u8_s32(all.v[1]), vreinterpretq_u8_s32(all.v[2]),
           vreinterpretq_u8_s32(all.v[3])}};
}
KFN B64 lookup(B64 table, B64 index) {
  return {{vqtbl1q_u8(table.v[0], index.v[0]), vqtbl1q_u8(table.v[1], index.v[1]), vqtbl1q_u8(table.v[2], index.v[2]),
           vqtbl1q_u8(table.v[3], index.v[3])}};
}

KFN int8x16_t as_signed(uint8x16_t a) { return vreinterpretq_s8_u8(a); }
KFN int8x16_t less_128(uint8x16_t a) { return vreinterpretq_s8_u8(veorq_u8(a, vdupq_n_u8(128))); }

// Products of a plane's entries with inputs. A bit that is set becomes -1.
template <int W>
struct Dot {
  I16 sum;
  KIN void step(const uint8_t* block, const int8_t* x) {
    if constexpr (W == 1) {
      const int8x16_t x0 = vld1q_s8(x), x1 = vld1q_s8(x + 16);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const uint8x16_t v = vld1q_u8(block + 16 * q);
        int32x4_t s = vdotq_laneq_s32(sum.v[q], as_signed(vtstq_u8(v, vdupq_n_u8(1))), x0, 0);
        s = vdotq_laneq_s32(s, as_signed(vtstq_u8(v, vdupq_n_u8(2))), x0, 1);
        s = vdotq_laneq_s32(s, as_signed(vtstq_u8(v, vdupq_n_u8(4))), x0, 2);
        s = vdotq_laneq_s32(s, as_signed(vtstq_u8(v, vdupq_n_u8(8))), x0, 3);
        s = vdotq_laneq_s32(s, as_signed(vtstq_u8(v, vdupq_n_u8(16))), x1, 0);
        s = vdotq_laneq_s32(s, as_signed(vtstq_u8(v, vdupq_n_u8(32))), x1, 1);
        s = vdotq_laneq_s32(s, as_signed(vtstq_u8(v, vdupq_n_u8(64))), x1, 2);
        sum.v[q] = vdotq_laneq_s32(s, as_signed(vtstq_u8(v, vdupq_n_u8(128))), x1, 3);
      }
    } else if constexpr (W == 2) {
      const int8x16_t in = vld1q_s8(x);
      const uint8x16_t low = vdupq_n_u8(3);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const uint8x16_t v = vld1q_u8(block + 16 * q);
        int32x4_t s = vdotq_laneq_s32(sum.v[q], as_signed(vandq_u8(v, low)), in, 0);
        s = vdotq_laneq_s32(s, as_signed(vandq_u8(vshrq_n_u8(v, 2), low)), in, 1);
        s = vdotq_laneq_s32(s, as_signed(vandq_u8(vshrq_n_u8(v, 4), low)), in, 2);
        sum.v[q] = vdotq_laneq_s32(s, as_signed(vshrq_n_u8(v, 6)), in, 3);
      }
    } else if constexpr (W == 4) {
      const int8x8_t in = vld1_s8(x);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const uint8x16_t v = vld1q_u8(block + 16 * q);
        sum.v[q] = vdotq_lane_s32(sum.v[q], as_signed(vandq_u8(v, vdupq_n_u8(15))), in, 0);
        sum.v[q] = vdotq_lane_s32(sum.v[q], as_signed(vshrq_n_u8(v, 4)), in, 1);
      }
    } else {
      const int8x16_t in = vreinterpretq_s8_s32(vdupq_n_s32(load<int32_t>(x)));
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) sum.v[q] = vdotq_s32(sum.v[q], less_128(vld1q_u8(block + 16 * q)), in);
    }
  }
  // `xsum`: of the inputs.
  KIN I16 total(int32_t xsum) const {
    return W == 1 ? I16{} - sum : W == 8 ? sum + 128 * xsum : sum;
  }
};

// scale and zero of a record's rows, for one byte a level: value = scale (level - zero).
struct Grid {
  F16 scale, zero;
};

constexpr int kTileTokens = 4;
constexpr bool is_wide(int kind) { return kind == INT8 || kind == TRIT2 || kind == TRIT3; }

// As for AVX-512. WIDE: levels above 127 occur.
template <int T, bool WIDE>
KFN void one_tile(const uint8_t* levels, const int8_t* x, int kb, F16 scale, F16 zero, const float* xscale,
                  const int32_t* xsum, float* y) {
  I16 sum[T];
  for (int k = 0; k < kb / 4; ++k) {
    int8x16_t v[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const uint8x16_t level = vld1q_u8(levels + 64 * k + 16 * q);
      v[q] = WIDE ? less_128(level) : as_signed(level);
    }
    if constexpr (T == 4) {  // four inputs of four tokens are a register
      const int8x16_t in = vld1q_s8(x + 16 * k);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        sum[0].v[q] = vdotq_laneq_s32(sum[0].v[q], v[q], in, 0);
        sum[1].v[q] = vdotq_laneq_s32(sum[1].v[q], v[q], in, 1);
        sum[2].v[q] = vdotq_laneq_s32(sum[2].v[q], v[q], in, 2);
        sum[3].v[q] = vdotq_laneq_s32(sum[3].v[q], v[q], in, 3);
      }
    } else {
#pragma GCC unroll 3
      for (int t = 0; t < T; ++t) {
        const int8x16_t in = vreinterpretq_s8_s32(vdupq_n_s32(load<int32_t>(x + (k * T + t) * 4)));
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) sum[t].v[q] = vdotq_s32(sum[t].v[q], v[q], in);
      }
    }
  }
  const F16 base = WIDE ? zero - splat(128.0f) : zero;
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const F16 value = (floats(sum[t]) - base * static_cast<float>(xsum[t])) * (scale * xscale[t]);
    float* const to = y + t * kStride;
    keep(to, load<F16>(to) + value);
  }
}

template <int T, bool WIDE>
KFN void tile(const uint8_t* levels, const int8_t* x, int kb, const Grid* grids, const float* xscale, const int32_t* xsum,
              float* y) {
  for (int r = 0; r < 2; ++r)
    one_tile<T, WIDE>(levels + kLevels * r, x, kb, grids[r].scale, grids[r].zero, xscale, xsum, y + 16 * r);
}
