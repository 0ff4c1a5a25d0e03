// The kernels of one instruction set: from the dtype and the activation of a call to its template.
#include "batch_norm.h"
#include "group_norm.h"

#define FLATWATER_STRING(name) #name
#define FLATWATER_NAME(name) FLATWATER_STRING(name)

namespace flatwater::FLATWATER_ISA {
namespace {

// Calls `call.operator()<A>(p)`.
template <class Call>
void with_activation(const Problem &p, const Call &call) {
    switch (p.activation) {
        case Activation::none: return call.template operator()<Activation::none>(p);
        case Activation::relu: return call.template operator()<Activation::relu>(p);
        case Activation::relu6: return call.template operator()<Activation::relu6>(p);
        case Activation::leaky_relu: return call.template operator()<Activation::leaky_relu>(p);
        case Activation::hardswish: return call.template operator()<Activation::hardswish>(p);
        case Activation::swish: return call.template operator()<Activation::swish>(p);
    }
}

// Of a backward call: where act' follows from a y that is given, loops of their own read that instead of the residual.
template <class Call>
void with_gradient(const Problem &p, const Call &call) {
    Problem of_y = p;
    of_y.residual = p.y;
    of_y.y = nullptr;
    if (p.y && p.activation == Activation::relu) return call.template operator()<relu_of_y>(of_y);
    if (p.y && p.activation == Activation::relu6) return call.template operator()<relu6_of_y>(of_y);
    if (p.y && p.activation == Activation::leaky_relu) return call.template operator()<leaky_relu_of_y>(of_y);
    with_activation(p, call);
}

// Calls `call.operator()<S>(p)`, unless there is nothing to do.
template <class Call>
void with_element(Problem p, const Call &call) {
    if (p.shape.elements() == 0) return;
    p.shape = canonical(p.shape);
    switch (p.dtype) {
        case DType::f32: return call.template operator()<float>(p);
        case DType::f64: return call.template operator()<double>(p);
        case DType::bf16: return call.template operator()<bf16>(p);
        case DType::f16: return call.template operator()<f16>(p);
    }
}

void batch_statistics(const Problem &problem) {
    with_element(problem, []<class S>(const Problem &p) { Batch<S>::statistics(p); });
}

void batch_normalize(const Problem &problem) {
    with_element(problem, []<class S>(const Problem &p) {
        with_activation(p, []<Activation A>(const Problem &q) { Batch<S>::template normalize<A>(q); });
    });
}

void batch_norm_forward(const Problem &problem) {
    with_element(problem, []<class S>(const Problem &p) {
        with_activation(p, []<Activation A>(const Problem &q) { Batch<S>::template forward<A>(q); });
    });
}

void batch_gradient_sums(const Problem &problem) {
    with_element(problem, []<class S>(const Problem &p) {
        with_gradient(p, []<Activation A>(const Problem &q) { Batch<S>::template gradient_sums<A>(q); });
    });
}

void batch_input_gradient(const Problem &problem) {
    with_element(problem, []<class S>(const Problem &p) {
        with_gradient(p, []<Activation A>(const Problem &q) { Batch<S>::template input_gradient<A>(q); });
    });
}

void batch_norm_backward(const Problem &problem) {
    with_element(problem, []<class S>(const Problem &p) {
        with_gradient(p, []<Activation A>(const Problem &q) { Batch<S>::template backward<A>(q); });
    });
}

void group_statistics(const Problem &problem) {
    with_element(problem, []<class S>(const Problem &p) { Group<S>::statistics(p); });
}

void group_normalize(const Problem &problem) {
    with_element(problem, []<class S>(const Problem &p) {
        with_activation(p, []<Activation A>(const Problem &q) { Group<S>::template normalize<A>(q); });
    });
}

void group_norm_forward(const Problem &problem) {
    with_element(problem, []<class S>(const Problem &p) {
        with_activation(p, []<Activation A>(const Problem &q) { Group<S>::template forward<A>(q); });
    });
}

void group_norm_backward(const Problem &problem) {
    with_element(problem, []<class S>(const Problem &p) {
        with_gradient(p, []<Activation A>(const Problem &q) { Group<S>::template backward<A>(q); });
    });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    FLATWATER_NAME(FLATWATER_ISA), batch_statistics,    batch_normalize,  batch_norm_forward, batch_gradient_sums,
    batch_input_gradient,          batch_norm_backward, group_statistics, group_normalize,    group_norm_forward,
    group_norm_backward,
};

}  // namespace flatwater::FLATWATER_ISA
