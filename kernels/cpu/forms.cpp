#include "forms.h"

#include "minifloats.h"
#include "spread.h"
#include "unpack.h"
#include "workspace.h"

namespace streamer {

Matrix form_of(const Matrix& matrix) {
  Matrix A = matrix;
  switch (A.format) {
    case Format::dense: return A;
    case Format::affine:
      A.middle = 1 << (A.bits - 1);
      A.bits = A.bits <= 4 ? 4 : 8;
      return A;
    case Format::mxfp4:
      if (!rows().levels) return A;
      A.format = Format::affine;
      A.levels = true;
      break;
    case Format::mxfp8:
    case Format::nvfp4: A.format = Format::dense;
  }
  A.scale = Scale::f32;
  return A;
}

int64_t form_bytes(const Matrix& matrix, const Matrix& form) {
  if (form.levels) return 4 * int64_t(form.K / form.group);
  if (form.format == matrix.format && form.bits == matrix.bits) return 0;
  return int64_t(form.K) * (form.format == Format::dense ? 32 : form.bits) / 8;
}

Matrix form_rows(const Matrix& matrix, const Matrix& form, int64_t begin, int64_t end) {
  Matrix A = form;
  const int64_t each = form_bytes(matrix, form), count = end - begin;
  if (each == 0) return A;
  // Blocks of rows are read whole by some kernels, whatever lies behind the last.
  float* to = workspace(Use::weights, (count + max_block) * each / 4 + 1);
  const auto* first = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(to) - begin * each);
  if (A.levels) {
    const int64_t G = A.K / A.group;
    const auto* exponents = static_cast<const uint8_t*>(A.scales) + begin * G;
    for (int64_t i = 0; i < count * G; ++i) to[i] = half_power(exponents[i]);
    A.scales = first;
    return A;
  }
  if (A.format == Format::dense) {
    widen_rows(matrix, begin, end, to);
  } else {
    const auto* from = static_cast<const uint8_t*>(A.w) + begin * A.K * matrix.bits / 8;
    spread(from, matrix.bits, count * A.K, reinterpret_cast<uint8_t*>(to));
  }
  A.w = first;
  return A;
}

} // namespace streamer
