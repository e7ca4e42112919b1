// One parallel region on the threads that the process has already.
#pragma once
#include <stdint.h>

namespace griffin {

// Run function(data, thread, threads) on a team of at most `threads` threads, the caller among them, and wait for all.
// `threads` as passed to the function is the size of the team, which may be smaller than asked for.
void parallel(int threads, void (*function)(void* data, int thread, int threads), void* data);

// At least `bytes`, aligned to 64, owned by the calling thread and valid until its next call; null without memory.
void* scratch(int64_t bytes);

void count_call();
void count_ff_bytes(int64_t bytes);

// Threads of one parallel region meet here; it may serve any number of times.
struct Barrier {
  int32_t arrived = 0, phase = 0;
  char padding[56];  // a cache line of its own
  void wait(int threads);
};

}  // namespace griffin
