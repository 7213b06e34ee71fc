#include "floors.h"

#include <chrono>
#include <stdexcept>
#include <vector>

#include "pool.h"
#include "steps.h"

namespace streamer {
namespace {

template <class F>
double timed(F body) {
  const int count = threads();
  std::vector<float> results(count * 16); // used, or the compiler may leave the work out
  const auto began = std::chrono::steady_clock::now();
  auto task = [&](int i) { results[i * 16] = body(i, count); };
  parallel_for(count, task);
  const auto ended = std::chrono::steady_clock::now();
  volatile float kept = 0.0f;
  for (float result : results) kept = kept + result;
  return std::chrono::duration<double>(ended - began).count();
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

double multiply_seconds(int rounds) {
  return timed([&](int i, int) { return steps().multiply(rounds, 0.5f + i); });
}

} // namespace streamer
