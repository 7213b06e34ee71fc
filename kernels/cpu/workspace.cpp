#include "workspace.h"

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
