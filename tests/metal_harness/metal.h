// Metal's types, address spaces, simdgroups and threadgroups in C++20, for tests of kernels.
//
// The threads of a threadgroup are coroutines that change places at barriers and simdgroup
// operations only. A barrier needs all threads, a simdgroup operation all 32 lanes, and all at the
// same line. Device memory is bounds-checked, outputs are poisoned and may be written by one thread
// only; threadgroup memory remembers who read and wrote since the last barrier. The first mistake
// ends the program: one line on stderr, exit code 3. Not here: matrix operations, atomics, textures.
#pragma once

#include <ucontext.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>

#include "fibers.h"

namespace harness {

// One argument's memory. Outputs start as NaNs and know which thread wrote what.
struct Buffer {
  std::string name;
  std::vector<char> bytes;
  std::vector<uint64_t> writers;

  static Buffer input(const char* name, const char* path) {
    std::ifstream file(path, std::ios::binary);
    return {name, std::vector<char>(std::istreambuf_iterator<char>(file), {}), {}};
  }
  static Buffer output(const char* name, size_t count, size_t width) {
    return {name, std::vector<char>(count * width, char(0xFF)), std::vector<uint64_t>(count)};
  }
  void save(const char* path) const {
    for (size_t i = 0; i < writers.size(); ++i) {
      if (!writers[i]) {
        fail(name + "[" + std::to_string(i) + "] was never written");
      }
    }
    std::ofstream(path, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
  }
};

}  // namespace harness

// A pointer to device or constant memory.
template <typename T>
class Device {
 public:
  Device(harness::Buffer& buffer, int64_t offset = 0) : buffer_(&buffer), offset_(offset) {}
  Device operator+(int64_t n) const {
    return Device(*buffer_, offset_ + n);
  }
  Device& operator+=(int64_t n) {
    offset_ += n;
    return *this;
  }
  T& operator*() const {
    return (*this)[0];
  }
  T& operator[](int64_t n) const {
    const int64_t at = offset_ + n;
    if (at < 0 || at >= int64_t(buffer_->bytes.size() / sizeof(T))) {
      harness::fail(buffer_->name + "[" + std::to_string(at) + "] is out of bounds");
    }
    if constexpr (!std::is_const_v<T>) {
      const uint64_t me = uint64_t(harness::group_count) << 32 | (harness::current + 1);
      uint64_t& writer = buffer_->writers[at];
      if (writer && writer != me) {
        harness::fail(buffer_->name + "[" + std::to_string(at) + "] belongs to another thread");
      }
      writer = me;
    }
    return reinterpret_cast<T*>(buffer_->bytes.data())[at];
  }

 private:
  harness::Buffer* buffer_;
  int64_t offset_;
};

// An array in threadgroup memory.
template <typename T, int N>
class Shared {
  struct Cell {
    T value;
    unsigned group, write_epoch, writer, read_epoch, reader;
    bool many;
  };

 public:
  class Reference {
   public:
    Reference(Shared& array, int at) : array_(array), at_(at) {}
    operator T() const {
      return array_.read(at_);
    }
    Reference& operator=(T value) {
      array_.write(at_, value);
      return *this;
    }
    Reference& operator=(const Reference& other) {
      return *this = T(other);
    }
    Reference& operator+=(T value) {
      return *this = T(*this) + value;
    }

   private:
    Shared& array_;
    int at_;
  };

  explicit Shared(const char* name) : name_(name) {}
  Reference operator[](int at) {
    if (at < 0 || at >= N) {
      harness::fail(cell(at) + " is out of bounds");
    }
    return Reference(*this, at);
  }

