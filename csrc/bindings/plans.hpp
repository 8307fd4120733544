// The plans of core/plan.hpp as Python objects, the same in every compiled module: each owns what its plan
// points to.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "core/four_bit/format.hpp"
#include "core/plan.hpp"

namespace py = pybind11;

namespace fastmerge {
namespace {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Longs = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

inline DType dtype_of(int code) {
    if (code < 0 || code > int(DType::Coded)) throw std::invalid_argument("unknown dtype code");
    return DType(code);
}

/// A coded tensor by the names of format.hpp; memory is borrowed, as everywhere.
struct PyCoded {
    Coded view;

    explicit PyCoded(const py::kwargs& given) {
        for (const auto& [key, value] : given) set(key.cast<std::string>(), value);
        const int64_t end = view.rows * view.cols;
        if (view.rows < 1 || view.cols < 1 || view.first < view.origin || view.origin < 0 || view.first > end)
            throw std::invalid_argument("coded: sizes do not fit");
    }

  private:
    template <class T>
    static T* at(const py::handle& value) {
        return reinterpret_cast<T*>(value.cast<uintptr_t>());
    }
    void set(const std::string& key, const py::handle& value) {
        if (key == "format")
            view.format = Format(value.cast<int>());
        else if (key == "type")
            view.type = dtype_of(value.cast<int>());
        else if (key == "scale_type")
            view.scale_type = ScaleType(value.cast<int>());
        else if (key == "group")
            view.group = value.cast<int32_t>();
        else if (key == "group_rows")
            view.group_rows = value.cast<int32_t>();
        else if (key == "symmetric")
            view.symmetric = value.cast<bool>();
        else if (key == "v1")
            view.v1 = value.cast<bool>();
        else if (key == "other_rule")
            view.other_rule = value.cast<bool>();
        else if (key == "search")
            view.search = value.cast<bool>();
        else if (key == "rotary")
            view.rotary = value.cast<int32_t>();
        else if (key == "rows")
            view.rows = value.cast<int64_t>();
        else if (key == "cols")
            view.cols = value.cast<int64_t>();
        else if (key == "origin")
            view.origin = value.cast<int64_t>();
        else if (key == "first")
            view.first = value.cast<int64_t>();
        else if (key == "codes")
            view.codes = at<uint8_t>(value);
        else if (key == "scales")
            view.scales = at<uint8_t>(value);
        else if (key == "zeros")
            view.zeros = at<uint8_t>(value);
        else if (key == "nested")
            view.nested = at<const float>(value);
        else if (key == "nested_offset")
            view.nested_offset = value.cast<float>();
        else if (key == "tensor_scale")
            view.tensor_scale = value.cast<float>();
        else if (key == "group_of")
            view.group_of = at<const int32_t>(value);
        else if (key == "low_a")
            view.low_a = at<const void>(value);
        else if (key == "low_b")
            view.low_b = at<const void>(value);
        else if (key == "low_type")
            view.low_type = dtype_of(value.cast<int>());
        else if (key == "rank")
            view.rank = value.cast<int32_t>();
        else if (key == "low_scale")
            view.low_scale = value.cast<float>();
        else
            throw std::invalid_argument("coded: no field " + key);
    }
};

/// Operands with the storage behind their pointer arrays.
struct PyOperands {
    std::vector<const void*> experts;
    std::vector<DType> types;
    py::list coded;  // keeps the descriptions alive that coded operands are given as
    Operands view;

    PyOperands(uintptr_t base, int base_type, const std::vector<uintptr_t>& addresses,
               const std::vector<int>& codes, int64_t start, int64_t n, int64_t cols, py::list owned)
        : coded(owned) {
        if (addresses.size() != codes.size() || start < 0 || n < 0 || cols < 1)
            throw std::invalid_argument("operands: sizes do not fit");
        for (const uintptr_t a : addresses) experts.push_back(reinterpret_cast<const void*>(a));
        for (const int c : codes) types.push_back(dtype_of(c));
        view.base = reinterpret_cast<const void*>(base);
        view.base_type = dtype_of(base_type);
        view.expert = experts.data(), view.expert_type = types.data();
        view.n_experts = int(experts.size());
        view.start = start, view.n = n, view.cols = cols;
    }
    PyOperands(const PyOperands&) = delete;
};

/// A Keep that owns its arrays.
struct PyKeep {
    Keep plan;
    std::vector<py::object> owned;
    std::vector<double> low, high;
    std::vector<uint64_t> key;
    std::vector<const uint8_t*> given;

