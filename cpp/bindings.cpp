// The kernels for Python. Checks stand in flatwater/kernels/*.py: here pointers are believed.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <string>
#include <vector>

#include "pool_bindings.h"
#include "problem.h"
#include "step_bindings.h"
#include "team.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flatwater {
namespace {

using Address = std::uintptr_t;

// A Problem that owns γ and β in double, whatever the dtype of the parameters.
struct Call {
    Problem problem{};
    std::vector<double> weight, bias;

    Call(int dtype, int activation, index outer, index channels, index inner, bool channels_last) {
        problem.dtype = static_cast<DType>(dtype);
        problem.activation = static_cast<Activation>(activation);
        problem.shape = {outer, channels, inner, channels_last};
        problem.groups = channels;
    }
};

std::vector<double> as_double(Address address, bool is_double, index size) {
    if (is_double) {
        const auto *values = reinterpret_cast<const double *>(address);
        return {values, values + size};
    }
    const auto *values = reinterpret_cast<const float *>(address);
    return {values, values + size};
}

void set_weight(Call &call, Address address, bool is_double) {
    call.weight = as_double(address, is_double, call.problem.shape.channels);
    call.problem.weight = call.weight.data();
}

void set_bias(Call &call, Address address, bool is_double) {
    call.bias = as_double(address, is_double, call.problem.shape.channels);
    call.problem.bias = call.bias.data();
}

// A writable property for each pointer of Problem, as an address; 0 is none.
template <auto member>
void def_pointer(nb::class_<Call> &type, const char *name) {
    using Pointer = std::remove_reference_t<decltype(std::declval<Problem &>().*member)>;
    type.def_prop_rw(
        name, [](const Call &call) { return reinterpret_cast<Address>(call.problem.*member); },
        [](Call &call, Address address) { call.problem.*member = reinterpret_cast<Pointer>(address); });
}

template <auto kernel>
void def_kernel(nb::module_ &m, const char *name) {
    m.def(
        name, [](const Call &call) { (isa().of(call.problem.dtype).*kernel)(call.problem); }, "call"_a,
        nb::call_guard<nb::gil_scoped_release>());
}

// Where a dense, writable or read-only array of `size` doubles begins; None if the object is none.
nb::object doubles(nb::handle array, index size) {
    Py_buffer view;
    if (PyObject_GetBuffer(array.ptr(), &view, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) != 0) {
        PyErr_Clear();
        return nb::none();
    }
    const bool fits = view.ndim == 1 && view.shape[0] == size && std::strcmp(view.format, "d") == 0;
    const auto address = reinterpret_cast<Address>(view.buf);
    PyBuffer_Release(&view);
    return fits ? nb::int_(address) : nb::object(nb::none());
}

template <class T>
void store_as(const double *values, Address target, index size) {
    for (index i = 0; i < size; ++i) reinterpret_cast<T *>(target)[i] = T(values[i]);
}

}  // namespace

NB_MODULE(_cpu, m) {
    nb::class_<Call> call(m, "Call");
    call.def(nb::init<int, int, index, index, index, bool>(), "dtype"_a, "activation"_a, "outer"_a, "channels"_a,
             "inner"_a, "channels_last"_a)
        .def("set_weight", &set_weight, "address"_a, "is_double"_a)
        .def("set_bias", &set_bias, "address"_a, "is_double"_a)
        .def_prop_rw(
            "groups", [](const Call &c) { return c.problem.groups; },
            [](Call &c, index groups) { c.problem.groups = groups; })
        .def_prop_rw(
            "epsilon", [](const Call &c) { return c.problem.epsilon; },
            [](Call &c, double epsilon) { c.problem.epsilon = epsilon; })
        .def_prop_rw(
            "count", [](const Call &c) { return c.problem.count; },
            [](Call &c, index count) { c.problem.count = count; });
    def_pointer<&Problem::x>(call, "x");
    def_pointer<&Problem::residual>(call, "residual");
    def_pointer<&Problem::dy>(call, "dy");
    def_pointer<&Problem::y>(call, "y");
    def_pointer<&Problem::dx>(call, "dx");
    def_pointer<&Problem::dresidual>(call, "dresidual");
    def_pointer<&Problem::mean>(call, "mean");
    def_pointer<&Problem::m2>(call, "m2");
    def_pointer<&Problem::inv_std>(call, "inv_std");
    def_pointer<&Problem::sum_dz>(call, "sum_dz");
    def_pointer<&Problem::sum_dz_xhat>(call, "sum_dz_xhat");

    def_kernel<&Kernels::batch_statistics>(m, "batch_statistics");
    def_kernel<&Kernels::batch_normalize>(m, "batch_normalize");
    def_kernel<&Kernels::batch_norm_forward>(m, "batch_norm_forward");
    def_kernel<&Kernels::batch_gradient_sums>(m, "batch_gradient_sums");
    def_kernel<&Kernels::batch_input_gradient>(m, "batch_input_gradient");
    def_kernel<&Kernels::batch_norm_backward>(m, "batch_norm_backward");
    def_kernel<&Kernels::group_statistics>(m, "group_statistics");
    def_kernel<&Kernels::group_normalize>(m, "group_normalize");
    def_kernel<&Kernels::group_norm_forward>(m, "group_norm_forward");
    def_kernel<&Kernels::group_norm_backward>(m, "group_norm_backward");

    m.def(
        "update_running",
        [](Address running_mean, Address running_variance, bool is_double, Address mean, Address m2, index channels,
           index count, double momentum, bool unbiased) {
            const auto *means = reinterpret_cast<const double *>(mean), *m2s = reinterpret_cast<const double *>(m2);
            if (is_double)
                update_running(reinterpret_cast<double *>(running_mean), reinterpret_cast<double *>(running_variance),
                               means, m2s, channels, count, momentum, unbiased);
            else
                update_running(reinterpret_cast<float *>(running_mean), reinterpret_cast<float *>(running_variance),
                               means, m2s, channels, count, momentum, unbiased);
        },
        "running_mean"_a, "running_variance"_a, "is_double"_a, "mean"_a, "m2"_a, "channels"_a, "count"_a, "momentum"_a,
        "unbiased"_a);
    m.def(
        "store",
        [](Address values, Address target, bool is_double, index size) {
            const auto *from = reinterpret_cast<const double *>(values);
            is_double ? store_as<double>(from, target, size) : store_as<float>(from, target, size);
        },
        "values"_a, "target"_a, "is_double"_a, "size"_a);
    m.def("doubles", &doubles, "array"_a, "size"_a);
    m.def("isa", [] { return std::string(isa().name); });
    m.def("threads", &threads);
    m.def("set_threads", &set_threads, "threads"_a);
    bind_pool(m);
    bind_step(m);
}

}  // namespace flatwater
