// A pool's experts brought into its slots in the middle of a pass: what streamer.residency and
// streamer.lrfu do, to the bit, on their own arrays; and what layers that are rehearsed meanwhile
// name is read ahead, as streamer.ahead does.
#pragma once

#include <memory>
#include <optional>
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

// An expert that is read before it is asked for, into a slot of its own.
struct Guessed {
  int layer, expert, slot;
  std::shared_ptr<ReadBatch> batch;
};

// Whether layers are rehearsed while one waits. each: seconds a byte of what is waited for; layer,
// end: seconds of a layer's rehearsal and of a pass's end (0: not known); reads, next: whether what
// this pass's and the next one's layers name is read.
struct Looking {
  double each, layer, end;
  bool reads, next;
};

// What a layer waited for; beside: while guesses were being read.
struct Demand {
  int64_t nbytes;
  double seconds;
  bool beside;
};

// Absent experts that rehearsed layers named: of these right, asked for then; read ahead, and of
// those used.
struct Guesses {
  int64_t named = 0, right = 0, read = 0, used = 0;
};

// A layer's choice, kept for whoever watches.
struct Told {
  int layer, k;
  std::vector<int32_t> ids, missed;
};

// What has come of it since it was asked last. rehearsals: seconds of each layer; end: of the pass's
// end, which waits excepted; guesses: of this pass's layers, and of the next one's.
struct Served {
  int64_t hits = 0, misses = 0, waits = 0;
  std::vector<Demand> demands;
  std::vector<Told> told;
  std::vector<double> rehearsals;
  double end = 0;
  Guesses guesses[2];
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

  // Whether there is time to rehearse a layer while what was brought last is being read; end: the last
  // of a pass, with all that follows.
  bool idle(bool end) const;
  // A layer was rehearsed and chose ids [count]: their slots, -1 for absent ones, which are read
  // ahead if there is room. next: in the next pass, whose layer must have been brought in this one.
  void guess(int layer, const int32_t* ids, int count, bool next, int32_t* slots);
  void rehearsed(double seconds);
  void ended(double seconds); // a pass's end took so long

  // Guesses are dropped, their slots free, and nothing is being read any more.
  void wait();
  // The pass is over: what came of it. Guesses about the next one hold their slots.
  Served take();

  bool watched = false; // whether choices are kept
  std::optional<Looking> looking;

  const std::shared_ptr<Reads>& reads() const {
    return reads_;
  }

 private:
  struct Named {
    int expert;
    bool read, next;
  };

  void chose(int layer, const int32_t* ids, int rows, int k);
  std::vector<int> freed(int count, int layer, const std::vector<int>& keep);
  void place(int layer, int expert, int slot);
  void evict(int slot);
  std::shared_ptr<ReadBatch> load(
      int layer, const int* experts, const int* slots, size_t count, std::optional<double> guess);
  void ask();
  std::vector<std::pair<int, int>> soonest(double most);
  bool coming(int layer, int expert) const;
  void score(int layer, const std::vector<int>& misses);
  std::vector<Guessed> joined(int layer, const std::vector<int>& misses);
  void reclaim(bool wait);
  void drop();

  std::shared_ptr<Reads> reads_;
  std::vector<CachedLayer> layers_;
  std::vector<SlotTensor> tensors_;
  CacheState s_;
  CacheRules rules_;
  std::vector<int> first_, layer_of_; // of all experts: each layer's first, each one's layer
  std::vector<double> rows_; // scratch
  std::vector<std::shared_ptr<ReadBatch>> under_way_;
  int64_t bytes_ = 0, asked_ = 0; // of an expert; of what is under way
  double since_ = 0; // when it was asked for
  bool early_ = false, beside_ = false; // some of it was guessed; guesses were being read
  int at_ = -1; // the layer that was brought last
  std::vector<int> need_; // and its experts
  std::vector<Guessed> ahead_, wrong_; // wrong: not needed, their slots not yet free
  std::vector<char> expected_; // of all experts: its layer was rehearsed and chose it
  std::vector<std::vector<Named>> named_; // by layer
  Served served_;
};

} // namespace streamer
