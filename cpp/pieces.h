// Loops over the pieces of a channel in channels-first memory: runs of consecutive elements.
#pragma once

#include "activation.h"
#include "walk.h"

namespace flatwater::FLATWATER_ISA {

// dz, and on the way x - shift. F: Affine, of one channel or of a vector of them. y lies where the residual does else.
template <class S, class V, Activation A, class F>
inline V gradient_at(const At<S> &at, index i, const F &f, V &shifted) {
    shifted = fetch<S, V>(at.x + i) - f.shift;
    if constexpr (is_of_y<A>)
        return activation_gradient<A, V>(fetch<S, V>(at.residual + i), fetch<S, V>(at.dy + i));
    V z = shifted * f.scale + f.offset;
    if (at.residual) z += fetch<S, V>(at.residual + i);
    return activation_gradient<A, V>(z, fetch<S, V>(at.dy + i));
}

template <class V>
struct Deviations {
    double sum, squares;  // Σ(x - pivot) and Σ(x - pivot)²
};

// The mean of a block's first sixteenth as its elements' own precision has it; 0 where there is no such number, and
// where the sixteenth's lanes differ by more than it: then it brings the elements no nearer to 0, but costs each a
// rounding, and may be that of an outlier. Were those elements far from the block's mean, then by a distance that is
// itself part of m2: at most by 4 deviations.
template <class S, class V>
typename Element<S>::Compute block_pivot(const S *x, const Pieces &block) {
    using T = typename Element<S>::Compute;
    constexpr index few = 16, width = Lanes<V>::count;
    const index count = (block.count + few - 1) / few;
    const index length = block.count > 1 ? block.length : larger(smaller(block.length, width), block.length / few);
    V ways[4] = {};
    for (index n = 0; n < count; ++n) {
        const S *piece = x + n * block.stride;
        four_ways<V>(0, length, [&]<int way>(index i) { ways[way] += fetch<S, V>(piece + i); });
    }
    const V sum = (ways[0] + ways[1]) + (ways[2] + ways[3]);
    const double each = double(count * (length / width));
    const T pivot = T(sum_of_lanes<V>(sum) / (each * width));
    return pivot - pivot == 0 && __builtin_fabs(double(pivot)) > spread_of_lanes<V>(sum) / each ? pivot : T(0);
}

// Of one channel, with every square in double: for values so far apart, or so close, that it is no number in float.
template <class S, class V>
Deviations<V> wide_deviations(const S *x, const Pieces &block, typename Element<S>::Compute pivot) {
    using Wide = typename Lanes<V>::wide;
    const Rest<V> rest(block.length);
    Wide first{}, second{};
    const auto add = [&](const V &deviation) {
        const Wide d = widen_lanes(deviation);
        first += d;
        second += d * d;
    };
    for (index n = 0; n < block.count; ++n) {
        const S *piece = x + n * block.stride;
        four_ways<V>(0, block.length, [&]<int>(index i) { add(fetch<S, V>(piece + i) - pivot); });
        if (rest.any) add(rest.only_new(fetch<S, V>(piece + rest.at) - pivot));
    }
    return {sum_of_doubles(first), sum_of_doubles(second)};
}

// Of one channel, whether it has only one value.
template <class S, class V>
bool is_constant(const S *x, const Pieces &block) {
    const V first = splat<V>(Element<S>::get(x));
    for (index n = 0; n < block.count; ++n) {
        const S *piece = x + n * block.stride;
        V least = first, most = first;
        const auto look = [&](const V &v) {
            least = v < least ? v : least;
            most = v > most ? v : most;
        };
        four_ways<V>(0, block.length, [&]<int>(index i) { look(fetch<S, V>(piece + i)); });
        if (block.length % Lanes<V>::count) look(fetch<S, V>(piece + block.length - Lanes<V>::count));
        if (any(least != most)) return false;
    }
    return true;
}

// Calls loop<second_level>() for the level of cache that this processor would have planes prefetched into: inside the
// loops the choice took up to a fifth of their time. Those that would rather have the second have AVX-512; and float64,
// which networks hardly have, is not worth two loops.
template <class S, class Loop>
inline void for_level(const Loop &loop) {
    using E = Element<S>;
    if constexpr (sizeof(typename E::Vector) == line_bytes && sizeof(typename E::Compute) < sizeof(double))
        if (machine().second_level_planes) return loop.template operator()<true>();
    loop.template operator()<false>();
}

// Deviations from a pivot near the block's mean: a large mean costs no precision.
template <class S, class V, bool second_level>
FLATWATER_ONE_COPY
void vector_moments(const S *x, const Pieces &block, const S *prefetched, Moments *found) {
    using T = typename Element<S>::Compute;
    using Wide = typename Lanes<V>::wide;
    T pivots[most_together], pivot{};
    Wide firsts[most_together], seconds[most_together], first{}, second{};
    for (index c = 0; c < block.channels; ++c) {
        pivots[c] = block_pivot<S, V>(x + c * block.length, block);
        firsts[c] = seconds[c] = Wide{};
    }
    const Rest<V> rest(block.length);
    V run_first[4] = {}, run_second[4] = {};
    const auto add = [&](index way, const V &d) {
        run_first[way] += d;
        run_second[way] += d * d;
    };
    in_short_runs<V>(
        block, rest,
        [&](index c) {
            pivot = pivots[c];
            first = firsts[c], second = seconds[c];
        },
        [&]<int way>(index i) {
            prefetch(prefetched + i, second_level);
            add(way, fetch<S, V>(x + i) - pivot);
        },
        [&](index i) {
            prefetch(prefetched + i + Lanes<V>::count - 1, second_level);
            add(3, rest.only_new(fetch<S, V>(x + i) - pivot));
        },
        [&] {
            move_into<V>(first, run_first);
            move_into<V>(second, run_second);
        },
        [&](index c) { firsts[c] = first, seconds[c] = second; });
    const index n = block.elements();
    for (index c = 0; c < block.channels; ++c) {
        Deviations<V> sums{sum_of_doubles(firsts[c]), sum_of_doubles(seconds[c])};
        const S *const channel = x + c * block.length;
        if (!squares_are_exact<T>(sums.squares, n, [&] { return is_constant<S, V>(channel, block); }))
            sums = wide_deviations<S, V>(channel, block, pivots[c]);
        found[c] = Moments::of_deviations(n, double(pivots[c]), sums.sum, sums.squares);
    }
}

// Of each of the block's channels. `prefetched` is another tensor, or another part of x, of which memory is asked for
// what lies where the block does in x.
template <class S>
void block_moments(const S *x, const Pieces &block, const S *prefetched, Moments *found) {
    using E = Element<S>;
    x += block.offset, prefetched += block.offset;
    if (block.length < E::width) return vector_moments<S, typename E::Compute, false>(x, block, prefetched, found);
    for_level<S>([&]<bool second_level>() {
        vector_moments<S, typename E::Vector, second_level>(x, block, prefetched, found);
    });
}

// One Affine for each channel; `ahead` is how far from here lies what is worked on after this: 0 if nothing is.
template <class S, class V, Activation A, bool streaming, bool second_level>
FLATWATER_ONE_COPY
void vector_apply(const At<S> &all, const Pieces &pieces, const Affine<typename Element<S>::Compute> *affine,
                  index ahead) {
    const At<S> at = all;  // copies: as far as the compiler knows, what it writes could change those of the caller
    const Ends<S> ends(pieces, at.y);
    const auto piece_apply = [&](index n, index c) {
        const auto f = affine[c];
        const index piece = pieces.offset + n * pieces.stride + c * pieces.length;
        at.prefetch_inputs(piece + pieces.length - 1 + ahead, second_level);  // its line is begun by no vector
        if constexpr (streaming) ends.prefetch(at.y, n, c);
        fill_piece<S, V, streaming>(at.y, piece, pieces.length, [=](index i, const auto &put) {
            at.prefetch_inputs(i + ahead, second_level);
            V z = (fetch<S, V>(at.x + i) - f.shift) * f.scale + f.offset;
            if (at.residual) z += fetch<S, V>(at.residual + i);
            put(at.y + i, activate<A, V>(z));
        });
    };
    for (index n = pieces.count - 1; n >= 0; --n)  // backwards: what was read last is still in cache
        for (index c = 0; c < pieces.channels; ++c) piece_apply(n, c);
}

template <class S, Activation A>
void pieces_apply(const At<S> &at, const Pieces &pieces, const Affine<typename Element<S>::Compute> *f, bool streaming,
                  index ahead) {
    using E = Element<S>;
    if (pieces.length < E::width) return vector_apply<S, typename E::Compute, A, false, false>(at, pieces, f, ahead);
    for_level<S>([&]<bool second_level>() {
        if (streaming) return vector_apply<S, typename E::Vector, A, true, second_level>(at, pieces, f, ahead);
        vector_apply<S, typename E::Vector, A, false, second_level>(at, pieces, f, ahead);
    });
}

// What a loop asks memory for besides what it reads: two tensors, or other parts of those that it reads.
template <class S>
struct Prefetched {
    const S *first, *second;

