#include "multiply.h"

#include <algorithm>

#include "forms.h"
#include "pool.h"
#include "workspace.h"

namespace streamer {
namespace {

// Bytes of weights that one task reads in a row, between even shares and few hand-outs; how many
// tasks a thread should have where there is less to read; and the multiply-adds below which waking
// another thread costs more than it saves.
constexpr int64_t task_bytes = 64 << 10;
constexpr int64_t tasks_each = 8;
constexpr int64_t parallel_work = 1 << 17;
// Bytes made of weights that one part takes before the next ones: well within a first-level cache.
constexpr int64_t made_bytes = 12 << 10;

int64_t row_bytes(const Matrix& A) {
  return std::max<int64_t>(1, int64_t(A.K) * width(A) / 8);
}

// Rows of a task, where all products read `bytes` of weights.
int64_t step_of(const Matrix& A, int64_t bytes) {
  const int64_t each = std::min(task_bytes, bytes / (tasks_each * threads()));
  return std::max<int64_t>(each / row_bytes(A) / 24 * 24, 24);
}

} // namespace

int width(const Matrix& A) {
  return A.format != Format::dense ? A.bits : A.scale == Scale::f32 ? 32 : 16;
}

bool same_packing(const Matrix& a, const Matrix& b) {
  return a.K == b.K && a.format == b.format &&
      (a.format == Format::dense ||
       (a.bits == b.bits && a.group == b.group && a.middle == b.middle && a.levels == b.levels));
}

void add_product(
    const Matrix& A,
    const std::vector<const float*>& x,
    const std::vector<float*>& y,
    std::vector<Pack>& packs,
    std::vector<Part>& parts,
    std::vector<Product>& products) {
  Product product{A, static_cast<int>(parts.size()), 0};
  const Matrix form = form_of(A);
  // Experts chosen by the same rows come one after another: looking far back finds no more.
  const size_t look = packs.size() > 8 ? packs.size() - 8 : 0;
  for (size_t i = 0; i < x.size(); i += max_rows) {
    const int M = static_cast<int>(std::min<size_t>(max_rows, x.size() - i));
    size_t found = look;
    for (; found < packs.size(); ++found) {
      const Pack& pack = packs[found];
      if (pack.M == M && same_packing(pack.A, form) && std::equal(pack.x, pack.x + M, &x[i])) break;
    }
    if (found == packs.size()) {
      Pack pack{form, M, {}};
      std::copy_n(&x[i], M, pack.x);
      packs.push_back(pack);
    }
    Part part{static_cast<int>(found), {}};
    std::copy_n(&y[i], M, part.y);
    parts.push_back(part);
  }
  product.end = static_cast<int>(parts.size());
  products.push_back(product);
}

namespace {

// Floats of packed rows held at a time, unless one part alone needs more.
constexpr int64_t packed_room = 1 << 19;

// The products of one batch, whose packs are [low, high).
void multiply_batch(
    const std::vector<Pack>& packs,
    const std::vector<Part>& parts,
    const std::vector<Product>& products,
    int low,
    int high) {
  const Rows& kernel = rows();
  std::vector<int64_t> starts{0};
  int64_t cells = 0;
  for (int i = low; i < high; ++i) {
    starts.push_back(starts.back() + (kernel.packed(packs[i].A, packs[i].M) + 15) / 16 * 16);
    cells += int64_t(packs[i].M) * packs[i].A.K;
  }
  float* packed = workspace(Use::packed, starts.back());
  auto pack = [&](int i) {
    const Pack& from = packs[low + i];
    kernel.pack(from.A, from.M, from.x, packed + starts[i]);
  };

  std::vector<int> first{0}, steps;
  int64_t work = 0, bytes = 0;
  for (const Product& product : products) bytes += product.A.N * row_bytes(product.A);
  for (const Product& product : products) {
    const Matrix& A = product.A;
    const int64_t step = step_of(A, bytes);
    steps.push_back(static_cast<int>(step));
    first.push_back(first.back() + static_cast<int>((A.N + step - 1) / step));
    int64_t rows = 0;
    for (int p = product.begin; p < product.end; ++p) rows += packs[parts[p].pack].M;
    work += rows * A.N * A.K;
  }
  auto run = [&](int task) {
    const size_t i = std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
    const Product& product = products[i];
    const Matrix& A = product.A;
    const int64_t begin = int64_t(task - first[i]) * steps[i];
    const int64_t end = std::min<int64_t>(A.N, begin + steps[i]);
    const Matrix form = form_of(A);
    float* scratch = workspace(Use::scratch, kernel.scratch(form));
    int64_t tall = max_tile;
    if (const int64_t each = form_bytes(A, form); each > 0 && product.end - product.begin == 1) {
      const int64_t block = kernel.block;
      tall = std::clamp<int64_t>(made_bytes / each / block * block, block, max_tile);
    }
    for (int64_t tile = begin; tile < end; tile += tall) {
      const int64_t stop = std::min<int64_t>(end, tile + tall);
      const Matrix made = form_rows(A, form, tile, stop);
      for (int p = product.begin; p < product.end; ++p) {
        const Part& part = parts[p];
        kernel.run(made, packs[part.pack].M, packed + starts[part.pack - low], scratch, part.y,
                   static_cast<int>(tile), static_cast<int>(stop));
      }
    }
  };
  const int packing = high - low, running = first.back();
  if (packing > 1 && cells >= 1 << 13) {
    parallel_for(packing, pack);
  } else {
    for (int i = 0; i < packing; ++i) pack(i);
  }
  if (work >= parallel_work) {
    parallel_for(running, run);
  } else {
    for (int task = 0; task < running; ++task) run(task);
  }
}

} // namespace

void multiply(
    const std::vector<Pack>& packs,
    const std::vector<Part>& parts,
    const std::vector<Product>& products) {
  const Rows& kernel = rows();
  auto room = [&](int low, int high) {
    int64_t total = 0;
    for (int i = low; i < high; ++i) total += kernel.packed(packs[i].A, packs[i].M) + 15;
    return total;
  };
  std::vector<Product> batch;
  int low = 0, high = 0;
  auto flush = [&] {
    if (!batch.empty()) multiply_batch(packs, parts, batch, low, high);
    batch.clear();
  };
  for (const Product& product : products) {
    for (int begin = product.begin; begin < product.end;) {
      // As many of its parts as fit beside what the batch holds already.
      int end = begin, from = low, to = high;
      for (; end < product.end; ++end) {
        const int pack = parts[end].pack;
        const bool empty = batch.empty() && end == begin;
        const int l = empty ? pack : std::min(from, pack), h = empty ? pack + 1 : std::max(to, pack + 1);
        if (!empty && room(l, h) > packed_room) break;
        from = l;
        to = h;
      }
      if (end == begin) {
        flush();
        continue;
      }
      low = from;
      high = to;
      batch.push_back({product.A, begin, end});
      begin = end;
    }
  }
  flush();
}

} // namespace streamer
