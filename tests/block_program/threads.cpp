// Runs work with a known result on several threads, in every way that could go wrong. Prints one line for
// each: its name, and how often the result was wrong.

#include "threads.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <vector>

// Sums of numbers, by `jobs` calls; a nap now and then is long enough for the helpers to fall asleep.
long wrong(int threads, int jobs, bool naps) {
  long count = 0;
  for (int job = 0; job < jobs; job++) {
    const long n = 1000 + job % 7;
    std::vector<long> sums(threads);
    in_parts(n, threads, [&](int part, long first, long end) {
      for (long i = first; i < end; i++) sums[part] += i;
    });
    long sum = 0;
    for (long of_part : sums) sum += of_part;
    count += sum != n * (n - 1) / 2;
    if (naps && job % 50 == 0) usleep(90 + job % 120);
  }
  return count;
}

int main() {
  const int most = MOST_THREADS;
  for (int threads : {1, 2, 5, most}) printf("%d-threads %ld\n", threads, wrong(threads, 3000, true));
  printf("fewer-again %ld\n", wrong(2, 3000, false));
  long one, other;
  std::thread first([&] { one = wrong(3, 5000, false); }), second([&] { other = wrong(4, 5000, true); });
  first.join();
  second.join();
  printf("two-callers %ld\n", one + other);
  fflush(stdout);
  if (fork() == 0) {
    printf("forked %ld\n", wrong(3, 3000, true));
    fflush(stdout);
    _exit(0);
  }
  wait(nullptr);
  printf("after-fork %ld\n", wrong(3, 3000, true));
}