    Prefetched plus(index offset) const { return {first + offset, second + offset}; }
    FLATWATER_HINT void prefetch(index i, bool second_level) const {
        flatwater::FLATWATER_ISA::prefetch(first + i, second_level);
        flatwater::FLATWATER_ISA::prefetch(second + i, second_level);
    }
};

// Σdz and Σdz·(x - shift)·unit of each of a block's channels; one Affine and unit for each of them.
template <class S, class V, Activation A, bool second_level>
FLATWATER_ONE_COPY
void vector_sums(const At<S> &all, const Pieces &block, const Affine<typename Element<S>::Compute> *affine,
                 const typename Element<S>::Compute *units, const Prefetched<S> &asked, GradientSums *found) {
    using T = typename Element<S>::Compute;
    Affine<T> f;
    T unit{};
    using Wide = typename Lanes<V>::wide;
    Wide dz_sums[most_together], dz_xhat_sums[most_together], dz_sum{}, dz_xhat_sum{};
    for (index c = 0; c < block.channels; ++c) dz_sums[c] = dz_xhat_sums[c] = Wide{};
    const Rest<V> rest(block.length);
    const At<S> at = all.plus(block.offset);
    const Prefetched<S> prefetched = asked.plus(block.offset);
    V sum[4] = {}, product[4] = {};
    in_short_runs<V>(
        block, rest,
        [&](index c) {
            f = affine[c];
            unit = units[c];
            dz_sum = dz_sums[c], dz_xhat_sum = dz_xhat_sums[c];
        },
        [&]<int way>(index i) {
            prefetched.prefetch(i, second_level);
            V shifted;
            const V dz = gradient_at<S, V, A>(at, i, f, shifted);
            sum[way] += dz;
            product[way] += dz * (shifted * unit);
        },
        [&](index i) {
            prefetched.prefetch(i + Lanes<V>::count - 1, second_level);
            V shifted;
            const V dz = gradient_at<S, V, A>(at, i, f, shifted);
            sum[3] += rest.only_new(dz);
            product[3] += rest.only_new(dz * (shifted * unit));
        },
        [&] {
            move_into<V>(dz_sum, sum);
            move_into<V>(dz_xhat_sum, product);
        },
        [&](index c) { dz_sums[c] = dz_sum, dz_xhat_sums[c] = dz_xhat_sum; });
    for (index c = 0; c < block.channels; ++c)
        found[c] = {sum_of_doubles(dz_sums[c]), sum_of_doubles(dz_xhat_sums[c])};
}

template <class S, Activation A>
void block_sums(const At<S> &at, const Pieces &block, const Affine<typename Element<S>::Compute> *f,
                const typename Element<S>::Compute *units, const Prefetched<S> &prefetched, GradientSums *found) {
    using E = Element<S>;
    if (block.length < E::width)
        return vector_sums<S, typename E::Compute, A, false>(at, block, f, units, prefetched, found);
    for_level<S>([&]<bool second_level>() {
        vector_sums<S, typename E::Vector, A, second_level>(at, block, f, units, prefetched, found);
    });
}

template <class S, class V, Activation A, bool streaming, bool second_level>
FLATWATER_ONE_COPY
void vector_gradient(const At<S> &all, const Pieces &pieces, const Affine<typename Element<S>::Compute> *affine,
                     const Gradient<typename Element<S>::Compute> *gradients, index ahead) {
    const At<S> at = all;
    const Ends<S> ends(pieces, at.dx ? at.dx : at.dresidual);
    const auto piece_gradient = [&](index n, index c) {
        const auto f = affine[c];
        const auto g = gradients[c];
        const index piece = pieces.offset + n * pieces.stride + c * pieces.length;
        at.prefetch_inputs(piece + pieces.length - 1 + ahead, second_level);
        if constexpr (streaming) {
            if (at.dx) ends.prefetch(at.dx, n, c);
            if (at.dresidual) ends.prefetch(at.dresidual, n, c);
        }
        const auto gradient = [=](index i, V &shifted) {
            at.prefetch_inputs(i + ahead, second_level);
            return gradient_at<S, V, A>(at, i, f, shifted);
        };
        if (!at.dx) {
            fill_piece<S, V, streaming>(at.dresidual, piece, pieces.length, [=](index i, const auto &put) {
                V shifted;
                put(at.dresidual + i, gradient(i, shifted));
            });
            return;
        }
        fill_piece<S, V, streaming>(at.dx, piece, pieces.length, [=](index i, const auto &put) {
            V shifted;
            const V dz = gradient(i, shifted);
            if (at.dresidual) put(at.dresidual + i, dz);
            put(at.dx + i, V(dz * g.dz_scale + ((shifted * g.unit) * g.x_scale + g.offset)));
        });
    };
    for (index n = pieces.count - 1; n >= 0; --n)
        for (index c = 0; c < pieces.channels; ++c) piece_gradient(n, c);
}

template <class S, Activation A>
void pieces_gradient(const At<S> &at, const Pieces &pieces, const Affine<typename Element<S>::Compute> *f,
                     const Gradient<typename Element<S>::Compute> *g, bool streaming, index ahead) {
    using E = Element<S>;
    if (pieces.length < E::width)
        return vector_gradient<S, typename E::Compute, A, false, false>(at, pieces, f, g, ahead);
    const bool in_step =
        !at.dx || !at.dresidual || before_multiple(at.dx, line_bytes) == before_multiple(at.dresidual, line_bytes);
    for_level<S>([&]<bool second_level>() {
        if (streaming && in_step)
            return vector_gradient<S, typename E::Vector, A, true, second_level>(at, pieces, f, g, ahead);
        vector_gradient<S, typename E::Vector, A, false, second_level>(at, pieces, f, g, ahead);
    });
}

}  // namespace flatwater::FLATWATER_ISA
