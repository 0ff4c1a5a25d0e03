// Loops over rows of columns: every column has its own channel, as in channels-last memory. Planes
// too small to be segments are handled this way too: a sample is then a row of channels × inner columns.
#pragma once

#include "segment.h"

namespace flatwater::FLATWATER_ISA {

// The widest tile of columns that is worked on at once.
constexpr index tile_columns = 512;

// Rows that are summed in their own precision before the sum goes on in double.
constexpr index block_rows = 64;

// Calls body<V, k>(j): k vectors from column j on. A ragged end is covered by a vector that begins
// earlier, for doing a column twice gives the same result; a tile narrower than a vector by scalars.
template <class S, class Body>
inline void each_column(index columns, const Body &body) {
    using E = Element<S>;
    using V = typename E::Vector;
    constexpr index width = E::width;
    index j = 0;
    for (; j + 4 * width <= columns; j += 4 * width) body.template operator()<V, 4>(j);
    for (; j + width <= columns; j += width) body.template operator()<V, 1>(j);
    if (j == columns) return;
    if (columns >= width) {
        body.template operator()<V, 1>(columns - width);
        return;
    }
    for (; j < columns; ++j) body.template operator()<typename E::Compute, 1>(j);
}

// A loop of a fixed, small number of steps with the step as a constant.
template <int n, class Body>
inline void unrolled(const Body &body) {
    for (int k = 0; k < n; ++k) body(k);
}

// Per column: mean[j] and m2[j] over `rows` rows that lie `stride` elements apart.
template <class S>
FLATWATER_ONE_COPY
void column_moments(const S *x, index rows, index stride, index columns, double *mean, double *m2) {
    using T = typename Element<S>::Compute;
    each_column<S>(columns, [=]<class V, int k>(index j) {
        using Wide = typename Lanes<V>::wide;
        constexpr int width = Lanes<V>::count;
        for (index start = 0; start < rows; start += block_rows) {
            const index size = rows - start < block_rows ? rows - start : block_rows;
            const S *block = x + start * stride + j;
            V pivot[k] = {};
            Wide first[k] = {}, second[k] = {};
            for (index r = 0; r < size; ++r)
                unrolled<k>([&](int i) { pivot[i] += fetch<S, V>(block + r * stride + i * width); });
            unrolled<k>([&](int i) { pivot[i] /= T(size); });
            for (index run = 0; run < size; run += short_run) {
                const index end = size - run < short_run ? size : run + short_run;
                V run_first[k] = {}, run_second[k] = {};
                for (index r = run; r < end; ++r)
                    unrolled<k>([&](int i) {
                        const V d = fetch<S, V>(block + r * stride + i * width) - pivot[i];
                        run_first[i] += d;
                        run_second[i] += d * d;
                    });
                unrolled<k>([&](int i) {
                    first[i] += widen_lanes(run_first[i]);
                    second[i] += widen_lanes(run_second[i]);
                });
            }
            T pivots[k * width];
            double firsts[k * width], seconds[k * width];
            __builtin_memcpy(pivots, pivot, sizeof pivots);
            __builtin_memcpy(firsts, first, sizeof firsts);
            __builtin_memcpy(seconds, second, sizeof seconds);
            const double share = 1 / double(size);
            for (int i = 0; i < k * width; ++i) {
                const double squares = seconds[i] - firsts[i] * firsts[i] * share, pivot_mean = double(pivots[i]);
                firsts[i] = Moments::finite(pivot_mean) ? pivot_mean + firsts[i] * share : pivot_mean;
                seconds[i] = squares < 0 ? 0 : squares;
            }
            if (start == 0) {  // mostly the only block: nothing to combine it with
                __builtin_memcpy(mean + j, firsts, sizeof firsts);
                __builtin_memcpy(m2 + j, seconds, sizeof seconds);
                continue;
            }
            for (int i = 0; i < k * width; ++i) {
                Moments all{start, mean[j + i], m2[j + i]};
                all.add({size, firsts[i], seconds[i]});
                mean[j + i] = all.mean;
                m2[j + i] = all.m2;
            }
        }
    });
}

// What a tile of columns needs: Affine and Gradient, one array for each field.
template <class T>
struct Columns {
    alignas(64) T shift[tile_columns], scale[tile_columns], offset[tile_columns];
    alignas(64) T dz_scale[tile_columns], x_scale[tile_columns], dx_offset[tile_columns];

