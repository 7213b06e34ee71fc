// What a segment is made of, for segment.cpp, which runs it, and segment_op.cpp, which MLX sees.
#pragma once

#include "data.h"
#include "segment.h"

namespace streamer {

// What comes of a call.
struct Made {
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> types;
  std::vector<bool> shared; // of states: written where they lie
  size_t first; // of the states
};

class SegmentOp::Impl {
 public:
  explicit Impl(Segment segment);

  bool kept() const {
    return kept_;
  }
  bool routes() const {
    return s_.router.has_value();
  }
  bool begins() const {
    return s_.entry && s_.entry->inputs() == 1;
  }
  bool ends() const {
    return s_.head.has_value();
  }
  bool has_room(const Arrays& states, int offset, int rows) const;
  bool in_place(const std::vector<bool>& fresh) const;
  // Checks what is given and says what comes of it.
  Made made(const SegmentOp::Call& call, const std::vector<Arrival>& arrivals) const;
  void run(
      const Arrays& in,
      Arrays& out,
      int offset,
      bool taped,
      const std::vector<Arrival>& arrivals,
      AtHand* there) const;
  AtHand at_hand(const Arrays& in, const std::vector<Arrival>& arrivals) const;
  void rewind(const Arrays& in, Arrays& out, int rows, int kept) const;
  std::vector<mx::Shape> rewound(const Arrays& states, const mx::array& tape, int rows, int kept) const;

  // Inputs before the states, outputs before tape and states.
  size_t first_in() const {
    return s_.entry ? s_.entry->inputs() : s_.chosen ? 5 : 1;
  }
  size_t first_out() const {
    return s_.router ? 5 : s_.hidden ? 3 : 1;
  }

 private:
  Segment s_;
  Arrays chosen_, router_, head_; // weights
  std::vector<Experts> head_matrix_;
  int64_t tape_ = 0; // floats a row
  bool kept_ = true;
};

} // namespace streamer
