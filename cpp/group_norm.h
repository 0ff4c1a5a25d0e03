// Group norm: statistics per sample and group of channels. Instance norm has groups of one channel.
#pragma once

#include "piece_moments.h"
#include "rows.h"

namespace flatwater::FLATWATER_ISA {

template <class S>
struct Group {
    using T = typename Element<S>::Compute;

    static index group_channels(const Problem &p) { return p.shape.channels / p.groups; }
    static index group_elements(const Problem &p) { return group_channels(p) * p.shape.inner; }
    static index all_groups(const Problem &p) { return p.shape.outer * p.groups; }
    static index all_planes(const Problem &p) { return p.shape.outer * p.shape.channels; }

    static void set_group(const Problem &p, index i, const Moments &all) {
        p.mean[i] = all.mean;
        p.m2[i] = all.m2;
        if (p.inv_std) p.inv_std[i] = inverse_deviation(all.m2, all.count, p.epsilon);
    }

    // Those of planes from `first` on, which are counted sample by sample.
    static void get_channels(const Problem &p, index first, const Channels &channels) {
        const index size = group_channels(p);
        index group = first / size, to_next_group = size - first % size, c = first % p.shape.channels;
        for (index k = 0; k < channels.count(); ++k) {
            channels.set(k, channel_of(p, group, c));
            if (++c == p.shape.channels) c = 0;
            if (--to_next_group == 0) to_next_group = size, ++group;
        }
    }

    // Of many planes: Σdz and Σdz·x̂, or means of such.
    struct PerPlane {
        double *dz, *dz_xhat;
        PerPlane from(index plane) const { return {dz + plane, dz_xhat + plane}; }
    };

    // For each plane of `count` groups from `first` on, whose sums these are, the means over its group of γ·dz and
    // γ·dz·x̂.
    static void set_means(const Problem &p, index first, index count, const PerPlane &sums, const PerPlane &means) {
        const index size = group_channels(p);
        const double share = 1 / double(group_elements(p));
        for (index i = 0; i < count; ++i) {
            const double *const weight = p.weight ? p.weight + (first + i) % p.groups * size : nullptr;
            const PerPlane from = sums.from(i * size), to = means.from(i * size);
            GradientSums all;
            for (index k = 0; k < size; ++k) {
                const double each = weight ? weight[k] : 1;
                all.add({each * from.dz[k], each * from.dz_xhat[k]});
            }
            for (index k = 0; k < size; ++k) to.dz[k] = all.dz * share, to.dz_xhat[k] = all.dz_xhat * share;
        }
    }

    // ---- planes as pieces: channels-first ------------------------------------------------------

    static index slab_bytes(const Problem &p) { return group_elements(p) * index(sizeof(S)); }

    // Whether what a group writes stays in the second-level cache beside what it reads.
    static bool outputs_fit(const Problem &p) { return flatwater::FLATWATER_ISA::outputs_fit<S>(p, slab_bytes(p)); }
    static Writing writing(const Problem &p) { return writing_of<S>(p, slab_bytes(p)); }

    // As many planes as one loop works on.
    static index together(const Problem &p) {
        return Blocks<S>(Pieces{0, 1, p.shape.inner, 0}).whole_planes() ? most_together : 1;
    }

    // Planes that lie side by side, and what loops over them need.
    class Planes {
      public:
        Planes(const Problem &p, index first, index count)
            : p_(p),
              first_(first),
              values_(Channels::values(count)),
              channels_(count, values_.get()),
              columns_(count) {
            get_channels(p, first, channels_);
            set_affine(channels_, columns_, 0);
        }

        // `ahead` elements before what is worked on after them (0: nothing is).
        void apply(index ahead) const {
            each_few(true, [&](index from, const Pieces &planes) {
                Affine<T> affine[most_together];
                for (index k = 0; k < planes.channels; ++k) affine[k] = columns_.affine(from + k);
                pieces_apply(At<S>(p_, 0), planes, affine, writing(p_), ahead);
            });
        }

