// Threads that wait for nobody who is not running: work is cut into chunks, whoever is there claims the next one, and the
// caller waits for claimed chunks only. A machine whose other core is busy costs the time of one chunk, not a time slice.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define COMPRESSOR_FORKS 1
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pool {

using Work = void (*)(void* context, long chunk);

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One word says which job this is (generation), how many chunks it has, and which is next, so that a claim is one
// compare-and-swap and a late worker can never claim a chunk of the wrong job.
class Pool {
 public:
  // Call work(context, 0 .. chunks - 1), each once, on up to `threads` threads, the caller among them. Where another
  // thread is using the pool, the caller does everything by itself.
  void run(Work work, void* context, long chunks, int threads) {
    if (threads > chunks) threads = static_cast<int>(chunks);
    if (threads > kMost) threads = kMost;
    std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
    if (threads < 2 || chunks >= (1L << 20) || !turn.try_lock() || !grow(threads - 1)) {
      for (long chunk = 0; chunk < chunks; ++chunk) work(context, chunk);
      return;
    }
    work_ = work;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    allowed_.store(threads - 1, std::memory_order_relaxed);
    const uint64_t generation = ((state_.load(std::memory_order_relaxed) >> 40) + 1) & 0xffffff;
    {
      std::lock_guard<std::mutex> lock(sleep_);
      state_.store(generation << 40 | static_cast<uint64_t>(chunks) << 20, std::memory_order_release);
    }
    if (sleepers_.load(std::memory_order_acquire) > 0) wake_.notify_all();
    work_on(generation);
    for (int spins = 0; done_.load(std::memory_order_acquire) < chunks; ++spins) {
      if (spins < 20000) relax(); else std::this_thread::yield();
    }
  }

 private:
  static constexpr int kMost = 256;

  // Claim and do chunks of one job until none is left.
  void work_on(uint64_t generation) {
    for (;;) {
      uint64_t state = state_.load(std::memory_order_acquire);
      const uint64_t next = state & 0xfffff, chunks = state >> 20 & 0xfffff;
      if (state >> 40 != generation || next >= chunks) return;
      if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
      work_(context_, static_cast<long>(next));  // a claimed chunk keeps the caller, and so the job, alive
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void live(int number) {
    uint64_t seen = 0;
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(300);
      uint64_t state = state_.load(std::memory_order_acquire);
      for (int spins = 0; state >> 40 == seen; ++spins) {
        relax();
        state = state_.load(std::memory_order_acquire);
        if ((spins & 63) == 63 && std::chrono::steady_clock::now() > until) break;
      }
      if (state >> 40 == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_acq_rel);
        wake_.wait(lock, [&] { return state_.load(std::memory_order_acquire) >> 40 != seen; });
        sleepers_.fetch_sub(1, std::memory_order_acq_rel);
        state = state_.load(std::memory_order_acquire);
      }
      seen = state >> 40;
      if (number < allowed_.load(std::memory_order_relaxed)) work_on(seen);
    }
  }

  bool grow(int workers) {
    while (workers_ < workers) {
      try {
        std::thread(&Pool::live, this, workers_).detach();
      } catch (...) {
        return workers_ > 0;
      }
      ++workers_;
    }
    return true;
  }

  std::mutex turn_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> state_{0};
  std::atomic<long> done_{0};
  std::atomic<int> sleepers_{0}, allowed_{0};
  Work work_ = nullptr;
  void* context_ = nullptr;
  int workers_ = 0;
};

// Never destroyed: its threads may outlive main. A forked child has none of them, and gets a pool of its own.
inline std::atomic<Pool*>& instance() {
  static std::atomic<Pool*> pool{nullptr};
  return pool;
}

inline void set_up() {
  instance().store(new Pool);
#ifdef COMPRESSOR_FORKS
  pthread_atfork(nullptr, nullptr, [] { instance().store(new Pool); });
#endif
}

// Call body(chunk) for every chunk below `chunks`. Throws std::bad_alloc if a chunk does, in whichever thread.
template <class Body>
void each(long chunks, int threads, Body&& body) {
  struct Guarded {
    Body& body;
    std::atomic<bool> short_of_memory;
  } guarded{body, {false}};
  const Work work = [](void* context, long chunk) {
    auto& mine = *static_cast<Guarded*>(context);
    try {
      mine.body(chunk);
    } catch (const std::bad_alloc&) {
      mine.short_of_memory = true;
    }
  };
  instance().load()->run(work, &guarded, chunks, threads);
  if (guarded.short_of_memory) throw std::bad_alloc();
}

}  // namespace pool
