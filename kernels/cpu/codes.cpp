#include "codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "code_steps.h"
#include "data.h"
#include "isa.h"
#include "mlx/ops.h"
#include "spans.h"

namespace streamer {
namespace {

constexpr float lowest = -3.4028234e38f;
constexpr int widest = 512; // channels whose products of bytes can't leave 32 bits

const CodeSteps& code_steps() {
#if defined(__x86_64__)
  if (level() >= Level::avx512) return codes_avx512();
  if (level() == Level::avx2) return codes_avx2();
#elif defined(__aarch64__)
  if (level() == Level::neon) return codes_neon();
#endif
  return codes_portable();
}

// Products of bytes, or null where this CPU has none.
const ByteSteps* byte_steps() {
#if defined(__x86_64__)
  static const bool known = __builtin_cpu_supports("avx512vbmi");
  if (known && level() >= Level::vnni) return &codes_vbmi();
  if (level() == Level::avx2) return &codes_madd();
#endif
  return nullptr;
}

int up_to(int multiple, int n) {
  return (n + multiple - 1) / multiple * multiple;
}

Codebook book_of(const mx::array& points) {
  const int count = points.shape(0), channels = points.shape(1);
  Codebook book{points.data<float>(), 0, channels, 0.0f, {}};
  while ((1 << book.width) < count) ++book.width;
  if (channels != 2) return book;
  float top = 0.0f;
  for (int i = 0; i < 2 * count; ++i) top = std::max(top, std::abs(book.points[i]));
  const float grid = top / 127;
  for (int i = 0; i < std::max(count, 64); ++i) {
    for (int e = 0; e < 2; ++e) {
      const float x = book.points[i % count * 2 + e], multiple = std::nearbyint(x / grid);
      if (!(std::abs(multiple * grid - x) <= 1e-6f * top)) return book;
      book.bytes[e][i] = static_cast<uint8_t>(128 + static_cast<int>(multiple));
    }
  }
  book.grid = grid;
  return book;
}

// x = hadamard(x) / sqrt(n), n a power of two.
void hadamard(float* x, int n) {
  for (int half = 1; half < n; half *= 2) {
    for (int i = 0; i < n; i += 2 * half) {
      float *a = x + i, *b = a + half;
      for (int k = 0; k < half; ++k) {
        const float sum = a[k] + b[k];
        b[k] = a[k] - b[k];
        a[k] = sum;
      }
    }
  }
  const float by = 1.0f / std::sqrt(static_cast<float>(n));
  for (int i = 0; i < n; ++i) x[i] *= by;
}

// Keys or values of all heads.
class Source {
 public:
  Source(const mx::array* in, int H, int coded)
      : in_(in), H_(H), coded_(coded), n_(in[7].shape(3)), book_(book_of(in[6])),
        bytes_(book_.grid > 0.0f && n_ <= widest ? byte_steps() : nullptr) {}

  int n() const {
    return n_;
  }
  const Codebook& book() const {
    return book_;
  }
  // How codes are multiplied, or null where they are unpacked into floats.
  const ByteSteps* bytes() const {
    return bytes_;
  }
  // Floats of a sum of coded values.
  int wide() const {
    return bytes_ ? bytes_->wide(n_) : n_;
  }
  const float* mean(int head) const {
    return of<float>(7, head);
  }

