// Statistics of the pieces of a channel (pieces.h), each read once.
#pragma once

#include "pieces.h"
#include "team.h"

namespace flatwater::FLATWATER_ISA {

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

// The moments of `sets` sets of pieces, of which pieces_of(i) is one, to take(i, moments). Their blocks are the tasks, and
// are added in the order in which they lie.
template <class S, class PiecesOf, class Take>
void block_by_block(const Problem &p, index sets, const PiecesOf &pieces_of, const Take &take) {
    const index blocks = Blocks<S>(pieces_of(0)).size();
    Scratch<Moments> found(sets * blocks);
    parallel_for(sets * blocks, p.shape.elements(), [&](index i) {
        const S *const x = At<S>(p, 0).x;
        block_moments(x, Blocks<S>(pieces_of(i / blocks))[i % blocks], x, &found[i]);
    });
    for (index i = 0; i < sets; ++i) {
        Moments all;
        for (index b = 0; b < blocks; ++b) all.add(found[i * blocks + b]);
        take(i, all);
    }
}

}  // namespace flatwater::FLATWATER_ISA
