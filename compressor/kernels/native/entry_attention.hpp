// What Python calls for the attention of one token. Included by entry.hpp.

// The last number that is read, and one more, of vectors of `width` numbers in rows, heads and places; in a type that nonsense
// does not overflow.
double extent(double rows, double row, double heads, double head, double places, double place, double width) {
  return (rows - 1) * row + (heads - 1) * head + (places - 1) * place + width;
}

// (q, numbers, k, numbers, v, numbers, mask, bytes, out, dtype, batch, heads, heads of keys, keys, d, dv, steps of q by row and
// head, of k and v by row, head and key, of the mask by row, head and key, scale, threads, level). The numbers behind an
// address are those that may be read from there on.
PyObject* attention(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr long long kMost = 1LL << 40;
  Arguments in(args, count);
  Attention a{};
  a.q = in.address<char>("q");
  const long long q_room = in.number("numbers of q", 0, kMost);
  a.k = in.address<char>("k");
  const long long k_room = in.number("numbers of k", 0, kMost);
  a.v = in.address<char>("v");
  const long long v_room = in.number("numbers of v", 0, kMost);
  a.mask = in.address<uint8_t>("mask", true);
  const long long mask_room = in.number("bytes of mask", 0, kMost);
  a.out = in.address<char>("out");
  a.dtype = static_cast<int>(in.number("dtype", FLOAT32, FLOAT16));
  constexpr long long kMany = 1LL << 24;
  a.batch = static_cast<long>(in.number("batch", 1, kMany));
  a.heads = static_cast<long>(in.number("heads", 1, 1 << 16));
  a.kv_heads = static_cast<long>(in.number("heads of keys", 1, 1 << 16));
  a.keys = static_cast<long>(in.number("keys", 1, 1LL << 31));
  a.d = static_cast<long>(in.number("width of keys", 16, kMostWidth));
  a.dv = static_cast<long>(in.number("width of values", 16, kMostWidth));
  for (long* step : {&a.q_row, &a.q_head, &a.k_row, &a.k_head, &a.k_key, &a.v_row, &a.v_head, &a.v_key, &a.mask_row,
                     &a.mask_head, &a.mask_key})
    *step = static_cast<long>(in.number("step", 0, kMost));
  a.scale = static_cast<float>(in.real("scale"));
  a.threads = static_cast<int>(in.number("threads", 1, 1024));
  const int level = level_from(in);
  in.expect(a.d % 16 == 0, "width of keys");
  in.expect(a.dv % 16 == 0, "width of values");
  if (in.fits()) {
    in.expect(a.heads % a.kv_heads == 0, "heads");
    in.expect(extent(a.batch, a.q_row, a.heads, a.q_head, 1, 0, a.d) <= static_cast<double>(q_room), "numbers of q");
    in.expect(extent(a.batch, a.k_row, a.kv_heads, a.k_head, a.keys, a.k_key, a.d) <= static_cast<double>(k_room), "numbers of k");
    in.expect(extent(a.batch, a.v_row, a.kv_heads, a.v_head, a.keys, a.v_key, a.dv) <= static_cast<double>(v_room), "numbers of v");
    in.expect(!a.mask || extent(a.batch, a.mask_row, a.heads, a.mask_head, a.keys, a.mask_key, 1) <= static_cast<double>(mask_room), "bytes of mask");
    for (const char* at : {a.q, a.k, a.v, static_cast<const char*>(a.out)})
      in.expect(reinterpret_cast<uintptr_t>(at) % width(a.dtype) == 0, "alignment");
  }
  if (!in.good()) return nullptr;
  return freely([&] { COMPRESSOR_AT(level, attend)(a); });
}