  // Where the codes of tokens `from` on are; up to `all` of them the last is repeated.
  void words(int head, int from, int count, int all, const uint32_t** to) const {
    const int coded = std::clamp(coded_ - from, 0, count);
    const uint32_t* at = of<uint32_t>(2, head) + from * in_[2].strides(2);
    for (int i = 0; i < coded; ++i, at += in_[2].strides(2)) to[i] = at;
    at = of<uint32_t>(4, head) + (from + coded - coded_) * in_[4].strides(2);
    for (int i = coded; i < count; ++i, at += in_[4].strides(2)) to[i] = at;
    std::fill(to + count, to + all, to[count - 1]);
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
  const float* bias_of(int r) const {
    return bias + int64_t(r % T) * columns();
  }
};

// Rows over one span of the raw tokens, as ContextPart::run.
void run_raw(
    const Call& call, const Source& keys, const Source& values, int head, int first, int rows, int index,
    float* y, float* tops, float* totals) {
  const AttendSteps& steps = attend_steps();
  const int from = index * span, n = keys.n();
  auto end_of = [&](int r) { return std::clamp(call.raw_end(first + r) - from, 0, span); };
  int count = 0;
  for (int r = 0; r < rows; ++r) count = std::max(count, end_of(r));
  std::fill(y, y + int64_t(rows) * values.n(), 0.0f);
  std::fill(totals, totals + rows, 0.0f);
  if (count == 0) return;
  float* s = workspace(2, int64_t(rows) * step);
  const float* q = call.q + (int64_t(head) * call.R + first) * n;
  keys.raw(head, from, count, steps.tile, [&](const float* k, int64_t stride, int begin, int here) {
    steps.scores(q, rows, k, stride, here, n, s + begin);
  });
  for (int r = 0; r < rows; ++r) {
    float* row = s + int64_t(r) * step;
    const int end = end_of(r), all = up_to(16, count);
    if (end == 0) {
      std::fill(row, row + all, 0.0f);
      continue;
    }
    if (call.bias != nullptr) {
      const float* bias = call.bias_of(first + r);
      const int early = std::clamp(call.first - from, 0, end); // columns of the first tokens
      steps.place(row, early, 1.0f, bias + from);
      steps.place(row + early, end - early, 1.0f, bias + call.coded + from + early);
    }
    // What this row reads as codes instead.
    const int begin = std::clamp(call.first - from, 0, end);
    const int begun = call.crossed(first + r) ? std::clamp(call.first + call.ahead - from, begin, end) : begin;
    std::fill(row + begin, row + begun, lowest);
    steps.soften(row, end, all, tops[r], totals[r]);
    std::fill(row + begin, row + begun, 0.0f);
  }
  values.raw(head, from, count, steps.tile, [&](const float* v, int64_t stride, int begin, int here) {
    steps.weigh(s + begin, rows, v, stride, here, values.n(), y);
  });
}

// The rotated queries of all heads as integers, where codes are multiplied as bytes.
struct Queries {
  std::vector<float> units;
  std::vector<int32_t> lifts;
  std::vector<int8_t> digits;
  int64_t row = 0; // bytes of one

  Queries(const Call& call, const Source& keys) {
    if (keys.bytes() == nullptr) return;
    const int rows = call.B * call.H * call.R;
    row = 2 * keys.wide();
    units.resize(rows), lifts.resize(rows), digits.resize(rows * row);
    keys.bytes()->pack_queries(call.rotated, rows, keys.n(), digits.data(), units.data(), lifts.data());
  }
};

// Rows over one span of the coded tokens, as ContextPart::run.
class CodedSpan {
 public:
  CodedSpan(
      const Call& call, const Queries& queries, const Source& keys, const Source& values, int head, int first,
      int rows, int from)
      : call_(call), queries_(queries), keys_(keys), values_(values), head_(head), first_(first), rows_(rows),
        from_(from) {
    for (int r = 0; r < rows; ++r) count_ = std::max(count_, end_of(r));
    // In floats: what a tile is unpacked to, and weights' digits with their units and lifts.
    const int64_t wide = std::max(keys.wide(), values.wide());
    const int64_t unpacked = std::max({most_tile * wide, key_tile * wide / 4, int64_t(value_tile) * 128 / 4}) + 16;
    const int64_t digits = rows * (value_tile / 2 + 2);
    scores_ = workspace(2, int64_t(rows) * step + 2 * span + unpacked + digits);
    key_scales_ = scores_ + int64_t(rows) * step;
    value_scales_ = key_scales_ + span;
    room_ = value_scales_ + span;
    digits_ = room_ + unpacked;
  }

  void run(float* y, float* tops, float* totals) {
    std::fill(y, y + int64_t(rows_) * values_.wide(), 0.0f);
    std::fill(totals, totals + rows_, 0.0f);
    if (count_ == 0) return;
    keys_.scales(head_, from_, count_, key_scales_);
    values_.scales(head_, from_, count_, value_scales_);
    std::fill(value_scales_ + count_, value_scales_ + span, 0.0f);
    keys_.bytes() ? score_bytes() : score();
    const float* q = call_.q + (int64_t(head_) * call_.R + first_) * keys_.n();
    for (int r = 0; r < rows_; ++r) soften(r, q + int64_t(r) * keys_.n(), tops[r], totals[r]);
    values_.bytes() ? weigh_bytes(y) : weigh(y);
  }

