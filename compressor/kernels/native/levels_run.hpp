// One matrix product, cut into chunks of rows: threads never share a sum, so their number does not change a bit.
// Included once for each instruction set.

#if COMPRESSOR_LEVEL != 2  // which has exact.hpp
template <int KIND>
static void run_exact(const Call& c) {
  const Matrix& w = c.w;
  const long groups = w.groups(), padded = groups * w.kb, tiles = w.tiles();
  float* const x = Scratch::mine().floats(c.tokens * padded);
  widen_tokens(c.x, c.dtype, 0, c.tokens, w.n, w.kb, groups, x);
  pool::each(chunks_of(tiles, c.threads), c.threads, [&](long chunk) {
    const auto [first, last] = span(tiles, chunks_of(tiles, c.threads), chunk);
    float y[16 * kTokensAtOnce];
    for (long tile = first; tile < last; ++tile)
      for (long from = 0; from < c.tokens; from += kTokensAtOnce) {
        const long to = from + kTokensAtOnce < c.tokens ? from + kTokensAtOnce : c.tokens;
        exact_tile<KIND>(w, tile, x + from * padded, padded, to - from, y);
        write_out(c, y, 16, 16 * tile, w.m - 16 * tile < 16 ? w.m - 16 * tile : 16, from, to);
      }
  });
}
#endif

template <int KIND>
static void run_kind(const Call& c) {
  const Matrix& w = c.w;
  const long groups = w.groups(), padded = groups * w.kb, tiles = w.tiles();
  if (c.exact) return run_exact<KIND>(c);
  Scratch& scratch = Scratch::mine();
  const Tokens x = scratch.tokens(c.tokens, groups, w.kb);
  if (c.tokens <= kFewTokens) {
    for (long t = 0; t < c.tokens; ++t) {
      const Tokens one{x.q + t * padded, x.scale + t * groups, x.sum + t * groups};
      quantize_tile(static_cast<const char*>(c.x) + t * w.n * width(c.dtype), c.dtype, 0, 1, w.n, w.kb, groups, one);
    }
    const auto tile_of_rows = c.tokens == 1 ? gemv_tile<KIND, 1> : c.tokens == 2 ? gemv_tile<KIND, 2> : gemv_tile<KIND, 3>;
    pool::each(chunks_of(tiles, c.threads), c.threads, [&](long chunk) {
      const auto [first, last] = span(tiles, chunks_of(tiles, c.threads), chunk);
      float y[16 * kFewTokens];
      for (long tile = first; tile < last; ++tile) {
        tile_of_rows(w, tile, x, y);
        write_out(c, y, 16, 16 * tile, w.m - 16 * tile < 16 ? w.m - 16 * tile : 16, 0, c.tokens);
      }
    });
    return;
  }
  const long batches = (c.tokens + kTileTokens - 1) / kTileTokens;
  pool::each(batches, c.threads, [&](long batch) {
    const long first = batch * kTileTokens, left = c.tokens - first;
    quantize_tile(c.x, c.dtype, first, static_cast<int>(left < kTileTokens ? left : kTileTokens), w.n, w.kb, groups, x);
  });
  const long blocks = (tiles + kTilesAtOnce - 1) / kTilesAtOnce;
  pool::each(blocks, c.threads, [&](long block) {
    const long first = block * kTilesAtOnce, last = first + kTilesAtOnce < tiles ? first + kTilesAtOnce : tiles;
    const long rows = w.m - 16 * first < kStride ? w.m - 16 * first : kStride;
    alignas(64) float y[kStride * kTokensAtOnce];
    for (long from = 0; from < c.tokens; from += kTokensAtOnce) {
      const long to = from + kTokensAtOnce < c.tokens ? from + kTokensAtOnce : c.tokens;
      std::memset(y, 0, sizeof(float) * kStride * (to - from));
      gemm_tiles<KIND>(w, first, last, x, from, to, y);
      write_out(c, y, kStride, 16 * first, rows, from, to);
    }
  });
}
