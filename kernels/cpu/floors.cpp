#include "floors.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "pool.h"
#include "rows.h"
#include "steps.h"

namespace streamer {
namespace {

using Clock = std::chrono::steady_clock;

// Seconds from when all threads stand ready to when the last is done: waking is no part of it, and
// no thread can do the work of two. Throws where they don't come together, as beside another loop.
template <class F>
double timed(F body) {
  const int count = threads();
  std::vector<float> results(count * 16); // used, or the compiler may leave the work out
  std::vector<Clock::time_point> ends(count);
  std::atomic<int> ready{0};
  std::atomic<bool> late{false};
  Clock::time_point began;
  const auto patience = Clock::now() + std::chrono::seconds(1);
  auto task = [&](int i) {
    if (ready.fetch_add(1) == count - 1) began = Clock::now();
    for (int turns = 1; ready.load() < count && !late.load(); ++turns) {
      if (turns % 1024 == 0) {
        std::this_thread::yield();
        if (Clock::now() > patience) late = true;
      }
    }
    if (!late) results[i * 16] = body(i, count);
    ends[i] = Clock::now();
  };
  parallel_for(count, task);
  if (late) throw std::runtime_error("floors: the threads are busy");
  volatile float kept = 0.0f;
  for (float result : results) kept = kept + result;
  return std::chrono::duration<double>(*std::max_element(ends.begin(), ends.end()) - began).count();
}

} // namespace

double read_seconds(const mlx::core::array& x) {
  if (x.dtype() != mlx::core::float32 || !x.is_available() || !x.flags().row_contiguous) {
    throw std::invalid_argument("floors: x must be evaluated, contiguous and float32");
  }
  const float* from = x.data<float>();
  const int64_t size = x.size();
  return timed([&](int i, int count) {
    const int64_t begin = size * i / count, end = size * (i + 1) / count;
    return steps().total(from + begin, end - begin);
  });
}

double multiply_rate(int rounds) {
  return 128.0 * rounds * threads() /
      timed([&](int i, int) { return steps().multiply(rounds, 0.5f + i); });
}

double product_rate(int rounds) {
  const Rows& kernel = rows();
  if (kernel.peak == nullptr) return multiply_rate(rounds);
  return double(kernel.peak_multiplies) * rounds * threads() /
      timed([&](int i, int) { return kernel.peak(rounds, 1 + i); });
}

} // namespace streamer
