// What a kernel is asked to do, in plain data. Nothing here knows Python or a framework.
#pragma once

#include <cstdint>

namespace flatwater {

using index = std::int64_t;

enum class DType { f32, f64, bf16, f16 };
enum class Activation { none, relu, relu6, leaky_relu, hardswish, swish };

// A tensor is (outer, channels, inner): samples, channels, and all spatial dimensions as one.
// channels_last says that memory holds it as (outer, inner, channels).
struct Shape {
    index outer, channels, inner;
    bool channels_last;
    index elements() const { return outer * channels * inner; }
};

// One call. Pointers to tensors are borrowed and share dtype and shape; those that a call does
// not use are null. Statistics and sums are double whatever the tensors are:
//     batch norm  mean, m2, inv_std, sum_dz, sum_dz_xhat [channels]
//     group norm  mean, m2, inv_std [outer * groups], sum_dz, sum_dz_xhat [channels]
// with m2 = Σ(x - mean)², z = γ·x̂ + β + residual, y = act(z), dz = dy·act'(z). A backward call of relu, relu6
// or leaky_relu that has y takes act'(z) from it, and reads no residual.
struct Problem {
    DType dtype;
    Shape shape;
    Activation activation;
    const void *x, *residual, *dy;
    void *y, *dx, *dresidual;
    const double *weight, *bias;  // null: γ = 1, β = 0
    index groups;
    double epsilon;
    double *mean, *m2, *inv_std, *sum_dz, *sum_dz_xhat;
    index count;  // values per channel behind the statistics; 0 says that they are constants
};

// The kernels for tensors of one dtype.
struct Kernels {
    void (*batch_statistics)(const Problem &);
    void (*batch_normalize)(const Problem &);
    void (*batch_norm_forward)(const Problem &);
    void (*batch_gradient_sums)(const Problem &);
    void (*batch_input_gradient)(const Problem &);
    void (*batch_norm_backward)(const Problem &);
    void (*group_statistics)(const Problem &);
    void (*group_normalize)(const Problem &);
    void (*group_norm_forward)(const Problem &);
    void (*group_norm_backward)(const Problem &);
};

// All that are compiled for one instruction set.
struct Isa {
    const char *name;
    const Kernels *kernels[4];

    const Kernels &of(DType dtype) const { return *kernels[static_cast<int>(dtype)]; }
};

// The best that this processor runs, or the one that `forced` names; null if it cannot run that.
const Isa *choose_isa(const char *forced);

// The one in use from the first call on: FLATWATER_ISA names it. std::invalid_argument if it names another.
const Isa &isa();

// From this size on something is done, in bytes: of one tensor, or a quarter of all that a training step reads and
// writes, which is four tensors, or six with a residual.
struct From {
    index bytes;
    bool of_step;
};

// What is faster on some processors and not on others; no result depends on it.
struct Machine {
    const char *name;
    // Rows of many columns are worked on whole, rather than in tiles whose sums stay in the first-level cache.
    bool whole_rows;
    // What is written is streamed past the caches: rows, planes, and planes of less than 4 KiB.
    From stream_rows, stream_planes, stream_short_planes;
    // In bytes, planes of 16-bit elements that are shorter are never streamed: their ends cost more than it saves.
    index shortest_half_plane;
    // Rows are prefetched into the second-level cache only, in the order in which they lie.
    From second_level_rows;
    // Planes are prefetched into the second-level cache only.
    bool second_level_planes;
    // The next channels' planes are always asked for while these are being written. Else only where what is written
    // stays in the second-level cache beside what is read: where it does not, what is asked for drives out what is
    // about to be read again, on some processors the greater loss. Those ask for short planes that are to be written.
    bool always_ahead;
};

// Of this processor, or the one that FLATWATER_TUNING names: "intel", "zen4" or "other". std::invalid_argument if it
// names another, from isa() already.
const Machine &machine();

// moving = momentum * moving + (1 - momentum) * batch, in place; T is float or double.
template <class T>
void update_running(T *running_mean, T *running_variance, const double *mean, const double *m2, index channels,
                    index count, double momentum, bool unbiased);

}  // namespace flatwater
