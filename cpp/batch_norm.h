// Batch norm: statistics per channel, over the samples and the inner dimension.
#pragma once

#include "piece_moments.h"
#include "rows.h"

namespace flatwater::FLATWATER_ISA {

// Whole channels as tasks keep a channel's slab in cache between the two halves. Too few of them
// to go round, and the tasks are blocks instead; the results are the same bits.
inline bool channels_go_round(const Problem &p) { return p.shape.channels >= 4 * threads() || threads() == 1; }

template <class S>
struct Batch {
    using T = typename Element<S>::Compute;

    static void set_moments(const Problem &p, index c, const Moments &moments) {
        p.mean[c] = moments.mean;
        p.m2[c] = moments.m2;
        if (p.inv_std) p.inv_std[c] = inverse_deviation(moments.m2, moments.count, p.epsilon);
    }

    FLATWATER_ONE_COPY  // its means are products, too, which Gradient subtracts from one
    static Gradient<T> gradient_of(const Problem &p, index c) {
        const Channel channel = channel_of(p, c, c);
        if (p.count == 0) return {channel, 0, 0};
        const double share = channel.weight / double(p.count);
        return {channel, p.sum_dz[c] * share, p.sum_dz_xhat[c] * share};
    }

    // ---- planes as pieces ---------------------------------------------------------------------

    static Pieces planes(const Problem &p, index c, index channels = 1) {
        return {c * p.shape.inner, p.shape.outer, p.shape.inner, p.shape.channels * p.shape.inner, channels};
    }

    static index slab_bytes(const Problem &p) { return p.shape.outer * p.shape.inner * index(sizeof(S)); }

    // Whether what a channel writes stays in the second-level cache beside what it reads.
    static bool outputs_fit(const Problem &p) { return flatwater::FLATWATER_ISA::outputs_fit<S>(p, slab_bytes(p)); }
    static Writing writing(const Problem &p) { return writing_of<S>(p, slab_bytes(p)); }

    // Calls body(first, count, ahead) for `count` channels as a task, `ahead` elements before those that come next
    // and are worth asking for (0: none are). There are enough tasks for every thread to have some.
    template <class Body>
    static void each_few_channels(const Problem &p, const Body &body) {
        const index channels = p.shape.channels, most = smaller(most_together, channels / 32);
        const bool whole = Blocks<S>(planes(p, 0)).whole_planes();
        const index together = whole ? larger(1, smaller(bytes_together / slab_bytes(p), most)) : 1;
        parallel_for((channels + together - 1) / together, p.shape.elements(), [&](index task) {
            const index first = task * together;
            const bool asks = first + 2 * together <= channels && (machine().always_ahead || outputs_fit(p));
            body(first, smaller(together, channels - first), asks ? together * p.shape.inner : 0);
        });
    }

    static void piece_statistics(const Problem &p) {
        block_by_block<S>(
            p, p.shape.channels, [&](index c) { return planes(p, c); },
            [&](index c, const Moments &all) { set_moments(p, c, all); });
    }

    static void piece_normalize(const Problem &p) {
        const index blocks = Blocks<S>(planes(p, 0)).size();
        parallel_for(p.shape.channels * blocks, p.shape.elements(), [&](index i) {
            const index c = i / blocks;
            const Affine<T> f(channel_of(p, c, c));
            pieces_apply(At<S>(p, 0), Blocks<S>(planes(p, c))[i % blocks], &f, writing(p), 0);
            finish_streaming();
        });
    }

    static void piece_forward(const Problem &p) {
        each_few_channels(p, [&](index first, index count, index ahead) {
            const At<S> at(p, 0);
            const Pieces pieces = planes(p, first, count);
            const Blocks<S> blocks(pieces);
            Moments all[most_together], found[most_together];
            for (index b = 0; b < blocks.size(); ++b) {
                block_moments(at.x, blocks[b], outputs_fit(p) ? at.y : at.x + blocks.to_next(b), found);
                for (index k = 0; k < count; ++k) all[k].add(found[k]);
            }
            Affine<T> affine[most_together];
            for (index k = 0; k < count; ++k) {
                const index c = first + k;
                set_moments(p, c, all[k]);
                affine[k] = Affine<T>(channel_of(p, c, c));
            }
            pieces_apply(at, pieces, affine, writing(p), ahead);
            finish_streaming();
        });
    }

    static void set_sums(const Problem &p, index c, const GradientSums &shifted) {
        const GradientSums sums = GradientSums::from_shifted<T>(shifted, channel_of(p, c, c));
        p.sum_dz[c] = sums.dz;
        p.sum_dz_xhat[c] = sums.dz_xhat;
    }

