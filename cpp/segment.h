// Loops over a segment: consecutive elements of one channel.
#pragma once

#include "activation.h"
#include "coefficients.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace flatwater::FLATWATER_ISA {

// Elements that are summed in their own precision before the sum goes on in double; also what
// stays in the first-level cache between the two passes over it.
constexpr index block_elements = 4096;

// Squared deviations that a lane sums in its own precision. Short, for when the mean is 10^4 deviations
// the deviations are multiples of a coarse unit, and roundings of a longer sum of squares all lean one way.
constexpr index short_run = 16;

template <class S, class V>
inline V fetch(const S *p) {
    if constexpr (Lanes<V>::count == 1)
        return Element<S>::get(p);
    else
        return Element<S>::load(p);
}

template <class S, class V>
inline void place(S *p, const V &value) {
    if constexpr (Lanes<V>::count == 1)
        Element<S>::put(p, value);
    else
        Element<S>::store(p, value);
}

// Writes past the caches: a large result is out of them anyway before somebody reads it, and a
// plain store would first read from memory what it is going to overwrite.
template <class S, class V>
inline void place_streaming(S *p, const V &value) {
    if constexpr (Lanes<V>::count == 1) {
        Element<S>::put(p, value);
    } else {
        alignas(vector_bytes) S line[Element<S>::width];
        Element<S>::store(line, value);
#if defined(__AVX512F__)
        if constexpr (sizeof line == 64)
            _mm512_stream_si512(reinterpret_cast<__m512i *>(p), bit_cast<__m512i>(line));
        else
#endif
#if defined(__AVX2__)
            if constexpr (sizeof line == 32)
            _mm256_stream_si256(reinterpret_cast<__m256i *>(p), bit_cast<__m256i>(line));
        else
#endif
            __builtin_memcpy(p, line, sizeof line);
    }
}

inline void finish_streaming() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// Calls body<V>(i): scalars up to `head`, then vectors, then scalars for what is left.
template <class S, class Body>
inline void each(index n, index head, const Body &body) {
    using E = Element<S>;
    index i = 0;
    for (; i < head; ++i) body.template operator()<typename E::Compute>(i);
    for (; i + E::width <= n; i += E::width) body.template operator()<typename E::Vector>(i);
    for (; i < n; ++i) body.template operator()<typename E::Compute>(i);
}

// How many elements stand before the first one at which a whole vector can be streamed.
template <class S>
inline index unaligned_head(const S *p, index n) {
    constexpr std::uintptr_t line = sizeof(S) * Element<S>::width;
    const index head = index((line - reinterpret_cast<std::uintptr_t>(p) % line) % line / sizeof(S));
    return head < n ? head : n;
}

// Two passes: the mean of the block, then deviations from it. A large mean costs no precision.
template <class S>
Moments block_moments(const S *x, index n) {
    using E = Element<S>;
    using T = typename E::Compute;
    using V = typename E::Vector;
    using Wide = typename Lanes<V>::wide;
    constexpr index width = E::width, pair = 2 * width;

    V sum[4] = {};
    T tail = 0;
    index i = 0;
    for (; i + 4 * width <= n; i += 4 * width)
        for (index k = 0; k < 4; ++k) sum[k] += E::load(x + i + k * width);
    for (; i + width <= n; i += width) sum[0] += E::load(x + i);
    for (; i < n; ++i) tail += E::get(x + i);
    const T pivot = T((sum_of_lanes<V>((sum[0] + sum[1]) + (sum[2] + sum[3])) + double(tail)) / double(n));

    Wide first{}, second{};
    double first_tail = 0, second_tail = 0;
    for (i = 0; i + pair <= n;) {
        const index end = n - i < short_run * pair ? n : i + short_run * pair;
        V run_first[2] = {}, run_second[2] = {};
        for (; i + pair <= end; i += pair)
            for (index k = 0; k < 2; ++k) {
                const V d = E::load(x + i + k * width) - pivot;
                run_first[k] += d;
                run_second[k] += d * d;
            }
        first += widen_lanes(run_first[0]) + widen_lanes(run_first[1]);
        second += widen_lanes(run_second[0]) + widen_lanes(run_second[1]);
    }
    for (; i + width <= n; i += width) {
        const V d = E::load(x + i) - pivot;
        first += widen_lanes(d);
        second += widen_lanes(V(d * d));
    }
    for (; i < n; ++i) {
        const T d = E::get(x + i) - pivot;
        first_tail += d;
        second_tail += double(d) * double(d);
    }
    const double rest = sum_of_lanes<V>(first) + first_tail;
    const double squares = sum_of_lanes<V>(second) + second_tail;
    const double m2 = squares - rest * rest / double(n);
    if (!Moments::finite(pivot)) return {n, double(pivot), m2};
    return {n, double(pivot) + rest / double(n), m2 < 0 ? 0 : m2};
}

