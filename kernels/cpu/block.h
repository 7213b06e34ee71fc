// What decoder layers are made of: a norm, a block and the sum with what came in, on row-major data.
// An op runs one of them, or all of a model's (segment.h), with the same bits.
#pragma once

#include <functional>

#include "multiply.h"
#include "stacks.h"
#include "step.h"

namespace streamer {

// Weights that are quantized alike.
struct Alike {
  std::vector<Weight> weights;
  int group, bits;
  std::string mode;
};

// An RMS norm before a block, whose output is then added to what came in.
struct Norm {
  mx::array weight;
  float eps;
};

// Row-major data of an op's inputs, one after another.
class Inputs {
 public:
  explicit Inputs(const std::vector<mx::array>& in, size_t at = 0) : in_(in), at_(at) {}

  const float* floats();
  Matrix matrix(const Experts& one);

 private:
  const std::vector<mx::array>& in_;
  size_t at_;
  std::vector<std::shared_ptr<char>> copies_;
};

// One call of a block: x [B, T, D] -> y [B, T, D]. States are those of before and after the call;
// keys and values are one buffer each that has room for `room` tokens, `offset` of which are there.
struct Pass {
  int B, T;
  const float* x;
  float* y;
  const float* before[2] = {};
  float* after[2] = {};
  int offset = 0, room = 0;
  std::vector<float*> tape; // its parts, if wanted: see Block

  int64_t rows() const {
    return int64_t(B) * T;
  }
};

struct Block {
  // What a state is: none, replaced in every call, or appended to.
  enum class Kind { plain, state, cache };

  Kind kind = Kind::plain;
  int D = 0;
  std::function<void(Inputs& weights, const Pass& pass)> body;
  std::vector<mx::array> weights; // in the order in which the body takes them
  // Shapes of its two states for a batch and, where they are caches, room for so many tokens.
  std::function<std::vector<mx::Shape>(int B, int room)> states;
  // What a pass may leave so that rows of it can be taken back: floats a row in each part of a tape;
  // none where there is nothing to take back, or a cache that is cut.
  std::vector<int64_t> tape;
  // The states after the first `kept` rows of a pass of one sequence, from those before it and its
  // tape, bit for bit those of these rows alone.
  std::function<void(Inputs& weights, const Pass& pass, int kept)> rewind;
};

// Layouts of weights that are quantized alike, each for its columns; one matrix each.
std::vector<Experts> matrices_of(const Alike& all, const std::vector<int>& columns, const char* what);

void check_norm(const Norm& norm, int width, const char* what);

// y[i] = x @ matrices[i]^T for `rows` rows, in one go.
void multiply_all(
    const std::vector<Matrix>& matrices,
    const float* x,
    int64_t rows,
    const std::vector<float*>& y);

} // namespace streamer
