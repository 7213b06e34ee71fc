// Which instruction sets this build has and this CPU runs.
#pragma once

#include <string>
#include <vector>

namespace streamer {

// Each x86 set has what those before it have.
enum class Level { portable, neon, avx2, avx512, vnni, amx };

// Fastest at one row first, of those both compiled in and present; "portable" is always last.
std::vector<std::string> isas();

// The one in use: STREAMER_ISA if set and usable, else the first of isas().
const std::string& isa();

Level level(); // of the one in use

// Whether it was asked for by name, rather than chosen as the fastest for most products.
bool forced();

// Picks one of isas() by name; false when it is not among them.
bool set_isa(const std::string& name);

} // namespace streamer
