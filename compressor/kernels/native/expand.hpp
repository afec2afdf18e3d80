// For processors that cannot expand by a mask: where each of eight marked entries comes from, by the mask.
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

}  // namespace layout
