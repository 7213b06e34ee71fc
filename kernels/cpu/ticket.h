// Reads as Python holds them: an engine, and those of one call.
#pragma once

#include <nanobind/nanobind.h>

#include <functional>
#include <tuple>

#include "reads.h"

namespace streamer {

namespace nb = nanobind;

// Shared, since a ticket keeps its engine.
struct Engine {
  std::shared_ptr<Reads> reads;
};

// A batch and the buffers that it fills, which must not go while reads are under way.
struct Ticket {
  std::shared_ptr<Reads> reads;
  std::shared_ptr<ReadBatch> batch;
  nb::object held;

  Ticket(std::shared_ptr<Reads> r, std::shared_ptr<ReadBatch> b, nb::object h)
      : reads(std::move(r)), batch(std::move(b)), held(std::move(h)) {}
  Ticket(const Ticket&) = delete;
  ~Ticket() {
    if (done()) return;
    nb::gil_scoped_release free;
    reads->cancel(batch, true);
    while (!reads->wait(*batch, 1)) {
    }
  }

  bool done() const { return batch->left.load(std::memory_order_acquire) == 0; }

  // From when it was asked for until all was there.
  double seconds() const { return done() ? batch->ended - batch->asked : 0; }

  void wait() {
    while (!done()) {
      {
        nb::gil_scoped_release free;
        reads->wait(*batch, 0.1);
      }
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
    }
    if (batch->state == reading_fine) held.reset();
  }

  // State (0: fine, an errno, or of ReadState), and file, offset and bytes of the read it is about.
  std::tuple<int, int, int64_t, size_t> error() const {
    if (batch->state == reading_fine || batch->runs.empty()) return {batch->state, 0, 0, 0};
    const ReadRun& run = batch->runs[batch->failed];
    return {batch->state, run.file, run.offset, run.nbytes};
  }

  // What returns once all of it is there, or never will be: for ops, which must not touch Python.
  std::function<void()> waiting() const {
    return [reads = reads, batch = batch] {
      while (batch->left.load(std::memory_order_acquire) != 0) reads->wait(*batch, 0.1);
    };
  }
};

} // namespace streamer