 private:
  int end_of(int r) const {
    return std::clamp(call_.coded_end(first_ + r) - from_, 0, span);
  }
  const float* rotated() const {
    return call_.rotated + (int64_t(head_) * call_.R + first_) * keys_.n();
  }

  void score() {
    const uint32_t* words[most_tile];
    for (int j = 0; j < count_; j += attend_steps().tile) {
      const int here = std::min(attend_steps().tile, count_ - j), n = keys_.n();
      keys_.words(head_, from_ + j, here, here, words);
      code_steps().unpack(words, here, keys_.book(), n, room_);
      attend_steps().scores(rotated(), rows_, room_, n, here, n, scores_ + j);
    }
  }

  void score_bytes() {
    const int64_t at = int64_t(head_) * call_.R + first_;
    const uint32_t* words[key_tile];
    for (int j = 0; j < count_; j += key_tile) {
      keys_.words(head_, from_ + j, std::min(key_tile, count_ - j), key_tile, words);
      keys_.bytes()->scores(
          words, keys_.book(), keys_.n(), queries_.digits.data() + at * queries_.row, queries_.units.data() + at,
          queries_.lifts.data() + at, rows_, bytes_room(), scores_ + j);
    }
  }

  void soften(int r, const float* q, float& top, float& total) {
    float* row = scores_ + int64_t(r) * step;
    const int end = end_of(r), all = up_to(value_tile, count_);
    if (end == 0) return std::fill(row, row + all, 0.0f);
    const float lift = attend_steps().dot(q, keys_.mean(head_), keys_.n());
    code_steps().place(row, end, key_scales_, lift);
    if (call_.bias != nullptr) {
      attend_steps().place(row, end, 1.0f, call_.bias_of(first_ + r) + call_.first + from_);
    }
    attend_steps().soften(row, end, all, top, total);
  }

  void weigh(float* y) {
    const uint32_t* words[most_tile];
    const int n = values_.n();
    for (int r = 0; r < rows_; ++r) code_steps().times(scores_ + int64_t(r) * step, count_, value_scales_);
    for (int j = 0; j < count_; j += attend_steps().tile) {
      const int here = std::min(attend_steps().tile, count_ - j);
      values_.words(head_, from_ + j, here, here, words);
      code_steps().unpack(words, here, values_.book(), n, room_);
      attend_steps().weigh(scores_ + j, rows_, room_, n, here, n, y);
    }
  }

  void weigh_bytes(float* y) {
    const ByteSteps& steps = *values_.bytes();
    float* units = digits_;
    auto* lifts = reinterpret_cast<int32_t*>(units + rows_);
    auto* digits = reinterpret_cast<int8_t*>(lifts + rows_);
    const uint32_t* words[value_tile];
    for (int j = 0; j < count_; j += value_tile) {
      values_.words(head_, from_ + j, std::min(value_tile, count_ - j), value_tile, words);
      for (int r = 0; r < rows_; ++r) {
        steps.pack_weights(
            scores_ + int64_t(r) * step + j, value_scales_ + j, digits + r * 2 * value_tile, units[r], lifts[r]);
      }
      steps.weigh(words, values_.book(), values_.n(), digits, units, lifts, rows_, bytes_room(), y);
    }
  }

  uint8_t* bytes_room() {
    const auto at = reinterpret_cast<uintptr_t>(room_);
    return reinterpret_cast<uint8_t*>((at + 63) / 64 * 64);
  }

