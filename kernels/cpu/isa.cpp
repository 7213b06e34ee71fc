#include "isa.h"

#include <cstdlib>

#include "rows.h"
#include "steps.h"

namespace streamer {

namespace {

struct Choice {
  std::string name;
  const Rows* rows;
  const Steps* steps;
};

const std::vector<Choice>& choices() {
  static const std::vector<Choice> found = [] {
    std::vector<Choice> out;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (vnni) out.push_back({"avx512vnni", &rows_vnni(), &steps_avx512()});
    if (avx512) out.push_back({"avx512", &rows_avx512(), &steps_avx512()});
    if (avx2) out.push_back({"avx2", &rows_maddubs(), &steps_avx2()});
#elif defined(__aarch64__)
    out.push_back({"neon", &rows_neon(), &steps_neon()});
#endif
    out.push_back({"portable", &rows_portable(), &steps_portable()});
    return out;
  }();
  return found;
}

const Choice* find(const std::string& name) {
  for (const Choice& choice : choices()) {
    if (choice.name == name) return &choice;
  }
  return nullptr;
}

const Choice*& current() {
  static const Choice* choice = [] {
    const char* name = std::getenv("STREAMER_ISA");
    const Choice* found = name ? find(name) : nullptr;
    return found ? found : &choices().front();
  }();
  return choice;
}

} // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Choice& choice : choices()) names.push_back(choice.name);
  return names;
}

const std::string& isa() {
  return current()->name;
}

bool set_isa(const std::string& name) {
  const Choice* found = find(name);
  if (found != nullptr) current() = found;
  return found != nullptr;
}

const Rows& rows() {
  return *current()->rows;
}

const Steps& steps() {
  return *current()->steps;
}

} // namespace streamer
