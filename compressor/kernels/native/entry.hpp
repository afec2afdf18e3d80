// What Python calls. Arguments are whole numbers (addresses, sizes, dtypes), in one flat row, but for a matrix's factor.
#pragma once

#include "pack.hpp"

namespace {

constexpr long kSlack = 64;  // bytes behind a stream that may be read

enum Level : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2, NEON = 3 };

struct Machine {
  bool avx2 = false, avx512 = false, neon = false;
  bool bf16 = false;  // products of bf16
  bool has(int level) const {
    return level == PORTABLE || (level == AVX2 && avx2) || (level == AVX512 && avx512) || (level == NEON && neon);
  }
};

Machine look() {
  Machine found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  found.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
               __builtin_cpu_supports("popcnt");  // all of which have f16c
  found.avx512 = found.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                 __builtin_cpu_supports("avx512vbmi2");
  found.bf16 = found.avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bitalg");
#elif defined(COMPRESSOR_ARM) && defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  found.neon = sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#elif defined(COMPRESSOR_ARM) && defined(__linux__)
  constexpr unsigned long kDotProducts = 1UL << 20;  // HWCAP_ASIMDDP, which old headers have not
  found.neon = (getauxval(AT_HWCAP) & kDotProducts) != 0;
#endif
  return found;
}

Machine machine;

// Reads arguments one after the other; the first that does not fit is remembered.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count) : values_(values), count_(count) {}
  long long number(const char* name, long long least, long long most) {
    PyObject* const value = next();
    const long long found = value ? PyLong_AsLongLong(value) : -1;
    if (PyErr_Occurred() || !value || found < least || found > most) fail(name);
    return found;
  }
  double real(const char* name) {
    PyObject* const value = next();
    const double found = value ? PyFloat_AsDouble(value) : 0;
    if (PyErr_Occurred() || !value) fail(name);
    return found;
  }
  template <class T>
  T* address(const char* name, bool optional = false) {
    PyObject* const value = next();
    void* const found = value ? PyLong_AsVoidPtr(value) : nullptr;
    if (PyErr_Occurred() || !value || (!found && !optional) || reinterpret_cast<uintptr_t>(found) % alignof(T)) fail(name);
    return static_cast<T*>(found);
  }
  void expect(bool holds, const char* what) {
    if (!holds) fail(what);
  }
  bool fits() const { return !wrong_; }
  // Whether all went well; else a ValueError is set.
  bool good() {
    if (!wrong_ && at_ != count_) wrong_ = "number of arguments";
    if (!wrong_) return true;
    PyErr_Clear();
    PyErr_Format(PyExc_ValueError, "compressor kernel: %s does not fit", wrong_);
    return false;
  }

 private:
  PyObject* next() { return at_ < count_ ? values_[at_++] : (++at_, nullptr); }
  void fail(const char* what) {
    PyErr_Clear();
    if (!wrong_) wrong_ = what;
  }
  PyObject* const* values_;
  Py_ssize_t count_, at_ = 0;
  const char* wrong_ = nullptr;
};

// kind, m, n, kb
Matrix shape_from(Arguments& in) {
  Matrix w{};
  w.kind = static_cast<int>(in.number("kind", TRIT1, DENSE_FP16));
  w.m = static_cast<long>(in.number("rows", 1, (1L << 31) - 1));
  w.n = static_cast<long>(in.number("inputs", 1, (1L << 31) - 1));
  w.kb = static_cast<int>(in.number("inputs of a record", 32, kMostInputs));
  in.expect(w.kb == 128 || (is_levels(w.kind) && (w.kb == 32 || w.kb == 64)), "inputs of a record");
  return w;
}

// kind, m, n, kb, factor, data, bytes, extra, bytes of extra
Matrix matrix_from(Arguments& in) {
  Matrix w = shape_from(in);
  w.factor = static_cast<float>(in.real("factor"));
  w.data = in.address<uint8_t>("data");
  const long long bytes = in.number("bytes", 0, 1LL << 46);
  w.extra = in.address<int64_t>("extra", true);
  const long long more = in.number("bytes of extra", 0, 1LL << 46);
  in.expect(reinterpret_cast<uintptr_t>(w.data) % 64 == 0, "alignment of data to 64 bytes");
  if (!in.fits()) return w;  // sizes may be nonsense
  if (is_levels(w.kind)) {
    in.expect(bytes == w.bytes(), "bytes");
    const bool numbered = w.kind == TRIT2 || w.kind == TRIT3;
    in.expect(!numbered || (w.extra != nullptr && more == w.tiles() * w.groups() * kRows), "numbers of trits");
  } else if (is_stream(w.kind)) {
    in.expect(w.extra != nullptr && more == 8LL * (w.tiles() + 1), "starts");
    in.expect(w.least() + kSlack <= bytes, "bytes");
    if (in.fits()) {
      bool rising = w.starts()[0] == 0;
      for (long tile = 0; tile < w.tiles() && rising; ++tile)
        rising = w.starts()[tile] <= bytes && w.starts()[tile + 1] - w.starts()[tile] >= w.least(tile);
      in.expect(rising && w.starts()[w.tiles()] <= bytes - kSlack, "starts");
    }
  } else {
    in.expect(bytes == 2LL * w.m * w.n, "bytes");
  }
  return w;
}

