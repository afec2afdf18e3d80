// Products of formats that are read row by row. Included once for each instruction set.

#if COMPRESSOR_LEVEL != 2  // which has exact.hpp
template <int KIND>
static void run_codes_exact(const Call& c) {
  run_panels<InFp32<std::conditional_t<KIND == PARTIAL, UnpackPartial, UnpackSparse8>>>(c);
}
#endif

template <int KIND>
static void run_codes(const Call& c) {
  if (c.exact) return run_codes_exact<KIND>(c);
  const long groups = c.w.groups(), padded = 128 * groups;
  const Tokens x = Scratch::mine().tokens(c.tokens, groups, 128);
  for (long t = 0; t < c.tokens; ++t) {  // every token is a tile of its own
    const Tokens one{x.q + t * padded, x.scale + t * groups, x.sum + t * groups};
    quantize_tile((const char*)c.x + t * c.w.n * width(c.dtype), c.dtype, 0, 1, c.w.n, 128, groups, one);
  }
  each_tile(c, [&](long tile, long t, float* y) {
    const int8_t* const q = x.q + t * padded;
    const float* const scale = x.scale + t * groups;
    if (KIND == PARTIAL) return partial_tile(c.w, tile, q, scale, x.sum + t * groups, y);
    sparse8_tile(c.w, tile, q, scale, y);
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
      dense_tile_bf16(w.data + 32 * tile * w.n, in, w.n, w.m - 16 * tile < 16 ? w.m - 16 * tile : 16, y);
    });
    return;
  }
#endif
  each_tile(c, [&](long tile, long t, float* y) {
    if (SPARSE) return sparse_tile<KIND>(w, tile, x + t * padded, y);
    dense_tile<BF16>(w.data + 32 * tile * w.n, x + t * padded, w.n, w.m - 16 * tile < 16 ? w.m - 16 * tile : 16, y);
  });
}

// The matrix as rows of an output dtype.
template <class Unpack>
static void unpack_all(const Matrix& w, char* out, int dtype, int threads) {
  const long chunks = chunks_of(w.tiles(), threads);
  pool::each(chunks, threads, [&](long chunk) {
    const auto [first, last] = span(w.tiles(), chunks, chunk);
    for (long tile = first; tile < last; ++tile)
      Unpack::tile(w, tile, [&](int r, long input, const float* values) {
        const long row = 16 * tile + r, count = w.n - input < w.kb ? w.n - input : w.kb;
        if (row < w.m) convert(values, count, w.factor, dtype, out + (row * w.n + input) * width(dtype));
      });
  });
}
