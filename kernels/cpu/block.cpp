#include "block.h"

#include "data.h"

namespace streamer {

const float* Inputs::floats() {
  return static_cast<const float*>(row_major(in_[at_++], copies_));
}

Matrix Inputs::matrix(const Experts& one) {
  return bound(one, in_, at_, copies_);
}

std::vector<Experts> matrices_of(const Alike& all, const std::vector<int>& columns, const char* what) {
  check(all.weights.size() == columns.size(), what);
  std::vector<Experts> out;
  for (size_t i = 0; i < columns.size(); ++i) {
    check(all.weights[i].w.ndim() == 2, what);
    out.push_back(experts_of(columns[i], all.weights[i], all.group, all.bits, all.mode));
  }
  return out;
}

void check_norm(const Norm& norm, int width, const char* what) {
  check(norm.weight.dtype() == mx::float32 && norm.weight.shape() == mx::Shape{width}, what);
}

void multiply_all(
    const std::vector<Matrix>& matrices,
    const float* x,
    int64_t rows,
    const std::vector<float*>& y) {
  std::vector<Pack> packs;
  std::vector<Part> parts;
  std::vector<Product> products;
  std::vector<const float*> from(rows);
  std::vector<float*> to(rows);
  for (size_t i = 0; i < matrices.size(); ++i) {
    for (int64_t r = 0; r < rows; ++r) {
      from[r] = x + r * matrices[i].K;
      to[r] = y[i] + r * matrices[i].N;
    }
    add_product(matrices[i], from, to, packs, parts, products);
  }
  multiply(packs, parts, products);
}

} // namespace streamer