int level_from(Arguments& in) {
  const int level = static_cast<int>(in.number("level", PORTABLE, NEON));
  in.expect(machine.has(level), "instruction set: this processor has it not");
  return level;
}

// `function` as it was compiled for a level.
#if defined(__x86_64__)
#define COMPRESSOR_AT(level, function) \
  ((level) == AVX512 ? avx512::function : (level) == AVX2 ? avx2::function : portable::function)
#elif defined(COMPRESSOR_ARM)
#define COMPRESSOR_AT(level, function) ((level) == NEON ? neon::function : portable::function)
#else
#define COMPRESSOR_AT(level, function) portable::function
#endif

// Do `work` without the GIL; None, or MemoryError.
template <class Work>
PyObject* freely(Work&& work) {
  bool short_of_memory = false;
  Py_BEGIN_ALLOW_THREADS;
  try {
    work();
  } catch (const std::bad_alloc&) {
    short_of_memory = true;
  }
  Py_END_ALLOW_THREADS;
  if (short_of_memory) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// (matrix, x, dtype, tokens, out, bias, way, threads, level): out (tokens, m) = x (tokens, n) times the matrix, plus
// bias (m,) fp32; x and out of the same dtype. Ways: 0 by activations in 8 bits, 1 by exact ones, 2 by exact ones and the
// unpacked matrix, that in bf16 for activations of this dtype where the processor multiplies it.
PyObject* linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Arguments in(args, count);
  Call call{};
  call.w = matrix_from(in);
  call.x = in.address<uint8_t>("x");
  call.dtype = static_cast<int>(in.number("dtype", FLOAT32, FLOAT16));
  call.tokens = static_cast<long>(in.number("tokens", 1, (1L << 31) - 1));
  call.out = in.address<uint8_t>("out");
  call.bias = in.address<float>("bias", true);
  const int way = static_cast<int>(in.number("way", 0, 2));
  call.exact = way == 1;
  call.unpacked = way == 2;
  call.threads = static_cast<int>(in.number("threads", 1, 1024));
  in.expect(reinterpret_cast<uintptr_t>(call.x) % width(call.dtype) == 0, "alignment of x");
  in.expect(reinterpret_cast<uintptr_t>(call.out) % width(call.dtype) == 0, "alignment of out");
  int level = level_from(in);
  call.bf16_products = machine.bf16;
  if (level == AVX512 && call.exact && !call.bf16_products) level = AVX2;  // exact products of AVX-512 are of bf16
  if (!in.good()) return nullptr;
  return freely([&] { COMPRESSOR_AT(level, run)(call); });
}

// (matrix, out, dtype, threads, level): the matrix (m, n).
PyObject* unpack(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Arguments in(args, count);
  const Matrix w = matrix_from(in);
  char* const out = in.address<char>("out");
  const int dtype = static_cast<int>(in.number("dtype", FLOAT32, FLOAT16));
  const int threads = static_cast<int>(in.number("threads", 1, 1024)), level = level_from(in);
  in.expect(w.kind < DENSE_BF16, "kind");
  if (!in.good()) return nullptr;
  return freely([&] { COMPRESSOR_AT(level, unpack)(w, out, dtype, threads); });
}

// (kind, m, n, kb, entries, tails, data, bytes, threads)
PyObject* pack_records(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Arguments in(args, count);
  const Matrix w = shape_from(in);
  const auto* const entries = in.address<uint8_t>("entries");
  const auto* const tails = in.address<uint8_t>("tails");
  auto* const data = in.address<uint8_t>("data");
  const long long bytes = in.number("bytes", 0, 1LL << 46);
  const int threads = static_cast<int>(in.number("threads", 1, 1024));
  in.expect(is_levels(w.kind), "kind");
  if (in.fits()) in.expect(bytes == w.bytes(), "bytes");
  if (!in.good()) return nullptr;
  return freely([&] { pack_levels(w, entries, tails, data, threads); });
}

// (matrix, entries, threads): the inverse of pack_records.
PyObject* read_records(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Arguments in(args, count);
  const Matrix w = matrix_from(in);
  auto* const entries = in.address<uint8_t>("entries");
  const int threads = static_cast<int>(in.number("threads", 1, 1024));
  in.expect(is_levels(w.kind), "kind");
  if (!in.good()) return nullptr;
  return freely([&] { unpack_levels(w, entries, threads); });
}

