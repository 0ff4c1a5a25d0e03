// The pool's blocks as DLPack tensors, which every framework can adopt.
#include "pool_bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <new>
#include <stdexcept>

#include "pool.h"
#include "problem.h"

using namespace nb::literals;

namespace flatwater {
namespace {

// DLManagedTensor, as dlpack.h has it: nanobind brings the structures inside it, but not this one.
struct ManagedTensor {
    nb::dlpack::dltensor tensor;
    void *manager;  // Paddle calls no deleter where this is null
    void (*deleter)(ManagedTensor *);
};

// What lives as long as the consumer's tensor.
struct Lent {
    ManagedTensor managed;
    pool::Block block;
    std::vector<index> shape, strides;
};

// Runs wherever the consumer drops its last reference, so possibly without the interpreter's lock.
void release(ManagedTensor *managed) {
    auto *const lent = static_cast<Lent *>(managed->manager);
    pool::release(lent->block);
    delete lent;
}

constexpr const char *unconsumed = "dltensor";

// A consumer renames the capsule and calls the deleter itself; without one, the capsule still owns the block.
void drop(PyObject *capsule) {
    if (!PyCapsule_IsValid(capsule, unconsumed)) return;
    auto *const managed = static_cast<ManagedTensor *>(PyCapsule_GetPointer(capsule, unconsumed));
    managed->deleter(managed);
}

nb::dlpack::dtype dlpack_dtype(DType dtype) {
    const auto type = [](nb::dlpack::dtype_code code, std::uint8_t bits) {
        return nb::dlpack::dtype{std::uint8_t(code), bits, 1};
    };
    switch (dtype) {
        case DType::f32: return type(nb::dlpack::dtype_code::Float, 32);
        case DType::f64: return type(nb::dlpack::dtype_code::Float, 64);
        case DType::bf16: return type(nb::dlpack::dtype_code::Bfloat, 16);
        case DType::f16: return type(nb::dlpack::dtype_code::Float, 16);
    }
    throw std::invalid_argument("no such dtype");
}

nb::object capsule(std::vector<index> shape, int dtype) {
    const nb::dlpack::dtype type = dlpack_dtype(static_cast<DType>(dtype));
    std::vector<index> strides(shape.size());
    index elements = 1, bytes = 0;
    for (std::size_t i = shape.size(); i-- > 0;) {
        strides[i] = elements;
        if (__builtin_mul_overflow(elements, shape[i], &elements)) throw std::bad_alloc();
    }
    if (__builtin_mul_overflow(elements, type.bits / 8, &bytes)) throw std::bad_alloc();

    auto lent = std::make_unique<Lent>(Lent{{}, {}, std::move(shape), std::move(strides)});
    lent->block = pool::allocate(std::size_t(bytes));
    ManagedTensor &managed = lent->managed;
    managed.tensor.data = lent->block.begin;
    managed.tensor.device = {nb::device::cpu::value, 0};
    managed.tensor.ndim = std::int32_t(lent->shape.size());
    managed.tensor.dtype = type;
    managed.tensor.shape = lent->shape.data();
    managed.tensor.strides = lent->strides.data();
    managed.manager = lent.get();
    managed.deleter = release;
    PyObject *const made = PyCapsule_New(&managed, unconsumed, drop);
    if (!made) {
        release(&lent.release()->managed);
        throw nb::python_error();
    }
    lent.release();
    return nb::steal(made);
}

}  // namespace

void bind_pool(nb::module_ &m) {
    m.def("pool_capsule", &capsule, "shape"_a, "dtype"_a);
    m.def("pool_trim", &pool::trim, nb::call_guard<nb::gil_scoped_release>());
    m.def("pool_set_limit", &pool::set_limit, "bytes"_a.none(), nb::call_guard<nb::gil_scoped_release>());
    m.def("pool_statistics", [] {
        const pool::Statistics s = pool::statistics();
        return nb::make_tuple(s.in_use, s.idle, s.peak, s.limit, s.hits, s.misses);
    });
}

}  // namespace flatwater
