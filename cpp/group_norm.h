// Group norm: statistics per sample and group of channels. Instance norm has groups of one channel.
#pragma once

#include "column_moments.h"
#include "team.h"

namespace flatwater::FLATWATER_ISA {

template <class S>
struct Group {
    using T = typename Element<S>::Compute;

    // Channels-last work is cut into tiles of this many columns: one sample can then feed a team.
    static constexpr index tile = 64;

    static index group_channels(const Problem &p) { return p.shape.channels / p.groups; }
    static index tiles(const Problem &p) { return larger(1, p.shape.channels / tile); }
    static index statistics_of(const Problem &p, index n, index c) { return n * p.groups + c / group_channels(p); }
    static Channel channel(const Problem &p, index n, index c) { return channel_of(p, statistics_of(p, n, c), c); }

    // A tile of the channels of sample n, channels-last.
    struct Part {
        index n, first, channels, offset;
        Block block;

        Part(const Problem &p, index task) {
            const index count = tiles(p);
            n = task / count;
            first = task % count * tile;
            channels = task % count + 1 == count ? p.shape.channels - first : tile;
            offset = n * p.shape.inner * p.shape.channels + first;
            block = {p.shape.inner, channels, p.shape.channels, 0, false, prefetches_second_level<S>(p)};
        }
    };

    static void set_group(const Problem &p, index i, const Moments &all) {
        p.mean[i] = all.mean;
        p.m2[i] = all.m2;
        if (p.inv_std) p.inv_std[i] = inverse_deviation(all.m2, all.count, p.epsilon);
    }

    // Channels-first, a group of one sample is one piece, and so is each of its planes. `backwards`: the group's planes
    // are worked on from the last to the first.
    static Pieces plane(const Problem &p, index i, bool backwards = false) {
        return {i * p.shape.inner, 1, p.shape.inner, backwards && group_channels(p) > 1 ? p.shape.inner : 0};
    }

    static Moments group_moments(const Problem &p, index i) {
        const index length = group_channels(p) * p.shape.inner;
        const Blocks<S> blocks(Pieces{i * length, 1, length, 0});
        const S *const x = At<S>(p, 0).x;
        Moments all, found;
        for (index b = 0; b < blocks.size(); ++b) {
            block_moments(x, blocks[b], x, &found);
            all.add(found);
        }
        return all;
    }

    FLATWATER_ONE_COPY
    static void statistics(const Problem &p) {
        const index channels = p.shape.channels, size = group_channels(p), inner = p.shape.inner;
        if (!p.shape.channels_last) {
            parallel_for(p.shape.outer * p.groups, p.shape.elements(),
                         [&](index i) { set_group(p, i, group_moments(p, i)); });
            return;
        }
        Scratch<double> mean(p.shape.outer * channels), m2(p.shape.outer * channels);
        parallel_for(p.shape.outer * tiles(p), p.shape.elements(), [&](index task) {
            const Part part(p, task);
            const index to = part.n * channels + part.first;
            column_moments(At<S>(p, part.offset).x, part.block, &mean[to], &m2[to]);
        });
        for (index i = 0; i < p.shape.outer * p.groups; ++i)
            set_group(p, i, Moments::of_equal_sets(&mean[i * size], &m2[i * size], size, 1, inner));
    }

    template <Activation A>
    static void plane_apply(const Problem &p, index i, index statistics, index ahead, bool backwards) {
        const Affine<T> f(channel_of(p, statistics, i % p.shape.channels));
        pieces_apply<S, A>(At<S>(p, 0), plane(p, i, backwards), &f, streams_planes<S>(p), ahead);
    }

    template <Activation A>
    static void normalize(const Problem &p) {
        const index channels = p.shape.channels;
        if (!p.shape.channels_last) {
            parallel_for(p.shape.outer * channels, p.shape.elements(), [&](index i) {
                plane_apply<A>(p, i, i / group_channels(p), 0, false);
                finish_streaming();
            });
            return;
        }
        parallel_for_backwards(p.shape.outer * tiles(p), p.shape.elements(), [&](index task) {
            const Part part(p, task);
            Columns<T> columns(part.channels);
            for (index j = 0; j < part.channels; ++j) columns.set(j, Affine<T>(channel(p, part.n, part.first + j)));
            columns_apply<S, A>(At<S>(p, part.offset), part.block, columns, streams_rows<S>(p));
            finish_streaming();
        });
    }

    template <Activation A>
    static void forward(const Problem &p) {
        const index size = group_channels(p), groups = p.shape.outer * p.groups;
        if (p.shape.channels_last) {
            statistics(p);
            return normalize<A>(p);
        }
        // A group's planes are normalized while they are still in cache from the statistics.
        parallel_for(groups, p.shape.elements(), [&](index i) {
            set_group(p, i, group_moments(p, i));
            const index ahead = i + 1 < groups ? size * p.shape.inner : 0;
            for (index k = size - 1; k >= 0; --k) plane_apply<A>(p, i * size + k, i, ahead, true);
            finish_streaming();
        });
    }