    void cut(const std::string& which, Doubles value, Longs last_tie, int axis) {
        if (value.ndim() != 2 || last_tie.ndim() != 2 || value.size() != last_tie.size())
            throw std::invalid_argument("cut: value and last_tie must be [K, units]");
        if (axis != int(Axis::Tensor) && axis != int(Axis::Row))
            throw std::invalid_argument("cut: one per tensor or per row");
        Cut& c = which == "trim" ? plan.trim : which == "remove" ? plan.remove : plan.select;
        c = {value.data(), last_tie.data(), value.shape(1), Axis(axis)};
        owned.push_back(value), owned.push_back(last_tie);
    }
    void drop(int kind, std::vector<double> lo, std::vector<double> hi, std::vector<uint64_t> keys, int axis,
              bool by_value, bool rescale) {
        low = std::move(lo), high = std::move(hi), key = std::move(keys);
        if (low.size() != key.size() || high.size() != key.size())
            throw std::invalid_argument("drop: one probability and key per expert");
        plan.drop = DropKind(kind);
        plan.p_low = low.data(), plan.p_high = high.data(), plan.key = key.data();
        plan.drop_axis = Axis(axis), plan.by_value = by_value, plan.rescale = rescale;
    }
    void masks(const std::vector<uintptr_t>& addresses) {
        given.clear();
        for (const uintptr_t a : addresses) given.push_back(reinterpret_cast<const uint8_t*>(a));
        plan.given = given.data();
    }
};

struct PyWalk {
    WalkPlan plan;
    py::object keep;  // keeps the arrays of plan.keep alive
    Doubles coefficient;
    std::vector<double> vote_scale, divisor_weight;

    PyWalk(py::object keep_object, Doubles c, int axis, int vote, int on_zero, std::vector<double> scale,
           bool take_max, int divide, double divisor, std::vector<double> weight, double floor, double lambda,
           bool add_base)
        : keep(keep_object), coefficient(c), vote_scale(std::move(scale)), divisor_weight(std::move(weight)) {
        if (c.ndim() != 2) throw std::invalid_argument("coefficient must be [K, units]");
        plan.keep = keep.cast<PyKeep&>().plan;
        plan.coefficient = coefficient.data(), plan.units = coefficient.shape(1);
        plan.axis = Axis(axis), plan.vote = Vote(vote), plan.on_zero = OnZero(on_zero);
        plan.vote_scale = vote_scale.empty() ? nullptr : vote_scale.data();
        plan.take_max = take_max, plan.divide = Divide(divide), plan.divisor = divisor;
        plan.divisor_weight = divisor_weight.empty() ? nullptr : divisor_weight.data();
        plan.floor = floor, plan.lambda = lambda, plan.add_base = add_base;
    }
};

inline void check(const Keep& keep, const PyOperands& in) {
    const int64_t n = in.view.n, cols = in.view.cols;
    const bool rows = keep.drop == DropKind::Ranked && keep.drop_axis == Axis::Row;
    if (rows && (n % cols || in.view.start % cols))
        throw std::invalid_argument("a ranked drop needs whole rows");
}

inline void bind_plans(py::module_& m) {
    py::class_<PyCoded>(m, "Coded", py::module_local())
        .def(py::init<const py::kwargs&>())
        .def_property_readonly("address",
                               [](const PyCoded& c) { return reinterpret_cast<uintptr_t>(&c.view); });
    py::class_<PyOperands>(m, "Operands", py::module_local())
        .def(py::init<uintptr_t, int, const std::vector<uintptr_t>&, const std::vector<int>&, int64_t,
                      int64_t, int64_t, py::list>(),
             py::arg("base"), py::arg("base_type"), py::arg("addresses"), py::arg("types"), py::arg("start"),
             py::arg("n"), py::arg("cols"), py::arg("coded") = py::list());
    py::class_<PyKeep>(m, "Keep", py::module_local())
        .def(py::init<>())
        .def("cut", &PyKeep::cut)
        .def("drop", &PyKeep::drop)
        .def("masks", &PyKeep::masks);
    py::class_<PyWalk>(m, "Walk", py::module_local())
        .def(py::init<py::object, Doubles, int, int, int, std::vector<double>, bool, int, double,
                      std::vector<double>, double, double, bool>());
}

}  // namespace
}  // namespace fastmerge
