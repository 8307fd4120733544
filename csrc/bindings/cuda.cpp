// fastmerge._cuda: addresses, sizes and a stream in; launches out. Memory is the caller's and on the device;
// nothing here allocates there, or waits. A launch that fails raises RuntimeError with CUDA's own words.
#include <string>

#include "bindings/plans.hpp"
#include "core/philox.hpp"
#include "cuda/batch.hpp"
#include "cuda/fused.hpp"
#include "cuda/quant4.hpp"
#include "cuda/select.hpp"
#include "cuda/stats.hpp"

// The module's name; the emulated build has another.
#ifndef FM_MODULE
#define FM_MODULE _cuda
#endif

using namespace fastmerge;

namespace {

/// A coded result and how it is cut; memory is borrowed.
struct PyResult {
    CodedResult plan;

    PyResult(const PyCoded& coded, const PyOperands& in) : plan(cuda::plan_result(coded.view, in.view)) {}
    int64_t tile_bytes() const { return plan.most_blocks * plan.tile() * int64_t(sizeof(float)); }
    int64_t scratch_bytes() const { return tile_bytes() + plan.rows * plan.cols * itemsize(plan.type); }
    void place(uintptr_t scratch, uintptr_t residual) {
        if (scratch_bytes() > 0 && !scratch) throw std::invalid_argument("result: no scratch");
        plan.scratch = reinterpret_cast<float*>(scratch);
        plan.values = reinterpret_cast<void*>(scratch + uintptr_t(tile_bytes()));
        plan.residual = reinterpret_cast<double*>(residual);
    }
};

/// A batch with the Python objects that its plans live in until it is written, and then its image.
struct PyBatch {
    Batch batch;
    std::vector<py::object> owned;
    Kind kind;  // of the first job: what statistics are over

