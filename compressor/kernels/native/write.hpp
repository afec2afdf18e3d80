// Sums to outputs. Included once for each instruction set.

// 16 numbers as `dtype`.
KFN void keep_as(int dtype, F16 v, char* out) {
  if (dtype == FLOAT32) keep(out, v);
  else if (dtype == FLOAT16) keep_halves(out, v);
  else keep_bf16(out, v);
}

// fp32 times a factor to the dtype of an output.
KERNEL void convert(const float* from, long count, float factor, int dtype, char* out) {
  const long whole = count / 16 * 16;
  for (long i = 0; i < whole; i += 16) keep_as(dtype, load<F16>(from + i) * factor, out + i * width(dtype));
  if (whole == count) return;
  float rest[16] = {};
  char all[64];
  std::memcpy(rest, from + whole, sizeof(float) * (count - whole));
  keep_as(dtype, load<F16>(rest) * factor, all);
  std::memcpy(out + whole * width(dtype), all, (count - whole) * width(dtype));
}

// Rows row .. row + count, 16 at most, of token t; y has 16 sums, whatever the count.
KFN void write_rows(const Call& c, const float* y, long t, long row, long count) {
  const F16 v = load<F16>(y) * c.w.factor;
  char* const out = static_cast<char*>(c.out) + (t * c.w.m + row) * width(c.dtype);
  if (count == 16) return keep_as(c.dtype, c.bias ? v + load<F16>(c.bias + row) : v, out);
  float bias[16] = {};
  char all[64];
  if (c.bias) std::memcpy(bias, c.bias + row, sizeof(float) * count);
  keep_as(c.dtype, v + load<F16>(bias), all);
  std::memcpy(out, all, count * width(c.dtype));
}

// Rows row .. row + rows of tokens from .. to; y[t - from][row], rows of `stride`.
KERNEL void write_out(const Call& c, const float* y, long stride, long row, long rows, long from, long to) {
  for (long t = from; t < to; ++t)
    for (long r = 0; r < rows; r += 16) write_rows(c, y + (t - from) * stride + r, t, row + r, rows - r < 16 ? rows - r : 16);
}

// One token after the other through a matrix: tile(number, token, y) makes 16 sums.
template <class Row>
static void each_tile(const Call& c, Row&& tile) {
  const long tiles = c.w.tiles(), chunks = chunks_of(tiles, c.threads);
  pool::each(chunks, c.threads, [&](long chunk) {
    const auto [first, last] = span(tiles, chunks, chunk);
    float y[16] = {};
    for (long t = 0; t < c.tokens; ++t)
      for (long number = first; number < last; ++number) {
        tile(number, t, y);
        write_out(c, y, 16, 16 * number, c.w.m - 16 * number < 16 ? c.w.m - 16 * number : 16, t, t + 1);
      }
  });
}
