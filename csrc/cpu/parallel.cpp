#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace hogwild::cpu {

namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// torch's wheels rename their OpenMP library, so it is found through torch's own library, which is
// in the process already, rather than by linking to one.
GompParallel find_openmp() {
#if defined(__APPLE__)
  const char* names[] = {"libtorch_cpu.dylib", "@rpath/libtorch_cpu.dylib"};
#else
  const char* names[] = {"libtorch_cpu.so"};
#endif
  for (const char* name : names)
    if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) {
      auto function = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
      dlclose(library);
      if (function) return function;
    }
  return nullptr;
}

GompParallel openmp() {
  static const GompParallel function = find_openmp();
  return function;
}

// One call's work. It does not matter how many threads come.
struct Job {
  const std::function<void(int, int)>& work;
  const int threads;
  const int items;
  std::atomic<int> next_thread{0};
  std::atomic<int> next_item{0};

  void draw() {
    const int thread = next_thread.fetch_add(1, std::memory_order_relaxed);
    for (int i; (i = next_item.fetch_add(1, std::memory_order_relaxed)) < items;) work(thread, i);
  }
};

// Threads that sleep until there is a job. They live as long as the process.
class SleepingPool {
 public:
  void run(Job& job) {
    const std::lock_guard<std::mutex> one_at_a_time(caller_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (int(threads_.size()) < job.threads - 1)
        threads_.emplace_back([this, i = int(threads_.size())] { serve(i); });
      job_ = &job;
      wanted_ = job.threads - 1;
      running_ = wanted_;
      ++generation_;
    }
    wake_.notify_all();
    job.draw();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void serve(int index) {
    long seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= wanted_) continue;
      Job* job = job_;
      lock.unlock();
      job->draw();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  int wanted_ = 0, running_ = 0;
  long generation_ = 0;
};

}  // namespace

void parallel(int threads, int items, const std::function<void(int, int)>& work) {
  Job job{work, std::min(threads, items), items};
  if (job.threads <= 1) return job.draw();
  if (GompParallel gomp_parallel = openmp()) {
    gomp_parallel([](void* data) { static_cast<Job*>(data)->draw(); }, &job, unsigned(job.threads),
                  0);
  } else {
    static SleepingPool* pool = new SleepingPool;  // never destroyed: its threads never return
    pool->run(job);
  }
}

const char* thread_pool() { return openmp() ? "OpenMP of torch" : "own threads"; }

}  // namespace hogwild::cpu
