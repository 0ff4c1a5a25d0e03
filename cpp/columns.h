// Loops over rows of columns: every column has its own channel, as in channels-last memory.
//
// A few rows at a time, each from its first column to its last: memory is read as it lies, and what a
// column needs is fetched once for all these rows. Columns that are no whole number of vectors end with
// a vector that begins earlier; fewer columns than a vector are taken in scalars, by the same loops.
#pragma once

#include "pieces.h"

namespace flatwater::FLATWATER_ISA {

// Rows that are worked on together: where they are summed, and where they are written as well.
constexpr index rows_summed = 8, rows_at_once = 4;
static_assert(rows_summed <= short_run);

// Affine and Gradient of many columns, one array for each field.
template <class T>
class Columns {
  public:
    enum Field { shift, scale, offset, unit, dz_scale, x_scale, dx_offset, fields };

    explicit Columns(index columns) : size_(columns), values_(fields * columns) {}

    Affine<T> affine(index j) const {
        Affine<T> f;
        f.shift = field(shift)[j], f.scale = field(scale)[j], f.offset = field(offset)[j];
        return f;
    }
    Gradient<T> gradient(index j) const {
        Gradient<T> g;
        g.unit = field(unit)[j], g.dz_scale = field(dz_scale)[j];
        g.x_scale = field(x_scale)[j], g.offset = field(dx_offset)[j];
        return g;
    }
    T *field(index i) const { return values_.get() + i * size_; }

  private:
    index size_;
    Scratch<T> values_;
};

// Consecutive columns of it, as vectors.
template <class V>
struct AffineOf {
    V shift, scale, offset;

    template <class T>
    AffineOf(const Columns<T> &c, index j)
        : shift(fetch<T, V>(c.field(c.shift) + j)),
          scale(fetch<T, V>(c.field(c.scale) + j)),
          offset(fetch<T, V>(c.field(c.offset) + j)) {}
};
template <class V>
struct GradientOf {
    V unit, dz_scale, x_scale, offset;

    template <class T>
    GradientOf(const Columns<T> &c, index j)
        : unit(fetch<T, V>(c.field(c.unit) + j)),
          dz_scale(fetch<T, V>(c.field(c.dz_scale) + j)),
          x_scale(fetch<T, V>(c.field(c.x_scale) + j)),
          offset(fetch<T, V>(c.field(c.dx_offset) + j)) {}
};

// A tile's place in memory: its rows lie `stride` apart; `column` is its first among the Columns. Of tiny planes in
// channels-first memory the rows are samples, mostly few: there, sums of gradients go on in double sooner.
// `second_level`: into which cache the rows are prefetched.
struct Block {
    index rows, columns, stride, column;
    bool rows_are_samples = false, second_level = false;

    // From an element to one that is worked on bytes_ahead later: whole groups of rows.
    template <class S>
    index ahead() const {
        const index group = rows_summed * columns * index(sizeof(S));
        return (bytes_ahead + group - 1) / group * rows_summed * stride;
    }
};

// How many vectors cover the columns.
template <class V>
inline index slots(index columns) {
    return (columns + Lanes<V>::count - 1) / Lanes<V>::count;
}

// Which element a loop over rows asks memory for when it works on the one at i: into the first-level cache the one
// `distance` away from it; into the second-level cache, whose own prefetching follows runs of lines, one vector after
// the other as they lie in the tile, from `first` + `distance` on.
template <class V, bool second_level>
class Asking {
  public:
    Asking(const Block &b, index first, index distance)
        : distance_(distance),
          next_(first + distance),
          slots_(slots<V>(b.columns)),
          left_(slots_),
          to_next_row_(b.stride - slots_ * Lanes<V>::count) {}

    FLATWATER_HINT index at(index i) {
        if constexpr (!second_level) return i + distance_;
        const index asked = next_;
        next_ += Lanes<V>::count;
        if (--left_ == 0) next_ += to_next_row_, left_ = slots_;
        return asked;
    }

