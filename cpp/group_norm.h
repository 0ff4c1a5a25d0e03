// Group norm: statistics per sample and group of channels. Instance norm has groups of one channel.
#pragma once

#include "rows.h"

namespace flatwater::FLATWATER_ISA {

template <class S>
struct Group {
    using T = typename Element<S>::Compute;

    static index group_channels(const Problem &p) { return p.shape.channels / p.groups; }

    // Of groups [first, first + count), sample by sample.
    static Channels channels_of(const Problem &p, index first, index count) {
        const index size = group_channels(p);
        Channels channels(count * size);
        index c = first % p.groups * size;
        for (index i = 0; i < count; ++i) {
            for (index k = i * size; k < (i + 1) * size; ++k, ++c) channels.set(k, channel_of(p, first + i, c));
            if (c == p.shape.channels) c = 0;
        }
        return channels;
    }

    // Means over each group of γ·dz and γ·dz·x̂, for each of its channels.
    static void set_means(const Problem &p, const Channels &channels, const GradientSums *sums, double *dz,
                          double *dz_xhat) {
        const index size = group_channels(p);
        const double share = 1 / double(size * p.shape.inner);
        for (index first = 0; first < channels.count(); first += size) {
            GradientSums all;
            for (index c = first; c < first + size; ++c) {
                const double weight = channels.weight()[c];
                all.add({weight * sums[c].dz, weight * sums[c].dz_xhat});
            }
            for (index c = first; c < first + size; ++c) dz[c] = all.dz * share, dz_xhat[c] = all.dz_xhat * share;
        }
    }

    static void set_group(const Problem &p, index i, const Moments &all) {
        p.mean[i] = all.mean;
        p.m2[i] = all.m2;
        if (p.inv_std) p.inv_std[i] = inverse_deviation(all.m2, all.count, p.epsilon);
    }

    // ---- planes as pieces: channels-first ------------------------------------------------------

    static index group_elements(const Problem &p) { return group_channels(p) * p.shape.inner; }

    // Whether what a group writes stays in the second-level cache beside what it reads.
    static bool outputs_fit(const Problem &p) {
        return !streams_planes<S>(p) && group_elements(p) * index(sizeof(S)) <= largest_slab;
    }

    // Calls body(first, count, ahead) for `count` groups as a task, whose planes lie side by side, `ahead` elements
    // before those that come next (0: none do). There are enough tasks for every thread to have some.
    template <class Body>
    static void each_few_groups(const Problem &p, const Body &body) {
        const index groups = p.shape.outer * p.groups, bytes = group_elements(p) * index(sizeof(S));
        const index together = larger(1, smaller(bytes_of_groups / bytes, groups / 32));
        parallel_for((groups + together - 1) / together, p.shape.elements(), [&](index task) {
            const index first = task * together;
            const bool asks = first + 2 * together <= groups;
            body(first, smaller(together, groups - first), asks ? together * group_elements(p) : 0);
            finish_streaming();
        });
    }

    // Calls body(k, planes) for the planes of `count` groups from `first` on, as many as are taken together, `k` planes
    // behind the first. Backwards: the last of them first, as what was read last is still in cache.
    template <class Body>
    static void each_few_planes(const Problem &p, index first, index count, bool backwards, const Body &body) {
        const index size = group_channels(p), inner = p.shape.inner, planes = count * size;
        const index together = Blocks<S>(Pieces{0, 1, inner, 0}).whole_planes() ? most_together : 1;
        const index steps = (planes + together - 1) / together;
        for (index i = 0; i < steps; ++i) {
            const index k = (backwards ? steps - 1 - i : i) * together;
            const index stride = backwards && k > 0 ? together * inner : 0;
            body(k, Pieces{(first * size + k) * inner, 1, inner, stride, smaller(together, planes - k)});
        }
    }

    static Moments group_moments(const Problem &p, index i) {
        const Blocks<S> blocks(Pieces{i * group_elements(p), 1, group_elements(p), 0});
        const At<S> at(p, 0);
        Moments all, found;
        for (index b = 0; b < blocks.size(); ++b) {
            block_moments(at.x, blocks[b], at.y && outputs_fit(p) ? at.y : at.x + blocks.to_next(b), &found);
            all.add(found);
        }
        return all;
    }

    static void plane_statistics(const Problem &p) {
        each_few_groups(p, [&](index first, index count, index) {
            for (index i = first; i < first + count; ++i) set_group(p, i, group_moments(p, i));
        });
    }

    template <Activation A>
    static void planes_apply(const Problem &p, index first, index count, index ahead) {
        const Channels channels = channels_of(p, first, count);
        const Columns<T> columns(channels.count());
        set_affine(channels, columns, 0);
        each_few_planes(p, first, count, true, [&](index k, const Pieces &planes) {
            Affine<T> affine[most_together];
            for (index c = 0; c < planes.channels; ++c) affine[c] = columns.affine(k + c);
            pieces_apply<S, A>(At<S>(p, 0), planes, affine, streams_planes<S>(p), ahead);
        });
    }

    template <Activation A>
    static void plane_normalize(const Problem &p) {
        each_few_groups(p, [&](index first, index count, index) { planes_apply<A>(p, first, count, 0); });
    }

    template <Activation A>
    static void plane_forward(const Problem &p) {
        each_few_groups(p, [&](index first, index count, index ahead) {
            for (index i = first; i < first + count; ++i) set_group(p, i, group_moments(p, i));
            planes_apply<A>(p, first, count, ahead);
        });
    }

