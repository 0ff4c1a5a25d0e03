// Statistics of rows of columns (columns.h), each row read once.
#pragma once

#include "columns.h"

namespace flatwater::FLATWATER_ISA {

// Rows after which the pivot of a column moves to the mean of the rows just done.
constexpr index pivot_rows = 64;
static_assert(pivot_rows % rows_summed == 0);

// What a vector of columns has summed so far.
template <class V>
struct ColumnMoments {
    using Part = typename Parts<V>::Part;
    V pivot;
    Parts<V> first, second;  // Σ(x - pivot), Σ(x - pivot)² since the pivot moved
    Parts<V> mean, m2;       // of all rows before that

    void add(const V &sum, const V &squares) {
        const auto more = Parts<V>::widened(sum), more_squares = Parts<V>::widened(squares);
        for (int i = 0; i < Parts<V>::count; ++i) first.of[i] += more.of[i], second.of[i] += more_squares.of[i];
    }

    // Combines the rows since the pivot moved with those before.
    void close(index before, index rows) {
        const auto pivots = Parts<V>::widened(pivot);
        Parts<V> next;
        for (int i = 0; i < Parts<V>::count; ++i) {
            const Part mean_rows = pivots.of[i] + first.of[i] * (1 / double(rows));
            const Part squares = second.of[i] - first.of[i] * first.of[i] * (1 / double(rows));
            const Part m2_rows = squares < 0.0 ? Part{} : squares;
            if (before == 0)
                mean.of[i] = mean_rows, m2.of[i] = m2_rows;
            else
                Union(before, rows).add(mean.of[i], m2.of[i], mean_rows, m2_rows);
            // As block_pivot: a mean that is lost in the deviations is not worth subtracting; nor is infinity.
            const Part worth = mean_rows * mean_rows * double(rows) > m2_rows ? mean_rows : Part{};
            next.of[i] = mean_rows - mean_rows == 0.0 ? worth : Part{};
        }
        pivot = next.narrowed();
        first = second = {};
    }
};

// Of a vector of columns, 1 where one has several values, else 0.
template <class S, class V>
FLATWATER_ONE_COPY
V several_values(const S *x, index rows, index stride) {
    const V first = fetch<S, V>(x), none{};
    V several{};
    for (index r = 1; r < rows; ++r) several = fetch<S, V>(x + r * stride) != first ? none + 1 : several;
    return several;
}

// Two passes in double, one column after the other.
template <class S>
FLATWATER_ONE_COPY
Moments exact_column(const S *x, index rows, index stride) {
    double sum = 0, m2 = 0;
    for (index r = 0; r < rows; ++r) sum += double(Element<S>::get(x + r * stride));
    const double mean = sum / double(rows);
    for (index r = 0; r < rows; ++r) {
        const double d = double(Element<S>::get(x + r * stride)) - mean;
        m2 += d * d;
    }
    return {rows, mean, m2};
}

// Mean and m2 of each column. The pivot of a column, from which deviations are taken, is the mean of the rows
// just before: so that x is read once. Were those far off, then by a distance that is itself part of m2.
template <class S, class V, bool second_level>
FLATWATER_ONE_COPY
void vector_column_moments(const S *x, const Block &b, double *mean, double *m2) {
    using T = typename Element<S>::Compute;
    ColumnMoments<V> moments[widest_tile / Lanes<V>::count];
    const index ahead = b.ahead<S>();

    each_slot<V>(b.columns, [&](index slot, index j) {
        const index rows = smaller(b.rows, rows_summed);
        V sum{}, least = fetch<S, V>(x + j), most = least;
        for (index r = 0; r < rows; ++r) {
            const V v = fetch<S, V>(x + r * b.stride + j);
            sum += v;
            least = v < least ? v : least;
            most = v > most ? v : most;
        }
        sum *= T(1) / T(rows);
        const V spread = (most - least) * T(0.25), size = sum < T(0) ? -sum : sum;
        moments[slot].pivot = sum - sum == T(0) ? V(size > spread ? sum : V{}) : V{};
        moments[slot].first = moments[slot].second = {};
    });
    for (index start = 0; start < b.rows; start += pivot_rows) {
        const index end = smaller(b.rows, start + pivot_rows);
        each_group<rows_summed>(end - start, [&]<index rows>(index r) {
            const S *group = x + (start + r) * b.stride;
            Asking<V, second_level> asking(b, 0, ahead);
            each_slot<V>(b.columns, [&](index slot, index j) {
                const V pivot = moments[slot].pivot;
                V first{}, second{};
                for (index k = 0; k < rows; ++k) {
                    const index i = k * b.stride + j;
                    prefetch(group + asking.at(i), second_level);
                    const V d = fetch<S, V>(group + i) - pivot;
                    first += d;
                    second += d * d;
                }
                moments[slot].add(first, second);
            });
        });
        each_slot<V>(b.columns, [&](index slot, index) { moments[slot].close(start, end - start); });
    }
    bool doubtful = false;
    each_slot<V>(b.columns, [&](index slot, index j) {
        __builtin_memcpy(mean + j, &moments[slot].mean, sizeof moments[slot].mean);
        __builtin_memcpy(m2 + j, &moments[slot].m2, sizeof moments[slot].m2);
        for (const auto &squares : moments[slot].m2.of)
            doubtful |= any(squares <= least_square * double(b.rows)) || any(squares - squares != 0.0);
    });
    if (!doubtful || sizeof(T) == sizeof(double)) return;
    T several[Lanes<V>::count];  // of the columns that a look at one of them has shown as well
    index shown = 0, end = 0;
    for (index j = 0; j < b.columns; ++j) {
        const auto is_constant = [&] {
            if (j >= end) {
                shown = smaller(j, b.columns - Lanes<V>::count), end = shown + Lanes<V>::count;
                const V found = several_values<S, V>(x + shown, b.rows, b.stride);
                __builtin_memcpy(several, &found, sizeof found);
            }
            return several[j - shown] == 0;
        };
        if (!squares_are_exact<T>(m2[j], b.rows, is_constant)) {
            const Moments exact = exact_column(x + j, b.rows, b.stride);
            mean[j] = exact.mean;
            m2[j] = exact.m2;
        }
    }
}

template <class S>
void column_moments(const S *x, const Block &b, double *mean, double *m2) {
    for_width<S>(b, [&]<class V, bool second_level>() {
        vector_column_moments<S, V, second_level>(x, b, mean, m2);
    });
}

}  // namespace flatwater::FLATWATER_ISA
