// One token after the other through formats that are read row by row. Included once for each instruction set.

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

template <bool SIGNS>
static void run_partial(const Call& c) {
  const Matrix& w = c.w;
  const long groups = w.groups(), padded = 128 * groups;
  Scratch& scratch = Scratch::mine();
  if (c.exact) {  // through the matrix itself, 16 rows at a time
    float* const x = scratch.floats(c.tokens * padded);
    widen_tokens(c.x, c.dtype, 0, c.tokens, w.n, 128, groups, x);
    const long tiles = w.tiles(), chunks = chunks_of(tiles, c.threads);
    pool::each(chunks, c.threads, [&](long chunk) {
      const auto [first, last] = span(tiles, chunks, chunk);
      std::vector<float> rows(16 * padded);
      for (long tile = first; tile < last; ++tile) {
        unpack_partial<SIGNS>(w, tile, rows.data());
        const long count = w.m - 16 * tile < 16 ? w.m - 16 * tile : 16;
        float y[16] = {};
        for (long t = 0; t < c.tokens; ++t) {
          for (long r = 0; r < count; ++r) y[r] = dot(rows.data() + r * padded, x + t * padded, w.n);
          write_out(c, y, 16, 16 * tile, count, t, t + 1);
        }
      }
    });
    return;
  }
  const Tokens x = scratch.tokens(c.tokens, groups, 128);
  for (long t = 0; t < c.tokens; ++t) {  // every token is a tile of its own
    const Tokens one{x.q + t * padded, x.scale + t * groups, x.sum + t * groups};
    quantize_tile((const char*)c.x + t * w.n * width(c.dtype), c.dtype, 0, 1, w.n, 128, groups, one);
  }
  each_tile(c, [&](long tile, long t, float* y) {
    partial_tile<SIGNS>(w, tile, x.q + t * padded, x.scale + t * groups, x.sum + t * groups, y);
  });
}

template <int KIND>
static void run_16(const Call& c) {
  const Matrix& w = c.w;
  constexpr bool SPARSE = KIND == SPARSE_BF16 || KIND == SPARSE_FP16, BF16 = KIND == SPARSE_BF16 || KIND == DENSE_BF16;
  const long groups = w.groups(), padded = 128 * groups;
  float* const x = Scratch::mine().floats(c.tokens * padded);
  widen_tokens(c.x, c.dtype, 0, c.tokens, w.n, 128, groups, x);
#if COMPRESSOR_LEVEL == 2
  if (BF16 && c.bf16_products && (!c.exact || c.dtype == BFLOAT16)) {
    uint16_t* const narrow = (uint16_t*)x;
    narrow_in_place(x, c.tokens * padded);
    each_tile(c, [&](long tile, long t, float* y) {
      const uint16_t* const in = narrow + t * padded;
      if (SPARSE) return sparse_tile_bf16(w, tile, in, y);
      for (long r = 0; r < 16 && 16 * tile + r < w.m; ++r) y[r] = dense_row_bf16(w.data + 2 * (16 * tile + r) * w.n, in, w.n);
    });
    return;
  }
#endif
  each_tile(c, [&](long tile, long t, float* y) {
    if (SPARSE) return sparse_tile<KIND>(w, tile, x + t * padded, y);
    for (long r = 0; r < 16 && 16 * tile + r < w.m; ++r)
      y[r] = dense_row<BF16>(w.data + 2 * (16 * tile + r) * w.n, x + t * padded, w.n);
  });
}

// The matrix as rows of an output dtype; TILE makes 16 rows of fp32 with padded inputs.
template <void (*TILE)(const Matrix&, long, float*)>
static void unpack_tiles(const Matrix& w, char* out, int dtype, int threads) {
  const long padded = w.kb * w.groups(), chunks = chunks_of(w.tiles(), threads);
  pool::each(chunks, threads, [&](long chunk) {
    const auto [first, last] = span(w.tiles(), chunks, chunk);
    std::vector<float> rows(16 * padded);
    for (long tile = first; tile < last; ++tile) {
      TILE(w, tile, rows.data());
      for (long row = 16 * tile; row < 16 * tile + 16 && row < w.m; ++row)
        convert(rows.data() + (row - 16 * tile) * padded, w.n, w.factor, dtype, out + row * w.n * width(dtype));
    }
  });
}
