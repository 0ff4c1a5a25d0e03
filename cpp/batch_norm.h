// Batch norm: statistics per channel, over the samples and the inner dimension.
#pragma once

#include "layout.h"

namespace flatwater::FLATWATER_ISA {

// Whole channels as tasks keep a channel's slab in cache between the two halves. Too few of them
// to go round, and the tasks are planes instead; the results are the same bits.
inline bool channels_go_round(const Problem &p) { return p.shape.channels >= 4 * threads() || threads() == 1; }

template <class S>
struct Batch {
    using T = typename Element<S>::Compute;

    static index plane(const Problem &p, index n, index c) { return (n * p.shape.channels + c) * p.shape.inner; }

    static void set_moments(const Problem &p, index c, const Moments &moments) {
        p.mean[c] = moments.mean;
        p.m2[c] = moments.m2;
    }

    // ---- planes as segments -------------------------------------------------------------------

    static Moments plane_moments(const Problem &p, index n, index c) {
        return segment_moments(At<S>(p, plane(p, n, c)).x, p.shape.inner);
    }

    FLATWATER_ONE_COPY
    static void add_plane(Moments &channel, const Moments &plane) { channel.add(plane); }

    static void segment_statistics(const Problem &p) {
        const index samples = p.shape.outer, channels = p.shape.channels;
        Scratch<Moments> planes(samples * channels);
        parallel_for(samples * channels, p.shape.elements(),
                     [&](index i) { planes[i] = plane_moments(p, i / channels, i % channels); });
        for (index c = 0; c < channels; ++c) {
            Moments all;
            for (index n = 0; n < samples; ++n) add_plane(all, planes[n * channels + c]);
            set_moments(p, c, all);
        }
    }

    template <Activation A>
    static void plane_apply(const Problem &p, index n, index c, const Affine<T> &f) {
        const At<S> at(p, plane(p, n, c));
        if (is_large<S>(p))
            segment_apply<S, A, true>(at.x, at.residual, at.y, p.shape.inner, f);
        else
            segment_apply<S, A, false>(at.x, at.residual, at.y, p.shape.inner, f);
    }

    template <Activation A>
    static void plane_gradient(const Problem &p, index n, index c, const Affine<T> &f, const Gradient<T> &g) {
        const At<S> at(p, plane(p, n, c));
        if (is_large<S>(p))
            segment_gradient<S, A, true>(at.dy, at.x, at.residual, at.dx, at.dresidual, p.shape.inner, f, g);
        else
            segment_gradient<S, A, false>(at.dy, at.x, at.residual, at.dx, at.dresidual, p.shape.inner, f, g);
    }

    template <Activation A>
    static void segment_normalize(const Problem &p) {
        const index channels = p.shape.channels;
        parallel_for(p.shape.outer * channels, p.shape.elements(), [&](index i) {
            plane_apply<A>(p, i / channels, i % channels, Affine<T>(channel_of(p, i % channels, i % channels)));
            finish_streaming();
        });
    }

    template <Activation A>
    static void segment_forward(const Problem &p) {
        const index samples = p.shape.outer;
        parallel_for(p.shape.channels, p.shape.elements(), [&](index c) {
            Moments all;
            for (index n = 0; n < samples; ++n) add_plane(all, plane_moments(p, n, c));
            set_moments(p, c, all);
            p.inv_std[c] = inverse_deviation(all.m2, all.count, p.epsilon);
            const Affine<T> f(channel_of(p, c, c));
            for (index n = samples - 1; n >= 0; --n) plane_apply<A>(p, n, c, f);
            finish_streaming();
        });
    }

    template <Activation A>
    static GradientSums plane_sums(const Problem &p, index n, index c) {
        const At<S> at(p, plane(p, n, c));
        return segment_sums<S, A>(at.dy, at.x, at.residual, p.shape.inner, channel_of(p, c, c));
    }

    template <Activation A>
    static void segment_gradient_sums(const Problem &p) {
        const index samples = p.shape.outer, channels = p.shape.channels;
        Scratch<GradientSums> planes(samples * channels);
        parallel_for(samples * channels, p.shape.elements(),
                     [&](index i) { planes[i] = plane_sums<A>(p, i / channels, i % channels); });
        sum_over_samples(p, planes.get());
    }

    static Gradient<T> gradient_of(const Problem &p, index c) {
        const Channel channel = channel_of(p, c, c);
        if (p.count == 0) return {channel, 0, 0};
        const double share = channel.weight / double(p.count);
        return {channel, p.sum_dz[c] * share, p.sum_dz_xhat[c] * share};
    }

    template <Activation A>
    static void segment_input_gradient(const Problem &p) {
        const index channels = p.shape.channels;
        parallel_for(p.shape.outer * channels, p.shape.elements(), [&](index i) {
            const index c = i % channels;
            plane_gradient<A>(p, i / channels, c, Affine<T>(channel_of(p, c, c)), gradient_of(p, c));
            finish_streaming();
        });
    }

    template <Activation A>
    static void segment_backward(const Problem &p) {
        const index samples = p.shape.outer;
        parallel_for(p.shape.channels, p.shape.elements(), [&](index c) {
            p.sum_dz[c] = p.sum_dz_xhat[c] = 0;
            for (index n = 0; n < samples; ++n) {
                const GradientSums sums = plane_sums<A>(p, n, c);
                p.sum_dz[c] += sums.dz;
                p.sum_dz_xhat[c] += sums.dz_xhat;
            }
            const Affine<T> f(channel_of(p, c, c));
            const Gradient<T> g = gradient_of(p, c);
            for (index n = samples - 1; n >= 0; --n) plane_gradient<A>(p, n, c, f, g);
            finish_streaming();
        });
    }

