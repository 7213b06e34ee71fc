#include "isa.h"

#include <cstdlib>

#include "rows.h"
#include "steps.h"
#include "tiles.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace streamer {

namespace {

struct Choice {
  std::string name;
  Level level;
  const Rows* rows;
  const Steps* steps;
};

#if defined(__aarch64__)
bool multiplies_bytes() {
#if defined(__APPLE__)
  return true; // every Mac with Arm
#elif defined(__linux__) && defined(HWCAP_ASIMDDP)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return false;
#endif
}

bool multiplies_matrices() {
#if defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, nullptr, 0) == 0 && has == 1;
#elif defined(__linux__) && defined(HWCAP2_I8MM)
  return getauxval(AT_HWCAP2) & HWCAP2_I8MM;
#else
  return false;
#endif
}
#endif

#if defined(__x86_64__)
// VNNI for vectors of 32 bytes, which CPUs without AVX-512 have; that of AVX-512 is another bit.
bool has_avxvnni() {
#if defined(STREAMER_EMULATE_VNNI)
  return true;
#else
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 4;
#endif
}
#endif

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
    if (vnni) out.push_back({"avx512vnni", Level::vnni, &rows_vnni(), &steps_avx512()});
    // Behind VNNI, which reads weights from memory faster at one row, until tiles do so too.
    const Rows* amx = vnni && __builtin_cpu_supports("gfni") ? rows_amx() : nullptr;
    if (amx && tiles_granted()) out.push_back({"amx", Level::amx, amx, &steps_avx512()});
    if (avx512) out.push_back({"avx512", Level::avx512, &rows_avx512(), &steps_avx512()});
    const Rows* avxvnni = avx2 && has_avxvnni() ? rows_avxvnni() : nullptr;
    if (avxvnni) out.push_back({"avxvnni", Level::avx2, avxvnni, &steps_avx2()});
    if (avx2) out.push_back({"avx2", Level::avx2, &rows_maddubs(), &steps_avx2()});
#elif defined(__aarch64__)
    const Rows *dot = rows_dot(), *i8mm = rows_i8mm();
    if (i8mm && multiplies_matrices()) out.push_back({"i8mm", Level::neon, i8mm, &steps_neon()});
    if (dot && multiplies_bytes()) out.push_back({"dotprod", Level::neon, dot, &steps_neon()});
    out.push_back({"neon", Level::neon, &rows_neon(), &steps_neon()});
#endif
    out.push_back({"portable", Level::portable, &rows_portable(), &steps_portable()});
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

#if defined(__x86_64__)
bool tiles_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  static const bool granted = [] {
    unsigned a, b, c, d;
    constexpr unsigned tiles = 1u << 24, bytes = 1u << 25;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (tiles | bytes)) return false;
    constexpr int ask = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ask, tile_data) == 0;
  }();
  return granted;
#else
  return false;
#endif
}
#endif

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Choice& choice : choices()) names.push_back(choice.name);
  return names;
}

const std::string& isa() {
  return current()->name;
}

Level level() {
  return current()->level;
}

static bool picked = false;

bool forced() {
  static const char* const name = std::getenv("STREAMER_ISA");
  return picked || (name != nullptr && find(name) != nullptr);
}

bool set_isa(const std::string& name) {
  const Choice* found = find(name);
  if (found != nullptr) current() = found, picked = true;
  return found != nullptr;
}

const Rows& rows() {
  return *current()->rows;
}

const Steps& steps() {
  return *current()->steps;
}

} // namespace streamer
