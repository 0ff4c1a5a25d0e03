// Group norm: statistics per sample and group of channels. Instance norm has groups of one channel.
#pragma once

#include "layout.h"

namespace flatwater::FLATWATER_ISA {

template <class S>
struct Group {
    using T = typename Element<S>::Compute;

    // Channels-last work is cut into tiles of this many columns: one sample can then feed a team.
    static constexpr index tile = 64;

    static index group_channels(const Problem &p) { return p.shape.channels / p.groups; }
    static index tiles(const Problem &p) { return p.shape.channels < tile ? 1 : p.shape.channels / tile; }
    static index statistics_of(const Problem &p, index n, index c) { return n * p.groups + c / group_channels(p); }
    static Channel channel(const Problem &p, index n, index c) { return channel_of(p, statistics_of(p, n, c), c); }

    // The channels [c0, c1) of sample n, channels-last.
    struct Part {
        index n, c0, c1, offset;
        Part(const Problem &p, index task) {
            const index count = tiles(p);
            n = task / count;
            c0 = task % count * tile;
            c1 = task % count + 1 == count ? p.shape.channels : c0 + tile;
            offset = n * p.shape.inner * p.shape.channels + c0;
        }
    };

    static void set_group(const Problem &p, index i, const Moments &all) {
        p.mean[i] = all.mean;
        p.m2[i] = all.m2;
    }

    // Of the planes of one group, channels-first.
    FLATWATER_ONE_COPY
    static Moments planes_moments(const Problem &p, index i) {
        const index size = group_channels(p), inner = p.shape.inner;
        Moments all;
        for (index c = 0; c < size; ++c) all.add(segment_moments(At<S>(p, (i * size + c) * inner).x, inner));
        return all;
    }

    FLATWATER_ONE_COPY
    static void statistics(const Problem &p) {
        const index channels = p.shape.channels, size = group_channels(p), inner = p.shape.inner;
        if (!p.shape.channels_last) {
            parallel_for(p.shape.outer * p.groups, p.shape.elements(),
                         [&](index i) { set_group(p, i, planes_moments(p, i)); });
            return;
        }
        Scratch<double> mean(p.shape.outer * channels), m2(p.shape.outer * channels);
        parallel_for(p.shape.outer * tiles(p), p.shape.elements(), [&](index task) {
            const Part part(p, task);
            const index to = part.n * channels + part.c0;
            column_moments(At<S>(p, part.offset).x, inner, channels, part.c1 - part.c0, &mean[to], &m2[to]);
        });
        for (index i = 0; i < p.shape.outer * p.groups; ++i) {
            Moments all;
            for (index c = 0; c < size; ++c) all.add({inner, mean[i * size + c], m2[i * size + c]});
            set_group(p, i, all);
        }
    }

    static void set_affine(const Problem &p, const Part &part, Columns<T> &columns) {
        for (index c = part.c0; c < part.c1; ++c)
            columns.set(c - part.c0, c - part.c0 + 1, Affine<T>(channel(p, part.n, c)));
    }

    template <Activation A>
    FLATWATER_ONE_COPY
    static void normalize(const Problem &p) {
        const index channels = p.shape.channels, inner = p.shape.inner;
        if (!p.shape.channels_last) {
            parallel_for(p.shape.outer * channels, p.shape.elements(), [&](index i) {
                const At<S> at(p, i * inner);
                const Affine<T> f(channel(p, i / channels, i % channels));
                segment_apply<S, A, false>(at.x, at.residual, at.y, inner, f);
            });
            return;
        }
        parallel_for(p.shape.outer * tiles(p), p.shape.elements(), [&](index task) {
            const Part part(p, task);
            const At<S> at(p, part.offset);
            Columns<T> columns;
            set_affine(p, part, columns);
            columns_apply<S, A>(at.x, at.residual, at.y, inner, channels, part.c1 - part.c0, columns);
        });
    }

