#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "griffin_native.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define GRIFFIN_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define GRIFFIN_PAUSE() __asm__ volatile("yield")
#else
#define GRIFFIN_PAUSE() ((void)0)
#endif

namespace griffin {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpNumber = int (*)();

std::atomic<GompParallel> gomp_parallel{nullptr};
std::atomic<OmpNumber> omp_thread_num{nullptr}, omp_num_threads{nullptr};
std::atomic<int64_t> calls{0}, ff_bytes{0};

struct Task {
  void (*function)(void*, int, int);
  void* data;
  int threads;
};

void run_in_openmp(void* data) {
  const Task& task = *static_cast<Task*>(data);
  task.function(task.data, omp_thread_num.load(std::memory_order_relaxed)(),
                omp_num_threads.load(std::memory_order_relaxed)());
}

// The pool for processes without GNU OpenMP. Workers look for work for some microseconds after each region, as decode
// calls follow one another closely, and sleep after that. One region at a time; a second caller runs alone.
class Pool {
 public:
  void run(int threads, const Task& task) {
    std::unique_lock<std::mutex> only(region_, std::try_to_lock);
    if (threads <= 1 || !only.owns_lock()) return task.function(task.data, 0, 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        while (workers_ < threads - 1) {
          std::thread(&Pool::work, this, workers_ + 1, generation_.load(std::memory_order_relaxed)).detach();
          workers_++;
        }
      } catch (...) {  // no more threads to be had: a smaller team
        threads = workers_ + 1;
      }
      task_ = task;
      task_.threads = threads;
      left_.store(workers_, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    task.function(task.data, 0, threads);
    for (int spin = 0; left_.load(std::memory_order_acquire) > 0; spin++)
      if (spin < kSpin)
        GRIFFIN_PAUSE();
      else
        std::this_thread::yield();
  }

 private:
  static constexpr int kSpin = 2000;  // some 20 to 80 microseconds

  void work(int number, uint64_t seen) {
    for (;;) {
      for (int spin = 0; spin < kSpin && generation_.load(std::memory_order_acquire) == seen; spin++) GRIFFIN_PAUSE();
      Task task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        task = task_;
      }
      if (number < task.threads) task.function(task.data, number, task.threads);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex region_, mutex_;
  std::condition_variable wake_;
  Task task_{};
  int workers_ = 0;
  std::atomic<int> left_{0};
  std::atomic<uint64_t> generation_{0};
};

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: detached workers may outlive static destructors
  return *instance;
}

struct Scratch {
  void* memory = nullptr;
  int64_t bytes = 0;
  ~Scratch() { release(); }
  void release() {
    if (memory) ::operator delete(memory, std::align_val_t(64));
    memory = nullptr;
    bytes = 0;
  }
};

}  // namespace

void parallel(int threads, void (*function)(void*, int, int), void* data) {
  Task task{function, data, threads};
  const GompParallel openmp = gomp_parallel.load(std::memory_order_acquire);
  if (threads <= 1)
    function(data, 0, 1);
  else if (openmp)
    openmp(run_in_openmp, &task, static_cast<unsigned>(threads), 0);
  else
    pool().run(threads, task);
}

void* scratch(int64_t bytes) {
  thread_local Scratch mine;
  if (mine.bytes < bytes) {
    mine.release();
    mine.memory = ::operator new(static_cast<size_t>(bytes), std::align_val_t(64), std::nothrow);
    if (mine.memory) mine.bytes = bytes;
  }
  return mine.memory;
}

void count_call() { calls.fetch_add(1, std::memory_order_relaxed); }
void count_ff_bytes(int64_t bytes) { ff_bytes.fetch_add(bytes, std::memory_order_relaxed); }

// Sense reversing: the last to arrive resets the count and turns the phase, which the others watch.
void Barrier::wait(int threads) {
  if (threads <= 1) return;
  const int32_t now = __atomic_load_n(&phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == threads) {
    __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&phase, now + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spin = 0; __atomic_load_n(&phase, __ATOMIC_ACQUIRE) == now; spin++)
    if (spin < 4000)
      GRIFFIN_PAUSE();
    else
      std::this_thread::yield();  // the thread we wait for may need this core
}

}  // namespace griffin

extern "C" {

int griffin_abi(void) { return GRIFFIN_ABI; }

void griffin_use_openmp(void* parallel, void* thread_num, void* num_threads) {
  const bool all = parallel && thread_num && num_threads;
  griffin::omp_thread_num.store(reinterpret_cast<griffin::OmpNumber>(thread_num));
  griffin::omp_num_threads.store(reinterpret_cast<griffin::OmpNumber>(num_threads));
  griffin::gomp_parallel.store(all ? reinterpret_cast<griffin::GompParallel>(parallel) : nullptr,
                               std::memory_order_release);
}

const char* griffin_threading(void) { return griffin::gomp_parallel.load() ? "openmp" : "own pool"; }

int64_t griffin_calls(void) { return griffin::calls.load(std::memory_order_relaxed); }

int64_t griffin_ff_bytes(void) { return griffin::ff_bytes.load(std::memory_order_relaxed); }

}  // extern "C"
