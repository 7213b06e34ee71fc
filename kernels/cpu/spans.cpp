#include "spans.h"

#include <memory>

#include "data.h"

namespace streamer {
namespace {

constexpr int most_rows = 128; // of a head that are taken through the context in pieces
constexpr int few_rows = 32; // that go through all of it together where there are more

using Done = std::function<void(int, int, const Sum*)>;
using Parts = std::vector<ContextPart>;

int groups_of(const ContextPart& part) {
  return (part.spans + group - 1) / group;
}

// Some rows of a head over one group of a part, in `sums`.
void run_group(const ContextPart& part, int head, int first, int rows, int index, Sum* sums) {
  const int64_t n = part.n;
  float *y = workspace(Use::scratch, rows * (n + 2)), *tops = y + rows * n, *totals = tops + rows;
  for (int i = index * group; i < std::min(part.spans, (index + 1) * group); ++i) {
    part.run(head, first, rows, i, y, tops, totals);
    for (int r = 0; r < rows; ++r) sums[r].take(y + r * n, tops[r], totals[r]);
  }
}

// A few rows: pieces of the context are shared among threads and merged afterwards. Pieces are
// groups, or single spans where groups are too few for all threads.
class Apart {
 public:
  Apart(int heads, int R, const Parts& parts) : R_(R), parts_(parts) {
    int groups = 0;
    for (const ContextPart& part : parts) groups += groups_of(part);
    whole_ = heads * groups >= 8 * threads();
    for (const ContextPart& part : parts) {
      const int pieces = whole_ ? groups_of(part) : part.spans;
      begins_.push_back({pieces_, floats_});
      pieces_ += pieces;
      floats_ += int64_t(pieces) * R * part.n;
    }
    room_.reset(new float[heads * (floats_ + 2 * int64_t(pieces_) * R)]);
    tops_ = room_.get() + heads * floats_;
    totals_ = tops_ + int64_t(heads) * pieces_ * R;
  }

  int pieces() const {
    return pieces_;
  }

  void run(int head, int piece, int first, int rows) {
    size_t p = parts_.size() - 1;
    while (piece < begins_[p].piece) --p;
    const ContextPart& part = parts_[p];
    const int index = piece - begins_[p].piece;
    float* y = sum_of(head, p, index, first);
    const int64_t at = (int64_t(head) * pieces_ + piece) * R_ + first;
    if (!whole_) return part.run(head, first, rows, index, y, tops_ + at, totals_ + at);
    std::vector<Sum> sums;
    for (int r = 0; r < rows; ++r) sums.emplace_back(y + int64_t(r) * part.n, part.n);
    run_group(part, head, first, rows, index, sums.data());
    for (int r = 0; r < rows; ++r) {
      tops_[at + r] = sums[r].top;
      totals_[at + r] = sums[r].total;
    }
  }

  void merge(int head, int r, const Done& row_done) const {
    int64_t n = 0;
    for (const ContextPart& part : parts_) n += 2 * part.n;
    float* room = workspace(Use::scratch, n);
    std::vector<Sum> sums;
    for (size_t p = 0; p < parts_.size(); ++p) {
      const int n = parts_[p].n, begin = begins_[p].piece;
      const int end = p + 1 < parts_.size() ? begins_[p + 1].piece : pieces_;
      Sum& sum = sums.emplace_back(room, n);
      for (int i = begin; i < end;) {
        Sum of_group(room + n, n);
        for (const int to = whole_ ? i + 1 : std::min(end, i + group); i < to; ++i) {
          const int64_t at = (int64_t(head) * pieces_ + i) * R_ + r;
          of_group.take(sum_of(head, p, i - begin, r), tops_[at], totals_[at]);
        }
        sum.take(of_group);
      }
      room += 2 * n;
    }
    row_done(head, r, sums.data());
  }

 private:
  struct Begin {
    int piece;
    int64_t floats;
  };

  float* sum_of(int head, size_t part, int index, int r) const {
    return room_.get() + head * floats_ + begins_[part].floats + (int64_t(index) * R_ + r) * parts_[part].n;
  }

  const int R_;
  const Parts& parts_;
  bool whole_;
  int pieces_ = 0; // of a head
  int64_t floats_ = 0; // of a head
  std::vector<Begin> begins_;
  std::unique_ptr<float[]> room_;
  float *tops_, *totals_;
};

void run_apart(int heads, int R, int64_t work, const Parts& parts, const Done& row_done) {
  Apart apart(heads, R, parts);
  const int pieces = apart.pieces();
  // Where there are fewer pieces than threads, rows are shared too.
  const int wanted = work < parallel_work ? 1 : (2 * threads() - 1) / std::max(1, heads * pieces) + 1;
  const int rows = ((R + wanted - 1) / wanted + 7) / 8 * 8, of_rows = (R + rows - 1) / rows;
  each(heads * pieces * of_rows, work, [&](int task) {
    const int first = task % of_rows * rows, piece = task / of_rows;
    apart.run(piece / pieces, piece % pieces, first, std::min(rows, R - first));
  });
  each(heads * R, work, [&](int task) { apart.merge(task / R, task % R, row_done); });
}

// A prompt's many rows: a few at a time go through the whole context.
void run_through(int heads, int R, int64_t work, const Parts& parts, const Done& row_done) {
  const int of_rows = (R + few_rows - 1) / few_rows;
  int64_t n = 0, widest = 0;
  for (const ContextPart& part : parts) {
    n += part.n;
    widest = std::max<int64_t>(widest, part.n);
  }
  each(heads * of_rows, work, [&](int task) {
    const int head = task / of_rows, first = task % of_rows * few_rows, rows = std::min(few_rows, R - first);
    std::vector<float> room(rows * (n + widest));
    float *y = room.data(), *of_group = y + rows * n;
    std::vector<Sum> sums; // [part, row]
    for (const ContextPart& part : parts) {
      const size_t begin = sums.size();
      for (int r = 0; r < rows; ++r, y += part.n) sums.emplace_back(y, part.n);
      for (int i = 0; i < groups_of(part); ++i) {
        std::vector<Sum> found;
        for (int r = 0; r < rows; ++r) found.emplace_back(of_group + int64_t(r) * part.n, part.n);
        run_group(part, head, first, rows, i, found.data());
        for (int r = 0; r < rows; ++r) sums[begin + r].take(found[r]);
      }
    }
    for (int r = 0; r < rows; ++r) {
      std::vector<Sum> of_row;
      for (size_t p = 0; p < parts.size(); ++p) of_row.push_back(sums[p * rows + r]);
      row_done(head, first + r, of_row.data());
    }
  });
}

} // namespace

void run_parts(int heads, int R, int64_t work, const Parts& parts, const Done& row_done) {
  (R <= most_rows ? run_apart : run_through)(heads, R, work, parts, row_done);
}

} // namespace streamer
