// One call's arrays: where codes and raw tokens lie, and what a row sees of them (codes.h).
#pragma once

#include <algorithm>

#include "code_steps.h"
#include "spans.h"
#include "mlx/array.h"

namespace streamer {

namespace mx = mlx::core;

constexpr float lowest = -3.4028234e38f;
constexpr int widest = 512; // channels whose products of bytes can't leave 32 bits

// The tables of the instruction set in use; byte_steps() is null where it has no products of integers
// for this codebook.
const CodeSteps& code_steps();
const ByteSteps* byte_steps(const Codebook& book);

// points [2^width, channels]
Codebook book_of(const mx::array& points);

inline int up_to(int multiple, int n) {
  return (n + multiple - 1) / multiple * multiple;
}

// Keys or values of all heads.
class Source {
 public:
  Source(const mx::array* in, int H, int coded)
      : in_(in), H_(H), coded_(coded), n_(in[7].shape(3)), book_(book_of(in[6])),
        bytes_(book_.grid > 0.0f && n_ <= widest ? byte_steps(book_) : nullptr) {}

  int n() const {
    return n_;
  }
  // Integers that stand for a token, where codes are multiplied as such.
  int spread() const {
    return n_ / book_.channels * (bytes_ ? bytes_->each : 2);
  }
  const Codebook& book() const {
    return book_;
  }
  // How codes are multiplied as integers, or null where they are unpacked into floats.
  const ByteSteps* bytes() const {
    return bytes_;
  }
  // Floats of a sum of coded values.
  int wide() const {
    return bytes_ ? bytes_->wide(spread()) : n_;
  }
  const float* mean(int head) const {
    return of<float>(7, head);
  }

  // Where the codes of tokens `from` on are, and as `padded` says.
  void words(int head, int from, int count, const uint32_t** to) const {
    const int coded = std::clamp(coded_ - from, 0, count);
    const uint32_t* at = of<uint32_t>(2, head) + from * in_[2].strides(2);
    for (int i = 0; i < coded; ++i, at += in_[2].strides(2)) to[i] = at;
    at = of<uint32_t>(4, head) + (from + coded - coded_) * in_[4].strides(2);
    for (int i = coded; i < count; ++i, at += in_[4].strides(2)) to[i] = at;
    std::fill(to + count, to + up_to(padded, count), to[count - 1]);
  }

  void scales(int head, int from, int count, float* to) const {
    const int coded = std::clamp(coded_ - from, 0, count);
    code_steps().widen(of<uint16_t>(3, head) + from * in_[3].strides(2), in_[3].strides(2), coded, to);
    code_steps().widen(
        of<uint16_t>(5, head) + (from + coded - coded_) * in_[5].strides(2), in_[5].strides(2), count - coded,
        to + coded);
  }

  // Calls part(rows, stride, begin, count) for tokens `from` on of those that are as they came, up
  // to `most` of them at a time; begin counts from `from`.
  template <class F>
  void raw(int head, int from, int count, int most, F part) const {
    const int first = in_[0].shape(2);
    for (int i = 0; i < count;) {
      const bool newer = from + i >= first;
      const mx::array& a = in_[newer];
      const int here = std::min(most, (newer ? count : std::min(count, first - from)) - i);
      const int64_t at = newer ? from + i - first : from + i;
      part(of<float>(newer, head) + at * a.strides(2), static_cast<int64_t>(a.strides(2)), i, here);
      i += here;
    }
  }

 private:
  template <class T>
  const T* of(int array, int head) const {
    const mx::array& a = in_[array];
    return a.data<T>() + head / H_ * a.strides(0) + head % H_ * a.strides(1);
  }

  const mx::array* in_; // as CodedSide lists them
  int H_, coded_, n_;
  Codebook book_;
  const ByteSteps* bytes_;
};

// What one call is about; columns are the first tokens, the codes, the recent ones.
struct Call {
  int B, H, R, T, first, recent, coded, ahead, crossing;
  bool causal;
  bool bias_of_heads; // a row of columns for each of B, H and R, else for each of T
  const float *q, *rotated, *bias, *sinks, *value_signs;

  int columns() const {
    return first + coded + recent;
  }
  int raw() const {
    return first + recent;
  }
  bool crossed(int r) const {
    return ahead > 0 && r % T >= crossing;
  }
  int seen(int r) const {
    return causal ? columns() - T + r % T + 1 : columns();
  }
  // How many of the raw, or of the coded tokens row r sees.
  int raw_end(int r) const {
    return seen(r) - coded < first ? std::min(first, seen(r)) : seen(r) - coded;
  }
  int coded_end(int r) const {
    return std::min(coded + (crossed(r) ? ahead : 0), seen(r) - first);
  }
  const float* bias_of(int head, int r) const {
    return bias + (bias_of_heads ? int64_t(head) * R + r : int64_t(r % T)) * columns();
  }
};

} // namespace streamer
