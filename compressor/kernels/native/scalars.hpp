// Single numbers of 16 bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace layout {

enum DType : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
constexpr long width(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

inline float from_bf16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline float from_fp16(uint16_t bits) {
  uint32_t word = static_cast<uint32_t>(bits & 0x7fff) << 13;
  float value;
  if ((bits & 0x7c00) == 0x7c00) {
    word |= 0x7f800000;
    std::memcpy(&value, &word, 4);
  } else {
    std::memcpy(&value, &word, 4);
    value *= 0x1p112f;
  }
  return bits & 0x8000 ? -value : value;
}

inline uint16_t to_fp16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(word >> 16 & 0x8000);
  word &= 0x7fffffff;
  if (word > 0x7f800000) return sign | 0x7e00;
  if (word >= 0x477ff000) return sign | 0x7c00;  // rounds beyond 65504
  if (word < 0x38800000) {                       // subnormal: adding 0.5 rounds to multiples of 2^-24
    float size;
    std::memcpy(&size, &word, 4);
    size += 0.5f;
    std::memcpy(&word, &size, 4);
    return sign | static_cast<uint16_t>(word - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((word - 0x38000000 + 0xfff + (word >> 13 & 1)) >> 13);
}

}  // namespace layout
