#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

namespace streamer {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int max_threads = 256;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int from_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr) return otherwise;
  char* end = nullptr;
  long value = std::strtol(text, &end, 10);
  return end != text && *end == 0 && value >= 0 && value <= 1 << 20 ? static_cast<int>(value) : otherwise;
}

// One loop at a time, its tasks cut into a range for each thread: what a thread reads is in a row,
// and what the hardware fetches ahead for it is its own. Who has done with its range takes from the
// others'. A range is a generation number and the next task in one word, so that a worker that
// wakes late can't take a task of the next loop with the body of the last.
class Pool {
 public:
  void run(int tasks, void (*body)(void*, int), void* context, int helpers) {
    helpers = started(helpers);
    const uint64_t generation = ++loops_ & 0xffffffffu;
    if (helpers + 1 > ranges_) ranges_ = helpers + 1;
    // Closed before the body changes: a worker still looking at the last loop can take nothing.
    for (int i = 0; i < ranges_; ++i) {
      next_[i].task.store(generation << 32 | closed, std::memory_order_release);
    }
    body_.store(body, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    tasks_.store(tasks, std::memory_order_release);
    helpers_.store(helpers, std::memory_order_release);
    done_.store(0, std::memory_order_relaxed);
    for (int i = 0; i <= helpers; ++i) {
      next_[i].task.store(generation << 32 | begin(i, tasks, helpers), std::memory_order_release);
    }
    generation_.store(static_cast<uint32_t>(generation), std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst) > 0) generation_.notify_all();
    work(generation, 0);
    for (int turns = 0; done_.load(std::memory_order_acquire) < tasks; ++turns) {
      turns < 4096 ? relax() : std::this_thread::yield();
    }
  }

 private:
  static constexpr uint32_t closed = 0xffffffffu;

  struct alignas(64) Next {
    std::atomic<uint64_t> task{0};
  };

  static uint32_t begin(int range, int tasks, int helpers) {
    return static_cast<uint32_t>(int64_t(tasks) * range / (helpers + 1));
  }

  // As many of them as this process may have.
  int started(int helpers) {
    try {
      for (; started_ < helpers; ++started_) {
        std::thread([this, index = started_, seen = generation_.load()] { loop(index, seen); }).detach();
      }
    } catch (const std::system_error&) {
      return started_;
    }
    return helpers;
  }

  // The tasks of a generation that are left, from range `own` on.
  void work(uint64_t generation, int own) {
    int others = 0;
    for (int i = 0; i <= others; ++i) {
      for (;;) {
        const int all = helpers_.load(std::memory_order_acquire) + 1, range = (own + i) % all;
        uint64_t now = next_[range].task.load(std::memory_order_acquire);
        if (now >> 32 != generation) return;
        // Read before the task is taken: taking it proves that they belong to this generation.
        auto body = body_.load(std::memory_order_acquire);
        auto context = context_.load(std::memory_order_acquire);
        const int tasks = tasks_.load(std::memory_order_acquire),
                  helpers = helpers_.load(std::memory_order_acquire);
        others = helpers;
        const uint32_t task = static_cast<uint32_t>(now);
        if (task == closed || task >= begin(range + 1, tasks, helpers)) break;
        if (!next_[range].task.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) {
          continue;
        }
        body(context, static_cast<int>(task));
        done_.fetch_add(1, std::memory_order_release);
      }
    }
  }

  void loop(int index, uint32_t seen) {
    static const auto spin = std::chrono::microseconds(from_environment("STREAMER_SPIN_US", 60));
    for (;;) {
      auto until = Clock::now() + spin;
      for (int turns = 1; generation_.load(std::memory_order_acquire) == seen; ++turns) {
        relax();
        if (turns % 64 == 0 && Clock::now() > until) {
          asleep_.fetch_add(1, std::memory_order_seq_cst);
          generation_.wait(seen, std::memory_order_seq_cst);
          asleep_.fetch_sub(1, std::memory_order_seq_cst);
        }
      }
      seen = generation_.load(std::memory_order_acquire);
      if (index < helpers_.load(std::memory_order_relaxed)) work(seen, index + 1);
    }
  }

  std::atomic<void (*)(void*, int)> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int> tasks_{0}, helpers_{0}, asleep_{0};
  int started_ = 0, ranges_ = 0;
  uint64_t loops_ = 0;
  Next next_[max_threads];
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

// Never destroyed: its threads may outlive main.
Pool* pool = nullptr;
std::mutex* busy = nullptr;

void renew() {
  pool = new Pool();
  busy = new std::mutex();
}

bool make() {
  renew();
#ifndef _WIN32
  // A forked child has none of the threads, and perhaps a held lock.
  pthread_atfork(nullptr, nullptr, renew);
#endif
  return true;
}

std::atomic<int>& count() {
  static std::atomic<int> value{[] {
    int n = from_environment("STREAMER_THREADS", 0);
    return std::min(n > 0 ? n : cores(), max_threads);
  }()};
  return value;
}

} // namespace

int cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  int n = static_cast<int>(std::thread::hardware_concurrency());
  return n > 0 ? n : 1;
}

int threads() {
  return count().load(std::memory_order_relaxed);
}

void set_threads(int n) {
  count().store(std::clamp(n, 1, max_threads), std::memory_order_relaxed);
}

void parallel_for(int tasks, void (*body)(void*, int), void* context) {
  static bool made = make();
  (void)made;
  int helpers = (threads() < tasks ? threads() : tasks) - 1;
  if (helpers > 0 && busy->try_lock()) {
    pool->run(tasks, body, context, helpers);
    busy->unlock();
    return;
  }
  for (int i = 0; i < tasks; ++i) body(context, i);
}

} // namespace streamer
