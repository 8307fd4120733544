// fastmerge's simulated device and drive, for tests alone: tests/simulation.py builds and wraps them. What
// waits releases the GIL; std::runtime_error is RuntimeError, OutOfMemory MemoryError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "bindings/transfers.hpp"
#include "io/checksum.hpp"
#include "simulate/clock.hpp"
#include "simulate/device.hpp"
#include "simulate/disk.hpp"

namespace py = pybind11;
using namespace fastmerge;
using namespace fastmerge::simulate;

PYBIND11_MODULE(_simulated, m) {
    py::class_<Device>(m, "Device")
        .def(py::init([](double copy_in_bandwidth, double copy_out_bandwidth, int64_t memory_bytes,
                         double copy_latency, double launch_latency, double duplex, double pageable_bandwidth,
                         int64_t pin_limit, bool moves_data, double jitter_seconds, uint64_t seed) {
                 return new Device({copy_in_bandwidth, copy_out_bandwidth, memory_bytes, copy_latency,
                                    launch_latency, duplex, pageable_bandwidth, pin_limit, moves_data,
                                    jitter_seconds, seed});
             }),
             py::arg("copy_in_bandwidth"), py::arg("copy_out_bandwidth"), py::arg("memory_bytes"),
             py::kw_only(), py::arg("copy_latency") = 0.0, py::arg("launch_latency") = 0.0,
             py::arg("duplex") = 1.0, py::arg("pageable_bandwidth") = 0.0, py::arg("pin_limit") = INT64_MAX,
             py::arg("moves_data") = true, py::arg("jitter_seconds") = 0.0, py::arg("seed") = 0)
        .def("allocate", &Device::allocate)
        .def("release", &Device::release)
        .def("pin", &Device::pin)
        .def("unpin", &Device::unpin)
        .def("copy",
             [](Device& d, int stream, uintptr_t target, uintptr_t source, int64_t n) {
                 const int64_t event = d.copy(stream, target, source, n);
                 if (event < 0) return;
                 nogil release;
                 d.wait(event);
             })
        .def("compute", &Device::compute, py::arg("seconds"), py::arg("n_bytes") = 0)
        .def("mark", &Device::mark)
        .def("follow", &Device::follow)
        .def("wait", &Device::wait, py::call_guard<nogil>())
        .def("is_done", &Device::is_done)
        .def("synchronize", &Device::synchronize, py::call_guard<nogil>())
        .def("fail", &Device::fail, py::arg("stream"), py::arg("nth"), py::arg("message"))
        .def("fail_allocation", [](Device& d, int64_t nth) { d.memory().fail_allocation(nth); })
        .def("fail_pin", [](Device& d, int64_t nth) { d.memory().fail_pin(nth); })
        .def("spans",
             [](const Device& d) {
                 py::list all;
                 for (const Span& s : d.spans())
                     all.append(
                         py::make_tuple(s.stream, s.start, s.end, s.n_bytes, s.is_copy ? "copy" : "compute"));
                 return all;
             })
        .def_property_readonly("total_bytes", [](Device& d) { return d.memory().total(); })
        .def_property_readonly("used_bytes", [](Device& d) { return d.memory().used(); })
        .def_property_readonly("peak_bytes", [](Device& d) { return d.memory().peak(); })
        .def_property_readonly("pinned_bytes", [](Device& d) { return d.memory().pinned(); })
        .def("close", &Device::close, py::call_guard<nogil>());

    py::class_<Disk> disk(m, "Disk");
    disk.def(py::init([](bool writing, double bandwidth, double latency_seconds, int depth,
                         int64_t piece_bytes, bool moves_data, double jitter_seconds, uint64_t seed,
                         const Disk* shares) {
                 return new Disk({writing, bandwidth, latency_seconds, depth, piece_bytes, moves_data,
                                  jitter_seconds, seed},
                                 shares);
             }),
             py::arg("writing"), py::arg("bandwidth"), py::kw_only(), py::arg("latency_seconds") = 0.0,
             py::arg("depth") = 8, py::arg("piece_bytes") = int64_t(4) << 20, py::arg("moves_data") = true,
             py::arg("jitter_seconds") = 0.0, py::arg("seed") = 0, py::arg("shares") = nullptr)
        .def("fail", &Disk::fail, py::arg("nth"), py::arg("code"), py::arg("done") = 0)
        .def("spans", [](const Disk& d) {
            py::list all;
            for (const DiskSpan& s : d.spans()) all.append(py::make_tuple(s.start, s.end, s.n_bytes));
            return all;
        });
    bind_transfers(disk);

    // The production class, compiled with this module's sanitizers.
    py::class_<Transfers> transfers(m, "Transfers", py::module_local());
    transfers.def(py::init<bool, int>());
    bind_transfers(transfers);

    m.def("now", &now, "Seconds of the clock that spans are in.");
    // What a thread of the host does to memory, where sanitizers see it.
    m.def(
        "fill",
        [](uintptr_t address, int value, int64_t n) {
            std::memset(reinterpret_cast<void*>(address), value, size_t(n));
        },
        py::call_guard<nogil>());
    m.def(
        "checksum",
        [](uintptr_t address, int64_t n) {
            return checksum(reinterpret_cast<const void*>(address), n, 1, 0);
        },
        py::call_guard<nogil>());
}
