// Python's view of threads that move bytes: fastmerge/streaming/ring.py: Transfers.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "io/transfer.hpp"

namespace fastmerge {

namespace py = pybind11;
using nogil = py::gil_scoped_release;
using Listed = std::tuple<int, int, int64_t, int64_t, uintptr_t>;
using Word = std::pair<int, int64_t>;

/// The methods of `Transfers`, and of what stands in for it.
template <class T>
void bind_transfers(py::class_<T>& c) {
    c.def(
         "submit",
         [](T& t, const std::vector<Listed>& list, const std::vector<Word>& words) {
             if (!words.empty() && words.size() != list.size())
                 throw std::invalid_argument("submit: a word and start per segment");
             std::vector<Segment> segments;
             for (const auto& [fd, direct_fd, offset, n, address] : list)
                 segments.push_back({fd, direct_fd, offset, n, address});
             for (size_t i = 0; i < words.size(); ++i)
                 segments[i].word = words[i].first, segments[i].start = words[i].second;
             return t.submit(segments);
         },
         py::arg("segments"), py::arg("words") = std::vector<Word>{})
        .def("wait",
             [](T& t, int64_t ticket) {
                 TransferError e;
                 std::vector<uint64_t> sums;
                 {
                     nogil release;
                     e = t.wait(ticket, sums);
                 }
                 const auto error = py::make_tuple(e.code, e.segment.fd, e.segment.offset + e.done);
                 return py::make_tuple(e.failed ? py::object(error) : py::none(), sums);
             })
        .def("is_done", &T::is_done)
        .def_property_readonly("busy_seconds", &T::busy_seconds)
        .def("close", &T::close, py::call_guard<nogil>());
}

}  // namespace fastmerge