  private:
    index distance_, next_, slots_, left_, to_next_row_;
};

// Calls body(slot, j) for the vectors that cover the columns.
template <class V, class Body>
inline void each_slot(index columns, const Body &body) {
    constexpr index width = Lanes<V>::count;
    index slot = 0, j = 0;
    for (; j + width <= columns; j += width) body(slot++, j);
    if (j < columns) body(slot, columns - width);
}

// Calls body<group>(r) for whole groups of rows, and body<1>(r) for those left over; or the other way round.
template <index group, class Body>
inline void each_group(index rows, const Body &body) {
    index r = 0;
    for (; r + group <= rows; r += group) body.template operator()<group>(r);
    for (; r < rows; ++r) body.template operator()<1>(r);
}
template <class Body>
inline void each_group_backwards(index rows, const Body &body) {
    index r = rows;
    for (; r % rows_at_once; --r) body.template operator()<1>(r - 1);
    for (; r > 0; r -= rows_at_once) body.template operator()<rows_at_once>(r - rows_at_once);
}

// Calls loop<V, second_level>() for vectors of columns, or for scalars where there are too few.
template <class S, class Loop>
inline void for_width(const Block &b, const Loop &loop) {
    using E = Element<S>;
    if (b.columns < E::width) return loop.template operator()<typename E::Compute, false>();
    if constexpr (two_levels<S>)
        if (b.second_level) return loop.template operator()<typename E::Vector, true>();
    loop.template operator()<typename E::Vector, false>();
}

// The same of a loop that writes: loop<V, streaming, second_level>(). What is not streamed is small enough for the
// first level.
template <class S, class Loop>
inline void for_width(const Block &b, bool streaming, const Loop &loop) {
    using E = Element<S>;
    if (!streaming)
        return b.columns < E::width ? loop.template operator()<typename E::Compute, false, false>()
                                    : loop.template operator()<typename E::Vector, false, false>();
    if constexpr (two_levels<S>)
        if (b.second_level) return loop.template operator()<typename E::Vector, true, true>();
    loop.template operator()<typename E::Vector, true, false>();
}

template <class S, class V, bool streaming>
inline void put(S *p, const V &value, const Rounding<S> &rounding) {
    if constexpr (streaming)
        place_streaming<S, V>(p, value, rounding);
    else
        place<S, V>(p, value, rounding);
}

template <class S, class V, Activation A, bool streaming, bool second_level>
FLATWATER_ONE_COPY
void vector_columns_apply(const At<S> &all, const Block &b, const Columns<typename Element<S>::Compute> &c) {
    const At<S> at = all;  // a copy: as far as the compiler knows, what it writes could change the caller's
    const auto rounding = Rounding<S>::held();
    const index ahead = b.ahead<S>();
    each_group_backwards(b.rows, [&]<index rows>(index r) {  // what was read last is still in cache
        Asking<V, second_level> asking(b, r * b.stride, -ahead);
        each_slot<V>(b.columns, [&](index, index j) {
            const AffineOf<V> f(c, b.column + j);
            for (index k = 0; k < rows; ++k) {
                const index i = (r + k) * b.stride + j;
                at.prefetch_inputs(asking.at(i), second_level);
                V z = (fetch<S, V>(at.x + i) - f.shift) * f.scale + f.offset;
                if (at.residual) z += fetch<S, V>(at.residual + i);
                put<S, V, streaming>(at.y + i, activate<A, V>(z), rounding);
            }
        });
    });
}

// Whether all vectors that cover a tile lie so in memory that they can be streamed.
template <class S>
inline bool can_stream(const S *out, const Block &b) {
    constexpr index width = Element<S>::width;
    return b.columns % width == 0 && b.stride % width == 0 && before_multiple(out, width * index(sizeof(S))) == 0;
}

template <class S>
void columns_apply(const At<S> &at, const Block &b, const Columns<typename Element<S>::Compute> &c, bool stream) {
    const bool streams = stream && can_stream(at.y, b);
    for_activation(at.activation, [&]<Activation A>() {
        for_width<S>(b, streams, [&]<class V, bool streaming, bool second_level>() {
            vector_columns_apply<S, V, A, streaming, second_level>(at, b, c);
        });
    });
}

// Per column: Σdz and Σdz·(x - shift)·unit.
template <class S, class V, Activation A, bool second_level>
FLATWATER_ONE_COPY
void vector_columns_sums(const At<S> &all, const Block &b, const Columns<typename Element<S>::Compute> &c,
                         double *dz_sums, double *dz_xhat_sums) {
    const At<S> at = all;
    using Wide = typename Lanes<V>::wide;
    constexpr index most = widest_tile / Lanes<V>::count;
    Wide dz_sum[most], dz_xhat_sum[most];
    each_slot<V>(b.columns, [&](index slot, index) { dz_sum[slot] = dz_xhat_sum[slot] = Wide{}; });
    const index ahead = b.ahead<S>();
    const auto add_group = [&]<index rows>(index r) {
        Asking<V, second_level> asking(b, r * b.stride, ahead);
        each_slot<V>(b.columns, [&](index slot, index j) {
            const AffineOf<V> f(c, b.column + j);
            const V unit = fetch<typename Element<S>::Compute, V>(c.field(c.unit) + b.column + j);
            V sum{}, product{}, odd_sum{}, odd_product{};  // of odd rows apart: half the roundings
            const auto add = [&](index k, V &to_sum, V &to_product) {
                const index i = (r + k) * b.stride + j;
                V shifted;
                at.prefetch_inputs(asking.at(i), second_level);
                const V dz = gradient_at<S, V, A>(at, i, f, shifted);
                to_sum += dz;
                to_product += dz * (shifted * unit);
            };
            for (index k = 0; k + 2 <= rows; k += 2) {
                add(k, sum, product);
                add(k + 1, odd_sum, odd_product);
            }
            if constexpr (rows % 2) add(rows - 1, sum, product);
            dz_sum[slot] += widen_lanes<V>(sum + odd_sum);
            dz_xhat_sum[slot] += widen_lanes<V>(product + odd_product);
        });
    };
    b.rows_are_samples ? each_group<2>(b.rows, add_group) : each_group<rows_summed>(b.rows, add_group);
    each_slot<V>(b.columns, [&](index slot, index j) {
        __builtin_memcpy(dz_sums + j, &dz_sum[slot], sizeof(Wide));
        __builtin_memcpy(dz_xhat_sums + j, &dz_xhat_sum[slot], sizeof(Wide));
    });
}

template <class S>
void columns_sums(const At<S> &at, const Block &b, const Columns<typename Element<S>::Compute> &c, double *dz_sums,
                  double *dz_xhat_sums) {
    for_gradient(at.activation, [&]<Activation A>() {
        for_width<S>(b, [&]<class V, bool second_level>() {
            vector_columns_sums<S, V, A, second_level>(at, b, c, dz_sums, dz_xhat_sums);
        });
    });
}

template <class S, class V, Activation A, bool streaming, bool second_level>
FLATWATER_ONE_COPY
void vector_columns_gradient(const At<S> &all, const Block &b, const Columns<typename Element<S>::Compute> &c) {
    const At<S> at = all;
    const auto rounding = Rounding<S>::held();
    const index ahead = b.ahead<S>();
    each_group_backwards(b.rows, [&]<index rows>(index r) {
        Asking<V, second_level> asking(b, r * b.stride, -ahead);
        each_slot<V>(b.columns, [&](index, index j) {
            const AffineOf<V> f(c, b.column + j);
            const GradientOf<V> g(c, b.column + j);
            for (index k = 0; k < rows; ++k) {
                const index i = (r + k) * b.stride + j;
                V shifted;
                at.prefetch_inputs(asking.at(i), second_level);
                const V dz = gradient_at<S, V, A>(at, i, f, shifted);
                if (at.dresidual) put<S, V, streaming>(at.dresidual + i, dz, rounding);
                if (!at.dx) continue;
                const V dx = dz * g.dz_scale + ((shifted * g.unit) * g.x_scale + g.offset);
                put<S, V, streaming>(at.dx + i, dx, rounding);
            }
        });
    });
}

template <class S>
void columns_gradient(const At<S> &at, const Block &b, const Columns<typename Element<S>::Compute> &c,
                      bool stream) {
    const bool aligned = (!at.dx || can_stream(at.dx, b)) && (!at.dresidual || can_stream(at.dresidual, b));
    const bool streams = stream && aligned;
    for_gradient(at.activation, [&]<Activation A>() {
        for_width<S>(b, streams, [&]<class V, bool streaming, bool second_level>() {
            vector_columns_gradient<S, V, A, streaming, second_level>(at, b, c);
        });
    });
}

}  // namespace flatwater::FLATWATER_ISA
