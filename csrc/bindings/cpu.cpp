// fastmerge._cpu: addresses, sizes and small float64 arrays in; results out. Checks live in fastmerge/ops.py;
// here only what would corrupt memory is checked again. The GIL is released around all work.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>

#include <stdexcept>

#include "bindings/plans.hpp"
#include "bindings/transfers.hpp"
#include "core/four_bit/encode.hpp"
#include "core/four_bit/nested.hpp"
#include "core/philox.hpp"
#include "cpu/four_bit.hpp"
#include "cpu/kernels.hpp"
#include "cpu/pool.hpp"
#include "cpu/sweeps.hpp"
#include "io/checksum.hpp"
#include "io/mapping.hpp"

namespace py = pybind11;
using namespace fastmerge;

namespace {

template <class T>
py::array_t<T> to_array(const std::vector<T>& v, std::vector<py::ssize_t> shape) {
    py::array_t<T> out(shape);
    std::copy(v.begin(), v.end(), out.mutable_data());
    return out;
}

/// Page-aligned anonymous memory, huge pages where the kernel gives them, returned to it when freed.
class Arena {
  public:
    explicit Arena(int64_t n_bytes) : n_bytes_(size_t(n_bytes > 0 ? n_bytes : 1)) {
        memory_ = mmap(nullptr, n_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                       -1, 0);
        if (memory_ == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(memory_, n_bytes_, MADV_HUGEPAGE);
#endif
    }
    ~Arena() { munmap(memory_, n_bytes_); }
    Arena(const Arena&) = delete;
    uintptr_t address() const { return reinterpret_cast<uintptr_t>(memory_); }

  private:
    size_t n_bytes_;
    void* memory_;
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "fastmerge CPU kernels: see csrc/cpu and docs/numerics.md";

    bind_plans(m);
    py::class_<Decided>(m, "Decided").def(py::init<int, int64_t>());
    m.def("walk",
          [](const PyWalk& w, const PyOperands& in, bool f64, Decided* known, uintptr_t out, int out_type) {
              check(w.plan.keep, in);
              if (w.plan.add_base && !in.view.base) throw std::invalid_argument("walk: no base to add to");
              bool bad = false;
              nogil release;
              run_walk(w.plan, in.view, f64, known, reinterpret_cast<void*>(out), dtype_of(out_type), &bad);
              return bad;
          });
    m.def("walk_coded",
          [](const PyWalk& w, const PyOperands& in, bool f64, Decided* known, const PyCoded& out) {
              check(w.plan.keep, in);
              if (w.plan.add_base && !in.view.base) throw std::invalid_argument("walk: no base to add to");
              bool bad = false;
              double residual[2];
              {
                  nogil release;
                  run_walk_coded(w.plan, in.view, f64, known, out.view, &bad, residual);
              }
              return py::make_tuple(bad, residual[0], residual[1]);
          });
    m.def("walk_peak", [](const PyWalk& w, const PyOperands& in, bool f64, Decided* known, int type) {
        check(w.plan.keep, in);
        if (w.plan.add_base && !in.view.base) throw std::invalid_argument("walk: no base to add to");
        bool bad = false;
        float peak = 0;
        {
            nogil release;
            peak = run_walk_peak(w.plan, in.view, f64, known, dtype_of(type), &bad);
        }
        return py::make_tuple(bad, peak);
    });
    m.def("keep_mask", [](const PyKeep& k, const PyOperands& in, bool f64) {
        check(k.plan, in);
        py::array_t<uint8_t> out({py::ssize_t(in.view.n_experts), py::ssize_t(in.view.n)});
        uint8_t* p = out.mutable_data();
        {
            nogil release;
            run_keep_mask(k.plan, in.view, f64, p);
        }
        return out;
    });
    m.def("keep_probability", [](const PyKeep& k, const PyOperands& in, bool f64) {
        check(k.plan, in);
        py::array_t<double> out({py::ssize_t(in.view.n_experts), py::ssize_t(in.view.n)});
        double* p = out.mutable_data();
        {
            nogil release;
            run_keep_probability(k.plan, in.view, f64, p);
        }
        return out;
    });
    m.def("sign_balance", [](const PyWalk& w, const PyOperands& in, bool f64) {
        check(w.plan.keep, in);
        nogil release;
        return run_sign_balance(w.plan, in.view, f64);
    });

    py::class_<OrderSweep>(m, "OrderSweep")
        .def(py::init([](int n_keys, bool variance, std::vector<std::vector<int64_t>> ranks, double fraction,
                         bool all_ties, bool by_row, int64_t n, int64_t cols, bool f64) {
            if (by_row && fraction >= 0)
                throw std::invalid_argument("a fraction of the nonzero elements is over a tensor");
            return new OrderSweep(
                OrderRequest{n_keys, variance, std::move(ranks), fraction, all_ties, by_row, n, cols, f64});
        }))
        .def("feed",
             [](OrderSweep& s, const PyOperands& in, int64_t offset) {
                 nogil release;
                 s.feed(in.view, offset);
             })
        .def("next_pass", &OrderSweep::next_pass, py::call_guard<nogil>())
        .def("result", [](const OrderSweep& s) {
            std::vector<std::vector<double>> value;
            std::vector<std::vector<int64_t>> last_tie;
            s.result(value, last_tie);
            py::list out;
            for (size_t r = 0; r < value.size(); ++r) {
                const std::vector<py::ssize_t> shape = {py::ssize_t(s.n_keys()), py::ssize_t(s.units())};
                out.append(py::make_tuple(to_array(value[r], shape), to_array(last_tie[r], shape)));
            }
            return out;
        });
    py::class_<MomentSweep>(m, "MomentSweep")
        .def(py::init(
            [](int of, int n_experts, bool f64) { return new MomentSweep(Moment(of), n_experts, f64); }))
        .def("feed",
             [](MomentSweep& s, const PyKeep& k, const PyOperands& in, Decided* known) {
                 check(k.plan, in);
                 nogil release;
                 s.feed(k.plan, in.view, known);
             })
        .def("result", [](MomentSweep& s) {
            const std::vector<double> values = s.result();
            return to_array(values, {py::ssize_t(values.size() / 2), 2});
        });
    py::class_<GramSweep>(m, "GramSweep")
        .def(py::init([](int k, int axis, int64_t n, int64_t cols, bool f64) {
            return new GramSweep(k, Axis(axis), n, cols, f64);
        }))
        .def("feed",
             [](GramSweep& s, const PyOperands& in) {
                 nogil release;
                 s.feed(in.view);
             })
        .def("result", [](GramSweep& s) {
            const std::vector<double> v = s.result();
            return to_array(v, {py::ssize_t(s.pairs()), py::ssize_t(s.units())});
        });

    m.def("decode", [](const PyCoded& c, int64_t n, uintptr_t out) {
        if (n < 0 || c.view.first + n > c.view.rows * c.view.cols)
            throw std::invalid_argument("decode: more elements than the tensor has");
        nogil release;
        run_decode(c.view, n, reinterpret_cast<float*>(out));
    });
    m.def("encode", [](const PyCoded& c, int64_t row, int64_t rows, uintptr_t x) {
        if (row < 0 || rows < 0 || row + rows > c.view.rows)
            throw std::invalid_argument("encode: more rows than the tensor has");
        if (!generic::encodes(c.view)) throw std::invalid_argument("encode: the format can only be read");
        nogil release;
        run_encode(c.view, row, rows, reinterpret_cast<const float*>(x));
    });
    m.def("encode_nested", [](uintptr_t absmax, int64_t blocks, float offset, bool cpu_table_rule,
                              uintptr_t codes, uintptr_t nested) {
        nogil release;
        generic::encode_nested(reinterpret_cast<const float*>(absmax), blocks, offset, cpu_table_rule,
                               reinterpret_cast<uint8_t*>(codes), reinterpret_cast<float*>(nested));
    });
    m.def("tensor_scale",
          [](const PyCoded& c, float peak) { return generic::tensor_scale_of(c.view, peak); });

    m.def("philox", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
        const generic::Philox4 r = generic::philox4x32_10(c0, c1, c2, c3, k0, k1);
        return py::make_tuple(r.w[0], r.w[1], r.w[2], r.w[3]);
    });
    m.def("set_threads", &set_threads, py::call_guard<nogil>());
    m.def("available_threads", &available_threads);
    m.def("isa", [] { return kernels().isa; });
    m.def("available_isas", &available_isas);
    m.def("set_isa", &set_isa);

    py::class_<Arena>(m, "Arena").def(py::init<int64_t>()).def_property_readonly("address", &Arena::address);
    m.def("checksum", [](const py::buffer& data, int word, int64_t start) {
        const py::buffer_info info = data.request();
        if (word != 1 && word != 2 && word != 4 && word != 8)
            throw std::invalid_argument("checksum: words have 1, 2, 4 or 8 bytes");
        nogil release;
        return checksum(info.ptr, int64_t(info.size * info.itemsize), word, start);
    });
    py::class_<Mapping>(m, "Mapping")
        .def(py::init<int, int64_t>())
        .def_property_readonly("address", &Mapping::address)
        .def("release", &Mapping::release, py::call_guard<nogil>());
    m.def("lost_pages", &lost_pages);
    py::class_<Transfers> transfers(m, "Transfers");
    transfers.def(py::init<bool, int>());
    bind_transfers(transfers);
}
