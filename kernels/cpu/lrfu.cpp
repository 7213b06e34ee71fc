// Which experts of a pool go: what streamer.lrfu does, to the bit.
#include <algorithm>
#include <limits>
#include <tuple>

#include "data.h"
#include "expert_cache.h"

namespace streamer {

void ExpertCache::chose(int layer, const int32_t* ids, int rows, int k) {
  const int E = layers_[layer].experts, count = rows * k;
  double* heat = s_.heat + first_[layer];
  int64_t* uses = s_.uses + first_[layer];
  for (int i = 0; i < count; ++i) ++uses[ids[i]];
  for (int e = 0; e < E; ++e) heat[e] *= rules_.ages[rows];
  if (rows == 1) {
    for (int i = 0; i < k; ++i) heat[ids[i]] += 1;
    return;
  }
  rows_.assign(E, 0);
  for (int i = 0; i < count; ++i) rows_[ids[i]] += rules_.ages[rows - 1 - i / k];
  for (int e = 0; e < E; ++e) heat[e] += rows_[e];
}

void ExpertCache::place(int layer, int expert, int slot) {
  layers_[layer].slots[expert] = slot;
  ++s_.resident[layer];
  s_.held[slot] = first_[layer] + expert;
}

void ExpertCache::evict(int slot) {
  const int expert = static_cast<int>(s_.held[slot]), layer = layer_of_[expert];
  expected_[expert] = 0;
  layers_[layer].slots[expert - first_[layer]] = -1;
  --s_.resident[layer];
  s_.held[slot] = -1;
  s_.spare[s_.spares[0]++] = slot;
}

std::vector<int> ExpertCache::freed(int count, int layer, const std::vector<int>& keep) {
  const int wanted = count - static_cast<int>(s_.spares[0]);
  if (wanted > 0) {
    struct Victim {
      bool expected; // the last to go
      double soon; // less is later
      int slot;
      bool operator<(const Victim& other) const {
        return std::tie(expected, soon, slot) < std::tie(other.expected, other.soon, other.slot);
      }
    };
    // The first to go, the last of them in front; of large pools most stay, as their heat alone says.
    std::vector<Victim> first;
    const double* turns = s_.turns + layer * layers_.size();
    const double furthest = *std::max_element(turns, turns + layers_.size());
    const size_t most = wanted + keep.size();
    double stays = std::numeric_limits<double>::infinity(); // heat
    for (int slot = 0; slot < s_.slots; ++slot) {
      const int64_t expert = s_.held[slot];
      if (expert < 0 || s_.heat[expert] > stays) continue;
      const double share = std::max(s_.heat[expert] * rules_.share, rules_.never);
      const Victim one{expected_[expert] != 0, -1 / share - turns[layer_of_[expert]], slot};
      if (first.size() == most) {
        if (!(one < first.front())) continue;
        std::pop_heap(first.begin(), first.end());
        first.pop_back();
      }
      first.push_back(one);
      std::push_heap(first.begin(), first.end());
      const double waits = -first.front().soon - furthest; // rows, at most, of what goes
      if (first.size() == most && !first.front().expected && waits > 0) {
        stays = (1 + 1e-9) / (waits * rules_.share);
      }
    }
    std::sort_heap(first.begin(), first.end());
    int left = wanted;
    for (size_t i = 0; i < first.size() && left; ++i) {
      const int expert = static_cast<int>(s_.held[first[i].slot]);
      const bool kept = std::binary_search(keep.begin(), keep.end(), expert - first_[layer]);
      if (layer_of_[expert] == layer && kept) continue;
      evict(first[i].slot);
      --left;
    }
    check(!left, "cache: more is asked of the pool than it has slots");
  }
  std::vector<int> slots;
  for (int i = 0; i < count; ++i) slots.push_back(s_.spare[--s_.spares[0]]);
  return slots;
}

} // namespace streamer