        // Σdz and Σdz·x̂ of each.
        void sum(const PerPlane &sums) const {
            const At<S> at(p_, 0);
            const S *const output = outputs_fit(p_) ? at.dx ? at.dx : at.dresidual : nullptr;
            set_units(channels_, columns_, 0);
            each_few(false, [&](index from, const Pieces &planes) {
                Affine<T> affine[most_together];
                GradientSums found[most_together], all[most_together];
                for (index k = 0; k < planes.channels; ++k) affine[k] = columns_.affine(from + k);
                const Blocks<S> blocks(planes);
                for (index b = 0; b < blocks.size(); ++b) {
                    const index next = blocks.to_next(b);
                    const auto prefetched =
                        output ? Prefetched<S>{output, at.x} : Prefetched<S>{at.x + next, at.dy + next};
                    block_sums(at, blocks[b], affine, columns_.field(columns_.unit) + from, prefetched, found);
                    for (index k = 0; k < planes.channels; ++k) all[k].add(found[k]);
                }
                const PerPlane to = sums.from(from);
                for (index k = 0; k < planes.channels; ++k) to.dz[k] = all[k].dz, to.dz_xhat[k] = all[k].dz_xhat;
            });
            complete_sums<T>(channels_, sums.dz, sums.dz_xhat);
        }

        // The means are those of set_means.
        void gradient(const PerPlane &means, index ahead) const {
            set_gradients(channels_, means.dz, means.dz_xhat, columns_, 0);
            each_few(true, [&](index from, const Pieces &planes) {
                Affine<T> affine[most_together];
                Gradient<T> gradients[most_together];
                for (index k = 0; k < planes.channels; ++k)
                    affine[k] = columns_.affine(from + k), gradients[k] = columns_.gradient(from + k);
                pieces_gradient(At<S>(p_, 0), planes, affine, gradients, writing(p_), ahead);
            });
        }

      private:
        // Calls body(from, planes) for as many as are taken together, `from` planes behind the first. Backwards, what
        // was read last is still in cache.
        template <class Body>
        void each_few(bool backwards, const Body &body) const {
            const index few = together(p_), steps = (channels_.count() + few - 1) / few, inner = p_.shape.inner;
            for (index i = 0; i < steps; ++i) {
                const index from = (backwards ? steps - 1 - i : i) * few;
                const index stride = backwards && from > 0 ? few * inner : 0;
                body(from, Pieces{(first_ + from) * inner, 1, inner, stride, smaller(few, channels_.count() - from)});
            }
        }

        const Problem &p_;
        const index first_;
        const Scratch<double> values_;
        const Channels channels_;
        const Columns<T> columns_;
    };

    // Groups as tasks keep a group's planes in cache between the two halves. Too few of them to go round, and the tasks
    // are blocks or planes instead; the results are the same bits.
    static bool groups_go_round(const Problem &p) { return all_groups(p) >= 4 * threads() || threads() == 1; }

    // Calls body(first, count, ahead) for `count` groups as a task, `ahead` elements before those that come next (0:
    // none do). There are enough tasks for every thread to have some.
    template <class Body>
    static void each_few_groups(const Problem &p, const Body &body) {
        const index groups = all_groups(p), bytes = slab_bytes(p);
        const index most = streams_planes<S>(p) ? bytes_together : bytes_of_groups;  // what is streamed is not in L1
        const index few = larger(1, smaller(most / bytes, groups / 32));
        parallel_for((groups + few - 1) / few, p.shape.elements(), [&](index task) {
            const index first = task * few;
            body(first, smaller(few, groups - first), first + 2 * few <= groups ? few * group_elements(p) : 0);
            finish_streaming();
        });
    }

    // Calls body(first, count) for `count` planes as a task.
    template <class Body>
    static void each_few_planes(const Problem &p, const Body &body) {
        const index planes = all_planes(p), few = larger(1, smaller(together(p), planes / 32));
        parallel_for((planes + few - 1) / few, p.shape.elements(), [&](index task) {
            body(task * few, smaller(few, planes - task * few));
            finish_streaming();
        });
    }

    static Pieces group(const Problem &p, index i) { return {i * group_elements(p), 1, group_elements(p), 0}; }

    static Moments group_moments(const Problem &p, index i) {
        const Blocks<S> blocks(group(p, i));
        const At<S> at(p, 0);
        const bool asks_for_output = at.y && outputs_fit(p);
        Moments all, found;
        for (index b = 0; b < blocks.size(); ++b) {
            block_moments(at.x, blocks[b], asks_for_output ? at.y : at.x + blocks.to_next(b), &found);
            all.add(found);
        }
        return all;
    }

    static void plane_statistics(const Problem &p) {
        if (groups_go_round(p))
            return each_few_groups(p, [&](index first, index count, index) {
                for (index i = first; i < first + count; ++i) set_group(p, i, group_moments(p, i));
            });
        block_by_block<S>(
            p, all_groups(p), [&](index i) { return group(p, i); },
            [&](index i, const Moments &all) { set_group(p, i, all); });
    }

