#include "buffers.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace streamer {
namespace {

struct Block {
  void* data = nullptr;
  int64_t count = 0;
  ~Block() {
    ::operator delete(data, std::align_val_t(64));
  }
};

} // namespace

const void* row_major(const mlx::core::array& a, std::vector<std::shared_ptr<char>>& held) {
  const char* from = a.data<char>();
  if (a.flags().row_contiguous || a.size() == 0) return from;
  const size_t item = a.itemsize();
  std::shared_ptr<char> copy(static_cast<char*>(std::malloc(a.nbytes())), std::free);
  if (!copy) throw std::bad_alloc();
  const auto& shape = a.shape();
  const auto& strides = a.strides();
  std::vector<int64_t> at(shape.size(), 0);
  int64_t offset = 0;
  for (char* to = copy.get(); to < copy.get() + a.nbytes(); to += item) {
    std::memcpy(to, from + offset * static_cast<int64_t>(item), item);
    for (int axis = static_cast<int>(shape.size()) - 1; axis >= 0; --axis) {
      offset += strides[axis];
      if (++at[axis] < shape[axis]) break;
      offset -= strides[axis] * shape[axis];
      at[axis] = 0;
    }
  }
  held.push_back(copy);
  return copy.get();
}

float* workspace(Use use, int64_t count) {
  static thread_local Block blocks[static_cast<int>(Use::step) + 1];
  Block& block = blocks[static_cast<int>(use)];
  if (block.count < count) {
    ::operator delete(block.data, std::align_val_t(64));
    block.data = nullptr;
    block.count = 0;
    block.data = ::operator new(count * sizeof(float), std::align_val_t(64));
    block.count = count;
  }
  return static_cast<float*>(block.data);
}

} // namespace streamer
