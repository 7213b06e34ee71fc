// kernels.native.Choices: what routers chose, kept as it is told.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T>
nb::bytes taken(std::vector<T>& rows) {
  nb::bytes out(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(T));
  rows.clear();
  return out;
}

// A call is told in the middle of a pass, when little of this is in the core's caches: it is only held
// then, and read with its neighbours when the pass has ended.
class Choices {
 public:
  void add(int layer, nb::object ids, nb::object missed) {
    held_.push_back({layer, std::move(ids), std::move(missed)});
  }

  int64_t count() {
    read();
    return count_;
  }

  nb::tuple take() {
    read();
    return nb::make_tuple(taken(calls_), taken(ids_), taken(missed_));
  }

 private:
  struct Held {
    int layer;
    nb::object ids, missed;
  };

  void read() {
    if (held_.empty()) return;
    std::vector<Held> held;
    held.swap(held_);
    for (const Held& one : held) read(one);
    held.clear();
    if (held_.empty()) held.swap(held_);  // what it has room for is kept
  }

  void read(const Held& one) {
    Py_buffer view;
    nb::object ordered = one.ids;
    if (PyObject_GetBuffer(ordered.ptr(), &view, PyBUF_C_CONTIGUOUS) != 0) {
      PyErr_Clear();
      ordered = ordered.attr("copy")("C");
      if (PyObject_GetBuffer(ordered.ptr(), &view, PyBUF_C_CONTIGUOUS) != 0) throw nb::python_error();
    }
    bool fits = view.itemsize == 4 && view.ndim > 0;
    if (fits) {
      auto* from = static_cast<const uint32_t*>(view.buf);
      int count = static_cast<int>(view.len / 4), k = static_cast<int>(view.shape[view.ndim - 1]);
      for (int i = 0; i < count; ++i) ids_.push_back(static_cast<uint16_t>(from[i]));
      size_t before = missed_.size();
      for (nb::handle expert : one.missed) missed_.push_back(nb::cast<uint16_t>(expert));
      calls_.insert(calls_.end(), {one.layer, count, k, static_cast<int>(missed_.size() - before)});
    }
    PyBuffer_Release(&view);
    if (!fits) throw std::invalid_argument("ids have 32 bits and a dimension");
    ++count_;
  }

  std::vector<Held> held_;
  std::vector<int32_t> calls_;
  std::vector<uint16_t> ids_, missed_;
  int64_t count_ = 0;
};

}  // namespace

void bind_choices(nb::module_& m) {
  nb::class_<Choices>(m, "Choices")
      .def(nb::init<>())
      .def("add", &Choices::add, "layer"_a, "ids"_a, "missed"_a,
          "ids [..., k], missed: some of them; neither is to change until `count` is asked for.")
      .def_prop_ro("count", &Choices::count, "Of calls, those that were taken too.")
      .def(
          "take", &Choices::take,
          "Of the calls since the last time: layer, ids, k, missed (int32), ids, missed (uint16).");
}
