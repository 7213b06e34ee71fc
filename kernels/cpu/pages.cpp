#include "pages.h"

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "mlx/allocator.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace streamer {
namespace {

namespace mx = mlx::core;

#ifdef __linux__
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 // headers before Linux 6.1
#endif
constexpr uintptr_t page = 2 << 20;

// The whole pages among some bytes, told to the system; false where there are none or it refuses.
bool advise(const void* from, size_t bytes, int advice) {
  const auto begin = (reinterpret_cast<uintptr_t>(from) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(from) + bytes) / page * page;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, advice) == 0;
}
#endif

} // namespace

mx::array zeros_on_huge_pages(int rows, int bytes) {
  if (rows < 0 || bytes < 0) throw std::invalid_argument("pages: wrong size");
  const size_t size = size_t(rows) * bytes;
  mx::array zeros(mx::allocator::malloc(size), {rows, bytes}, mx::uint8);
  auto* data = zeros.data<char>();
#ifdef __linux__
  advise(data, size, MADV_HUGEPAGE); // before they are touched
#endif
  if (size > 0) std::memset(data, 0, size);
  return zeros;
}

bool onto_huge_pages(const mx::array& array) {
  if (!array.is_available()) throw std::invalid_argument("pages: the array must be evaluated");
#ifdef __linux__
  const void* data = array.data<char>();
  return advise(data, array.nbytes(), MADV_HUGEPAGE) && advise(data, array.nbytes(), MADV_COLLAPSE);
#else
  return false;
#endif
}

} // namespace streamer