    template <Activation A>
    static void forward(const Problem &p) {
        const index size = group_channels(p), inner = p.shape.inner, count = size * inner;
        if (p.shape.channels_last) {
            statistics(p);
            for (index i = 0; i < p.shape.outer * p.groups; ++i)
                p.inv_std[i] = inverse_deviation(p.m2[i], count, p.epsilon);
            return normalize<A>(p);
        }
        // A group's planes are normalized while they are still in cache from the statistics.
        parallel_for(p.shape.outer * p.groups, p.shape.elements(), [&](index i) {
            const Moments all = planes_moments(p, i);
            set_group(p, i, all);
            p.inv_std[i] = inverse_deviation(all.m2, count, p.epsilon);
            for (index k = size - 1; k >= 0; --k) {
                const At<S> at(p, (i * size + k) * inner);
                const Affine<T> f(channel_of(p, i, i % p.groups * size + k));
                segment_apply<S, A, false>(at.x, at.residual, at.y, inner, f);
            }
        });
    }

    // Means over a group of γ·dz and γ·dz·x̂.
    static GradientSums group_means(const Problem &p, const GradientSums *planes, index i) {
        const index size = group_channels(p), first = i % p.groups * size;
        const double count = double(size * p.shape.inner);
        GradientSums means;
        for (index k = 0; k < size; ++k) {
            const double weight = p.weight ? p.weight[first + k] : 1;
            means.dz += weight * planes[i * size + k].dz / count;
            means.dz_xhat += weight * planes[i * size + k].dz_xhat / count;
        }
        return means;
    }

    template <Activation A>
    static void backward(const Problem &p) {
        Scratch<GradientSums> planes(p.shape.outer * p.shape.channels);
        p.shape.channels_last ? column_backward<A>(p, planes.get()) : segment_backward<A>(p, planes.get());
        sum_over_samples(p, planes.get());
    }

    template <Activation A>
    static void segment_backward(const Problem &p, GradientSums *planes) {
        const index size = group_channels(p), inner = p.shape.inner;
        parallel_for(p.shape.outer * p.groups, p.shape.elements(), [&](index i) {
            const index first = i % p.groups * size;
            for (index k = 0; k < size; ++k) {
                const At<S> at(p, (i * size + k) * inner);
                planes[i * size + k] =
                    segment_sums<S, A>(at.dy, at.x, at.residual, inner, channel_of(p, i, first + k));
            }
            if (!p.dx && !p.dresidual) return;
            const GradientSums means = group_means(p, planes, i);
            for (index k = size - 1; k >= 0; --k) {
                const At<S> at(p, (i * size + k) * inner);
                const Channel channel = channel_of(p, i, first + k);
                segment_gradient<S, A, false>(at.dy, at.x, at.residual, at.dx, at.dresidual, inner,
                                              Affine<T>(channel), Gradient<T>(channel, means.dz, means.dz_xhat));
            }
        });
    }

    template <Activation A>
    static void column_backward(const Problem &p, GradientSums *planes) {
        const index channels = p.shape.channels, inner = p.shape.inner, tasks = p.shape.outer * tiles(p);
        parallel_for(tasks, p.shape.elements(), [&](index task) {
            const Part part(p, task);
            const At<S> at(p, part.offset);
            Columns<T> columns;
            double dz[tile_columns], shifted[tile_columns];
            set_affine(p, part, columns);
            columns_sums<S, A>(at.dy, at.x, at.residual, inner, channels, part.c1 - part.c0, columns, dz, shifted);
            for (index c = part.c0; c < part.c1; ++c)
                planes[part.n * channels + c] = GradientSums::from_shifted<T>(
                    dz[c - part.c0], shifted[c - part.c0], channel(p, part.n, c));
        });
        if (!p.dx && !p.dresidual) return;
        Scratch<GradientSums> means(p.shape.outer * p.groups);
        for (index i = 0; i < p.shape.outer * p.groups; ++i) means[i] = group_means(p, planes, i);
        parallel_for(tasks, p.shape.elements(), [&](index task) {
            const Part part(p, task);
            const At<S> at(p, part.offset);
            Columns<T> columns;
            set_affine(p, part, columns);
            for (index c = part.c0; c < part.c1; ++c) {
                const GradientSums &mean = means[statistics_of(p, part.n, c)];
                columns.set(c - part.c0, c - part.c0 + 1,
                            Gradient<T>(channel(p, part.n, c), mean.dz, mean.dz_xhat));
            }
            columns_gradient<S, A>(at.dy, at.x, at.residual, at.dx, at.dresidual, inner, channels,
                                   part.c1 - part.c0, columns);
        });
    }
};

}  // namespace flatwater::FLATWATER_ISA