    void add(const WalkPlan& plan, py::object plan_object, py::object operands, bool is_f64, uintptr_t kept,
             int64_t stride, uintptr_t rank, uintptr_t low, uintptr_t high, int64_t unit, uintptr_t out,
             int out_type, uintptr_t bad) {
        const auto& in = operands.cast<const PyOperands&>();
        if (in.view.n_experts > 0 && plan.coefficient && plan.units < 1)
            throw std::invalid_argument("walk: no coefficients");
        Job job;
        job.plan = plan, job.in = in.view;
        job.ranks.kept = reinterpret_cast<const uint64_t*>(kept), job.ranks.stride = stride;
        job.ranks.rank = reinterpret_cast<const uint32_t*>(rank);
        job.ranks.low = reinterpret_cast<const double*>(low);
        job.ranks.high = reinterpret_cast<const double*>(high);
        job.ranks.unit = unit;
        job.out = reinterpret_cast<void*>(out), job.out_type = dtype_of(out_type);
        job.bad = reinterpret_cast<int32_t*>(bad);
        if (batch.n_jobs() == 0) kind = {is_f64, has_coded(job.in)};
        owned.push_back(plan_object), owned.push_back(operands);
        batch.add(job, is_f64);
    }
    const Job* job() const {
        if (batch.jobs() == nullptr || batch.n_jobs() == 0) throw std::invalid_argument("batch: not filled");
        return batch.jobs();
    }
    const Operands& in() const { return batch.job(0).in; }
};

/// The device and stream of a call.
struct Queue {
    int device;
    uintptr_t stream;
};

template <class F>
void on(const Queue& q, F&& launch_all) {
    const device_guard guard(q.device);
    cudaError_t status = guard.status;
    if (status == cudaSuccess) status = launch_all(reinterpret_cast<cudaStream_t>(q.stream));
    if (status != cudaSuccess)
        throw std::runtime_error("cuda:" + std::to_string(q.device) + ": " + cudaGetErrorString(status));
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(FM_MODULE, m) {
    m.doc() = "fastmerge CUDA kernels: see csrc/cuda and docs/numerics.md";
    bind_plans(m);

    m.attr("PIECE") = PIECE_ELEMENTS;
    m.attr("SEGMENT") = SEGMENT;
    m.attr("BLOCK") = BLOCK;
    m.attr("TREE_GROUP") = cuda::TREE_GROUP;
    m.attr("SAMPLE") = cuda::SAMPLE;
    m.attr("MOST_BETWEEN") = cuda::MOST_BETWEEN;
    m.attr("BRACKET_BYTES") = sizeof(cuda::Bracket);
    m.attr("INSIDE_BYTES") = sizeof(cuda::Inside);
    m.attr("DIGIT_BINS") = cuda::DIGIT_BINS;
    m.def("n_digits", &cuda::n_digits);
    PYBIND11_NUMPY_DTYPE(Target, rank, prefix, piece, open, value, last_tie);
    m.attr("target_dtype") = py::dtype::of<Target>();

    py::class_<Queue>(m, "Queue").def(py::init<int, uintptr_t>());
    py::class_<PyResult>(m, "Result")
        .def(py::init<const PyCoded&, const PyOperands&>())
        .def_property_readonly("tiles", [](const PyResult& r) { return r.plan.tiles; })
        .def_property_readonly("scratch_bytes", &PyResult::scratch_bytes)
        .def("place", &PyResult::place);
    py::class_<PyBatch>(m, "Batch")
        .def(py::init<>())
        .def("add_walk",
             [](PyBatch& b, py::object walk, py::object operands, bool f64, uintptr_t kept, int64_t stride,
                uintptr_t rank, uintptr_t low, uintptr_t high, int64_t unit, uintptr_t out, int out_type,
                uintptr_t bad) {
                 const auto& w = walk.cast<const PyWalk&>();
                 const auto& in = operands.cast<const PyOperands&>();
                 check(w.plan.keep, in);
                 if (w.plan.add_base && !in.view.base) throw std::invalid_argument("walk: no base to add to");
                 if (!out || !bad) throw std::invalid_argument("walk: no place for its result");
                 b.add(w.plan, walk, operands, f64, kept, stride, rank, low, high, unit, out, out_type, bad);
             })
        .def("add_walk_coded",
             [](PyBatch& b, py::object walk, py::object operands, bool f64, uintptr_t kept, int64_t stride,
                uintptr_t rank, uintptr_t low, uintptr_t high, int64_t unit, py::object result,
                uintptr_t bad) {
                 const auto& w = walk.cast<const PyWalk&>();
                 const auto& in = operands.cast<const PyOperands&>();
                 check(w.plan.keep, in);
                 if (w.plan.add_base && !in.view.base) throw std::invalid_argument("walk: no base to add to");
                 if (!bad) throw std::invalid_argument("walk: no place for its result");
                 const auto at = reinterpret_cast<uintptr_t>(&result.cast<const PyResult&>().plan);
                 b.owned.push_back(result);
                 b.add(w.plan, walk, operands, f64, kept, stride, rank, low, high, unit, at,
                       int(DType::Coded), bad);
             })
        .def("add_walk_plan",  // for a statistic that goes by a walk's plan
             [](PyBatch& b, py::object walk, py::object operands, bool f64, uintptr_t kept, int64_t stride,
                uintptr_t rank, uintptr_t low, uintptr_t high, int64_t unit) {
                 const auto& w = walk.cast<const PyWalk&>();
                 check(w.plan.keep, operands.cast<const PyOperands&>());
                 b.add(w.plan, walk, operands, f64, kept, stride, rank, low, high, unit, 0, 1, 0);
             })
        .def("add_keep",
             [](PyBatch& b, py::object keep, py::object operands, bool f64, uintptr_t kept, int64_t stride,
                uintptr_t rank, uintptr_t low, uintptr_t high, int64_t unit) {
                 WalkPlan plan;
                 plan.keep = keep.cast<const PyKeep&>().plan;
                 check(plan.keep, operands.cast<const PyOperands&>());
                 b.add(plan, keep, operands, f64, kept, stride, rank, low, high, unit, 0, 1, 0);
             })
        .def("size", [](const PyBatch& b) { return b.batch.size(); })
        .def("fill", [](PyBatch& b, uintptr_t host, uintptr_t device, py::object owner) {
            b.batch.fill(at<void>(host), device);
            b.owned = {owner};  // of the device memory: it lives as long as the batch
        });

    m.def("walk", [](const Queue& q, const PyBatch& b) {
        on(q, [&](cudaStream_t s) { return cuda::run_walks(b.batch, s); });
    });
    m.def("walk_peak", [](const Queue& q, const PyBatch& b, int type, uintptr_t found) {
        on(q, [&](cudaStream_t s) {
            return cuda::walk_peak(b.job(), b.in(), b.kind.f64, dtype_of(type), at<uint32_t>(found), s);
        });
    });
    m.def("keep_mask", [](const Queue& q, const PyBatch& b, uintptr_t mask) {
        on(q,
           [&](cudaStream_t s) { return cuda::keep_mask(b.job(), b.in().n, b.kind, at<uint8_t>(mask), s); });
    });
    m.def("keep_bits", [](const Queue& q, const PyBatch& b, uintptr_t bits, int64_t words) {
        on(q, [&](cudaStream_t s) {
            return cuda::keep_bits(b.job(), b.in().n, b.kind, at<uint64_t>(bits), words, s);
        });
    });
    m.def("keep_probability", [](const Queue& q, const PyBatch& b, uintptr_t p) {
        on(q, [&](cudaStream_t s) {
            return cuda::keep_probability(b.job(), b.in().n, b.kind, at<double>(p), s);
        });
    });
    m.def("sign_balance", [](const Queue& q, const PyBatch& b, uintptr_t balance) {
        on(q, [&](cudaStream_t s) {
            return cuda::sign_balance(b.job(), b.in().n, b.kind, at<unsigned long long>(balance), s);
        });
    });
    m.def("moment_leaves", [](const Queue& q, const PyBatch& b, bool square, int64_t total, uintptr_t leaves,
                              uintptr_t carried, uintptr_t carry) {
        on(q, [&](cudaStream_t s) {
            return cuda::moment_leaves(b.job(), square, b.in(), b.kind, total, at<double>(leaves),
                                       at<const double>(carried), at<double>(carry), s);
        });
    });
    m.def("largest", [](const Queue& q, const PyBatch& b, uintptr_t keys) {
        on(q, [&](cudaStream_t s) {
            return cuda::largest(b.job(), b.in(), b.kind, at<unsigned long long>(keys), s);
        });
    });
    m.def("gram_leaves", [](const Queue& q, const PyBatch& b, int axis, int64_t total, uintptr_t leaves,
                            uintptr_t carried, uintptr_t carry) {
        on(q, [&](cudaStream_t s) {
            return cuda::gram_leaves(b.job(), Axis(axis), b.in(), b.kind, total, at<double>(leaves),
                                     at<const double>(carried), at<double>(carry), s);
        });
    });
    m.def("sum_tree", [](const Queue& q, uintptr_t leaves, int64_t n_units, int64_t n_leaves, int64_t width,
                         uintptr_t nodes, uintptr_t sums) {
        on(q, [&](cudaStream_t s) {
            return cuda::sum_tree(at<const double>(leaves), n_units, n_leaves, width, at<double>(nodes),
                                  at<double>(sums), s);
        });
    });
    m.def("extremes", [](const Queue& q, const PyBatch& b, int64_t unit, uintptr_t low, uintptr_t high) {
        on(q, [&](cudaStream_t s) {
            return cuda::extremes(b.job(), b.in(), b.kind, unit, at<double>(low), at<double>(high), s);
        });
    });

    using cuda::Selection;
    py::class_<Selection>(m, "Selection")
        .def(py::init([](int n_keys, int n_ranks, bool all_ties, bool f64, double fraction, uintptr_t targets,
                         uintptr_t bins, uintptr_t nonzero, uintptr_t equal, int64_t n, int64_t n_pieces,
                         uintptr_t sample, uintptr_t brackets, uintptr_t inside, uintptr_t between) {
            return Selection{n_keys,
                             n_ranks,
                             all_ties,
                             f64,
                             fraction,
                             at<Target>(targets),
                             at<unsigned long long>(bins),
                             at<unsigned long long>(nonzero),
                             at<uint32_t>(equal),
                             n,
                             n_pieces,
                             at<uint32_t>(sample),
                             at<cuda::Bracket>(brackets),
                             at<cuda::Inside>(inside),
                             at<uint32_t>(between)};
        }));
    m.def("open_targets", [](const Queue& q, const Selection& s, uintptr_t ranks, int64_t units, int64_t n) {
        on(q, [&](cudaStream_t stream) {
            return cuda::open_targets(s, at<const int64_t>(ranks), units, n, stream);
        });
    });
    m.def("narrow", [](const Queue& q, const PyBatch& b, const Selection& s) {
        on(q, [&](cudaStream_t stream) { return cuda::narrow(b.job(), b.kind.coded, s, stream); });
    });
    m.def("count_digits", [](const Queue& q, const PyBatch& b, const Selection& s, int d) {
        on(q, [&](cudaStream_t stream) { return cuda::count_digits(b.job(), b.kind.coded, s, d, stream); });
    });
    m.def("choose_digits", [](const Queue& q, const Selection& s, int d) {
        on(q, [&](cudaStream_t stream) { return cuda::choose_digits(s, d, stream); });
    });
    m.def("count_equals", [](const Queue& q, const PyBatch& b, const Selection& s) {
        on(q, [&](cudaStream_t stream) { return cuda::count_equals(b.job(), b.kind.coded, s, stream); });
    });
    m.def("locate_ties", [](const Queue& q, const Selection& s) {
        on(q, [&](cudaStream_t stream) { return cuda::locate_ties(s, stream); });
    });
    m.def("find_ties", [](const Queue& q, const PyBatch& b, const Selection& s, int64_t offset) {
        on(q, [&](cudaStream_t stream) { return cuda::find_ties(b.job(), b.kind.coded, s, offset, stream); });
    });
    m.def("select_units",
          [](const Queue& q, const PyBatch& b, const Selection& s, int64_t unit, int64_t units) {
              on(q, [&](cudaStream_t stream) {
                  return cuda::select_units(b.job(), b.in(), b.kind.coded, s, unit, units, stream);
              });
          });
    m.def("order_keys", [](const Queue& q, const PyBatch& b, int first, int last, uintptr_t keys) {
        if (first < -1 || first > last || last > b.in().n_experts)
            throw std::invalid_argument("order_keys: no such experts");
        on(q, [&](cudaStream_t s) {
            return cuda::order_keys(b.job(), b.in(), b.kind, first, last, at<void>(keys), s);
        });
    });
    m.def("rank_scratch", [](const Queue& q, const PyBatch& b) {
        int64_t bytes = 0;
        on(q, [&](cudaStream_t) {
            bytes = cuda::rank_scratch(b.in(), b.kind.coded);
            return cudaSuccess;
        });
        return bytes;
    });
    m.def("rank_rows", [](const Queue& q, const PyBatch& b, uintptr_t ranks, uintptr_t scratch) {
        on(q, [&](cudaStream_t s) {
            return cuda::rank_rows(b.job(), b.in(), b.kind.coded, at<uint32_t>(ranks), at<void>(scratch), s);
        });
    });

    m.def("philox", [](const Queue& q, uintptr_t words) {  // in: counter and key; out: the four words
        on(q, [&](cudaStream_t s) { return cuda::philox_words(at<uint32_t>(words), s); });
    });
    m.def("device_count", [] {
        int n = 0;
        const cudaError_t status = cudaGetDeviceCount(&n);
        return py::make_tuple(status == cudaSuccess ? n : 0, status == cudaSuccess
                                                                 ? std::string()
                                                                 : std::string(cudaGetErrorString(status)));
    });
    m.def("built_for", [] { return FM_TARGETS; });
}
