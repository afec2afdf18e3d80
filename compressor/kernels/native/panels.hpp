// Tokens times a matrix that is unpacked on the way, 16 rows at a time, which stay in the second cache. Included once for each
// instruction set.

// A panel (16, inputs) times tokens (tokens, inputs), all in rows of `stride`, inputs a multiple of 16; y[t][row].
KERNEL void times_rows(const float* panel, const float* x, long stride, long inputs, long tokens, float* y) {
  constexpr int kBlock = COMPRESSOR_LEVEL == 2 ? 4 : 2;  // of rows, and of tokens: their sums fill the registers
  for (long t = 0; t < tokens; t += kBlock) {
    const float* in[kBlock];
    for (long j = 0; j < kBlock; ++j) in[j] = x + (t + j < tokens ? t + j : tokens - 1) * stride;
    for (int r = 0; r < 16; r += kBlock) {
      F16 sums[kBlock][kBlock] = {};
      for (long k = 0; k < inputs; k += 16) {
        F16 w[kBlock];
#pragma GCC unroll 4
        for (int i = 0; i < kBlock; ++i) w[i] = load<F16>(panel + (r + i) * stride + k);
#pragma GCC unroll 4
        for (int j = 0; j < kBlock; ++j) {
          const F16 v = load<F16>(in[j] + k);
#pragma GCC unroll 4
          for (int i = 0; i < kBlock; ++i) sums[j][i] += w[i] * v;
        }
      }
      for (long j = 0; j < kBlock && t + j < tokens; ++j)
        for (int i = 0; i < kBlock; ++i) y[(t + j) * 16 + r + i] = total(sums[j][i]);
    }
  }
}

// What a panel is made of and multiplied by: activations of any dtype, the matrix as it is, both in fp32.
template <class Unpack>
struct InFp32 {
  using Number = float;
  static void token(const Call& c, long t, Number* to) {
    widen_tokens(static_cast<const char*>(c.x) + t * c.w.n * width(c.dtype), c.dtype, 0, 1, c.w.n, c.w.kb, c.w.groups(), to);
  }
  static const Number* rows(const Matrix& w, long tile, Number* panel, long stride) {
    Unpack::tile(w, tile, [&](int r, long input, const float* values) {
      std::memcpy(panel + r * stride + input, values, sizeof(float) * w.kb);
    });
    return panel;
  }
  static void times(const Matrix& w, const Number* panel, const Number*, const Number* x, long stride, long tokens, float* y) {
    times_rows(panel, x, stride, w.groups() * w.kb, tokens, y);
  }
};

template <class How>
static void run_panels(const Call& c) {
  using Number = typename How::Number;
  constexpr long kLine = 64 / sizeof(Number);
  const Matrix& w = c.w;
  const long tiles = w.tiles(), chunks = chunks_of(tiles, c.threads);
  const long stride = w.groups() * w.kb + kLine;  // so that lines of rows that are read together have places of their own
  Number* const x = reinterpret_cast<Number*>(Scratch::mine().floats(c.tokens * stride));
  for (long t = 0; t < c.tokens; ++t) How::token(c, t, x + t * stride);
  pool::each(chunks, c.threads, [&](long chunk) {
    const auto [first, last] = span(tiles, chunks, chunk);
    std::vector<Number> memory(16 * stride + kLine);
    Number* const room = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) / sizeof(Number);
    std::vector<float> y(16 * c.tokens);
    for (long tile = first; tile < last; ++tile) {
      const Number* const panel = How::rows(w, tile, room, stride);
      How::times(w, panel, room, x, stride, c.tokens, y.data());
      write_out(c, y.data(), 16, 16 * tile, w.m - 16 * tile < 16 ? w.m - 16 * tile : 16, 0, c.tokens);
    }
  });
}
