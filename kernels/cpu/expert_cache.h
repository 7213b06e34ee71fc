// A pool's experts brought into its slots in the middle of a pass: what streamer.residency and
// streamer.lrfu do, to the bit, on their own arrays.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "moe.h"
#include "reads.h"

namespace streamer {

// Of a layer: which slot each expert lies in, -1 where it is absent, and where on disk each part of
// it begins (file << 44 | offset).
struct CachedLayer {
  int32_t* slots;
  int experts;
  std::vector<const int64_t*> parts;
};

// One tensor of all slots: that of slot s is the nbytes at `at` + s * nbytes.
struct SlotTensor {
  char* at;
  size_t nbytes;
};

// Arrays of the pool. By expert, all layers': heat, uses; by slot: held (an expert, -1: none), spare
// (a stack of `spares[0]` slots); by layer: resident. turns: [layers, layers].
struct CacheState {
  double* heat;
  int64_t* uses;
  int64_t* held;
  int32_t* spare;
  int64_t* spares;
  int64_t* resident;
  const double* turns;
  int slots;
};

// ages[r]: what a row counts r rows later; share: 1 - ages[1]; never: the least share of rows;
// wave: experts that are waited for together.
struct CacheRules {
  std::vector<double> ages;
  double share, never;
  int wave;
};

// Experts that a layer waits for.
struct Coming {
  std::vector<int> pairs;
  std::shared_ptr<ReadBatch> batch;
};

// A layer's choice, kept for whoever watches.
struct Told {
  int layer, k;
  std::vector<int32_t> ids, missed;
};

// What has come of it since it was asked last.
struct Served {
  int64_t hits = 0, misses = 0, waits = 0;
  std::vector<std::pair<int64_t, double>> demands; // bytes that a layer waited for, seconds they took
  std::vector<Told> told;
  std::shared_ptr<ReadBatch> failed; // a read; what was computed with it is nothing
};

class ExpertCache {
 public:
  ExpertCache(
      std::shared_ptr<Reads> reads,
      std::vector<CachedLayer> layers,
      std::vector<SlotTensor> tensors,
      CacheState state,
      CacheRules rules);
  ~ExpertCache(); // once nothing is being read

  // A layer's router chose ids [rows, k]: their slots, absent ones taken from what is needed last and
  // being read. False if it is no choice of this layer's, or more than the pool holds.
  bool bring(int layer, const int32_t* ids, int rows, int k, int32_t* slots, std::vector<Coming>& coming);
  // What the last call brought is there and used. False if a read failed.
  bool landed();
  void wait() const; // nothing of it is being read any more
  Served take();

  bool watched = false; // whether choices are kept

  const std::shared_ptr<Reads>& reads() const {
    return reads_;
  }

 private:
  void chose(int layer, const int32_t* ids, int rows, int k);
  std::vector<int> freed(int count, int layer, const std::vector<int>& keep);
  void evict(int slot);

  std::shared_ptr<Reads> reads_;
  std::vector<CachedLayer> layers_;
  std::vector<SlotTensor> tensors_;
  CacheState s_;
  CacheRules rules_;
  std::vector<int> first_, layer_of_; // of all experts: each layer's first, each one's layer
  std::vector<double> rows_; // scratch
  std::vector<std::shared_ptr<ReadBatch>> under_way_;
  int64_t bytes_ = 0, asked_ = 0; // of an expert; of what is under way
  Served served_;
};

} // namespace streamer
