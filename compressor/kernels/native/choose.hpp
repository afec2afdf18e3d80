// From the kind of a matrix, a number, to the code that was compiled for it. Included once for each instruction set.

static void run_packed(const Call& c) {
  switch (c.w.kind) {
    case TRIT1: return run_kind<TRIT1>(c);
    case TRIT2: return run_kind<TRIT2>(c);
    case TRIT3: return run_kind<TRIT3>(c);
    case INT2: return run_kind<INT2>(c);
    case INT3: return run_kind<INT3>(c);
    case INT4: return run_kind<INT4>(c);
    case INT8: return run_kind<INT8>(c);
    case SIGN: return run_kind<SIGN>(c);
    case PARTIAL: return run_codes<PARTIAL>(c);
    case SPARSE8: return run_codes<SPARSE8>(c);
    case SPARSE_BF16: return run_16<SPARSE_BF16>(c);
    case SPARSE_FP16: return run_16<SPARSE_FP16>(c);
    case DENSE_BF16: return run_16<DENSE_BF16>(c);
    default: return run_16<DENSE_FP16>(c);
  }
}

// work(how the matrix is unpacked).
template <class Work>
static void by_unpacking(int kind, Work&& work) {
  switch (kind) {
    case TRIT1: return work(UnpackLevels<TRIT1>());
    case TRIT2: return work(UnpackLevels<TRIT2>());
    case TRIT3: return work(UnpackLevels<TRIT3>());
    case INT2: return work(UnpackLevels<INT2>());
    case INT3: return work(UnpackLevels<INT3>());
    case INT4: return work(UnpackLevels<INT4>());
    case INT8: return work(UnpackLevels<INT8>());
    case SIGN: return work(UnpackLevels<SIGN>());
    case PARTIAL: return work(UnpackPartial());
    case SPARSE8: return work(UnpackSparse8());
    case SPARSE_BF16: return work(UnpackSparse<SPARSE_BF16>());
    case SPARSE_FP16: return work(UnpackSparse<SPARSE_FP16>());
    case DENSE_BF16: return work(UnpackPlain<DENSE_BF16>());
    default: return work(UnpackPlain<DENSE_FP16>());
  }
}

static void unpack(const Matrix& w, char* out, int dtype, int threads) {
  by_unpacking(w.kind, [&](auto how) { unpack_all<decltype(how)>(w, out, dtype, threads); });
}

static void run(const Call& c) {
  if (!c.unpacked) return run_packed(c);
  by_unpacking(c.w.kind, [&](auto how) {
    using Unpack = decltype(how);
#if COMPRESSOR_LEVEL == 2
    if (c.dtype == BFLOAT16 && c.bf16_products) return run_panels<InBf16<Unpack>>(c);
#endif
    run_panels<InFp32<Unpack>>(c);
  });
}