  const Call& call_;
  const Queries& queries_;
  const Source &keys_, &values_;
  const int head_, first_, rows_, from_;
  int count_ = 0;
  float *scores_, *key_scales_, *value_scales_, *room_, *digits_;
};

// A row from its sums: of the codes, rotated back where signs are given, and the rest.
void finish(const Call& call, const Source& values, int head, int r, const Sum* sums, float* rotated, float* rest) {
  const AttendSteps& steps = attend_steps();
  const int n = values.n();
  const Sum &raw = sums[0], &coded = sums[1];
  float top = std::max(raw.top, coded.top), total = 0.0f;
  if (call.sinks != nullptr) {
    const float sink = call.sinks[head % call.H * (call.R / call.T) + r / call.T];
    top = std::max(top, sink);
    total = steps.exponential(sink - top);
  }
  const float of_raw = steps.exponential(raw.top - top), of_coded = steps.exponential(coded.top - top);
  total += of_raw * raw.total + of_coded * coded.total;
  const float raw_scale = of_raw / total, scale = of_coded / total, mass = scale * coded.total;
  const float* mean = values.mean(head);
  if (values.bytes()) {
    values.bytes()->in_order(coded.y, n, rotated);
  } else {
    std::copy(coded.y, coded.y + n, rotated);
  }
  if (call.value_signs != nullptr) hadamard(rotated, n);
  for (int c = 0; c < n; ++c) {
    rotated[c] *= call.value_signs != nullptr ? scale * call.value_signs[c] : scale;
    rest[c] = raw.y[c] * raw_scale + mass * mean[c];
  }
}

void check_side(const CodedSide& side, int B, int H, int coded) {
  const int n = side.mean.shape(3);
  auto fits = [&](const mx::array& a, int last) {
    return a.ndim() == 4 && a.shape(0) == B && a.shape(1) == H && a.shape(3) == last;
  };
  check(side.points.ndim() == 2 && side.mean.ndim() == 4, "attend_codes: points or mean has too few axes");
  int width = 0;
  while ((1 << width) < side.points.shape(0)) ++width;
  const int channels = side.points.shape(1);
  check(
      side.points.shape(0) == 1 << width &&
          ((channels == 2 && width >= 4 && width <= 8) || (channels == 1 && width == 8)),
      "attend_codes: no kernel for these points");
  const int words = (n / channels * width + 31) / 32;
  check(n % channels == 0 && fits(side.mean, n) && side.mean.shape(2) == 1, "attend_codes: the mean doesn't fit");
  check(fits(side.first, n) && fits(side.recent, n), "attend_codes: raw tokens don't fit");
  check(fits(side.words, words) && fits(side.ahead_words, words), "attend_codes: words don't fit");
  check(fits(side.scales, 1) && fits(side.ahead_scales, 1), "attend_codes: scales don't fit");
  check(coded <= side.words.shape(2) && coded <= side.scales.shape(2), "attend_codes: fewer codes than said");
  check(
      side.ahead_words.shape(2) <= side.recent.shape(2) &&
          side.ahead_words.shape(2) == side.ahead_scales.shape(2),
      "attend_codes: the block ahead doesn't fit");
  check_float({side.first, side.recent, side.points, side.mean}, "attend_codes: raw tokens, points and mean must be float32");
  check(
      side.words.dtype() == mx::uint32 && side.ahead_words.dtype() == mx::uint32 &&
          side.scales.dtype() == mx::float16 && side.ahead_scales.dtype() == mx::float16,
      "attend_codes: words must be uint32 and scales float16");
}

} // namespace

std::vector<mx::array> attend_codes(
    const mx::array& q,
    const mx::array& rotated,
    const CodedSide& keys,
    const CodedSide& values,
    int rows,
    int coded,
    int crossing,
    bool causal,
    const std::optional<mx::array>& bias,
    const std::optional<mx::array>& sinks,
    const std::optional<mx::array>& key_signs,
    const std::optional<mx::array>& value_signs,
    mx::StreamOrDevice stream) {
  check(q.ndim() == 4 && rotated.shape() == q.shape(), "attend_codes: the queries don't fit each other");
  Call call{};
  call.B = q.shape(0), call.H = q.shape(1), call.R = q.shape(2), call.T = rows;
  call.coded = coded, call.crossing = crossing, call.causal = causal;
  check(coded >= 0 && rows > 0 && call.R % rows == 0, "attend_codes: rows don't fit the queries");
  check_side(keys, call.B, call.H, coded);
  check_side(values, call.B, call.H, coded);
  check(keys.mean.shape(3) == q.shape(3), "attend_codes: the queries don't fit the keys");
  call.first = keys.first.shape(2), call.recent = keys.recent.shape(2);
  call.ahead = keys.ahead_words.shape(2);
  check(
      values.first.shape(2) == call.first && values.recent.shape(2) == call.recent &&
          values.ahead_words.shape(2) == call.ahead,
      "attend_codes: keys and values differ in length");
  check(!causal || rows <= call.columns(), "attend_codes: more rows than columns");
  check(!bias || bias->shape() == mx::Shape{rows, call.columns()}, "attend_codes: the bias doesn't fit");
  check(!sinks || sinks->shape() == mx::Shape{call.H * (call.R / rows)}, "attend_codes: the sinks don't fit");
  Arrays inputs{q, rotated};
  for (const CodedSide* side : {&keys, &values}) {
    auto flat = [&](const mx::array& a) { inputs.push_back(mx::contiguous(a, false, stream)); };
    flat(side->first);
    flat(side->recent);
    // slices of larger arrays, read where they lie
    for (const mx::array* a : {&side->words, &side->scales}) inputs.push_back(*a);
    for (const mx::array* a : {&side->ahead_words, &side->ahead_scales, &side->points, &side->mean}) flat(*a);
  }
  if (bias) inputs.push_back(*bias);
  if (sinks) inputs.push_back(*sinks);
  for (const auto& [signs, side] : {std::pair(&key_signs, &keys), {&value_signs, &values}}) {
    if (!*signs) continue;
    const int n = side->mean.shape(3);
    check((*signs)->shape() == mx::Shape{n} && (n & (n - 1)) == 0, "attend_codes: the signs don't fit");
    check_float({**signs}, "attend_codes: the signs must be float32");
    inputs.push_back(**signs);
  }
  const bool biased = bias.has_value(), sunk = sinks.has_value(), turned = key_signs.has_value(),
             back = value_signs.has_value();
  check_float({q, rotated}, "attend_codes: the queries must be float32");
  if (bias) check_float({*bias}, "attend_codes: the bias must be float32");
  if (sinks) check_float({*sinks}, "attend_codes: the sinks must be float32");
  auto body = [=](const Arrays& in, Arrays& out) mutable {
    Data data;
    call.q = data(in[0]), call.rotated = data(in[1]);
    call.bias = biased ? data(in[18]) : nullptr;
    call.sinks = sunk ? data(in[18 + biased]) : nullptr;
    call.value_signs = back ? data(in[18 + biased + sunk + turned]) : nullptr;
    std::vector<float> rotated;
    if (turned) {
      const float* signs = data(in[18 + biased + sunk]);
      const int n = in[0].shape(3);
      rotated.resize(in[0].size());
      for (size_t i = 0; i < rotated.size(); ++i) rotated[i] = call.q[i] * signs[i % n];
      for (size_t i = 0; i < rotated.size(); i += n) hadamard(rotated.data() + i, n);
      call.rotated = rotated.data();
    }
    const Source keys(&in[2], call.H, call.coded), values(&in[10], call.H, call.coded);
    const Queries queries(call, keys);
    const int n = values.n();
    const ContextPart raw{
        (call.raw() + span - 1) / span, n,
        [&](int head, int first, int rows, int index, float* y, float* tops, float* totals) {
          run_raw(call, keys, values, head, first, rows, index, y, tops, totals);
        }};
    const ContextPart codes{
        (call.coded + call.ahead + span - 1) / span, values.wide(),
        [&](int head, int first, int rows, int index, float* y, float* tops, float* totals) {
          CodedSpan(call, queries, keys, values, head, first, rows, index * span).run(y, tops, totals);
        }};
    const int heads = call.B * call.H;
    const int64_t work = int64_t(heads) * call.R * call.columns() * n * 2;
    run_parts(heads, call.R, work, {raw, codes}, [&](int head, int r, const Sum* sums) {
      const int64_t at = (int64_t(head) * call.R + r) * n;
      finish(call, values, head, r, sums, out[0].data<float>() + at, out[1].data<float>() + at);
    });
  };
  const mx::Shape shape{call.B, call.H, call.R, values.mean.shape(3)};
  return mx::array::make_arrays(
      {shape, shape},
      {mx::float32, mx::float32},
      std::make_shared<Step>(mx::to_stream(stream), "StreamerAttendCodes", body),
      std::move(inputs));
}

} // namespace streamer