template <class S>
FLATWATER_ONE_COPY
Moments segment_moments(const S *x, index n) {
    Moments all;
    for (index i = 0; i < n; i += block_elements)
        all.add(block_moments(x + i, n - i < block_elements ? n - i : block_elements));
    return all;
}

template <class S, Activation A, bool streaming>
FLATWATER_ONE_COPY
void segment_apply(const S *x, const S *residual, S *y, index n, const Affine<typename Element<S>::Compute> &f) {
    each<S>(n, streaming ? unaligned_head(y, n) : 0, [=]<class V>(index i) {
        V z = (fetch<S, V>(x + i) - f.shift) * f.scale + f.offset;
        if (residual) z += fetch<S, V>(residual + i);
        const V value = activate<A, V>(z);
        if constexpr (streaming)
            place_streaming<S, V>(y + i, value);
        else
            place<S, V>(y + i, value);
    });
}

template <class S, Activation A>
FLATWATER_ONE_COPY
GradientSums segment_sums(const S *dy, const S *x, const S *residual, index n, const Channel &channel) {
    using T = typename Element<S>::Compute;
    using Wide = typename Element<S>::Vector;
    const Affine<T> f(channel);
    double dz_sum = 0, shifted_sum = 0;
    for (index start = 0; start < n; start += block_elements) {
        const index end = n - start < block_elements ? n : start + block_elements;
        Wide wide_dz{}, wide_shifted{};
        T tail_dz = 0, tail_shifted = 0;
        each<S>(end - start, 0, [&]<class V>(index k) {
            const index i = start + k;
            const V shifted = fetch<S, V>(x + i) - f.shift;
            V z = shifted * f.scale + f.offset;
            if (residual) z += fetch<S, V>(residual + i);
            const V dz = activation_gradient<A, V>(z, fetch<S, V>(dy + i));
            if constexpr (Lanes<V>::count == 1) {
                tail_dz += dz;
                tail_shifted += dz * shifted;
            } else {
                wide_dz += dz;
                wide_shifted += dz * shifted;
            }
        });
        dz_sum += sum_of_lanes<Wide>(wide_dz) + double(tail_dz);
        shifted_sum += sum_of_lanes<Wide>(wide_shifted) + double(tail_shifted);
    }
    return GradientSums::from_shifted<T>(dz_sum, shifted_sum, channel);
}

template <class S, Activation A, bool streaming>
FLATWATER_ONE_COPY
void segment_gradient(const S *dy, const S *x, const S *residual, S *dx, S *dresidual, index n,
                      const Affine<typename Element<S>::Compute> &f,
                      const Gradient<typename Element<S>::Compute> &g) {
    each<S>(n, streaming && dx ? unaligned_head(dx, n) : 0, [=]<class V>(index i) {
        const V shifted = fetch<S, V>(x + i) - f.shift;
        V z = shifted * f.scale + f.offset;
        if (residual) z += fetch<S, V>(residual + i);
        const V dz = activation_gradient<A, V>(z, fetch<S, V>(dy + i));
        if (dresidual) place<S, V>(dresidual + i, dz);
        if (!dx) return;
        const V value = dz * g.dz_scale + (shifted * g.x_scale + g.offset);
        if constexpr (streaming)
            place_streaming<S, V>(dx + i, value);
        else
            place<S, V>(dx + i, value);
    });
}

}  // namespace flatwater::FLATWATER_ISA
