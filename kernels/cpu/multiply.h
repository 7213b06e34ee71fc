// Products of row lists with weight matrices, shared out among threads.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace streamer {

// Rows x[0..M) of one matrix's columns, laid out once for all products that name it.
struct Pack {
  Matrix A; // its format and columns; no pointers
  int M;
  const float* x[max_rows];
};

// y[m] = x[m] @ A^T for the rows of pack `pack`.
struct Part {
  int pack;
  float* y[max_rows];
};

// One matrix and the parts [begin, end) that use it: each of its weights is read once for all.
struct Product {
  Matrix A;
  int begin, end;
};

// Whether rows packed for one matrix serve another.
bool same_packing(const Matrix& a, const Matrix& b);

// Splits a list of row pairs (x[i], y[i]) into packs and parts; a pack that is there already is shared.
void add_product(
    const Matrix& A,
    const std::vector<const float*>& x,
    const std::vector<float*>& y,
    std::vector<Pack>& packs,
    std::vector<Part>& parts,
    std::vector<Product>& products);

void multiply(
    const std::vector<Pack>& packs,
    const std::vector<Part>& parts,
    const std::vector<Product>& products);

// Bits of one stored weight.
int width(const Matrix& A);

} // namespace streamer
