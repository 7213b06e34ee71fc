#include "linear.h"

#include <stdexcept>

#include "buffers.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "multiply.h"
#include "step.h"

namespace streamer {
namespace {

Scale scale_of(const mx::array& a, const char* name) {
  if (a.dtype() == mx::float32) return Scale::f32;
  if (a.dtype() == mx::float16) return Scale::f16;
  if (a.dtype() == mx::bfloat16) return Scale::bf16;
  throw std::invalid_argument(std::string("linear: ") + name + " must be a float array");
}

void check(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("linear: ") + what);
}

} // namespace

Matrix matrix_of(
    int columns,
    const mx::array& w,
    const std::optional<mx::array>& scales,
    const std::optional<mx::array>& biases,
    int group,
    int bits,
    const std::string& mode) {
  check(w.ndim() >= 2, "the weight must have two axes");
  Matrix A{};
  A.N = w.shape(-2);
  A.K = columns;
  if (!scales) {
    A.format = Format::dense;
    A.scale = scale_of(w, "a dense weight");
    check(w.shape(-1) == A.K, "x and the weight differ in columns");
    return A;
  }
  A.bits = bits;
  A.group = group;
  const bool known = group == 32 || group == 64 || group == 128 || (group == 16 && mode == "nvfp4");
  check(known, "the group must be 32, 64 or 128, of nvfp4 16");
  check(A.K % group == 0, "columns must be a multiple of the group");
  check(w.dtype() == mx::uint32, "a quantized weight must be uint32");
  check(int64_t(w.shape(-1)) * 32 == int64_t(A.K) * bits, "x and the weight differ in columns");
  check(
      scales->ndim() == w.ndim() && scales->shape(-2) == A.N && scales->shape(-1) == A.K / group,
      "scales don't fit the weight");
  if (mode != "affine") {
    const bool fp8 = mode == "mxfp8", nv = mode == "nvfp4";
    check(fp8 || nv || mode == "mxfp4", "the mode must be affine, mxfp4, mxfp8 or nvfp4");
    A.format = fp8 ? Format::mxfp8 : nv ? Format::nvfp4 : Format::mxfp4;
    const bool fits = bits == (fp8 ? 8 : 4) && group == (nv ? 16 : 32) && !biases;
    check(fits, "bits or groups are not the mode's, or there are biases");
    check(scales->dtype() == mx::uint8, "scales must be uint8");
    return A;
  }
  check((bits >= 2 && bits <= 6) || bits == 8, "bits must be 2, 3, 4, 5, 6 or 8");
  A.format = Format::affine;
  A.scale = scale_of(*scales, "scales");
  check(
      biases && biases->shape() == scales->shape() && biases->dtype() == scales->dtype(),
      "biases don't fit the scales");
  return A;
}

mx::array linear(
    const mx::array& x,
    const mx::array& w,
    const std::optional<mx::array>& scales,
    const std::optional<mx::array>& biases,
    int group,
    int bits,
    const std::string& mode,
    mx::StreamOrDevice stream) {
  check(x.ndim() >= 1 && x.dtype() == mx::float32, "x must be float32");
  check(w.ndim() == 2, "the weight must have two axes");
  Matrix A = matrix_of(x.shape(-1), w, scales, biases, group, bits, mode);
  mx::Shape shape = x.shape();
  shape.back() = A.N;
  std::vector<mx::array> inputs{x, w};
  if (scales) inputs.push_back(*scales);
  if (biases) inputs.push_back(*biases);
  return mx::array(
      std::move(shape),
      mx::float32,
      std::make_shared<Linear>(mx::to_stream(stream), A),
      std::move(inputs));
}

