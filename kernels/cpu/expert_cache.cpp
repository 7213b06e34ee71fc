#include "expert_cache.h"

#include <algorithm>
#include <chrono>
#include <iterator>

#include "data.h"
#include "pool.h"

namespace streamer {
namespace {

constexpr int file_shift = 44; // streamer.trace.FILE_SHIFT
constexpr double begun = 2; // guesses: one being read, one that is next

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

bool done(const ReadBatch& batch) {
  return batch.left.load(std::memory_order_acquire) == 0;
}

bool has(const std::vector<int>& sorted, int expert) {
  return std::binary_search(sorted.begin(), sorted.end(), expert);
}

std::vector<int> distinct(const int32_t* ids, int count) {
  std::vector<int> all(ids, ids + count);
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

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
  expected_.assign(layer_of_.size(), 0);
  named_.resize(layers_.size());
}

ExpertCache::~ExpertCache() {
  for (const auto& batch : under_way_) reads_->cancel(batch, true);
  wait();
}

std::shared_ptr<ReadBatch> ExpertCache::load(
    int layer, const int* experts, const int* slots, size_t count, std::optional<double> guess) {
  const CachedLayer& at = layers_[layer];
  std::vector<ReadPiece> pieces;
  for (size_t i = 0; i < count; ++i) {
    for (size_t t = 0; t < tensors_.size(); ++t) {
      const int64_t from = at.parts[t][experts[i]];
      pieces.push_back(
          {static_cast<int>(from >> file_shift), from & ((int64_t(1) << file_shift) - 1),
           tensors_[t].at + slots[i] * tensors_[t].nbytes, tensors_[t].nbytes});
    }
  }
  return reads_->submit(std::move(pieces), {}, guess);
}

bool ExpertCache::bring(
    int layer, const int32_t* ids, int rows, int k, int32_t* slots, std::vector<Coming>& coming) {
  check(layer >= 0 && layer < static_cast<int>(layers_.size()), "cache: there is no such layer");
  const CachedLayer& at = layers_[layer];
  const int count = rows * k;
  coming.clear();
  const std::vector<int> need = distinct(ids, count);
  const bool fits = need.front() >= 0 && need.back() < at.experts; // else of what is no number
  if (!fits || static_cast<int>(need.size()) > s_.slots ||
      rows >= static_cast<int>(rules_.ages.size())) {
    return false;
  }
  at_ = layer;
  need_ = need;
  early_ = false;
  chose(layer, ids, rows, k);
  std::fill_n(expected_.begin() + first_[layer], at.experts, 0);
  if (!ahead_.empty() || !wrong_.empty()) {
    const size_t held = ahead_.size() + wrong_.size();
    need.size() + held <= static_cast<size_t>(s_.slots) ? reclaim(false) : drop();
  }
  std::vector<int> misses, late;
  for (int expert : need) {
    if (at.slots[expert] < 0) misses.push_back(expert);
  }
  served_.hits += static_cast<int64_t>(need.size() - misses.size());
  served_.misses += static_cast<int64_t>(misses.size());
  if (watched) served_.told.push_back({layer, k, {ids, ids + count}, misses});
  score(layer, misses);
  const std::vector<Guessed> early = joined(layer, misses);
  auto comes = [&](const std::shared_ptr<ReadBatch>& batch, const std::vector<int>& experts) {
    Coming wave{{}, batch};
    for (int pair = 0; pair < count; ++pair) {
      if (has(experts, ids[pair])) wave.pairs.push_back(pair);
    }
    under_way_.push_back(batch);
    coming.push_back(std::move(wave));
  };
  for (size_t i = 0; i < early.size();) { // those of one batch lie together
    std::vector<int> experts;
    const auto& batch = early[i].batch;
    for (; i < early.size() && early[i].batch == batch; ++i) experts.push_back(early[i].expert);
    comes(batch, experts);
  }
  for (int expert : misses) {
    if (at.slots[expert] < 0) late.push_back(expert);
  }
  if (!late.empty()) {
    const std::vector<int> taken = freed(static_cast<int>(late.size()), layer, need);
    for (size_t i = 0; i < late.size(); i += rules_.wave) {
      const size_t n = std::min(late.size() - i, size_t(rules_.wave));
      for (size_t j = i; j < i + n; ++j) place(layer, late[j], taken[j]);
      comes(load(layer, &late[i], &taken[i], n, std::nullopt), {&late[i], &late[i] + n});
    }
  }
  if (!misses.empty()) {
    ++served_.waits;
    asked_ = bytes_ * static_cast<int64_t>(misses.size());
    since_ = now();
    early_ = !early.empty();
    beside_ = false;
    for (const auto* all : {&ahead_, &wrong_}) {
      for (const Guessed& one : *all) beside_ = beside_ || !done(*one.batch);
    }
  }
  ask();
  for (int i = 0; i < count; ++i) slots[i] = at.slots[ids[i]];
  return true;
}

bool ExpertCache::landed() {
  if (under_way_.empty()) return true;
  double seconds = 0;
  for (const auto& batch : under_way_) {
    while (!reads_->wait(*batch, 1)) {
    }
    if (batch->state != reading_fine) served_.failed = batch;
    seconds = std::max(seconds, batch->ended - batch->asked);
  }
  if (!early_) served_.demands.push_back({asked_, seconds, beside_});
  under_way_.clear();
  return served_.failed == nullptr;
}

bool ExpertCache::idle(bool end) const {
  if (!looking) return false;
  double unread = 0; // bytes, some of which may have been guessed long ago
  for (const auto& batch : under_way_) {
    const int left = batch->left.load(std::memory_order_acquire);
    if (!left) continue;
    for (const ReadRun& run : batch->runs) {
      unread += static_cast<double>(run.nbytes) * left / batch->runs.size();
    }
  }
  const double left = std::min(asked_ * looking->each - (now() - since_), unread * looking->each);
  // Where reading takes processors that rehearsing would have, as out of the page cache, what is
  // rehearsed comes later, and so do the reads.
  const double reading = reads_->processor() / looking->each;
  static const int processors = cores();
  const double share = std::min(1.0, (processors - reading) / threads());
  return left > 0 && left * share > (end ? looking->end : looking->layer);
}

void ExpertCache::rehearsed(double seconds) {
  served_.rehearsals.push_back(seconds);
  if (looking && !looking->layer) looking->layer = seconds;
}

void ExpertCache::ended(double seconds) {
  served_.end = seconds;
}

void ExpertCache::guess(int layer, const int32_t* ids, int count, bool next, int32_t* slots) {
  check(layer >= 0 && layer < static_cast<int>(layers_.size()), "cache: there is no such layer");
  const CachedLayer& at = layers_[layer];
  std::fill_n(slots, count, -1);
  const std::vector<int> chosen = distinct(ids, count);
  if (chosen.front() < 0 || chosen.back() >= at.experts) return; // of what is no number
  for (int expert : chosen) {
    if (at.slots[expert] >= 0) {
      expected_[first_[layer] + expert] = 1;
    } else if (!coming(layer, expert)) { // guessed in the pass before
      named_[layer].push_back({expert, false, next});
    }
  }
  ask();
  for (int i = 0; i < count; ++i) slots[i] = at.slots[ids[i]];
}

// Reads absent experts that were named, no more than the disk can begin with before a layer asks again:
// others would hold slots until then, from which experts had to go.
void ExpertCache::ask() {
  if (!looking || at_ < 0) return;
  const bool last = at_ + 1 == static_cast<int>(layers_.size());
  const double computing = looking->layer + (last ? looking->end : 0);
  double most = begun + computing / (looking->each * static_cast<double>(bytes_));
  for (const auto* all : {&ahead_, &wrong_}) {
    for (const Guessed& one : *all) most -= !done(*one.batch);
  }
  // what the waiting layer needs stays, and what rehearsed ones found
  const auto found = std::count(expected_.begin(), expected_.end(), 1);
  const double held = ahead_.size() + wrong_.size() + need_.size() + found;
  const auto named = soonest(std::min(most, s_.slots - held));
  const std::vector<int> own = freed(static_cast<int>(named.size()), at_, need_);
  for (size_t i = 0; i < named.size(); ++i) {
    const auto [layer, expert] = named[i];
    ahead_.push_back({layer, expert, own[i], load(layer, &expert, &own[i], 1, 0)});
  }
}

// Of the absent experts that were named and are not read yet the first ones, at most so many, which are
// read now: (layer, expert).
std::vector<std::pair<int, int>> ExpertCache::soonest(double most) {
  std::vector<std::pair<int, int>> all;
  const int count = static_cast<int>(layers_.size());
  for (int i = 1; i <= count; ++i) {
    const int layer = (at_ + i) % count;
    for (Named& one : named_[layer]) {
      const std::pair expert(layer, one.expert);
      const bool trusted = one.next ? looking->next : looking->reads;
      const bool absent = layers_[layer].slots[one.expert] < 0 && !coming(layer, one.expert);
      const bool twice = std::find(all.begin(), all.end(), expert) != all.end();
      if (one.read || !trusted || !absent || twice) continue;
      if (all.size() + 1 > most) return all;
      all.push_back(expert);
      one.read = true;
    }
  }
  return all;
}

bool ExpertCache::coming(int layer, int expert) const {
  return std::any_of(ahead_.begin(), ahead_.end(), [&](const Guessed& one) {
    return one.layer == layer && one.expert == expert;
  });
}

// The layer asks for these absent ones: what was said of it before.
void ExpertCache::score(int layer, const std::vector<int>& misses) {
  for (const Named& one : named_[layer]) {
    const bool right = has(misses, one.expert);
    Guesses& tally = served_.guesses[one.next];
    ++tally.named;
    tally.right += right;
    tally.read += one.read;
    tally.used += right && one.read;
  }
  named_[layer].clear();
}

// Those of them that are read ahead, now in the pool; what else was for this layer is not needed.
std::vector<Guessed> ExpertCache::joined(int layer, const std::vector<int>& misses) {
  std::vector<Guessed> found, others;
  size_t wrong = wrong_.size();
  for (Guessed& one : ahead_) {
    (one.layer != layer ? others : has(misses, one.expert) ? found : wrong_).push_back(std::move(one));
  }
  ahead_ = std::move(others);
  for (const Guessed& one : found) place(layer, one.expert, one.slot);
  for (; wrong < wrong_.size(); ++wrong) {
    const auto& batch = wrong_[wrong].batch;
    const bool shared = std::any_of(
        found.begin(), found.end(), [&](const Guessed& one) { return one.batch == batch; });
    if (!shared) reads_->cancel(batch);
  }
  for (const Guessed& one : found) reads_->promote(one.batch);
  return found;
}

// Slots of what was not needed: where its bytes have come they are kept until somebody needs the slot.
void ExpertCache::reclaim(bool wait) {
  std::vector<Guessed> left;
  for (Guessed& one : wrong_) {
    while (wait && !reads_->wait(*one.batch, 1)) {
    }
    if (!done(*one.batch)) {
      left.push_back(std::move(one));
      continue;
    }
    if (one.batch->state == reading_fine && layers_[one.layer].slots[one.expert] < 0) {
      place(one.layer, one.expert, one.slot);
    } else {
      s_.spare[s_.spares[0]++] = one.slot;
    }
  }
  wrong_ = std::move(left);
}

void ExpertCache::drop() {
  for (const Guessed& one : ahead_) reads_->cancel(one.batch);
  std::move(ahead_.begin(), ahead_.end(), std::back_inserter(wrong_));
  ahead_.clear();
  reclaim(true);
}

void ExpertCache::wait() {
  for (auto& named : named_) named.clear();
  std::fill(expected_.begin(), expected_.end(), 0);
  for (const auto& batch : under_way_) {
    while (!reads_->wait(*batch, 1)) {
    }
  }
  drop();
}

Served ExpertCache::take() {
  reclaim(false);
  need_.clear();
  at_ = -1;
  Served out;
  std::swap(out, served_);
  return out;
}

} // namespace streamer
