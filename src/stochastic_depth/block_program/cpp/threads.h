// Run the parts of a piece of work on several threads.
//
// There is one part for each thread, and every thread, the caller included, takes parts that nobody has
// begun. So nobody waits for a thread that gets no core because another program has it, as at a barrier of
// OpenMP; and in a forked process, in which only the caller exists, the caller computes everything. The
// results do not depend on which thread takes which part.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

static_assert(MOST_THREADS <= 64, "there is one bit for each part");

// Lets threads wait for a condition: they spin for a while, because sleeping and waking take as long as a
// small part, and then release their core.
class Signal {
 public:
  template <class Ready>
  void wait(const Ready& ready) {
    if (spin(ready)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    while (asleep_ = true, !ready()) woken_.wait(lock);
  }

  // Must be called after the state that `ready` reads has changed.
  void wake() {
    if (!asleep_) return;
    std::lock_guard<std::mutex> lock(mutex_);
    asleep_ = false;
    woken_.notify_all();
  }

 private:
  template <class Ready>
  static bool spin(const Ready& ready) {
    using std::chrono::steady_clock;
    const auto end = steady_clock::now() + SPIN_TIME;
    do
      for (int round = 0; round < 16; round++) {
        if (ready()) return true;
        pause();
      }
    while (steady_clock::now() < end);
    return false;
  }

  // Hints to the processor that this thread spins.
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  static constexpr auto SPIN_TIME = std::chrono::microseconds(100);

  std::atomic<bool> asleep_{false};
  std::mutex mutex_;
  std::condition_variable woken_;
};

// The helper threads. They are started when they are first needed, and never end.
class Helpers {
 public:
  // Calls work(part) for the parts 0 to parts - 1.
  template <class Work>
  void run_parts(int parts, const Work& work) {
    if (parts == 1 || busy_.exchange(true)) {  // the helpers work for another caller
      for (int part = 0; part < parts; part++) work(part);
      return;
    }
    start(parts - 1);
    work_ = &work;
    call_ = [](const void* work, int part) { (*(const Work*)work)(part); };
    unfinished_ = parts;
    unclaimed_ = ~uint64_t(0) >> (MOST_THREADS - parts);
    offered_.wake();
    take(0);
    finished_.wait([&] { return unfinished_ == 0; });
    busy_ = false;
  }

 private:
  void start(int count) {
    try {
      for (; started_ < count; started_++)
        std::thread([this, own = started_ + 1] {
          for (;;) {
            offered_.wait([&] { return unclaimed_ != 0; });
            take(own);
          }
        }).detach();
    } catch (const std::system_error&) {  // no more threads are allowed: the caller takes their parts
    }
  }

  // Computes unclaimed parts, its own first, until there are none. `work_` and `call_` are read only after
  // a part was claimed, because `run_parts` then waits for that part before it changes them.
  void take(int own) {
    while (const uint64_t open = unclaimed_) {
      const int part = open >> own & 1 ? own : __builtin_ctzll(open);
      const uint64_t claim = uint64_t(1) << part;
      if (!(unclaimed_.fetch_and(~claim) & claim)) continue;
      call_(work_, part);
      if (--unfinished_ == 0) finished_.wake();
    }
  }

  std::atomic<bool> busy_{false};
  int started_ = 0;
  const void* work_ = nullptr;
  void (*call_)(const void*, int) = nullptr;
  std::atomic<uint64_t> unclaimed_{0};  // one bit for each part
  std::atomic<int> unfinished_{0};
  Signal offered_, finished_;
};

// Never destroyed, because its threads use it as long as the process lives. A forked process has no
// helpers, and starts its own.
inline Helpers* helpers = [] {
  pthread_atfork(nullptr, nullptr, [] { helpers = new Helpers; });
  return new Helpers;
}();

// Calls work(part, first, end) for every part of `count` items.
template <class Work>
void in_parts(long count, int threads, const Work& work) {
  const long parts = std::clamp<long>(threads, 1, MOST_THREADS);
  helpers->run_parts((int)parts, [&](int part) {
    work(part, count * part / parts, count * (part + 1) / parts);
  });
}