    // Means over a group of γ·dz and γ·dz·x̂.
    static GradientSums group_means(const Problem &p, const GradientSums *planes, index i) {
        const index size = group_channels(p), first = i % p.groups * size;
        const double count = double(size * p.shape.inner);
        GradientSums means;
        for (index k = 0; k < size; ++k) {
            const double weight = p.weight ? p.weight[first + k] : 1;
            means.add({weight * planes[i * size + k].dz / count, weight * planes[i * size + k].dz_xhat / count});
        }
        return means;
    }

    // dβ and dγ: what the planes of each channel contribute, sample after sample.
    static void sum_over_samples(const Problem &p, const GradientSums *planes) {
        for (index c = 0; c < p.shape.channels; ++c) {
            GradientSums all;
            for (index n = 0; n < p.shape.outer; ++n) all.add(planes[n * p.shape.channels + c]);
            p.sum_dz[c] = all.dz;
            p.sum_dz_xhat[c] = all.dz_xhat;
        }
    }

    template <Activation A>
    static void backward(const Problem &p) {
        Scratch<GradientSums> planes(p.shape.outer * p.shape.channels);
        p.shape.channels_last ? column_backward<A>(p, planes.get()) : piece_backward<A>(p, planes.get());
        sum_over_samples(p, planes.get());
    }

    template <Activation A>
    static void piece_backward(const Problem &p, GradientSums *planes) {
        const index size = group_channels(p), groups = p.shape.outer * p.groups;
        parallel_for(groups, p.shape.elements(), [&](index i) {
            const At<S> at(p, 0);
            const index first = i % p.groups * size;
            for (index k = 0; k < size; ++k) {
                const Blocks<S> blocks(plane(p, i * size + k));
                const Channel channel = channel_of(p, i, first + k);
                GradientSums all, found;
                for (index b = 0; b < blocks.size(); ++b) {
                    block_sums<S, A>(at, blocks[b], &channel, {at.x, at.dy}, &found);
                    all.add(found);
                }
                planes[i * size + k] = GradientSums::from_shifted<T>(all, channel);
            }
            if (!p.dx && !p.dresidual) return;
            const GradientSums means = group_means(p, planes, i);
            const index ahead = i + 1 < groups ? size * p.shape.inner : 0;
            for (index k = size - 1; k >= 0; --k) {
                const Channel channel = channel_of(p, i, first + k);
                const Affine<T> f(channel);
                const Gradient<T> g(channel, means.dz, means.dz_xhat);
                pieces_gradient<S, A>(at, plane(p, i * size + k, true), &f, &g, streams_planes<S>(p), ahead);
            }
            finish_streaming();
        });
    }

    template <Activation A>
    static void column_backward(const Problem &p, GradientSums *planes) {
        const index tasks = p.shape.outer * tiles(p);
        parallel_for(tasks, p.shape.elements(), [&](index task) {
            const Part part(p, task);
            Columns<T> columns(part.channels);
            Scratch<double> dz(part.channels), dz_xhat(part.channels);
            for (index j = 0; j < part.channels; ++j) {
                const Channel each = channel(p, part.n, part.first + j);
                columns.set(j, Affine<T>(each));
                columns.set(j, each.inv_std);
            }
            columns_sums<S, A>(At<S>(p, part.offset), part.block, columns, dz.get(), dz_xhat.get());
            for (index j = 0; j < part.channels; ++j)
                planes[part.n * p.shape.channels + part.first + j] = GradientSums::from_shifted<T>(
                    GradientSums{dz[j], dz_xhat[j]}, channel(p, part.n, part.first + j));
        });
        if (!p.dx && !p.dresidual) return;
        Scratch<GradientSums> means(p.shape.outer * p.groups);
        for (index i = 0; i < p.shape.outer * p.groups; ++i) means[i] = group_means(p, planes, i);
        parallel_for_backwards(tasks, p.shape.elements(), [&](index task) {
            const Part part(p, task);
            Columns<T> columns(part.channels);
            for (index j = 0; j < part.channels; ++j) {
                const Channel each = channel(p, part.n, part.first + j);
                const GradientSums &mean = means[statistics_of(p, part.n, part.first + j)];
                columns.set(j, Affine<T>(each));
                columns.set(j, Gradient<T>(each, mean.dz, mean.dz_xhat));
            }
            columns_gradient<S, A>(At<S>(p, part.offset), part.block, columns, streams_rows<S>(p));
            finish_streaming();
        });
    }
};

}  // namespace flatwater::FLATWATER_ISA
