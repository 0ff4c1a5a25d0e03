// Loops over the pieces of a channel in channels-first memory: runs of consecutive elements.
//
// A piece that is no whole number of vectors ends with a vector that begins earlier: what it writes twice
// is the same, and where it sums, the lanes that were there before are cleared. A piece narrower than a
// vector is taken in scalars, by the same loops.
#pragma once

#include "activation.h"
#include "elements.h"
#include "layout.h"

namespace flatwater::FLATWATER_ISA {

// Values that a lane sums in its own precision. Short, for when the mean is 10^4 deviations the deviations are
// multiples of a coarse unit, and roundings of a longer sum of squares all lean one way.
constexpr index short_run = 8;

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

// The last vector of a piece, where it is not whole: where it begins, and which of its lanes are new.
template <class V>
struct Rest {
    using Bits = typename Lanes<V>::bits;
    index at;
    bool any;
    Bits keep;

    explicit Rest(index length) : at(length - Lanes<V>::count), any(length % Lanes<V>::count != 0), keep{} {
        constexpr index width = Lanes<V>::count;
        if constexpr (width > 1)
            for (index i = 0; i < width; ++i) keep[i] = i < width - length % width ? 0 : -1;
    }
    V only_new(const V &v) const { return bit_cast<V>(Bits(bit_cast<Bits>(v) & keep)); }
};

// Calls body<way>(i) for each whole vector in [begin, end), the ways in turn: 0, 1, … 3.
template <class V, class Body>
inline void four_ways(index begin, index end, const Body &body) {
    constexpr index width = Lanes<V>::count;
    index i = begin;
    for (; i + 4 * width <= end; i += 4 * width) {
        body.template operator()<0>(i);
        body.template operator()<1>(i + width);
        body.template operator()<2>(i + 2 * width);
        body.template operator()<3>(i + 3 * width);
    }
    const index left = (end - i) / width;
    if (left > 0) body.template operator()<0>(i);
    if (left > 1) body.template operator()<1>(i + width);
    if (left > 2) body.template operator()<2>(i + 2 * width);
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

// Calls begin(c) and end(c) around what is done for channel c, body<way>(i) for the whole vectors of its pieces, four
// ways in turn, last(i) for those that are not whole, which go the last way, and flush() before the sums of any way are
// longer than a short run. i counts from the first piece. Of short pieces, all channels of a few samples come first.
template <class V, class Begin, class Body, class Last, class Flush, class End>
inline void in_short_runs(const Pieces &block, const Rest<V> &rest, const Begin &begin, const Body &body,
                          const Last &last, const Flush &flush, const End &end) {
    constexpr index longest = 4 * short_run * Lanes<V>::count;
    const index run = short_run / (block.length / (4 * Lanes<V>::count) + 1);  // pieces; 0: not even one
    for (index c = 0; c < block.channels && run == 0; ++c) {
        begin(c);
        for (index n = 0; n < block.count; ++n) {
            const index piece = n * block.stride + c * block.length, stop = piece + block.length;
            for (index start = piece; start < stop; start += longest) {
                four_ways<V>(start, smaller(stop, start + longest), body);
                flush();
            }
            if (rest.any) last(piece + rest.at);
            flush();
        }
        end(c);
    }
    const index turn = block.channels == 1 ? block.count : run;  // pieces of a channel before it is the next one's turn
    for (index first = 0; first < block.count && run > 0; first += turn) {
        const index stop = smaller(first + turn, block.count);
        for (index c = 0; c < block.channels; ++c) {
            begin(c);
            for (index done = first; done < stop; done += run) {
                for (index n = done; n < smaller(done + run, stop); ++n) {
                    const index piece = n * block.stride + c * block.length;
                    four_ways<V>(piece, piece + block.length, body);
                    if (rest.any) last(piece + rest.at);
                }
                flush();
            }
            end(c);
        }
    }
}

// What four ways have summed in the elements' own precision, on its way into a sum in double.
template <class V>
inline void move_into(typename Lanes<V>::wide &sum, V (&ways)[4]) {
    sum += widen_lanes<V>(ways[0] + ways[1]) + widen_lanes<V>(ways[2] + ways[3]);
    for (V &way : ways) way = V{};
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
template <class S, class V>
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
            prefetch(prefetched + i);
            add(way, fetch<S, V>(x + i) - pivot);
        },
        [&](index i) {
            prefetch(prefetched + i + Lanes<V>::count - 1);
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
    if (block.length < E::width) return vector_moments<S, typename E::Compute>(x, block, prefetched, found);
    vector_moments<S, typename E::Vector>(x, block, prefetched, found);
}

// Calls body(i) for vectors that cover a piece, each with the place for what it returns. Streamed are whole cache lines
// only: a line of which one half is streamed, and the other written otherwise, goes to memory in two.
template <class S, class V, bool streaming, class Body>
inline void fill_piece(S *out, index begin, index length, const Body &body) {
    constexpr index width = Lanes<V>::count, line = line_bytes / index(sizeof(S));
    const index end = begin + length;
    index i = begin;
    const auto place_until = [&](index stop) {
        for (; i + width <= stop; i += width) place<S, V>(out + i, body(i));
    };
    if constexpr (streaming && width > 1) {
        const index first = smaller(begin + before_multiple(out + begin, line_bytes), end);
        if constexpr (width < line) place_until(first);
        if (i < first) {
            const index at = width < line ? smaller(i, end - width) : i;
            place_lanes<S, V>(out + at, body(at), i - at, first - at);
        }
        for (i = first; i + line <= end; i += line)
            for (index j = i; j < i + line; j += width) place_streaming<S, V>(out + j, body(j));
        if constexpr (width < line) place_until(end);
        if (i < end) place_lanes<S, V>(out + end - width, body(end - width), width - (end - i), width);
    } else {
        place_until(end);
        if (i < end) place<S, V>(out + end - width, body(end - width));
    }
}

// One Affine for each channel; `ahead` is how far from here lies what is worked on after this: 0 if nothing is.
template <class S, class V, Activation A, bool streaming>
FLATWATER_ONE_COPY
void vector_apply(const At<S> &all, const Pieces &pieces, const Affine<typename Element<S>::Compute> *affine,
                  index ahead) {
    const At<S> at = all;  // copies: as far as the compiler knows, what it writes could change those of the caller
    const auto piece_apply = [&](index n, index c) {
        const auto f = affine[c];
        const index piece = pieces.offset + n * pieces.stride + c * pieces.length;
        at.prefetch_inputs(piece + pieces.length - 1 + ahead);  // its line is begun by no vector
        fill_piece<S, V, streaming>(at.y, piece, pieces.length, [=](index i) {
            at.prefetch_inputs(i + ahead);
            V z = (fetch<S, V>(at.x + i) - f.shift) * f.scale + f.offset;
            if (at.residual) z += fetch<S, V>(at.residual + i);
            return activate<A, V>(z);
        });
    };
    for (index n = pieces.count - 1; n >= 0; --n)  // backwards: what was read last is still in cache
        for (index c = 0; c < pieces.channels; ++c) piece_apply(n, c);
}

template <class S, Activation A>
void pieces_apply(const At<S> &at, const Pieces &pieces, const Affine<typename Element<S>::Compute> *f, bool streaming,
                  index ahead) {
    using E = Element<S>;
    if (pieces.length < E::width) return vector_apply<S, typename E::Compute, A, false>(at, pieces, f, ahead);
    if (streaming) return vector_apply<S, typename E::Vector, A, true>(at, pieces, f, ahead);
    vector_apply<S, typename E::Vector, A, false>(at, pieces, f, ahead);
}

// What a loop asks memory for besides what it reads: two tensors, or other parts of those that it reads.
template <class S>
struct Prefetched {
    const S *first, *second;

    Prefetched plus(index offset) const { return {first + offset, second + offset}; }
    void prefetch(index i) const {
        flatwater::FLATWATER_ISA::prefetch(first + i);
        flatwater::FLATWATER_ISA::prefetch(second + i);
    }
};

// Σdz and Σdz·(x - shift)·unit of each of a block's channels.
template <class S, class V, Activation A>
FLATWATER_ONE_COPY
void vector_sums(const At<S> &all, const Pieces &block, const Channel *channels, const Prefetched<S> &asked,
                 GradientSums *found) {
    using T = typename Element<S>::Compute;
    Affine<T> affine[most_together], f;
    T unit{};
    using Wide = typename Lanes<V>::wide;
    Wide dz_sums[most_together], dz_xhat_sums[most_together], dz_sum{}, dz_xhat_sum{};
    for (index c = 0; c < block.channels; ++c) {
        affine[c] = Affine<T>(channels[c]);
        dz_sums[c] = dz_xhat_sums[c] = Wide{};
    }
    const Rest<V> rest(block.length);
    const At<S> at = all.plus(block.offset);
    const Prefetched<S> prefetched = asked.plus(block.offset);
    V sum[4] = {}, product[4] = {};
    in_short_runs<V>(
        block, rest,
        [&](index c) {
            f = affine[c];
            unit = T(unit_of<T>(channels[c].inv_std));
            dz_sum = dz_sums[c], dz_xhat_sum = dz_xhat_sums[c];
        },
        [&]<int way>(index i) {
            prefetched.prefetch(i);
            V shifted;
            const V dz = gradient_at<S, V, A>(at, i, f, shifted);
            sum[way] += dz;
            product[way] += dz * (shifted * unit);
        },
        [&](index i) {
            prefetched.prefetch(i + Lanes<V>::count - 1);
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
void block_sums(const At<S> &at, const Pieces &block, const Channel *channels, const Prefetched<S> &prefetched,
                GradientSums *found) {
    using E = Element<S>;
    if (block.length < E::width)
        return vector_sums<S, typename E::Compute, A>(at, block, channels, prefetched, found);
    vector_sums<S, typename E::Vector, A>(at, block, channels, prefetched, found);
}

template <class S, class V, Activation A, bool streaming>
FLATWATER_ONE_COPY
void vector_gradient(const At<S> &all, const Pieces &pieces, const Affine<typename Element<S>::Compute> *affine,
                     const Gradient<typename Element<S>::Compute> *gradients, index ahead) {
    const At<S> at = all;
    const auto piece_gradient = [&](index n, index c) {
        const auto f = affine[c];
        const auto g = gradients[c];
        const index piece = pieces.offset + n * pieces.stride + c * pieces.length;
        at.prefetch_inputs(piece + pieces.length - 1 + ahead);
        const auto gradient = [=](index i, V &shifted) {
            at.prefetch_inputs(i + ahead);
            return gradient_at<S, V, A>(at, i, f, shifted);
        };
        if (!at.dx) {
            fill_piece<S, V, streaming>(at.dresidual, piece, pieces.length, [=](index i) {
                V shifted;
                return gradient(i, shifted);
            });
            return;
        }
        fill_piece<S, V, streaming>(at.dx, piece, pieces.length, [=](index i) {
            V shifted;
            const V dz = gradient(i, shifted);
            if (at.dresidual) place<S, V>(at.dresidual + i, dz);
            return V(dz * g.dz_scale + ((shifted * g.unit) * g.x_scale + g.offset));
        });
    };
    for (index n = pieces.count - 1; n >= 0; --n)
        for (index c = 0; c < pieces.channels; ++c) piece_gradient(n, c);
}

template <class S, Activation A>
void pieces_gradient(const At<S> &at, const Pieces &pieces, const Affine<typename Element<S>::Compute> *f,
                     const Gradient<typename Element<S>::Compute> *g, bool streaming, index ahead) {
    using E = Element<S>;
    if (pieces.length < E::width) return vector_gradient<S, typename E::Compute, A, false>(at, pieces, f, g, ahead);
    if (streaming) return vector_gradient<S, typename E::Vector, A, true>(at, pieces, f, g, ahead);
    vector_gradient<S, typename E::Vector, A, false>(at, pieces, f, g, ahead);
}

}  // namespace flatwater::FLATWATER_ISA
