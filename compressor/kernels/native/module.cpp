// compressor's kernels for CPUs, as one source: needs a C++17 compiler (GCC or Clang) and Python's headers, nothing else.
//
// Every instruction set is compiled in and chosen at run time. Entry points take addresses and sizes; what does not fit
// is a ValueError, never a crash. The GIL is released while they work.

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifdef __linux__
#include <sys/mman.h>
#endif
#if defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define COMPRESSOR_ARM 1
#include <arm_neon.h>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention.hpp"
#include "layout.hpp"
#include "pool.hpp"
#include "scalars.hpp"
#include "expand.hpp"

namespace {

using namespace layout;

constexpr int kTilesAtOnce = 4;                 // of rows that share what is read of the activations; even
constexpr long kStride = 16 * kTilesAtOnce;      // of the sums of a token
constexpr long kTokensAtOnce = 480;              // whose sums are held; a multiple of every tile of tokens
constexpr long kLevels = 64 * kMostInputs / 4;   // bytes of a record, a byte a level
constexpr long kReadAtOnce = 512;               // bytes
constexpr long kAhead = 6144;                    // bytes by which rows of 16-bit numbers are asked for before they are read
constexpr long kMostWidth = 512;                 // of a head
constexpr long kFewTokens = 3;                   // up to which records are not decoded first

// For loops that do little with what they read: into the second cache, as the first one has room for inputs, or for what was
// asked for, and not for both. Loops that work on a line for longer are faster when they leave it to the processor.
// As assembler: compilers move all requests of a loop to where it begins, and a core has places for few at a time.
inline __attribute__((always_inline)) void ask_for(const void* at) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(at)));
#else
  __builtin_prefetch(at, 0, 2);
#endif
}
inline __attribute__((always_inline)) void ask(const uint8_t* at) { ask_for(at + kAhead); }

struct Call {
  Matrix w;
  const void* x;
  int dtype;
  long tokens;
  void* out;
  const float* bias;
  bool exact;     // activations as they are
  bool unpacked;  // and the matrix, too, or rounded to bf16 if they are
  bool bf16_products;
  int threads;
};

// Quantized activations: of a tile of T tokens, [groups][kb / 4][T][4], and [groups][T] for scales and sums.
struct Tokens {
  int8_t* q;
  float* scale;
  int32_t* sum;
};

// Memory of the calling thread that is kept from call to call.
class Scratch {
 public:
  static Scratch& mine() {
    static thread_local Scratch scratch;
    return scratch;
  }
  float* floats(long count) { return static_cast<float*>(room(sizeof(float) * count)); }
  Tokens tokens(long count, long groups, int kb) {
    const long scales = (4 * count * groups + 63) / 64 * 64;
    char* const at = static_cast<char*>(room(count * groups * kb + 2 * scales + 64));
    const long q = (count * groups * kb + 63) / 64 * 64;
    return {reinterpret_cast<int8_t*>(at), reinterpret_cast<float*>(at + q), reinterpret_cast<int32_t*>(at + q + scales)};
  }
  ~Scratch() { std::free(whole_); }

 private:
  void* room(long bytes) {
    if (bytes + 64 > size_) {
      std::free(whole_);
      whole_ = std::malloc(bytes + 64);
      size_ = whole_ ? bytes + 64 : 0;
      if (!whole_) throw std::bad_alloc();
    }
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(whole_) + 63) / 64 * 64);
  }
  void* whole_ = nullptr;
  long size_ = 0;
};

// Rows are cut into more chunks than there are threads, so that a slow thread does less.
inline long chunks_of(long tiles, int threads) {
  const long wanted = threads < 2 ? 1 : 8L * threads;
  return tiles < wanted ? tiles : wanted;
}
inline std::pair<long, long> span(long count, long chunks, long chunk) {
  return {count * chunk / chunks, count * (chunk + 1) / chunks};
}

#define COMPRESSOR_LEVEL 0
#define KIN inline __attribute__((always_inline))
#define KFN static KIN
#define KERNEL static __attribute__((noinline))
namespace portable {
#include "vectors.hpp"
#include "isa_portable.hpp"
#include "kernels.hpp"
}  // namespace portable
#undef COMPRESSOR_LEVEL
#undef KIN
#undef KFN
#undef KERNEL

#if defined(__x86_64__)
#define COMPRESSOR_LEVEL 1
#define COMPRESSOR_TARGET "avx2,fma,f16c,bmi,bmi2,popcnt"
#define KIN inline __attribute__((always_inline, target(COMPRESSOR_TARGET)))
#define KFN static KIN
#define KERNEL static __attribute__((noinline, target(COMPRESSOR_TARGET)))
namespace avx2 {
#include "isa_avx2.hpp"
#include "kernels.hpp"
}  // namespace avx2
#undef COMPRESSOR_LEVEL
#undef KIN
#undef KFN
#undef KERNEL
#undef COMPRESSOR_TARGET

#define COMPRESSOR_LEVEL 2
#if defined(__clang__)  // which takes whole registers anyway, and ignores a target that names a width
#define COMPRESSOR_WIDTH ""
#else
#define COMPRESSOR_WIDTH ",prefer-vector-width=512"
#endif
#define COMPRESSOR_TARGET \
  "avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2" COMPRESSOR_WIDTH
#define KIN inline __attribute__((always_inline, target(COMPRESSOR_TARGET)))
#define KFN static KIN
#define KERNEL static __attribute__((noinline, target(COMPRESSOR_TARGET)))
// The same where the processor multiplies bf16, which is asked at run time.
#define COMPRESSOR_BF16 COMPRESSOR_TARGET ",avx512bf16,avx512bitalg"
#define KBI static inline __attribute__((always_inline, target(COMPRESSOR_BF16)))
#define KBF static __attribute__((noinline, target(COMPRESSOR_BF16)))
namespace avx512 {
#include "vectors.hpp"
#include "isa_avx512.hpp"
#include "kernels.hpp"
}  // namespace avx512
#undef KBI
#undef KBF
#undef COMPRESSOR_BF16
#undef COMPRESSOR_LEVEL
#undef COMPRESSOR_TARGET
#undef KIN
#undef KFN
#undef KERNEL
#endif

#if defined(COMPRESSOR_ARM)
#define COMPRESSOR_LEVEL 3
#define COMPRESSOR_TARGET "arch=armv8.2-a+dotprod"
#define KIN inline __attribute__((always_inline, target(COMPRESSOR_TARGET)))
#define KFN static KIN
#define KERNEL static __attribute__((noinline, target(COMPRESSOR_TARGET)))
namespace neon {
#include "isa_neon.hpp"
#include "kernels.hpp"
}  // namespace neon
#undef COMPRESSOR_LEVEL
#undef COMPRESSOR_TARGET
#undef KIN
#undef KFN
#undef KERNEL
#endif

}  // namespace

#include "entry.hpp"
