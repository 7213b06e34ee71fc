#include "expert_cache.h"

#include <algorithm>

#include "data.h"

namespace streamer {
namespace {

constexpr int file_shift = 44; // streamer.trace.FILE_SHIFT

} // namespace

ExpertCache::ExpertCache(
    std::shared_ptr<Reads> reads,
    std::vector<CachedLayer> layers,
    std::vector<SlotTensor> tensors,
    CacheState state,
    CacheRules rules)
    : reads_(std::move(reads)),
      layers_(std::move(layers)),
      tensors_(std::move(tensors)),
      s_(state),
      rules_(std::move(rules)) {
  check(rules_.wave > 0 && rules_.ages.size() > 1, "cache: senseless rules");
  for (const CachedLayer& layer : layers_) {
    check(layer.parts.size() == tensors_.size(), "cache: parts don't fit the tensors");
    first_.push_back(static_cast<int>(layer_of_.size()));
    layer_of_.resize(layer_of_.size() + layer.experts, static_cast<int>(first_.size()) - 1);
  }
  for (const SlotTensor& tensor : tensors_) bytes_ += static_cast<int64_t>(tensor.nbytes);
}

ExpertCache::~ExpertCache() {
  for (const auto& batch : under_way_) reads_->cancel(batch, true);
  wait();
}

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

void ExpertCache::evict(int slot) {
  const int expert = static_cast<int>(s_.held[slot]), layer = layer_of_[expert];
  layers_[layer].slots[expert - first_[layer]] = -1;
  --s_.resident[layer];
  s_.held[slot] = -1;
  s_.spare[s_.spares[0]++] = slot;
}

std::vector<int> ExpertCache::freed(int count, int layer, const std::vector<int>& keep) {
  const int wanted = count - static_cast<int>(s_.spares[0]);
  if (wanted > 0) {
    struct Victim {
      double soon; // less is later
      int slot;
      bool operator<(const Victim& other) const {
        return soon != other.soon ? soon < other.soon : slot < other.slot;
      }
    };
    std::vector<Victim> all;
    const double* turns = s_.turns + layer * layers_.size();
    for (int slot = 0; slot < s_.slots; ++slot) {
      const int64_t expert = s_.held[slot];
      if (expert < 0) continue;
      const double share = std::max(s_.heat[expert] * rules_.share, rules_.never);
      all.push_back({-1 / share - turns[layer_of_[expert]], slot});
    }
    const size_t most = std::min(all.size(), wanted + keep.size());
    std::partial_sort(all.begin(), all.begin() + most, all.end());
    int left = wanted;
    for (size_t i = 0; i < most && left; ++i) {
      const int expert = static_cast<int>(s_.held[all[i].slot]);
      if (layer_of_[expert] == layer && std::binary_search(keep.begin(), keep.end(), expert - first_[layer])) {
        continue;
      }
      evict(all[i].slot);
      --left;
    }
    check(!left, "cache: more is asked of the pool than it has slots");
  }
  std::vector<int> slots;
  for (int i = 0; i < count; ++i) slots.push_back(s_.spare[--s_.spares[0]]);
  return slots;
}

bool ExpertCache::bring(
    int layer, const int32_t* ids, int rows, int k, int32_t* slots, std::vector<Coming>& coming) {
  check(layer >= 0 && layer < static_cast<int>(layers_.size()), "cache: there is no such layer");
  const CachedLayer& at = layers_[layer];
  const int count = rows * k;
  coming.clear();
  std::vector<int> need(ids, ids + count), misses;
  std::sort(need.begin(), need.end());
  need.erase(std::unique(need.begin(), need.end()), need.end());
  const bool fits = need.front() >= 0 && need.back() < at.experts; // else of what is no number
  if (!fits || static_cast<int>(need.size()) > s_.slots ||
      rows >= static_cast<int>(rules_.ages.size())) {
    return false;
  }
  chose(layer, ids, rows, k);
  for (int expert : need) {
    if (at.slots[expert] < 0) misses.push_back(expert);
  }
  served_.hits += static_cast<int64_t>(need.size() - misses.size());
  served_.misses += static_cast<int64_t>(misses.size());
  if (watched) served_.told.push_back({layer, k, {ids, ids + count}, misses});
  if (!misses.empty()) {
    ++served_.waits;
    const std::vector<int> taken = freed(static_cast<int>(misses.size()), layer, need);
    for (size_t i = 0; i < misses.size(); i += rules_.wave) {
      const size_t end = std::min(misses.size(), i + rules_.wave);
      std::vector<ReadPiece> pieces;
      Coming wave;
      for (size_t j = i; j < end; ++j) {
        for (size_t t = 0; t < tensors_.size(); ++t) {
          const int64_t from = at.parts[t][misses[j]];
          pieces.push_back(
              {static_cast<int>(from >> file_shift), from & ((int64_t(1) << file_shift) - 1),
               tensors_[t].at + taken[j] * tensors_[t].nbytes, tensors_[t].nbytes});
        }
        at.slots[misses[j]] = taken[j];
        ++s_.resident[layer];
        s_.held[taken[j]] = first_[layer] + misses[j];
        for (int pair = 0; pair < count; ++pair) {
          if (ids[pair] == misses[j]) wave.pairs.push_back(pair);
        }
      }
      wave.batch = reads_->submit(std::move(pieces), {}, std::nullopt);
      under_way_.push_back(wave.batch);
      coming.push_back(std::move(wave));
    }
    asked_ = bytes_ * static_cast<int64_t>(misses.size());
  }
  for (int i = 0; i < count; ++i) slots[i] = at.slots[ids[i]];
  return true;
}

bool ExpertCache::landed() {
  if (under_way_.empty()) return true;
  wait();
  double seconds = 0;
  for (const auto& batch : under_way_) {
    if (batch->state != reading_fine) served_.failed = batch;
    seconds = std::max(seconds, batch->ended - batch->asked);
  }
  served_.demands.emplace_back(asked_, seconds);
  under_way_.clear();
  return served_.failed == nullptr;
}

void ExpertCache::wait() const {
  for (const auto& batch : under_way_) {
    while (!reads_->wait(*batch, 1)) {
    }
  }
}

Served ExpertCache::take() {
  Served out;
  std::swap(out, served_);
  return out;
}

} // namespace streamer