    static void piece_gradient_sums(const Problem &p) {
        const index channels = p.shape.channels, blocks = Blocks<S>(planes(p, 0)).size();
        Scratch<GradientSums> found(channels * blocks);
        parallel_for(channels * blocks, p.shape.elements(), [&](index i) {
            const index c = i / blocks;
            const At<S> at(p, 0);
            const Channel channel = channel_of(p, c, c);
            const Affine<T> f(channel);
            const T unit = T(unit_of<T>(channel.inv_std));
            block_sums(at, Blocks<S>(planes(p, c))[i % blocks], &f, &unit, {at.x, at.dy}, &found[i]);
        });
        for (index c = 0; c < channels; ++c) {
            GradientSums all;
            for (index b = 0; b < blocks; ++b) all.add(found[c * blocks + b]);
            set_sums(p, c, all);
        }
    }

    static void piece_input_gradient(const Problem &p) {
        const index blocks = Blocks<S>(planes(p, 0)).size();
        parallel_for(p.shape.channels * blocks, p.shape.elements(), [&](index i) {
            const index c = i / blocks;
            const Affine<T> f(channel_of(p, c, c));
            const Gradient<T> g = gradient_of(p, c);
            pieces_gradient(At<S>(p, 0), Blocks<S>(planes(p, c))[i % blocks], &f, &g, writing(p), 0);
            finish_streaming();
        });
    }

    static void piece_backward(const Problem &p) {
        each_few_channels(p, [&](index first, index count, index ahead) {
            const At<S> at(p, 0);
            const S *const output = at.dx ? at.dx : at.dresidual;
            const Pieces pieces = planes(p, first, count);
            const Blocks<S> blocks(pieces);
            Affine<T> affine[most_together];
            T units[most_together];
            for (index k = 0; k < count; ++k) {
                const Channel channel = channel_of(p, first + k, first + k);
                affine[k] = Affine<T>(channel);
                units[k] = T(unit_of<T>(channel.inv_std));
            }
            GradientSums all[most_together], found[most_together];
            for (index b = 0; b < blocks.size(); ++b) {
                const index next = blocks.to_next(b);
                const Prefetched<S> prefetched =
                    outputs_fit(p) ? Prefetched<S>{output, at.x} : Prefetched<S>{at.x + next, at.dy + next};
                block_sums(at, blocks[b], affine, units, prefetched, found);
                for (index k = 0; k < count; ++k) all[k].add(found[k]);
            }
            Gradient<T> gradients[most_together];
            for (index k = 0; k < count; ++k) {
                set_sums(p, first + k, all[k]);
                gradients[k] = gradient_of(p, first + k);
            }
            pieces_gradient(at, pieces, affine, gradients, writing(p), ahead);
            finish_streaming();
        });
    }

    // ---- rows of columns ----------------------------------------------------------------------

    // One set, of all rows.
    struct AllRows {
        const Problem &p;

        index sets() const { return 1; }
        const Shape &shape() const { return p.shape; }
        void get_channels(index, const Channels &channels) const {
            for (index c = 0; c < channels.count(); ++c) channels.set(c, channel_of(p, c, c));
        }
        void get_means(index, const Channels &channels, double *dz, double *dz_xhat) const {
            for (index c = 0; c < channels.count(); ++c) {
                const double share = channels.weight()[c] / double(p.count);
                dz[c] = p.count ? share * p.sum_dz[c] : 0;
                dz_xhat[c] = p.count ? share * p.sum_dz_xhat[c] : 0;
            }
        }
        void set_moments(index, const double *mean, const double *m2) const {
            const index count = p.shape.outer * p.shape.inner;
            for (index c = 0; c < p.shape.channels; ++c) Batch::set_moments(p, c, {count, mean[c], m2[c]});
        }
        void set_sums(index, const double *dz, const double *dz_xhat) const {
            for (index c = 0; c < p.shape.channels; ++c) p.sum_dz[c] = dz[c], p.sum_dz_xhat[c] = dz_xhat[c];
        }
    };
    static Rows<S, AllRows> rows(const Problem &p) { return {p, {p}}; }

    // ---- the calls ----------------------------------------------------------------------------

    static void statistics(const Problem &p) { as_pieces(p.shape) ? piece_statistics(p) : rows(p).statistics(); }

    static void normalize(const Problem &p) {
        as_pieces(p.shape) ? piece_normalize(p) : rows(p).normalize();
    }

    static void forward(const Problem &p) {
        if (!as_pieces(p.shape)) return rows(p).forward();
        if (channels_go_round(p)) return piece_forward(p);
        piece_statistics(p);
        piece_normalize(p);
    }

    static void gradient_sums(const Problem &p) {
        as_pieces(p.shape) ? piece_gradient_sums(p) : rows(p).gradient_sums();
    }

    static void input_gradient(const Problem &p) {
        as_pieces(p.shape) ? piece_input_gradient(p) : rows(p).input_gradient();
    }

    static void backward(const Problem &p) {
        const bool elementwise = p.dx || p.dresidual;
        if (!elementwise) return gradient_sums(p);
        if (!as_pieces(p.shape)) return rows(p).backward();
        if (channels_go_round(p)) return piece_backward(p);
        piece_gradient_sums(p);
        piece_input_gradient(p);
    }
};

}  // namespace flatwater::FLATWATER_ISA
