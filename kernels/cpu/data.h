// What the bodies of steps share: checks, their inputs' floats, and loops over tasks.
#pragma once

#include <memory>
#include <stdexcept>

#include "buffers.h"
#include "pool.h"
#include "step.h"
#include "steps.h"
#include "workspace.h"

namespace streamer {

using Arrays = std::vector<mx::array>;

constexpr int64_t parallel_work = 1 << 17; // multiply-adds below which one thread is faster

inline void check(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

inline void check_float(const Arrays& arrays, const char* what) {
  for (const mx::array& a : arrays) check(a.dtype() == mx::float32, what);
}

// Row-major float data of inputs, kept while the op runs.
class Data {
 public:
  const float* operator()(const mx::array& a) {
    return static_cast<const float*>(row_major(a, held_));
  }

 private:
  std::vector<std::shared_ptr<char>> held_;
};

template <class F>
void each(int tasks, int64_t work, F body) {
  if (work >= parallel_work) {
    parallel_for(tasks, body);
  } else {
    for (int i = 0; i < tasks; ++i) body(i);
  }
}

// `count` rows of n, each x / sqrt(mean(x^2) + eps) * w.
inline void norm_rows(const float* x, int64_t count, int n, const float* w, float eps, float* y) {
  constexpr int64_t part = 16;
  each(static_cast<int>((count + part - 1) / part), count * n, [&](int task) {
    for (int64_t r = task * part; r < count && r < (task + 1) * part; ++r) {
      steps().norm(x + r * n, w, eps, 1.0f, n, y + r * n);
    }
  });
}

inline void add_rows(const float* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] += x[i];
}

// Where the rows of an array lie when its last axis is contiguous.
inline int64_t offset_of(const mx::array& a, int64_t row) {
  int64_t at = 0;
  for (int axis = static_cast<int>(a.ndim()) - 2; axis >= 0; --axis) {
    at += row % a.shape(axis) * a.strides(axis);
    row /= a.shape(axis);
  }
  return at;
}

// The rows of an array where they lie, or of a copy whose last axis is contiguous.
class RowsOf {
 public:
  RowsOf(const mx::array& a, Data& data)
      : a_(a),
        n_(a.shape(-1)),
        apart_(n_ == 1 || a.strides(-1) == 1),
        from_(apart_ ? a.data<float>() : data(a)) {}

  const float* operator[](int64_t row) const {
    return from_ + (apart_ ? offset_of(a_, row) : row * n_);
  }

 private:
  const mx::array& a_;
  int64_t n_;
  bool apart_;
  const float* from_;
};

} // namespace streamer
