// kernels.native.Reads: what Python sees of reads.h.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "ticket.h"

namespace nb = nanobind;
using namespace nb::literals;

using streamer::Engine;
using streamer::Ticket;

namespace {

// The memory of a buffer that its owner keeps for as long as `held` lives.
std::pair<char*, size_t> memory(nb::handle buffer, bool writable) {
  Py_buffer view;
  if (PyObject_GetBuffer(buffer.ptr(), &view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) {
    throw nb::python_error();
  }
  std::pair<char*, size_t> found{static_cast<char*>(view.buf), static_cast<size_t>(view.len)};
  PyBuffer_Release(&view);
  return found;
}

Ticket* submit(
    const std::shared_ptr<streamer::Reads>& self, nb::sequence pieces, nb::sequence widen,
    std::optional<double> guess) {
  std::vector<streamer::ReadPiece> wanted;
  for (nb::handle piece : pieces) {
    auto [at, nbytes] = memory(piece[2], true);
    wanted.push_back({nb::cast<int>(piece[0]), nb::cast<int64_t>(piece[1]), at, nbytes});
  }
  std::vector<streamer::Widening> widenings;
  for (nb::handle one : widen) {
    auto [from, stored] = memory(one[0], false);
    auto [to, held] = memory(one[1], true);
    if (held != 2 * stored) throw std::invalid_argument("widening takes twice the bytes");
    widenings.push_back(
        {reinterpret_cast<const uint16_t*>(from), reinterpret_cast<float*>(to), stored / 2,
         nb::cast<bool>(one[2])});
  }
  nb::object held = nb::make_tuple(pieces, widen);
  auto batch = self->submit(std::move(wanted), std::move(widenings), guess);
  return new Ticket(self, std::move(batch), std::move(held));
}

}  // namespace

void bind_reads(nb::module_& m) {
  nb::class_<Ticket>(m, "ReadTicket")
      .def_prop_ro("done", &Ticket::done)
      .def_prop_ro("seconds", &Ticket::seconds)
      .def("wait", &Ticket::wait, "Until nothing of it is under way any more.")
      .def("error", &Ticket::error)
      .def("promote", [](Ticket& t) { t.reads->promote(t.batch); })
      .def("cancel", [](Ticket& t) { t.reads->cancel(t.batch); });
  nb::class_<Engine>(m, "Reads")
      .def(
          "__init__",
          [](Engine* self, std::vector<int> fds, int threads, bool direct, bool drop_behind,
             size_t block, size_t gap, size_t chunk_min, size_t chunk_max, double bandwidth,
             double latency, size_t guess_bytes) {
            streamer::ReadOptions options{
                threads, direct, drop_behind, block, gap, chunk_min, chunk_max, bandwidth, latency,
                guess_bytes};
            new (self) Engine{std::make_shared<streamer::Reads>(std::move(fds), options)};
          },
          "fds"_a, nb::kw_only(), "threads"_a, "direct"_a, "drop_behind"_a, "block"_a, "gap"_a,
          "chunk_min"_a, "chunk_max"_a, "bandwidth"_a, "latency"_a, "guess_bytes"_a)
      .def(
          "submit",
          [](Engine& self, nb::sequence pieces, nb::sequence widen, std::optional<double> guess) {
            return submit(self.reads, pieces, widen, guess);
          },
          "pieces"_a, "widen"_a, "guess"_a = nb::none(), nb::rv_policy::take_ownership,
          "Queue reads of (file, offset, buffer), then widen (from, to, bfloat16 or not).")
      .def(
          "stop",
          [](Engine& self) {
            nb::gil_scoped_release free;
            self.reads->stop();
          })
      .def_prop_ro("bytes_read", [](Engine& self) { return self.reads->bytes_read.load(); })
      .def_prop_ro("reads", [](Engine& self) { return self.reads->reads.load(); })
      .def_prop_rw(
          "guess_bytes", [](Engine& self) { return self.reads->guess_bytes.load(); },
          [](Engine& self, size_t n) { self.reads->set_guess_bytes(n); })
      .def_prop_rw(
          "logging", [](Engine& self) { return self.reads->logging.load(); },
          [](Engine& self, bool on) { self.reads->set_logging(on); })
      .def("take_log", [](Engine& self) {
        const auto log = self.reads->take_log();
        return nb::bytes(reinterpret_cast<const char*>(log.data()), log.size() * sizeof(log[0]));
      });
}
