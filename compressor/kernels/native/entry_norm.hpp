// What Python calls for a norm. Included by entry.hpp.

// (x, weight, out, rows, n, dtype, eps, more, rounded, level): see Norm.
PyObject* norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Arguments in(args, count);
  Norm c{};
  c.x = in.address<char>("x");
  c.weight = in.address<char>("weight");
  c.out = in.address<char>("out");
  c.rows = static_cast<long>(in.number("rows", 0, 1LL << 31));
  c.n = static_cast<long>(in.number("width", 16, 1 << 24));
  c.dtype = static_cast<int>(in.number("dtype", FLOAT32, FLOAT16));
  c.eps = static_cast<float>(in.real("eps"));
  c.more = in.number("more", 0, 1) != 0;
  c.rounded = in.number("rounded", 0, 1) != 0;
  const int level = level_from(in);
  in.expect(c.n % 16 == 0, "width");
  for (const char* at : {c.x, c.weight, static_cast<const char*>(c.out)})
    in.expect(reinterpret_cast<uintptr_t>(at) % width(c.dtype) == 0, "alignment");
  if (!in.good()) return nullptr;
  return freely([&] { COMPRESSOR_AT(level, normalize)(c); });
}