    void set(index from, index to, const Affine<T> &f) {
        for (index j = from; j < to; ++j) shift[j] = f.shift, scale[j] = f.scale, offset[j] = f.offset;
    }
    void set(index from, index to, const Gradient<T> &g) {
        for (index j = from; j < to; ++j) dz_scale[j] = g.dz_scale, x_scale[j] = g.x_scale, dx_offset[j] = g.offset;
    }
};

template <class T, class V>
inline V column(const T *values, index j) {
    V v;
    __builtin_memcpy(&v, values + j, sizeof v);
    return v;
}

template <class S, Activation A>
FLATWATER_ONE_COPY
void columns_apply(const S *x, const S *residual, S *y, index rows, index stride, index columns,
                   const Columns<typename Element<S>::Compute> &c) {
    using T = typename Element<S>::Compute;
    each_column<S>(columns, [=, &c]<class V, int k>(index j) {
        constexpr int width = Lanes<V>::count;
        V shift[k], scale[k], offset[k];
        unrolled<k>([&](int i) {
            shift[i] = column<T, V>(c.shift, j + i * width);
            scale[i] = column<T, V>(c.scale, j + i * width);
            offset[i] = column<T, V>(c.offset, j + i * width);
        });
        for (index r = rows - 1; r >= 0; --r)  // backwards: what was read last is still in cache
            unrolled<k>([&](int i) {
                const index at = r * stride + j + i * width;
                V z = (fetch<S, V>(x + at) - shift[i]) * scale[i] + offset[i];
                if (residual) z += fetch<S, V>(residual + at);
                place<S, V>(y + at, activate<A, V>(z));
            });
    });
}

// Per column: dz_sum[j] = Σdz and shifted_sum[j] = Σdz·(x - shift).
template <class S, Activation A>
FLATWATER_ONE_COPY
void columns_sums(const S *dy, const S *x, const S *residual, index rows, index stride, index columns,
                  const Columns<typename Element<S>::Compute> &c, double *dz_sum, double *shifted_sum) {
    using T = typename Element<S>::Compute;
    each_column<S>(columns, [=, &c]<class V, int k>(index j) {
        constexpr int width = Lanes<V>::count;
        for (int i = 0; i < k * width; ++i) dz_sum[j + i] = shifted_sum[j + i] = 0;
        for (index start = 0; start < rows; start += block_rows) {
            const index end = rows - start < block_rows ? rows : start + block_rows;
            V sum[k] = {}, product[k] = {};
            for (index r = start; r < end; ++r)
                unrolled<k>([&](int i) {
                    const index at = r * stride + j + i * width;
                    const V shifted = fetch<S, V>(x + at) - column<T, V>(c.shift, j + i * width);
                    V z = shifted * column<T, V>(c.scale, j + i * width) + column<T, V>(c.offset, j + i * width);
                    if (residual) z += fetch<S, V>(residual + at);
                    const V dz = activation_gradient<A, V>(z, fetch<S, V>(dy + at));
                    sum[i] += dz;
                    product[i] += dz * shifted;
                });
            alignas(vector_bytes) T sums[k * width], products[k * width];
            __builtin_memcpy(sums, sum, sizeof sums);
            __builtin_memcpy(products, product, sizeof products);
            for (int i = 0; i < k * width; ++i) {
                dz_sum[j + i] += double(sums[i]);
                shifted_sum[j + i] += double(products[i]);
            }
        }
    });
}

template <class S, Activation A>
FLATWATER_ONE_COPY
void columns_gradient(const S *dy, const S *x, const S *residual, S *dx, S *dresidual, index rows, index stride,
                      index columns, const Columns<typename Element<S>::Compute> &c) {
    using T = typename Element<S>::Compute;
    each_column<S>(columns, [=, &c]<class V, int k>(index j) {
        constexpr int width = Lanes<V>::count;
        for (index r = rows - 1; r >= 0; --r)
            unrolled<k>([&](int i) {
                const index at = r * stride + j + i * width, from = j + i * width;
                const V shifted = fetch<S, V>(x + at) - column<T, V>(c.shift, from);
                V z = shifted * column<T, V>(c.scale, from) + column<T, V>(c.offset, from);
                if (residual) z += fetch<S, V>(residual + at);
                const V dz = activation_gradient<A, V>(z, fetch<S, V>(dy + at));
                if (dresidual) place<S, V>(dresidual + at, dz);
                if (dx)
                    place<S, V>(dx + at, V(dz * column<T, V>(c.dz_scale, from) +
                                           (shifted * column<T, V>(c.x_scale, from) + column<T, V>(c.dx_offset, from))));
            });
    });
}

}  // namespace flatwater::FLATWATER_ISA