    // Σdz and Σdz·(x - shift)·unit of each plane.
    template <Activation A>
    static void planes_sums(const Problem &p, index first, index count, const Columns<T> &columns, double *dz,
                            double *dz_xhat) {
        const At<S> at(p, 0);
        const S *const output = at.dx ? at.dx : at.dresidual;
        each_few_planes(p, first, count, false, [&](index from, const Pieces &planes) {
            Affine<T> affine[most_together];
            GradientSums all[most_together], found[most_together];
            for (index k = 0; k < planes.channels; ++k) affine[k] = columns.affine(from + k);
            const Blocks<S> blocks(planes);
            for (index b = 0; b < blocks.size(); ++b) {
                const index next = blocks.to_next(b);
                const Prefetched<S> prefetched =
                    output && outputs_fit(p) ? Prefetched<S>{output, at.x} : Prefetched<S>{at.x + next, at.dy + next};
                block_sums<S, A>(at, blocks[b], affine, columns.field(columns.unit) + from, prefetched, found);
                for (index k = 0; k < planes.channels; ++k) all[k].add(found[k]);
            }
            for (index k = 0; k < planes.channels; ++k) dz[from + k] = all[k].dz, dz_xhat[from + k] = all[k].dz_xhat;
        });
    }

    template <Activation A>
    static void plane_backward(const Problem &p, GradientSums *sums) {
        each_few_groups(p, [&](index first, index count, index ahead) {
            const Channels channels = channels_of(p, first, count);
            const Columns<T> columns(channels.count());
            set_affine(channels, columns, 0);
            set_units(channels, columns, 0);
            const Scratch<double> dz(channels.count()), dz_xhat(channels.count());
            planes_sums<A>(p, first, count, columns, dz.get(), dz_xhat.get());
            complete_sums<T>(channels, dz.get(), dz_xhat.get());
            GradientSums *const own = sums + first * group_channels(p);
            for (index k = 0; k < channels.count(); ++k) own[k] = {dz.get()[k], dz_xhat.get()[k]};
            if (!p.dx && !p.dresidual) return;
            set_means(p, channels, own, dz.get(), dz_xhat.get());
            set_gradients(channels, dz.get(), dz_xhat.get(), columns, 0);
            each_few_planes(p, first, count, true, [&](index from, const Pieces &planes) {
                Affine<T> affine[most_together];
                Gradient<T> gradients[most_together];
                for (index k = 0; k < planes.channels; ++k)
                    affine[k] = columns.affine(from + k), gradients[k] = columns.gradient(from + k);
                pieces_gradient<S, A>(At<S>(p, 0), planes, affine, gradients, streams_planes<S>(p), ahead);
            });
        });
    }

    // ---- rows of columns: channels-last --------------------------------------------------------

    // A set for each sample.
    struct Samples {
        const Problem &p;
        GradientSums *sums;  // once they are known, of each channel of each sample

        index sets() const { return p.shape.outer; }
        Shape shape() const { return {1, p.shape.channels, p.shape.inner, true}; }
        Channels channels(index n) const { return channels_of(p, n * p.groups, p.groups); }
        void get_means(index n, const Channels &channels, double *dz, double *dz_xhat) const {
            set_means(p, channels, sums + n * p.shape.channels, dz, dz_xhat);
        }
        void set_moments(index n, const double *mean, const double *m2) const {
            const index size = group_channels(p);
            for (index g = 0; g < p.groups; ++g)
                set_group(p, n * p.groups + g,
                          Moments::of_equal_sets(mean + g * size, m2 + g * size, size, 1, p.shape.inner));
        }
        void set_sums(index n, const double *dz, const double *dz_xhat) const {
            for (index c = 0; c < p.shape.channels; ++c) sums[n * p.shape.channels + c] = {dz[c], dz_xhat[c]};
        }
    };
    static Rows<S, Samples> rows(const Problem &p, GradientSums *sums = nullptr) { return {p, {p, sums}}; }

    // ---- the calls ----------------------------------------------------------------------------

    static void statistics(const Problem &p) {
        p.shape.channels_last ? rows(p).statistics() : plane_statistics(p);
    }

    template <Activation A>
    static void normalize(const Problem &p) {
        p.shape.channels_last ? rows(p).template normalize<A>() : plane_normalize<A>(p);
    }

    template <Activation A>
    static void forward(const Problem &p) {
        p.shape.channels_last ? rows(p).template forward<A>() : plane_forward<A>(p);
    }

    // dβ and dγ: what the planes of each channel contribute, sample after sample.
    static void sum_over_samples(const Problem &p, const GradientSums *sums) {
        for (index c = 0; c < p.shape.channels; ++c) p.sum_dz[c] = p.sum_dz_xhat[c] = 0;
        for (index n = 0; n < p.shape.outer; ++n)
            for (index c = 0; c < p.shape.channels; ++c, ++sums) {
                p.sum_dz[c] += sums->dz;
                p.sum_dz_xhat[c] += sums->dz_xhat;
            }
    }

    template <Activation A>
    static void backward(const Problem &p) {
        const Scratch<GradientSums> sums(p.shape.outer * p.shape.channels);
        if (!p.shape.channels_last)
            plane_backward<A>(p, sums.get());
        else if (p.dx || p.dresidual)
            rows(p, sums.get()).template backward<A>();
        else
            rows(p, sums.get()).template gradient_sums<A>();
        sum_over_samples(p, sums.get());
    }
};

}  // namespace flatwater::FLATWATER_ISA
