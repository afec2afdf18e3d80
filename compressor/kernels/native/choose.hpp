// From the kind of a matrix, a number, to the code that was compiled for it. Included once for each instruction set.

static void run(const Call& c) {
  switch (c.w.kind) {
    case TRIT1: return run_kind<TRIT1>(c);
    case TRIT2: return run_kind<TRIT2>(c);
    case TRIT3: return run_kind<TRIT3>(c);
    case INT2: return run_kind<INT2>(c);
    case INT3: return run_kind<INT3>(c);
    case INT4: return run_kind<INT4>(c);
    case INT8: return run_kind<INT8>(c);
    case SIGN: return run_kind<SIGN>(c);
    case PARTIAL: return run_partial<true>(c);
    case SPARSE8: return run_partial<false>(c);
    case SPARSE_BF16: return run_16<SPARSE_BF16>(c);
    case SPARSE_FP16: return run_16<SPARSE_FP16>(c);
    case DENSE_BF16: return run_16<DENSE_BF16>(c);
    default: return run_16<DENSE_FP16>(c);
  }
}

static void unpack(const Matrix& w, char* out, int dtype, int threads) {
  switch (w.kind) {
    case TRIT1: return unpack_tiles<unpack_tile<TRIT1>>(w, out, dtype, threads);
    case TRIT2: return unpack_tiles<unpack_tile<TRIT2>>(w, out, dtype, threads);
    case TRIT3: return unpack_tiles<unpack_tile<TRIT3>>(w, out, dtype, threads);
    case INT2: return unpack_tiles<unpack_tile<INT2>>(w, out, dtype, threads);
    case INT3: return unpack_tiles<unpack_tile<INT3>>(w, out, dtype, threads);
    case INT4: return unpack_tiles<unpack_tile<INT4>>(w, out, dtype, threads);
    case INT8: return unpack_tiles<unpack_tile<INT8>>(w, out, dtype, threads);
    case SIGN: return unpack_tiles<unpack_tile<SIGN>>(w, out, dtype, threads);
    case PARTIAL: return unpack_tiles<unpack_partial<true>>(w, out, dtype, threads);
    case SPARSE8: return unpack_tiles<unpack_partial<false>>(w, out, dtype, threads);
    case SPARSE_BF16: return unpack_tiles<unpack_sparse<SPARSE_BF16>>(w, out, dtype, threads);
    default: return unpack_tiles<unpack_sparse<SPARSE_FP16>>(w, out, dtype, threads);
  }
}
