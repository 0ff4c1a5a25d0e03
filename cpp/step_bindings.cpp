// One norm in one training step, forward and then backward. What a layer does in every step is done here in
// one call each way: around a large tensor every line of code comes cold from memory, and Python has many.
#include "step_bindings.h"

#include <nanobind/ndarray.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "problem.h"

using namespace nb::literals;

namespace flatwater {
namespace {

using Address = std::uintptr_t;

template <class T>
void assign(std::vector<double> &to, Address from, index size) {
    to.assign(reinterpret_cast<const T *>(from), reinterpret_cast<const T *>(from) + size);
}

// The parameters of a float64 tensor are double, those of all others float.
void read(std::vector<double> &to, Address from, index size, DType dtype) {
    dtype == DType::f64 ? assign<double>(to, from, size) : assign<float>(to, from, size);
}

void write(Address to, const std::vector<double> &from, DType dtype) {
    if (!to) return;
    if (dtype == DType::f64)
        std::copy(from.begin(), from.end(), reinterpret_cast<double *>(to));
    else
        std::transform(from.begin(), from.end(), reinterpret_cast<float *>(to), [](double v) { return float(v); });
}

template <class T>
T *pointer(Address address) {
    return reinterpret_cast<T *>(address);
}

class Step {
  public:
    // Over the batch where groups is 0, else over that many groups of each sample's channels.
    Step(int dtype, int activation, index outer, index channels, index inner, bool channels_last, index groups,
         double epsilon)
        : by_batch_(groups == 0) {
        problem_.dtype = static_cast<DType>(dtype);
        problem_.activation = static_cast<Activation>(activation);
        problem_.shape = {outer, channels, inner, channels_last};
        problem_.groups = by_batch_ ? channels : groups;
        problem_.epsilon = epsilon;
        const std::size_t sets = std::size_t(by_batch_ ? channels : outer * groups);
        for (auto *values : {&mean_, &m2_}) values->resize(sets);
        inv_std_.resize(sets, 1 / std::sqrt(epsilon));
        problem_.mean = mean_.data();
        problem_.m2 = m2_.data();
        problem_.inv_std = inv_std_.data();
    }
    Step(const Step &) = delete;  // problem_ points into the arrays
    Step &operator=(const Step &) = delete;

    // Takes the statistics from the running ones, as constants.
    void freeze(Address running_mean, Address running_variance) {
        frozen_ = true;
        read(mean_, running_mean, channels(), problem_.dtype);
        read(inv_std_, running_variance, channels(), problem_.dtype);
        for (double &value : inv_std_) value = 1.0 / std::sqrt(value + problem_.epsilon);
        problem_.mean = mean_.data();
        problem_.inv_std = inv_std_.data();
    }

    // Fills y, and the statistics unless they are constants. 0 is the address of what there is not.
    void forward(Address x, Address y, Address residual, Address weight, Address bias) {
        if (weight) read(weight_, weight, channels(), problem_.dtype), problem_.weight = weight_.data();
        if (bias) read(bias_, bias, channels(), problem_.dtype), problem_.bias = bias_.data();
        problem_.x = pointer<const void>(x);
        problem_.y = pointer<void>(y);
        problem_.residual = pointer<const void>(residual);
        run(!by_batch_ ? &Kernels::group_norm_forward
            : frozen_  ? &Kernels::batch_normalize
                       : &Kernels::batch_norm_forward);
    }

    // moving = momentum · moving + (1 - momentum) · batch
    void update(Address running_mean, Address running_variance, double momentum, bool unbiased) const {
        const auto into = [&](auto *mean, auto *variance) {
            update_running(mean, variance, mean_.data(), m2_.data(), channels(), count(), momentum, unbiased);
        };
        if (problem_.dtype == DType::f64)
            into(pointer<double>(running_mean), pointer<double>(running_variance));
        else
            into(pointer<float>(running_mean), pointer<float>(running_variance));
    }

    // Fills those of the gradients that have an address. γ and β are still those of the forward pass. Of the residual
    // and y one is enough, where the activation's slope follows from y.
    void backward(Address dy, Address x, Address residual, Address y, Address dx, Address dresidual, Address dweight,
                  Address dbias) {
        const auto size = std::size_t(channels());
        std::vector<double> sum_dz(size), sum_dz_xhat(size);
        problem_.x = pointer<const void>(x);
        problem_.dy = pointer<const void>(dy);
        problem_.residual = pointer<const void>(residual);
        problem_.y = pointer<void>(y);
        problem_.dx = pointer<void>(dx);
        problem_.dresidual = pointer<void>(dresidual);
        problem_.sum_dz = sum_dz.data();
        problem_.sum_dz_xhat = sum_dz_xhat.data();
        problem_.count = frozen_ ? 0 : count();
        run(by_batch_ ? &Kernels::batch_norm_backward : &Kernels::group_norm_backward);
        write(dweight, sum_dz_xhat, problem_.dtype);
        write(dbias, sum_dz, problem_.dtype);
    }

    index count() const { return problem_.shape.outer * problem_.shape.inner; }
    std::vector<double> &mean() { return mean_; }
    std::vector<double> &m2() { return m2_; }
    std::vector<double> &inv_std() { return inv_std_; }

  private:
    index channels() const { return problem_.shape.channels; }

    // Over no elements every sum is the 0 that it began with, and inv_std that of the variance 0.
    void run(void (*Kernels::*kernel)(const Problem &)) {
        if (problem_.shape.elements()) (isa().of(problem_.dtype).*kernel)(problem_);
    }

    Problem problem_{};
    bool by_batch_, frozen_ = false;
    std::vector<double> mean_, m2_, inv_std_, weight_, bias_;
};

// The statistics as a NumPy array over the step's own memory.
template <auto values>
auto view(Step &step) {
    auto &of = (step.*values)();
    return nb::ndarray<nb::numpy, double, nb::ndim<1>>(of.data(), {of.size()}, nb::find(step));
}

}  // namespace

void bind_step(nb::module_ &m) {
    nb::set_leak_warnings(false);  // a framework's graph, and the steps in it, may outlive the interpreter
    const auto free_gil = nb::call_guard<nb::gil_scoped_release>();
    nb::class_<Step>(m, "Step")
        .def(nb::init<int, int, index, index, index, bool, index, double>(), "dtype"_a, "activation"_a, "outer"_a,
             "channels"_a, "inner"_a, "channels_last"_a, "groups"_a, "epsilon"_a)
        .def("freeze", &Step::freeze, "running_mean"_a, "running_variance"_a)
        .def("forward", &Step::forward, "x"_a, "y"_a, "residual"_a, "weight"_a, "bias"_a, free_gil)
        .def("update", &Step::update, "running_mean"_a, "running_variance"_a, "momentum"_a, "unbiased"_a)
        .def("backward", &Step::backward, "dy"_a, "x"_a, "residual"_a, "y"_a, "dx"_a, "dresidual"_a, "dweight"_a,
             "dbias"_a, free_gil)
        .def_prop_ro("mean", &view<&Step::mean>)
        .def_prop_ro("m2", &view<&Step::m2>)
        .def_prop_ro("inv_std", &view<&Step::inv_std>);
}

}  // namespace flatwater
