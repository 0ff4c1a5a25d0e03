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

// Calls loop<second_level>() for the level of cache that this processor would have planes prefetched into.
template <class S, class Loop>
inline void for_level(const Loop &loop) {
    if constexpr (two_levels<S>)
        if (machine().second_level_planes) return loop.template operator()<true>();
    loop.template operator()<false>();
}

// The same of a loop that writes: loop<writing, second_level>(). Processors that ask for what is written would have it in
// the first level.
template <class S, class Loop>
inline void for_writing(Writing writing, const Loop &loop) {
    if (writing == Writing::asked_for) return loop.template operator()<Writing::asked_for, false>();
    for_level<S>([&]<bool second_level>() {
        if (writing == Writing::streamed) return loop.template operator()<Writing::streamed, second_level>();
        loop.template operator()<Writing::stored, second_level>();
    });
}

// How far from a piece the one lies that is written a few pieces after it: a sample's one after the other, but samples
// backwards.
inline index to_next_written(const Pieces &pieces) {
    constexpr index few = 2;
    return pieces.channels > few ? few * pieces.length : -few * pieces.stride;
}

// One Affine for each channel; `ahead` is how far from here lies what is worked on after this: 0 if nothing is.
template <class S, class V, Activation A, Writing writing, bool second_level>
FLATWATER_ONE_COPY
void vector_apply(const At<S> &all, const Pieces &pieces, const Affine<typename Element<S>::Compute> *affine,
                  index ahead) {
    const At<S> at = all;  // copies: as far as the compiler knows, what it writes could change those of the caller
    const Ends<S> ends(pieces, at.y);
    const index to_next = to_next_written(pieces);
    const auto ask = [=](index i) FLATWATER_HINT_LAMBDA {
        if constexpr (writing == Writing::asked_for) return prefetch(at.y + i + to_next, second_level);
        at.prefetch_inputs(i + ahead, second_level);
    };
    const auto piece_apply = [&](index n, index c) {
        const auto f = affine[c];
        const index piece = pieces.offset + n * pieces.stride + c * pieces.length;
        ask(piece + pieces.length - 1);  // its line is begun by no vector
        if constexpr (writing == Writing::streamed) ends.prefetch(at.y, n, c);
        fill_piece<S, V, writing == Writing::streamed>(at.y, piece, pieces.length, [=](index i, const auto &put) {
            ask(i);
            V z = (fetch<S, V>(at.x + i) - f.shift) * f.scale + f.offset;
            if (at.residual) z += fetch<S, V>(at.residual + i);
            put(at.y + i, activate<A, V>(z));
        });
    };
    for (index n = pieces.count - 1; n >= 0; --n)  // backwards: what was read last is still in cache
        for (index c = 0; c < pieces.channels; ++c) piece_apply(n, c);
}

template <class S>
void pieces_apply(const At<S> &at, const Pieces &pieces, const Affine<typename Element<S>::Compute> *f,
                  Writing writing, index ahead) {
    using E = Element<S>;
    for_activation(at.activation, [&]<Activation A>() {
        if (pieces.length < E::width)
            return vector_apply<S, typename E::Compute, A, Writing::stored, false>(at, pieces, f, ahead);
        for_writing<S>(writing, [&]<Writing chosen, bool second_level>() {
            vector_apply<S, typename E::Vector, A, chosen, second_level>(at, pieces, f, ahead);
        });
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

template <class S>
void block_sums(const At<S> &at, const Pieces &block, const Affine<typename Element<S>::Compute> *f,
                const typename Element<S>::Compute *units, const Prefetched<S> &prefetched, GradientSums *found) {
    using E = Element<S>;
    for_gradient(at.activation, [&]<Activation A>() {
        if (block.length < E::width)
            return vector_sums<S, typename E::Compute, A, false>(at, block, f, units, prefetched, found);
        for_level<S>([&]<bool second_level>() {
            vector_sums<S, typename E::Vector, A, second_level>(at, block, f, units, prefetched, found);
        });
    });
}

template <class S, class V, Activation A, Writing writing, bool second_level>
FLATWATER_ONE_COPY
void vector_gradient(const At<S> &all, const Pieces &pieces, const Affine<typename Element<S>::Compute> *affine,
                     const Gradient<typename Element<S>::Compute> *gradients, index ahead) {
    const At<S> at = all;
    const Ends<S> ends(pieces, at.dx ? at.dx : at.dresidual);
    constexpr bool streaming = writing == Writing::streamed;
    const index to_next = to_next_written(pieces);
    const auto ask = [=](index i) FLATWATER_HINT_LAMBDA {
        if constexpr (writing != Writing::asked_for) return at.prefetch_inputs(i + ahead, second_level);
        if (at.dx) prefetch(at.dx + i + to_next, second_level);
        if (at.dresidual) prefetch(at.dresidual + i + to_next, second_level);
    };
    const auto piece_gradient = [&](index n, index c) {
        const auto f = affine[c];
        const auto g = gradients[c];
        const index piece = pieces.offset + n * pieces.stride + c * pieces.length;
        ask(piece + pieces.length - 1);
        if constexpr (streaming) {
            if (at.dx) ends.prefetch(at.dx, n, c);
            if (at.dresidual) ends.prefetch(at.dresidual, n, c);
        }
        const auto gradient = [=](index i, V &shifted) {
            ask(i);
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

template <class S>
void pieces_gradient(const At<S> &at, const Pieces &pieces, const Affine<typename Element<S>::Compute> *f,
                     const Gradient<typename Element<S>::Compute> *g, Writing writing, index ahead) {
    using E = Element<S>;
    const bool in_step =
        !at.dx || !at.dresidual || before_multiple(at.dx, line_bytes) == before_multiple(at.dresidual, line_bytes);
    const Writing how = writing == Writing::streamed && !in_step ? Writing::stored : writing;
    for_gradient(at.activation, [&]<Activation A>() {
        if (pieces.length < E::width)
            return vector_gradient<S, typename E::Compute, A, Writing::stored, false>(at, pieces, f, g, ahead);
        for_writing<S>(how, [&]<Writing chosen, bool second_level>() {
            vector_gradient<S, typename E::Vector, A, chosen, second_level>(at, pieces, f, g, ahead);
        });
    });
}

}  // namespace flatwater::FLATWATER_ISA
