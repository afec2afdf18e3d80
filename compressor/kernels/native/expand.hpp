// Where marked entries come from, by the mask: of eight, for processors that cannot expand by one; and before each of 32.
#pragma once

#include <cstdint>

namespace layout {

struct Expansion {
  alignas(64) uint8_t bytes[256][8];   // index of a byte, 0x80 where nothing is marked
  alignas(64) uint8_t words[256][16];  // indices of the two bytes of a 16-bit number
  constexpr Expansion() : bytes(), words() {
    for (int mask = 0; mask < 256; ++mask)
      for (int at = 0, next = 0; at < 8; ++at) {
        const bool marked = mask >> at & 1;
        bytes[mask][at] = static_cast<uint8_t>(marked ? next : 0x80);
        words[mask][2 * at] = static_cast<uint8_t>(marked ? 2 * next : 0x80);
        words[mask][2 * at + 1] = static_cast<uint8_t>(marked ? 2 * next + 1 : 0x80);
        next += marked;
      }
  }
};
inline constexpr Expansion kExpansion{};

// The same to the upper halves of 32 bits, which makes fp32 of bf16.
struct Widening {
  alignas(64) uint8_t from[256][32];
  constexpr Widening() : from() {
    for (int mask = 0; mask < 256; ++mask)
      for (int at = 0, next = 0; at < 8; ++at) {
        const bool marked = mask >> at & 1;
        for (int i = 0; i < 4; ++i) from[mask][4 * at + i] = static_cast<uint8_t>(marked && i > 1 ? 2 * next + i - 2 : 0x80);
        next += marked;
      }
  }
};
inline constexpr Widening kWidening{};

// Bits before each of 32, of the lower half of a mask and of the upper one.
struct Before {
  alignas(64) uint16_t low[32], high[32];
  constexpr Before() : low(), high() {
    for (int at = 0; at < 32; ++at) {
      low[at] = static_cast<uint16_t>(at < 16 ? (1 << at) - 1 : 0xffff);
      high[at] = static_cast<uint16_t>(at < 16 ? 0 : (1 << (at - 16)) - 1);
    }
  }
};
inline constexpr Before kBefore{};

}  // namespace layout
