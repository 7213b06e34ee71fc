// What Python passes for weights.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "linear.h"

namespace streamer {

// Weight, scales, biases.
using WeightOf = std::tuple<mx::array, std::optional<mx::array>, std::optional<mx::array>>;

inline Weight weight_of(const WeightOf& arrays) {
  return {std::get<0>(arrays), std::get<1>(arrays), std::get<2>(arrays)};
}

} // namespace streamer
