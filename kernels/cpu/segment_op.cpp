// A segment as MLX's graph has it, and at once.
#include "segment_impl.h"

#include "data.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"

namespace streamer {
namespace {

// One run of a segment. States that may be written where they lie share their buffers.
class SegmentStep : public mx::Primitive {
 public:
  SegmentStep(
      mx::Stream stream,
      std::shared_ptr<const SegmentOp::Impl> impl,
      int offset,
      bool taped,
      size_t first,
      std::vector<bool> shared)
      : Primitive(stream),
        impl_(std::move(impl)),
        offset_(offset),
        taped_(taped),
        first_(first),
        shared_(std::move(shared)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    const size_t from = impl_->first_in();
    for (size_t i = 0; i < outputs.size(); ++i) {
      const size_t state = i - first_;
      if (i >= first_ && shared_[state] && inputs[from + state].flags().row_contiguous) {
        outputs[i].copy_shared_buffer(inputs[from + state]);
      } else {
        outputs[i].set_data(mx::allocator::malloc(outputs[i].nbytes()));
      }
    }
    Arrays in, out;
    for (const mx::array& a : inputs) in.push_back(mx::array::unsafe_weak_copy(a));
    for (const mx::array& a : outputs) out.push_back(mx::array::unsafe_weak_copy(a));
    mx::cpu::get_command_encoder(stream()).dispatch(
        [impl = impl_, in = std::move(in), out = std::move(out), offset = offset_,
         taped = taped_]() mutable { impl->run(in, out, offset, taped, {}, nullptr); });
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("segment: this kernel runs on the CPU only");
  }

  const char* name() const override {
    return "StreamerSegment";
  }

 private:
  std::shared_ptr<const SegmentOp::Impl> impl_;
  int offset_;
  bool taped_;
  size_t first_;
  std::vector<bool> shared_;
};

} // namespace

SegmentOp::SegmentOp(Segment segment) : impl_(std::make_shared<const Impl>(std::move(segment))) {}

SegmentOp::~SegmentOp() = default;

bool SegmentOp::kept() const {
  return impl_->kept();
}

bool SegmentOp::routes() const {
  return impl_->routes();
}

bool SegmentOp::begins() const {
  return impl_->begins();
}

bool SegmentOp::ends() const {
  return impl_->ends();
}

bool SegmentOp::in_place(const Call& call) const {
  return impl_->in_place(call.fresh);
}

bool SegmentOp::has_room(const Arrays& states, int offset, int rows) const {
  return impl_->has_room(states, offset, rows);
}

Arrays SegmentOp::operator()(Call call, mx::StreamOrDevice stream) const {
  Made made = impl_->made(call, {});
  Arrays all = std::move(call.inputs);
  all.insert(all.end(), call.states.begin(), call.states.end());
  return mx::array::make_arrays(
      std::move(made.shapes),
      made.types,
      std::make_shared<SegmentStep>(
          mx::to_stream(stream), impl_, call.offset, call.taped, made.first, std::move(made.shared)),
      std::move(all));
}

namespace {

mx::array allocated(const mx::Shape& shape, mx::Dtype type) {
  size_t bytes = mx::size_of(type);
  for (int n : shape) bytes *= n;
  return mx::array(mx::allocator::malloc(bytes), shape, type);
}

} // namespace

AtHand SegmentOp::at_hand(const Arrays& inputs, const std::vector<Arrival>& arrivals) const {
  return impl_->at_hand(inputs, arrivals);
}

Arrays SegmentOp::now(
    const Call& call, const std::vector<Arrival>& arrivals, AtHand* there) const {
  const Made made = impl_->made(call, arrivals);
  Arrays in = call.inputs, out;
  in.insert(in.end(), call.states.begin(), call.states.end());
  for (mx::array& a : in) a.eval();
  for (size_t i = 0; i < made.shapes.size(); ++i) {
    const size_t state = i - made.first;
    if (i >= made.first && made.shared[state] && call.states[state].flags().row_contiguous) {
      out.push_back(call.states[state]);
      continue;
    }
    out.push_back(allocated(made.shapes[i], made.types[i]));
  }
  impl_->run(in, out, call.offset, call.taped, arrivals, there);
  return out;
}

Arrays SegmentOp::rewind(
    const Arrays& states, const mx::array& tape, int rows, int kept) const {
  Arrays all = states, out;
  all.push_back(tape);
  for (mx::array& a : all) a.eval();
  for (const mx::Shape& shape : impl_->rewound(states, tape, rows, kept)) {
    out.push_back(allocated(shape, mx::float32));
  }
  impl_->rewind(all, out, rows, kept);
  return out;
}

} // namespace streamer
