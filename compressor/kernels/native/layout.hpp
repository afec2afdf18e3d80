// How a matrix lies in memory. All numbers little-endian.
//
// A record is 16 rows x `kb` inputs (32, 64 or 128): planes of 1, 2, 4 or 8 bits an entry, then a tail of scales. Records
// of the same 16 rows follow each other, so that a thread reads one strictly sequential stream. In a block of 64 bytes of
// a plane of w bits, byte 4 r + i holds in bits w f .. w f + w - 1 the entry of row r and input 4 (f + block * 8 / w) + i
// of the record. Blocks of several planes that cover the same inputs stand side by side.
//
// Tails:  trits  fp16 s1[16], s2[16], s3[16]             value = s1 (u1 - 1) + s2 (u2 - 1) + s3 (u3 - 1)
//         ints   fp16 s[16], u8 z[16]                    value = s (u - z)
//         signs  fp16 s[16], fp16 c[16]                  value = s (2 u - 1) + c
// filled up to a multiple of 64 bytes. Beside two and three planes of trits stands a table of a byte for every row of every
// record: the whole number that stands for the largest scale where all planes are made into one level of 8 bits. Everything is times one fp32 factor of the matrix.
//
// Formats with a mask are streams of variable length, 16 rows a tile, and a table says where each tile starts:
//   partial  fp32 step[16], zero[16]; then for every 128 inputs a record of signs as above (tail, then plane), and the
//            marked entries by fours, in rounds: a row that has more than 4 i of them gives its next ones in round i. First
//            u16 rounds (an even number), fours in all, and for every round the rows that give, a bit each; then four places
//            for every row that gives, round after round, a byte each, 128 + input or 0 where a row has no more; then as
//            many codes.
//            value = step (code - zero) where marked, else s (2 u - 1) + c.
//   sparse8  the same head; then for every 128 inputs a mask of 16 x 16 bytes, and the codes of the marked entries, a byte
//            each, row after row. value = step (code - zero) where marked, else 0.
//   sparse16 row after row, for every 128 inputs a mask of 16 bytes and the marked entries as bf16 or fp16; else 0.
#pragma once

#include <cstdint>
#include <cstring>

namespace layout {

enum Kind : int { TRIT1 = 1, TRIT2 = 2, TRIT3 = 3, INT2 = 4, INT3 = 5, INT4 = 6, INT8 = 7, SIGN = 8, PARTIAL = 9, SPARSE8 = 10, SPARSE_BF16 = 11, SPARSE_FP16 = 12, DENSE_BF16 = 13, DENSE_FP16 = 14 };

constexpr int kRows = 16;
constexpr int kMostInputs = 128;  // of a record

constexpr bool is_levels(long kind) { return kind >= TRIT1 && kind <= SIGN; }
constexpr bool is_stream(long kind) { return kind >= PARTIAL && kind <= SPARSE_FP16; }
constexpr bool is_trits(int kind) { return kind <= TRIT3; }
constexpr int planes(int kind) { return kind <= TRIT3 ? kind : kind == INT3 ? 2 : 1; }
constexpr int plane_bits(int kind, int plane) {
  return kind <= INT2 ? 2 : kind == INT3 ? (plane == 0 ? 2 : 1) : kind == INT4 ? 4 : kind == INT8 ? 8 : 1;
}
constexpr int bits(int kind) {
  return kind <= TRIT3 ? 2 * kind : kind == INT2 ? 2 : kind == INT3 ? 3 : kind == INT4 ? 4 : kind == INT8 ? 8 : 1;
}
constexpr int tail_bytes(int kind) { return kind == TRIT3 ? 128 : 64; }
// Inputs that one block of every plane, or as many as needed, covers.
constexpr int step(int kind) { return kind == INT3 || kind == SIGN ? 32 : kind == INT4 ? 8 : kind == INT8 ? 4 : 16; }
constexpr long data_bytes(int kind, int kb) { return 2L * bits(kind) * kb; }
constexpr long record_bytes(int kind, int kb) { return data_bytes(kind, kb) + tail_bytes(kind); }

struct Matrix {
  int kind;
  long m, n;
  int kb;
  const uint8_t* data;
  float factor;
  const void* extra;  // starts of the tiles of a stream and its end, int64; or the numbers of trits
  const int64_t* starts() const { return static_cast<const int64_t*>(extra); }
  const uint8_t* numbers(long tile, long group) const {
    return static_cast<const uint8_t*>(extra) + (tile * groups() + group) * kRows;
  }
  long tiles() const { return (m + kRows - 1) / kRows; }
  long groups() const { return (n + kb - 1) / kb; }
  long row_bytes() const { return groups() * record_bytes(kind, kb); }
  long bytes() const { return tiles() * row_bytes(); }
  // Of a stream, what one of its tiles takes when nothing is marked, and what all of them do.
  long least(long tile) const {
    const long rows = m - kRows * tile < kRows ? m - kRows * tile : kRows;
    return kind == PARTIAL ? 128 + groups() * 324 : kind == SPARSE8 ? 128 + groups() * 256 : rows * groups() * 16;
  }
  long least() const { return (tiles() - 1) * least(0) + least(tiles() - 1); }
};

// What a tile of `partial` or `sparse8` begins with.
struct RowGrids {
  float step[kRows], zero[kRows];
  explicit RowGrids(const uint8_t* at) {
    std::memcpy(step, at, sizeof step);
    std::memcpy(zero, at + sizeof step, sizeof zero);
  }
};

// The marked entries of a record of `partial`.
struct Fours {
  int rounds;
  const uint8_t *rows, *places, *codes, *end;
  explicit Fours(const uint8_t* at) {
    uint16_t head[2];
    std::memcpy(head, at, sizeof head);
    rounds = head[0];
    rows = at + sizeof head;
    places = rows + 2 * rounds;
    codes = places + 4 * head[1];
    end = codes + 4 * head[1];
  }
  unsigned rows_of(int round) const {
    uint16_t bits;
    std::memcpy(&bits, rows + 2 * round, sizeof bits);
    return bits;
  }
};

// Offset in a record of the block that holds an input, and the field in its bytes.
struct Place {
  long block;
  int shift;
};
constexpr Place place(int kind, int plane, int input) {
  const int w = plane_bits(kind, plane), fields = 8 / w, covers = 4 * fields;
  if (kind == INT3) {  // two blocks of two bits, then one of one
    const int super = input / 32;
    return {super * 192L + (plane == 0 ? (input % 32) / 16 * 64 : 128), w * ((input % covers) / 4)};
  }
  return {(static_cast<long>(input / covers) * planes(kind) + plane) * 64, w * ((input % covers) / 4)};
}

}  // namespace layout
