// The threads of a threadgroup as coroutines: who waits, who goes on, and for what.
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

namespace harness {

using Where = std::source_location;

struct Dim {
  unsigned x, y, z;
};

struct Fiber {
  enum State { ready, barrier, simd, done };
  ucontext_t context;
  std::vector<char> stack;
  State state;
  unsigned line;
  unsigned operations;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current, group_count, epoch;
inline Dim group, group_size, grid_size;
inline std::function<void()> body;
inline std::vector<std::array<uint64_t, 2>> exchanged;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(
      stderr,
      "%s (thread %u of threadgroup %u,%u,%u)\n",
      what.c_str(),
      current,
      group.x,
      group.y,
      group.z);
  std::fflush(stderr);
  std::_Exit(3);
}

inline void enter() {
  body();
  fibers[current].state = Fiber::done;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void wait(Fiber::State state, unsigned line) {
  fibers[current].state = state;
  fibers[current].line = line;
  swapcontext(&fibers[current].context, &scheduler);
}

// Lets fibers [from, to) go on if all of them wait for the same thing at the same line.
inline bool release(unsigned from, unsigned to, Fiber::State state) {
  for (unsigned i = from; i < to; ++i) {
    if (fibers[i].state != state || fibers[i].line != fibers[from].line) {
      return false;
    }
  }
  for (unsigned i = from; i < to; ++i) {
    fibers[i].state = Fiber::ready;
  }
  return true;
}

inline void run_group() {
  const unsigned count = group_size.x * group_size.y * group_size.z;
  ++group_count;
  ++epoch;
  fibers.resize(count);
  exchanged.resize(count);
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(1 << 16);
    fiber.state = Fiber::ready;
    fiber.operations = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    for (current = 0; current < count; ++current) {
      if (fibers[current].state == Fiber::ready) {
        swapcontext(&scheduler, &fibers[current].context);
      }
    }
    bool moved = false;
    for (unsigned lane = 0; lane + 32 <= count; lane += 32) {
      moved |= release(lane, lane + 32, Fiber::simd);
    }
    if (!moved && release(0, count, Fiber::barrier)) {
      moved = true;
      ++epoch;
    }
    if (!moved) {
      for (current = 0; current < count; ++current) {
        const Fiber& fiber = fibers[current];
        if (fiber.state != Fiber::done) {
          const char* what = fiber.state == Fiber::barrier ? "barrier" : "simdgroup operation";
          fail(std::string("divergent ") + what + " at line " + std::to_string(fiber.line));
        }
      }
      return;
    }
  }
}

// Calls `kernel` once per thread of `grid`; whole threadgroups only.
inline void launch(Dim grid, Dim threads, std::function<void()> kernel) {
  if (grid.x % threads.x || grid.y % threads.y || grid.z % threads.z) {
    fail("the grid is not a whole number of threadgroups");
  }
  if (threads.x * threads.y * threads.z > 896) {
    fail("a threadgroup has more than 896 threads");
  }
  body = kernel;
  group_size = threads;
  grid_size = grid;
  for (unsigned z = 0; z < grid.z / threads.z; ++z) {
    for (unsigned y = 0; y < grid.y / threads.y; ++y) {
      for (unsigned x = 0; x < grid.x / threads.x; ++x) {
        group = {x, y, z};
        run_group();
      }
    }
  }
}

}  // namespace harness
