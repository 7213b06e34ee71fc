// How long a thread computed itself, and not by MLX's graph.
#pragma once

#include <chrono>

namespace streamer {

// Counts the seconds of its life for this thread, without those added to `waited` meanwhile.
class Computing {
 public:
  explicit Computing(const double* waited = nullptr) : waited_(waited), before_(waited ? *waited : 0) {}
  Computing(const Computing&) = delete;
  ~Computing() {
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began_;
    seconds += took.count() - (waited_ ? *waited_ - before_ : 0);
  }

  static inline thread_local double seconds = 0;

 private:
  const std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
  const double* waited_;
  double before_;
};

} // namespace streamer