 private:
  std::string cell(int at) const {
    return std::string("threadgroup ") + name_ + "[" + std::to_string(at) + "]";
  }
  T read(int at) {
    Cell& c = cells_[at];
    if (c.group != harness::group_count) {
      harness::fail(cell(at) + " is read before it is written");
    }
    if (c.write_epoch == harness::epoch && c.writer != harness::current) {
      harness::fail("race: " + cell(at) + " is read and written between two barriers");
    }
    c.many = c.read_epoch == harness::epoch && (c.many || c.reader != harness::current);
    c.read_epoch = harness::epoch;
    c.reader = harness::current;
    return c.value;
  }
  void write(int at, T value) {
    Cell& c = cells_[at];
    if (c.write_epoch == harness::epoch && c.writer != harness::current) {
      harness::fail("race: " + cell(at) + " is written by two threads between two barriers");
    }
    if (c.read_epoch == harness::epoch && (c.many || c.reader != harness::current)) {
      harness::fail("race: " + cell(at) + " is read and written between two barriers");
    }
    c.group = harness::group_count;
    c.write_epoch = harness::epoch;
    c.writer = harness::current;
    c.value = value;
  }

  const char* name_;
  Cell cells_[N] = {};
};

using uint = unsigned;
using half = _Float16;
using float16_t = _Float16;
using std::exp;
using std::fma;

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float x) {
    const uint32_t all = std::bit_cast<uint32_t>(x);
    bits = x != x ? 0x7FC0 : uint16_t((all + 0x7FFF + (all >> 16 & 1)) >> 16);
  }
  operator float() const {
    return std::bit_cast<float>(uint32_t(bits) << 16);
  }
};

struct uint3 {
  uint x, y, z;
};

template <typename To, typename From>
To as_type(From from) {
  return std::bit_cast<To>(from);
}

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline void threadgroup_barrier(mem_flags, harness::Where where = harness::Where::current()) {
  harness::wait(harness::Fiber::barrier, where.line());
}

namespace harness {

// Every lane gives a value; what lane `from(i)` gave, for each i that is asked for, comes back.
template <typename T>
class Lanes {
 public:
  Lanes(T mine, unsigned line) : side_(fibers[current].operations++ % 2) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    std::memcpy(&exchanged[current][side_], &mine, sizeof(T));
    wait(Fiber::simd, line);
  }
  T operator[](unsigned lane) const {
    T value;
    std::memcpy(&value, &exchanged[current / 32 * 32 + lane % 32][side_], sizeof(T));
    return value;
  }

 private:
  unsigned side_;
};

template <typename T, typename F>
T reduce(T mine, unsigned line, F&& combine) {
  const Lanes<T> lanes(mine, line);
  T all[32];
  for (unsigned i = 0; i < 32; ++i) {
    all[i] = lanes[i];
  }
  for (unsigned width = 16; width; width /= 2) {
    for (unsigned i = 0; i < width; ++i) {
      all[i] = combine(all[i], all[i + width]);
    }
  }
  return all[0];
}

inline uint3 position() {
  const unsigned x = current % group_size.x;
  const unsigned y = current / group_size.x % group_size.y;
  return {x, y, current / (group_size.x * group_size.y)};
}

}  // namespace harness

template <typename T>
T simd_sum(T x, harness::Where where = harness::Where::current()) {
  return harness::reduce(x, where.line(), [](T a, T b) { return T(a + b); });
}

template <typename T>
T simd_max(T x, harness::Where where = harness::Where::current()) {
  return harness::reduce(x, where.line(), [](T a, T b) { return a > b ? a : b; });
}

template <typename T>
T simd_shuffle(T x, uint lane, harness::Where where = harness::Where::current()) {
  return harness::Lanes<T>(x, where.line())[lane];
}

template <typename T>
T simd_shuffle_xor(T x, uint mask, harness::Where where = harness::Where::current()) {
  return harness::Lanes<T>(x, where.line())[harness::current % 32 ^ mask];
}

namespace attribute {

inline uint3 thread_position_in_threadgroup() {
  return harness::position();
}
inline uint3 threadgroup_position_in_grid() {
  return {harness::group.x, harness::group.y, harness::group.z};
}
inline uint3 thread_position_in_grid() {
  const uint3 p = harness::position();
  const harness::Dim &g = harness::group, &s = harness::group_size;
  return {g.x * s.x + p.x, g.y * s.y + p.y, g.z * s.z + p.z};
}
inline uint thread_index_in_simdgroup() {
  return harness::current % 32;
}
inline uint simdgroup_index_in_threadgroup() {
  return harness::current / 32;
}

}  // namespace attribute

#define thread
#define kernel
