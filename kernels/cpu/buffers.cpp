#include "buffers.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace streamer {
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

} // namespace streamer
