// From numbers in rows to the layouts, and back. Portable: done once, at load.
#pragma once

namespace {

// Planes of entries [planes][m][n], a byte each, and tails [tiles][groups][tail bytes], to records.
inline void pack_levels(const Matrix& w, const uint8_t* entries, const uint8_t* tails, uint8_t* out, int threads) {
  const long data = data_bytes(w.kind, w.kb), whole = record_bytes(w.kind, w.kb), tail = tail_bytes(w.kind);
  pool::each(w.tiles(), threads, [&](long tile) {
    uint8_t* record = out + tile * w.row_bytes();
    const long rows = w.m - 16 * tile < 16 ? w.m - 16 * tile : 16;
    for (long g = 0; g < w.groups(); ++g, record += whole) {
      std::memset(record, 0, data);
      std::memcpy(record + data, tails + (tile * w.groups() + g) * tail, tail);
      for (int p = 0; p < planes(w.kind); ++p)
        for (int k = 0; k < w.kb && g * w.kb + k < w.n; ++k) {
          const Place at = place(w.kind, p, k);
          const uint8_t* from = entries + (p * w.m + 16 * tile) * w.n + g * w.kb + k;
          for (long r = 0; r < rows; ++r) record[at.block + 4 * r + k % 4] |= static_cast<uint8_t>(from[r * w.n] << at.shift);
        }
    }
  });
}

inline void unpack_levels(const Matrix& w, uint8_t* entries, int threads) {
  const long whole = record_bytes(w.kind, w.kb);
  pool::each(w.tiles(), threads, [&](long tile) {
    const uint8_t* record = w.data + tile * w.row_bytes();
    const long rows = w.m - 16 * tile < 16 ? w.m - 16 * tile : 16;
    for (long g = 0; g < w.groups(); ++g, record += whole)
      for (int p = 0; p < planes(w.kind); ++p)
        for (int k = 0; k < w.kb && g * w.kb + k < w.n; ++k) {
          const Place at = place(w.kind, p, k);
          const int most = (1 << plane_bits(w.kind, p)) - 1;
          uint8_t* to = entries + (p * w.m + 16 * tile) * w.n + g * w.kb + k;
          for (long r = 0; r < rows; ++r) to[r * w.n] = record[at.block + 4 * r + k % 4] >> at.shift & most;
        }
  });
}

// What a stream is made of; those that a kind has not are null.
struct Pieces {
  const uint8_t* marked;  // [m][n], 0 or 1
  const uint8_t* values;  // [m][n], a byte or two each, of those that are marked
  const uint8_t* signs;   // [m][n], 0 or 1; ignored where marked
  const uint8_t* tails;   // [tiles][groups][64]
  const uint8_t* heads;   // [tiles][128]
};

// A record of signs and marked entries; returns its bytes. Without `out` nothing is written.
inline long pack_partial_record(const Matrix& w, const Pieces& from, long tile, long g, uint8_t* out) {
  const long rows = w.m - 16 * tile < 16 ? w.m - 16 * tile : 16, inputs = w.n - 128 * g < 128 ? w.n - 128 * g : 128;
  uint8_t marked[16][128];  // inputs of a row
  int counts[16] = {}, rounds = 0, fours = 0;
  for (long r = 0; r < rows; ++r) {
    const uint8_t* const row = from.marked + (16 * tile + r) * w.n + 128 * g;
    for (long k = 0; k < inputs; ++k)
      if (row[k]) marked[r][counts[r]++] = static_cast<uint8_t>(k);
    const int own = (counts[r] + 3) / 4;
    rounds = own > rounds ? own : rounds;
    fours += own;
  }
  rounds += rounds % 2;
  const long bytes = 64 + 256 + 4 + 2 * rounds + 8 * fours;
  if (!out) return bytes;
  std::memset(out, 0, bytes);
  std::memcpy(out, from.tails + 64 * (tile * w.groups() + g), 64);
  for (long r = 0; r < rows; ++r)
    for (long k = 0; k < inputs; ++k) {
      const long number = (16 * tile + r) * w.n + 128 * g + k;
      if (from.signs[number] && !from.marked[number])
        out[64 + k / 32 * 64 + 4 * r + k % 4] |= static_cast<uint8_t>(1 << (k % 32 / 4));
    }
  const uint16_t head[2] = {static_cast<uint16_t>(rounds), static_cast<uint16_t>(fours)};
  std::memcpy(out + 320, head, sizeof head);
  uint8_t *place = out + 324 + 2 * rounds, *code = place + 4 * fours;
  for (int round = 0; round < rounds; ++round) {
    uint16_t giving = 0;
    for (long r = 0; r < rows; ++r) {
      const int first = 4 * round, last = counts[r] < first + 4 ? counts[r] : first + 4;
      if (last <= first) continue;
      giving = static_cast<uint16_t>(giving | 1 << r);
      for (int i = first; i < last; ++i) {
        place[i - first] = static_cast<uint8_t>(128 + marked[r][i]);
        code[i - first] = from.values[(16 * tile + r) * w.n + 128 * g + marked[r][i]];
      }
      place += 4;
      code += 4;
    }
    std::memcpy(out + 324 + 2 * round, &giving, sizeof giving);
  }
  return bytes;
}

// One tile; returns its bytes. Without `out` nothing is written.
inline long pack_stream_tile(const Matrix& w, const Pieces& from, long tile, uint8_t* out) {
  const bool eight = w.kind == PARTIAL || w.kind == SPARSE8;
  const long rows = w.m - 16 * tile < 16 ? w.m - 16 * tile : 16, size = eight ? 1 : 2;
  long at = 0;
  auto row_of = [&](long r, long g, uint8_t* mask, uint8_t* values) {  // returns the bytes of the values
    long used = 0;
    for (int k = 0; k < 128 && g * 128 + k < w.n; ++k) {
      const long number = (16 * tile + r) * w.n + g * 128 + k;
      if (!from.marked[number]) continue;
      if (out) {
        mask[k / 8] |= static_cast<uint8_t>(1 << (k % 8));
        std::memcpy(values + used, from.values + size * number, size);
      }
      used += size;
    }
    return used;
  };
  if (!eight) {
    for (long r = 0; r < rows; ++r)
      for (long g = 0; g < w.groups(); ++g) {
        if (out) std::memset(out + at, 0, 16);
        at += 16 + row_of(r, g, out + at, out + at + 16);
      }
    return at;
  }
  if (out) std::memcpy(out, from.heads + 128 * tile, 128);
  at = 128;
  for (long g = 0; g < w.groups(); ++g) {
    if (w.kind == PARTIAL) {
      at += pack_partial_record(w, from, tile, g, out ? out + at : nullptr);
      continue;
    }
    uint8_t* const masks = out + at;
    if (out) std::memset(masks, 0, 256);
    at += 256;
    for (long r = 0; r < rows; ++r) at += row_of(r, g, masks + 16 * r, out + at);
  }
  return at;
}

// Where tiles start, and with `out` the tiles themselves.
inline void pack_stream(const Matrix& w, const Pieces& from, int64_t* starts, uint8_t* out, int threads) {
  if (!out) {
    pool::each(w.tiles(), threads, [&](long tile) { starts[tile + 1] = pack_stream_tile(w, from, tile, nullptr); });
    starts[0] = 0;
    for (long tile = 0; tile < w.tiles(); ++tile) starts[tile + 1] += starts[tile];
    return;
  }
  pool::each(w.tiles(), threads, [&](long tile) { pack_stream_tile(w, from, tile, out + starts[tile]); });
}

}  // namespace