std::vector<mx::array> linears(
    const mx::array& x,
    const std::vector<Weight>& weights,
    int group,
    int bits,
    const std::string& mode,
    mx::StreamOrDevice stream) {
  check(x.ndim() >= 1 && x.dtype() == mx::float32, "x must be float32");
  check(!weights.empty(), "there must be a weight");
  std::vector<Matrix> matrices;
  std::vector<mx::Shape> shapes;
  std::vector<mx::array> inputs{x};
  for (const Weight& weight : weights) {
    check(weight.w.ndim() == 2, "the weight must have two axes");
    matrices.push_back(
        matrix_of(x.shape(-1), weight.w, weight.scales, weight.biases, group, bits, mode));
    shapes.push_back(x.shape());
    shapes.back().back() = matrices.back().N;
    inputs.push_back(weight.w);
    if (weight.scales) inputs.push_back(*weight.scales);
    if (weight.biases) inputs.push_back(*weight.biases);
  }
  const int each = static_cast<int>(inputs.size() - 1) / static_cast<int>(weights.size());
  for (const Weight& weight : weights) {
    check(
        weight.scales.has_value() == (each > 1) && weight.biases.has_value() == (each > 2),
        "the weights must be quantized alike");
  }
  auto body = [matrices, each](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
    std::vector<std::shared_ptr<char>> copies;
    const auto* x = static_cast<const float*>(row_major(in[0], copies));
    std::vector<Pack> packs;
    std::vector<Part> parts;
    std::vector<Product> products;
    std::vector<const float*> from;
    std::vector<float*> to;
    for (size_t i = 0; i < matrices.size(); ++i) {
      Matrix A = matrices[i];
      const mx::array* own = &in[1 + i * each];
      A.w = row_major(own[0], copies);
      if (each > 1) A.scales = row_major(own[1], copies);
      if (each > 2) A.biases = row_major(own[2], copies);
      from.clear();
      to.clear();
      for (int64_t m = 0; m < static_cast<int64_t>(out[i].size()) / A.N; ++m) {
        from.push_back(x + m * A.K);
        to.push_back(out[i].data<float>() + m * A.N);
      }
      add_product(A, from, to, packs, parts, products);
    }
    multiply(packs, parts, products);
  };
  return mx::array::make_arrays(
      std::move(shapes),
      std::vector<mx::Dtype>(weights.size(), mx::float32),
      std::make_shared<Step>(mx::to_stream(stream), "StreamerLinears", body),
      std::move(inputs));
}

void Linear::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) return;
  // Inputs are copied as arrays: their data are there when the task runs, and MLX keeps them.
  std::vector<mx::array> held;
  for (const mx::array& a : inputs) held.push_back(mx::array::unsafe_weak_copy(a));
  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.dispatch([A = matrix_, held = std::move(held), y = out.data<float>(),
                    M = static_cast<int64_t>(out.size()) / matrix_.N]() mutable {
    std::vector<std::shared_ptr<char>> copies;
    const auto* x = static_cast<const float*>(row_major(held[0], copies));
    A.w = row_major(held[1], copies);
    if (held.size() > 2) A.scales = row_major(held[2], copies);
    if (held.size() > 3) A.biases = row_major(held[3], copies);
    std::vector<const float*> from;
    std::vector<float*> to;
    for (int64_t m = 0; m < M; ++m) {
      from.push_back(x + m * A.K);
      to.push_back(y + m * A.N);
    }
    std::vector<Pack> packs;
    std::vector<Part> parts;
    std::vector<Product> products;
    add_product(A, from, to, packs, parts, products);
    multiply(packs, parts, products);
  });
}

void Linear::eval_gpu(const std::vector<mx::array>&, mx::array&) {
  throw std::runtime_error("linear: this kernel runs on the CPU only");
}

bool Linear::is_equivalent(const Primitive& other) const {
  const Matrix& a = matrix_;
  const Matrix& b = static_cast<const Linear&>(other).matrix_;
  return a.N == b.N && a.K == b.K && a.bits == b.bits && a.group == b.group &&
      a.format == b.format && a.scale == b.scale;
}

} // namespace streamer