    // ---- rows of columns ----------------------------------------------------------------------

    static void row_statistics(const Problem &p) {
        const RowLayout layout(p.shape);
        const index columns = layout.columns();
        Scratch<double> mean(layout.chunks * columns), m2(layout.chunks * columns);
        parallel_for(layout.tasks(), p.shape.elements(), [&](index task) {
            const Tile tile(layout, task);
            const index to = tile.chunk * columns + tile.c0 * layout.inner;
            column_moments(At<S>(p, tile.offset).x, tile.rows, columns, tile.columns, &mean[to], &m2[to]);
        });
        parallel_for(layout.channels, p.shape.elements(), [&](index c) {
            Moments all;
            for (index chunk = 0; chunk < layout.chunks; ++chunk) {
                const index rest = layout.rows - chunk * layout.chunk_rows;
                const index rows = rest < layout.chunk_rows ? rest : layout.chunk_rows;
                const index first = chunk * columns + c * layout.inner;
                all.add(Moments::of_equal_sets(&mean[first], &m2[first], layout.inner, rows));
            }
            set_moments(p, c, all);
        });
    }

    static void set_affine(const Problem &p, const RowLayout &layout, const Tile &tile, Columns<T> &columns) {
        for (index c = tile.c0; c < tile.c1; ++c)
            columns.set((c - tile.c0) * layout.inner, (c - tile.c0 + 1) * layout.inner,
                        Affine<T>(channel_of(p, c, c)));
    }

    // Calls body(tile, its pointers, its columns), a task for each tile.
    template <class Body>
    static void each_tile(const Problem &p, const RowLayout &layout, const Body &body) {
        parallel_for(layout.tasks(), p.shape.elements(), [&](index task) {
            const Tile tile(layout, task);
            Columns<T> columns;
            set_affine(p, layout, tile, columns);
            body(tile, At<S>(p, tile.offset), columns);
        });
    }

    template <Activation A>
    static void row_normalize(const Problem &p) {
        const RowLayout layout(p.shape);
        each_tile(p, layout, [&](const Tile &tile, const At<S> &at, const Columns<T> &columns) {
            columns_apply<S, A>(at.x, at.residual, at.y, tile.rows, layout.columns(), tile.columns, columns);
        });
    }

    template <Activation A>
    static void row_gradient_sums(const Problem &p) {
        const RowLayout layout(p.shape);
        const index width = layout.columns();
        Scratch<double> dz(layout.chunks * width), shifted(layout.chunks * width);
        each_tile(p, layout, [&](const Tile &tile, const At<S> &at, const Columns<T> &columns) {
            const index to = tile.chunk * width + tile.c0 * layout.inner;
            columns_sums<S, A>(at.dy, at.x, at.residual, tile.rows, width, tile.columns, columns, &dz[to],
                               &shifted[to]);
        });
        parallel_for(layout.channels, p.shape.elements(), [&](index c) {
            double dz_sum = 0, shifted_sum = 0;
            for (index chunk = 0; chunk < layout.chunks; ++chunk)
                for (index i = chunk * width + c * layout.inner, end = i + layout.inner; i < end; ++i) {
                    dz_sum += dz[i];
                    shifted_sum += shifted[i];
                }
            const GradientSums sums = GradientSums::from_shifted<T>(dz_sum, shifted_sum, channel_of(p, c, c));
            p.sum_dz[c] = sums.dz;
            p.sum_dz_xhat[c] = sums.dz_xhat;
        });
    }

    template <Activation A>
    static void row_input_gradient(const Problem &p) {
        const RowLayout layout(p.shape);
        each_tile(p, layout, [&](const Tile &tile, const At<S> &at, Columns<T> &columns) {
            for (index c = tile.c0; c < tile.c1; ++c)
                columns.set((c - tile.c0) * layout.inner, (c - tile.c0 + 1) * layout.inner, gradient_of(p, c));
            columns_gradient<S, A>(at.dy, at.x, at.residual, at.dx, at.dresidual, tile.rows, layout.columns(),
                                   tile.columns, columns);
        });
    }

    // ---- the calls ----------------------------------------------------------------------------

    FLATWATER_ONE_COPY
    static void statistics(const Problem &p) { as_segments(p.shape) ? segment_statistics(p) : row_statistics(p); }

    template <Activation A>
    FLATWATER_ONE_COPY
    static void normalize(const Problem &p) {
        as_segments(p.shape) ? segment_normalize<A>(p) : row_normalize<A>(p);
    }

    template <Activation A>
    static void forward(const Problem &p) {
        if (as_segments(p.shape) && channels_go_round(p)) return segment_forward<A>(p);
        statistics(p);
        const index count = p.shape.outer * p.shape.inner;
        for (index c = 0; c < p.shape.channels; ++c) p.inv_std[c] = inverse_deviation(p.m2[c], count, p.epsilon);
        normalize<A>(p);
    }

    template <Activation A>
    FLATWATER_ONE_COPY
    static void gradient_sums(const Problem &p) {
        as_segments(p.shape) ? segment_gradient_sums<A>(p) : row_gradient_sums<A>(p);
    }

    template <Activation A>
    FLATWATER_ONE_COPY
    static void input_gradient(const Problem &p) {
        as_segments(p.shape) ? segment_input_gradient<A>(p) : row_input_gradient<A>(p);
    }

    template <Activation A>
    static void backward(const Problem &p) {
        const bool elementwise = p.dx || p.dresidual;
        if (elementwise && as_segments(p.shape) && channels_go_round(p)) return segment_backward<A>(p);
        gradient_sums<A>(p);
        if (elementwise) input_gradient<A>(p);
    }
};

}  // namespace flatwater::FLATWATER_ISA