// (kind, m, n, kb, marked, values, signs, tails, heads, starts, data, bytes, threads); without data only starts are found.
PyObject* pack_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Arguments in(args, count);
  const Matrix w = shape_from(in);
  Pieces from{};
  from.marked = in.address<uint8_t>("marked");
  from.values = in.address<uint8_t>("values");
  from.signs = in.address<uint8_t>("signs", w.kind != PARTIAL);
  from.tails = in.address<uint8_t>("tails", w.kind != PARTIAL);
  from.heads = in.address<uint8_t>("heads", w.kind != PARTIAL && w.kind != SPARSE8);
  auto* const starts = in.address<int64_t>("starts");
  auto* const data = in.address<uint8_t>("data", true);
  const long long bytes = in.number("bytes", 0, 1LL << 46);
  const int threads = static_cast<int>(in.number("threads", 1, 1024));
  in.expect(is_stream(w.kind), "kind");
  if (in.fits() && data != nullptr) in.expect(starts[w.tiles()] <= bytes - kSlack, "bytes");
  if (!in.good()) return nullptr;
  return freely([&] { pack_stream(w, from, starts, data, threads); });
}

// (data, bytes): ask the system for large pages, where it has any, for memory that nothing has been written to yet.
// Reading a matrix is a long walk; with pages of 4 KB part of it is spent on finding them.
PyObject* use_large_pages(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Arguments in(args, count);
  [[maybe_unused]] const auto* const data = in.address<uint8_t>("data");
  [[maybe_unused]] const long long bytes = in.number("bytes", 0, 1LL << 46);
  if (!in.good()) return nullptr;
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may be refused
#endif
  Py_RETURN_NONE;
}

// (data, bytes, threads, level) -> the exclusive or of all 32-bit words: reads memory once and does next to nothing else.
PyObject* read_memory(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Arguments in(args, count);
  const auto* const data = in.address<uint32_t>("data");
  const long words = static_cast<long>(in.number("bytes", 0, 1LL << 46) / 4);
  const int threads = static_cast<int>(in.number("threads", 1, 1024)), level = level_from(in);
  if (!in.good()) return nullptr;
  const auto read = COMPRESSOR_AT(level, read_blocks);
  constexpr long kWords = kReadAtOnce / 4;
  const long blocks = words / kWords, chunks = chunks_of(blocks, threads);
  std::atomic<uint32_t> total{0};
  for (long word = blocks * kWords; word < words; ++word) total ^= data[word];
  Py_BEGIN_ALLOW_THREADS;
  pool::each(chunks, threads, [&](long chunk) {
    const auto [first, last] = span(blocks, chunks, chunk);
    total ^= read(reinterpret_cast<const uint8_t*>(data + first * kWords), last - first);
  });
  Py_END_ALLOW_THREADS;
  return PyLong_FromUnsignedLong(total.load());
}

// -> the levels that this processor has, the best one last, and whether it multiplies bf16.
PyObject* processor(PyObject*, PyObject* const*, Py_ssize_t) {
  PyObject* const levels = PyList_New(0);
  for (int level = PORTABLE; levels && level <= NEON; ++level) {
    if (!machine.has(level)) continue;
    PyObject* const number = PyLong_FromLong(level);
    const bool kept = number && PyList_Append(levels, number) == 0;
    Py_XDECREF(number);
    if (!kept) {
      Py_DECREF(levels);
      return nullptr;
    }
  }
  return levels ? Py_BuildValue("NO", levels, machine.bf16 ? Py_True : Py_False) : nullptr;
}

#include "entry_attention.hpp"
#include "entry_norm.hpp"

#define COMPRESSOR_ENTRY(name) {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(name)), METH_FASTCALL, nullptr}
PyMethodDef methods[] = {
    COMPRESSOR_ENTRY(linear),       COMPRESSOR_ENTRY(unpack),    COMPRESSOR_ENTRY(pack_records),
    COMPRESSOR_ENTRY(read_records), COMPRESSOR_ENTRY(pack_rows), COMPRESSOR_ENTRY(read_memory),
    COMPRESSOR_ENTRY(processor),    COMPRESSOR_ENTRY(use_large_pages), COMPRESSOR_ENTRY(attention),
    COMPRESSOR_ENTRY(norm),         {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Kernels of compressor for CPUs.", -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

// A digest of what was compiled, so that an extension that is older than the files beside it is known for what it is.
#ifndef COMPRESSOR_SOURCES
#define COMPRESSOR_SOURCES unknown
#endif
#define COMPRESSOR_TEXT_OF(words) #words
#define COMPRESSOR_TEXT(words) COMPRESSOR_TEXT_OF(words)

PyMODINIT_FUNC PyInit__native() {
  machine = look();
  pool::set_up();
  PyObject* const module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "sources", COMPRESSOR_TEXT(COMPRESSOR_SOURCES)) < 0) return nullptr;
  return module;
}
