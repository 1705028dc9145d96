// Work that several threads share.
//
// It is cut into parts, one for each thread, and whoever is there takes what nobody has begun: the
// caller first of all. So a thread that does not get a core, because another program has it, is not
// waited for (at a barrier, as OpenMP has it, it would be), and in a process that was forked off, which
// has the caller alone, everything is computed too. What a part computes does not depend on who takes it.

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

constexpr int MOST_THREADS = 64;

// Threads wait for something: they look for a while, because sleeping and waking take as long as a
// small part does, and then release their core.
class Signal {
 public:
  template <class Ready>
  void wait(const Ready& ready) {
    if (soon(ready)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    while (asleep_ = true, !ready()) woken_.wait(lock);
  }

  // To be called after what `ready` looks at has changed.
  void wake() {
    if (!asleep_) return;
    std::lock_guard<std::mutex> lock(mutex_);
    asleep_ = false;
    woken_.notify_all();
  }

 private:
  template <class Ready>
  static bool soon(const Ready& ready) {
    using std::chrono::steady_clock;
    const auto end = steady_clock::now() + A_WHILE;
    do
      for (int look = 0; look < 16; look++) {
        if (ready()) return true;
        pause();
      }
    while (steady_clock::now() < end);
    return false;
  }

  // Tells the processor that this thread does nothing but look.
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  static constexpr auto A_WHILE = std::chrono::microseconds(100);

  std::atomic<bool> asleep_{false};
  std::mutex mutex_;
  std::condition_variable woken_;
};

// The threads that help, which are made when they are first needed, and wait for ever.
class Helpers {
 public:
  // Calls work(part) for the parts 0 to parts - 1.
  template <class Work>
  void share(int parts, const Work& work) {
    if (parts == 1 || shared_.exchange(true)) {  // another caller has the helpers
      for (int part = 0; part < parts; part++) work(part);
      return;
    }
    hire(parts - 1);
    work_ = &work;
    call_ = [](const void* work, int part) { (*(const Work*)work)(part); };
    unfinished_ = parts;
    unclaimed_ = ~uint64_t(0) >> (MOST_THREADS - parts);
    offered_.wake();
    take(0);
    finished_.wait([&] { return unfinished_ == 0; });
    shared_ = false;
  }

 private:
  void hire(int count) {
    try {
      for (; hired_ < count; hired_++)
        std::thread([this, own = hired_ + 1] {
          for (;;) {
            offered_.wait([&] { return unclaimed_ != 0; });
            take(own);
          }
        }).detach();
    } catch (const std::system_error&) {  // no more threads are allowed: the caller takes their parts
    }
  }

  // Computes unclaimed parts, its own first, until there are none. What `share` has written is read
  // after a part is claimed only: then `share` waits for it.
  void take(int own) {
    while (const uint64_t open = unclaimed_) {
      const int part = open >> own & 1 ? own : __builtin_ctzll(open);
      const uint64_t claim = uint64_t(1) << part;
      if (!(unclaimed_.fetch_and(~claim) & claim)) continue;
      call_(work_, part);
      if (--unfinished_ == 0) finished_.wake();
    }
  }

  std::atomic<bool> shared_{false};
  int hired_ = 0;
  const void* work_ = nullptr;
  void (*call_)(const void*, int) = nullptr;
  std::atomic<uint64_t> unclaimed_{0};  // bit by bit
  std::atomic<int> unfinished_{0};
  Signal offered_, finished_;
};

// Never destroyed, because its threads use it for as long as the process lives. A process that is
// forked off has none of them, and begins with new ones.
inline Helpers* helpers = [] {
  pthread_atfork(nullptr, nullptr, [] { helpers = new Helpers; });
  return new Helpers;
}();

// Calls work(part, first, end) for every part of `count` items.
template <class Work>
void in_parts(long count, int threads, const Work& work) {
  const long parts = std::clamp<long>(threads, 1, MOST_THREADS);
  helpers->share((int)parts, [&](int part) {
    work(part, count * part / parts, count * (part + 1) / parts);
  });
}
