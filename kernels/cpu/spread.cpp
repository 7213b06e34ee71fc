#include "spread.h"

#include <cstring>

#include "isa.h"

namespace streamer {
namespace {

// One word's weights, moved apart by halves: the upper half of every piece of 2 * n weights goes
// from bit n * bits to bit n * field.
template <int bits, int field, int n>
inline uint64_t halves(uint64_t word) {
  constexpr int apart = n * (field - bits);
  uint64_t low = 0;
  for (int at = 0; at < 64; at += 2 * n * field) low |= ((uint64_t(1) << n * bits) - 1) << at;
  const uint64_t high = low << n * bits;
  word = (word & low) | (word & high) << apart;
  if constexpr (n > 1) word = halves<bits, field, n / 2>(word);
  return word;
}

struct ByHalves {
  template <int bits, int field>
  static uint64_t spread(uint64_t word) {
    return halves<bits, field, 32 / field>(word);
  }
};

#if defined(__x86_64__)
struct ByDeposit {
  template <int bits, int field>
  static __attribute__((target("bmi2"))) uint64_t spread(uint64_t word) {
    constexpr uint64_t each = field == 4 ? 0x1111111111111111u : 0x0101010101010101u;
    return __builtin_ia32_pdep_di(word, each * ((1u << bits) - 1));
  }
};

// Zen and Zen 2 take hundreds of cycles for it.
bool deposits() {
  static const bool quick = __builtin_cpu_supports("bmi2") && !__builtin_cpu_is("znver1") &&
      !__builtin_cpu_is("znver2");
  return quick && level() != Level::portable;
}
#endif

template <class By, int bits, int field>
inline __attribute__((always_inline)) void all(const uint8_t* from, int64_t count, uint8_t* to) {
  constexpr int weights = 64 / field, bytes = weights * bits / 8, several = 8;
  const int64_t words = count / weights, ahead = words * bytes;
  auto one = [&](int64_t i, int64_t read) __attribute__((always_inline)) {
    uint64_t word = 0;
    std::memcpy(&word, from + i * bytes, read);
    word = By::template spread<bits, field>(word);
    std::memcpy(to + i * 8, &word, 8);
  };
  int64_t i = 0;
  for (; i + several < words; i += several) {
    // What the next call will ask for: these are read while the products wait for nothing.
    __builtin_prefetch(from + i * bytes + ahead);
#pragma GCC unroll 8
    for (int j = 0; j < several; ++j) one(i + j, 8); // what lies behind is the next ones'
  }
  for (; i < words; ++i) one(i, bytes);
}

template <class By>
inline __attribute__((always_inline)) void any(
    const uint8_t* from, int bits, int64_t count, uint8_t* to) {
  switch (bits) {
    case 2: return all<By, 2, 4>(from, count, to);
    case 3: return all<By, 3, 4>(from, count, to);
    case 5: return all<By, 5, 8>(from, count, to);
    case 6: return all<By, 6, 8>(from, count, to);
  }
}

#if defined(__x86_64__)
__attribute__((target("bmi2"))) void by_deposit(
    const uint8_t* from, int bits, int64_t count, uint8_t* to) {
  any<ByDeposit>(from, bits, count, to);
}
#endif

} // namespace

void spread(const uint8_t* from, int bits, int64_t count, uint8_t* to) {
#if defined(__x86_64__)
  if (deposits()) return by_deposit(from, bits, count, to);
#endif
  any<ByHalves>(from, bits, count, to);
}

} // namespace streamer