    static void plane_normalize(const Problem &p) {
        each_few_planes(p, [&](index first, index count) { Planes(p, first, count).apply(0); });
    }

    static void plane_forward(const Problem &p) {
        if (!groups_go_round(p)) {
            plane_statistics(p);
            return plane_normalize(p);
        }
        const index size = group_channels(p);
        each_few_groups(p, [&](index first, index count, index ahead) {
            for (index i = first; i < first + count; ++i) set_group(p, i, group_moments(p, i));
            Planes(p, first * size, count * size).apply(ahead);
        });
    }

    static void plane_backward(const Problem &p, const PerPlane &sums) {
        const index size = group_channels(p);
        if (groups_go_round(p) && (p.dx || p.dresidual))
            return each_few_groups(p, [&](index first, index count, index ahead) {
                const Planes planes(p, first * size, count * size);
                const Scratch<double> dz(count * size), dz_xhat(count * size);
                const PerPlane own = sums.from(first * size), means{dz.get(), dz_xhat.get()};
                planes.sum(own);
                set_means(p, first, count, own, means);
                planes.gradient(means, ahead);
            });
        each_few_planes(p, [&](index first, index count) { Planes(p, first, count).sum(sums.from(first)); });
        if (!p.dx && !p.dresidual) return;
        const Scratch<double> dz(all_planes(p)), dz_xhat(all_planes(p));
        const PerPlane means{dz.get(), dz_xhat.get()};
        set_means(p, 0, all_groups(p), sums, means);
        each_few_planes(p, [&](index first, index count) {
            Planes(p, first, count).gradient(means.from(first), 0);
        });
    }

    // ---- rows of columns: channels-last --------------------------------------------------------

    // A set for each sample.
    struct Samples {
        const Problem &p;
        PerPlane sums;  // once they are known, of each channel of each sample

        index sets() const { return p.shape.outer; }
        Shape shape() const { return {1, p.shape.channels, p.shape.inner, true}; }
        void get_channels(index n, const Channels &channels) const {
            Group::get_channels(p, n * p.shape.channels, channels);
        }
        void get_means(index n, const Channels &, double *dz, double *dz_xhat) const {
            set_means(p, n * p.groups, p.groups, sums.from(n * p.shape.channels), {dz, dz_xhat});
        }
        void set_moments(index n, const double *mean, const double *m2) const {
            const index size = group_channels(p);
            for (index g = 0; g < p.groups; ++g)
                set_group(p, n * p.groups + g,
                          Moments::of_equal_sets(mean + g * size, m2 + g * size, size, 1, p.shape.inner));
        }
        void set_sums(index n, const double *dz, const double *dz_xhat) const {
            const PerPlane own = sums.from(n * p.shape.channels);
            for (index c = 0; c < p.shape.channels; ++c) own.dz[c] = dz[c], own.dz_xhat[c] = dz_xhat[c];
        }
    };
    static Rows<S, Samples> rows(const Problem &p, const PerPlane &sums = {}) { return {p, {p, sums}}; }

    // ---- the calls ----------------------------------------------------------------------------

    static void statistics(const Problem &p) {
        p.shape.channels_last ? rows(p).statistics() : plane_statistics(p);
    }

    static void normalize(const Problem &p) {
        p.shape.channels_last ? rows(p).normalize() : plane_normalize(p);
    }

    static void forward(const Problem &p) {
        p.shape.channels_last ? rows(p).forward() : plane_forward(p);
    }

    // dβ and dγ: what the planes of each channel contribute, sample after sample.
    static void sum_over_samples(const Problem &p, const PerPlane &sums) {
        for (index c = 0; c < p.shape.channels; ++c) p.sum_dz[c] = p.sum_dz_xhat[c] = 0;
        for (index n = 0; n < p.shape.outer; ++n) {
            const PerPlane own = sums.from(n * p.shape.channels);
            for (index c = 0; c < p.shape.channels; ++c) p.sum_dz[c] += own.dz[c];
            for (index c = 0; c < p.shape.channels; ++c) p.sum_dz_xhat[c] += own.dz_xhat[c];
        }
    }

    static void backward(const Problem &p) {
        const Scratch<double> dz(all_planes(p)), dz_xhat(all_planes(p));
        const PerPlane sums{dz.get(), dz_xhat.get()};
        if (!p.shape.channels_last)
            plane_backward(p, sums);
        else if (p.dx || p.dresidual)
            rows(p, sums).backward();
        else
            rows(p, sums).gradient_sums();
        sum_over_samples(p, sums);
    }
};

}  // namespace flatwater::FLATWATER_ISA
