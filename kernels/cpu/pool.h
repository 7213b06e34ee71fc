// A few threads that stay, for loops of tens of microseconds.
#pragma once

#include <cstddef>

namespace streamer {

int threads();
int cores(); // that this process may run on

// Sets how many threads share a loop, the caller among them (1 to 256).
void set_threads(int count);

// Calls body(i) once for each i in [0, tasks), on up to `threads()` threads, and returns when all
// are done. Each thread begins with a range of its own, neighbours in order, and helps with the
// others' when it is through: tasks must not depend on who runs them.
// A loop begun while another runs (a second MLX stream) stays on its caller.
void parallel_for(int tasks, void (*body)(void* context, int task), void* context);

template <class F>
void parallel_for(int tasks, F& body) {
  parallel_for(
      tasks, [](void* f, int task) { (*static_cast<F*>(f))(task); }, &body);
}

} // namespace streamer
