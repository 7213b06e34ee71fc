// Products of random weights by each of Arm's kernels against double: within 1e-5 of each sum's
// size, rows alike in any company. A line for each set and format; exit code 1 where one is wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "forms.h"
#include "rows.h"
#include "unpack.h"

using namespace streamer;

namespace {

struct Form {
  Format format;
  int bits, group;
};

constexpr Form forms[] = {
    {Format::affine, 4, 32}, {Format::affine, 4, 64}, {Format::affine, 4, 128},
    {Format::affine, 8, 32}, {Format::affine, 8, 64}, {Format::affine, 8, 128},
    {Format::affine, 2, 64}, {Format::affine, 3, 64}, {Format::affine, 5, 128},
    {Format::affine, 6, 32}, {Format::mxfp4, 4, 32},  {Format::mxfp8, 8, 32},
    {Format::nvfp4, 4, 16},  {Format::dense, 32, 0},
};
constexpr int M = max_rows, N = 11;
const Rows* in_use;

std::mt19937 random_bits(1);
std::normal_distribution<float> normal;

// 64-byte aligned floats.
struct Floats {
  float* at;
  explicit Floats(int64_t count)
      : at(static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64))) {}
  ~Floats() {
    std::free(at);
  }
};

double e4m3(uint64_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const double size = exponent > 0 ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
  return code < 128 ? size : -size;
}

// Weights as they are stored, and as doubles.
struct Weights {
  std::vector<uint8_t> bytes;
  std::vector<float> scales, biases;
  std::vector<uint8_t> exponents;
  std::vector<double> wide;
  Matrix A;

  Weights(const Form& form, int K) {
    const bool dense = form.format == Format::dense;
    const int group = dense ? K : form.group, exponent = form.format == Format::nvfp4 ? 60 : 124;
    bytes.resize(int64_t(N) * K * form.bits / 8);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random_bits());
    if (form.format == Format::mxfp8) {
      for (uint8_t& byte : bytes) byte &= 0xbf; // a NaN would be any sum's
    }
    if (dense) {
      for (int i = 0; i < N * K; ++i) reinterpret_cast<float*>(bytes.data())[i] = normal(random_bits);
    }
    for (int i = 0; i < N * K / group; ++i) {
      scales.push_back(0.1f + std::abs(normal(random_bits)));
      biases.push_back(-scales.back() * static_cast<float>((1 << form.bits % 32) - 1) * 0.45f);
      exponents.push_back(static_cast<uint8_t>(exponent + random_bits() % 6));
    }
    for (int i = 0; i < N * K; ++i) {
      uint64_t q = 0; // bits of each weight in a row, lowest first
      for (int b = 0; b < form.bits && !dense; ++b) {
        const int64_t bit = int64_t(i) * form.bits + b;
        q |= uint64_t(bytes[bit / 8] >> bit % 8 & 1) << b;
      }
      const int g = i / group;
      wide.push_back(
          dense ? reinterpret_cast<float*>(bytes.data())[i]
          : form.format == Format::mxfp4 ? std::ldexp(fp4_halves[q], exponents[g] - 128)
          : form.format == Format::mxfp8 ? std::ldexp(e4m3(q), exponents[g] - 127)
          : form.format == Format::nvfp4 ? fp4_halves[q] * 0.5 * e4m3(exponents[g])
                                         : double(scales[g]) * q + biases[g]);
    }
    const bool affine = form.format == Format::affine;
    A = {bytes.data(), affine ? static_cast<void*>(scales.data()) : exponents.data(), biases.data(), N,
         K, form.bits, form.group, form.format, Scale::f32};
  }
};

// y[m][n] by rows [first, first + count).
void product(const Rows& rows, const Matrix& weights, const float* const* x, int count, float* out) {
  const Matrix A = form_rows(weights, form_of(weights), 0, N);
  Floats packed(rows.packed(A, count)), scratch(rows.scratch(A));
  float* y[M];
  for (int m = 0; m < count; ++m) y[m] = out + m * N;
  rows.pack(A, count, x, packed.at);
  rows.run(A, count, packed.at, scratch.at, y, 0, 5);
  rows.run(A, count, packed.at, scratch.at, y, 5, N);
}

// The largest error of all, in units of its sum's size; 1 where rows differ by their company.
double worst(const Rows& rows, const Form& form, int K) {
  const Weights w(form, K);
  std::vector<float> values(M * K), y(M * N), other(M * N);
  for (int i = 0; i < M * K; ++i) values[i] = normal(random_bits) + (i / K % 2); // half have a mean
  const float* x[M];
  for (int m = 0; m < M; ++m) x[m] = values.data() + m * K;
  product(rows, w.A, x, M, y.data());
  double most = 0;
  for (int count = 1; count < M; ++count) {
    product(rows, w.A, x + M - count, count, other.data());
    if (std::memcmp(other.data(), y.data() + (M - count) * N, count * N * 4) != 0) return 1;
  }
  for (int i = 0; i < M * N; ++i) {
    double sum = 0, size = 0;
    for (int k = 0; k < K; ++k) {
      const double term = double(x[i / N][k]) * w.wide[i % N * K + k];
      sum += term;
      size += term * term;
    }
    const double error = std::abs(y[i] - sum) / std::fmax(std::abs(sum), std::sqrt(size));
    if (!(error <= 1)) return 1; // no number, too
    most = std::fmax(most, error);
  }
  return most;
}

} // namespace

const Rows& streamer::rows() {
  return *in_use;
}

int main() {
  const Rows* sets[] = {&rows_portable(), &rows_neon(), rows_dot(), rows_i8mm()};
  const char* names[] = {"portable", "neon", "dotprod", "i8mm"};
  int wrong = 0;
  for (int set = 0; set < 4; ++set) {
    in_use = sets[set];
    for (const Form& form : forms) {
      double most = 0;
      for (int K : {128, 384, 1152, 4224}) most = std::fmax(most, worst(*sets[set], form, K));
      wrong += !(most <= 1e-5);
      std::printf("%s %d %d %d %.1e\n", names[set], int(form.format), form.bits, form.group, most);
    }
  }
  return wrong > 0;
}
