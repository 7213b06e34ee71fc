// Products of a few rows with one weight matrix: what an instruction set supplies.
//
// y[m][n] = sum_k x[m][k] * w[n][k], fp32 accumulation, for M <= 8 rows that share every weight
// read. Each y has its own order of additions, which depends on K and the format alone: neither on
// M, on the other rows, on N nor on how the matrix is split among threads.
#pragma once

#include <cstdint>
#include <type_traits>

namespace streamer {

enum class Format { affine, mxfp4, mxfp8, nvfp4, dense };
enum class Scale { f32, f16, bf16 };

constexpr int max_rows = 8;
constexpr int max_tile = 96; // output rows of one run
constexpr int max_block = 16; // that a kernel reads at once, the matrix's last ones apart

struct Matrix {
  const void* w; // [N, K * bits / 32] uint32, or dense [N, K] of `scale`'s type
  const void* scales; // [N, K / group]
  const void* biases; // [N, K / group], affine only; scales are bytes where the format has a name
  int N, K, bits, group;
  Format format;
  Scale scale; // type of scales and biases, or of w when dense
  int middle = 8; // of affine weights: where sums count from it, they stay small
  bool levels = false; // affine nibbles stand for fp4_halves, and there are no biases
};

struct Rows {
  // Floats that pack needs for M rows, and that run needs to work in; both 64-byte aligned.
  int64_t (*packed)(const Matrix& matrix, int M);
  int64_t (*scratch)(const Matrix& matrix);
  // Lays M rows out for the kernel, with their sums by group.
  void (*pack)(const Matrix& matrix, int M, const float* const* x, float* out);
  // y[m][n] for n in [begin, end) and M <= max_rows packed rows.
  void (*run)(
      const Matrix& matrix,
      int M,
      const float* packed,
      float* scratch,
      float* const* y,
      int begin,
      int end);
  // gate[i] = silu(gate[i]) * up[i]; each value alike wherever it stands.
  void (*swiglu)(float* gate, const float* up, int64_t count);
  void (*silu)(float* x, int64_t count);
  // `rounds` times the instructions of the innermost product alone, in registers, and how many
  // multiply-adds of weights a round stands for; null where they are fused multiply-adds.
  float (*peak)(int rounds, int start) = nullptr;
  int peak_multiplies = 0;
  bool levels = false; // whether run knows them: mxfp4 comes as affine then
  int block = 4; // output rows that it takes at once, at least
};

// The table of the instruction set in use.
const Rows& rows();

// What every instruction set compiles in: nothing from the standard library may be inlined there,
// or the linker might keep the copy that other CPUs can't run.
const Rows& rows_portable();
const Rows& rows_avx2();
const Rows& rows_maddubs();
const Rows& rows_avx512();
const Rows& rows_vnni();
const Rows& rows_neon();
const Rows* rows_dot(); // null where the compiler does not know products of bytes
const Rows* rows_i8mm(); // or of matrices of them
const Rows* rows_avxvnni(); // null where the compiler does not know its instructions
const Rows* rows_amx(); // null where it does not know the tiles

namespace {

// run(std::integral_constant<int, M>) for M of 1 to max_rows: code of its own for each.
template <typename Run>
inline void by_rows(int M, Run run) {
  switch (M) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 3: return run(std::integral_constant<int, 3>());
    case 4: return run(std::integral_constant<int, 4>());
    case 5: return run(std::integral_constant<int, 5>());
    case 6: return run(std::integral_constant<int, 6>());
    case 7: return run(std::integral_constant<int, 7>());
    case 8: return run(std::integral_constant<int, 8>());
  }
}

} // namespace
} // namespace streamer
