// The kernels of one instruction set, FLATWATER_ISA, for tensors of one dtype, FLATWATER_DTYPE.
#include "batch_norm.h"
#include "group_norm.h"

#define FLATWATER_JOIN(a, b) a##b
#define FLATWATER_KERNELS_OF(dtype) FLATWATER_JOIN(kernels_of_, dtype)

namespace flatwater::FLATWATER_ISA {
namespace {

using S = FLATWATER_DTYPE;

template <void (*kernel)(const Problem &)>
void run(const Problem &problem) {
    if (problem.shape.elements() == 0) return;
    Problem p = problem;
    p.shape = canonical(p.shape);
    kernel(p);
}

// Of a backward call: where act' follows from a y that is given, loops of their own read that instead of the residual.
template <void (*kernel)(const Problem &)>
void run_backward(const Problem &problem) {
    Problem p = problem;
    if (p.y && of_y(p.activation) != p.activation) {
        p.activation = of_y(p.activation);
        p.residual = p.y;
    }
    run<kernel>(p);
}

}  // namespace

extern const Kernels FLATWATER_KERNELS_OF(FLATWATER_DTYPE);
const Kernels FLATWATER_KERNELS_OF(FLATWATER_DTYPE) = {
    run<Batch<S>::statistics>,
    run<Batch<S>::normalize>,
    run<Batch<S>::forward>,
    run_backward<Batch<S>::gradient_sums>,
    run_backward<Batch<S>::input_gradient>,
    run_backward<Batch<S>::backward>,
    run<Group<S>::statistics>,
    run<Group<S>::normalize>,
    run<Group<S>::forward>,
    run_backward<Group<S>::backward>,
};

}  // namespace flatwater::FLATWATER_ISA
