// Norms over rows of columns (columns.h): how they are cut into tasks, and the passes over them.
#pragma once

#include "channels.h"
#include "column_moments.h"
#include "team.h"

namespace flatwater::FLATWATER_ISA {

// A norm over sets of rows, equal in size, that have statistics of their own: batch norm's over one of all rows, group
// norm's over one for each sample. Of the norm it knows
//     sets(), shape()                     how many sets there are, and the shape of each
//     get_channels(n, channels)           the channels of set n
//     get_means(n, channels, dz, dz_xhat) what set_gradients takes of each of them
//     set_moments(n, mean, m2)            takes the moments of each,
//     set_sums(n, dz, dz_xhat)            and Σdz and Σdz·x̂
template <class S, class Norm>
class Rows {
    using T = typename Element<S>::Compute;

    // What is known of set n while it is worked on: two sums of each column of each chunk, its channels, and what its
    // columns need, which is from `column` on.
    struct Set {
        index n;
        double *first, *second;
        Channels channels;
        const Columns<T> &columns;
        index column;
    };

    // The same of `sets` sets.
    class Work {
      public:
        Work(const RowLayout &layout, index sets)
            : columns_(layout.columns),
              sums_(layout.chunks * layout.columns),
              channels_(layout.channels),
              first_(sets * sums_),
              second_(sets * sums_),
              values_(sets * Channels::values(channels_)),
              all_(sets * columns_) {}

        // As number n, the one that is kept at i.
        Set set(index n, index i) const {
            const Channels channels(channels_, values_.get() + i * Channels::values(channels_));
            return {n, first_.get() + i * sums_, second_.get() + i * sums_, channels, all_, i * columns_};
        }

      private:
        index columns_, sums_, channels_;
        Scratch<double> first_, second_, values_;
        Columns<T> all_;
    };

  public:
    Rows(const Problem &p, const Norm &norm)
        : p_(p), norm_(norm), layout_(RowLayout::of<S>(norm.shape(), norm.sets(), threads())) {}

    void statistics() const {
        const Work work(layout_, norm_.sets());
        each_tile(work, [this](const Set &set, const Tile &tile) { sum_moments(set, tile); });
        each_set(work, [this](const Set &set) { take_moments(set); });
    }

    void normalize() const {
        const Work work(layout_, norm_.sets());
        each_set(work, [this](const Set &set) { prepare_affine(set); });
        each_tile_backwards(work, [this](const Set &set, const Tile &tile) { write(set, tile); });
    }

    void forward() const {
        both_passes([](const Set &) {}, [this](const Set &set, const Tile &tile) { sum_moments(set, tile); },
                    [this](const Set &set) {
                        take_moments(set);
                        prepare_affine(set);
                    },
                    [this](const Set &set, const Tile &tile) { write(set, tile); });
    }

    void gradient_sums() const {
        const Work work(layout_, norm_.sets());
        each_set(work, [this](const Set &set) { prepare_sums(set); });
        each_tile(work, [this](const Set &set, const Tile &tile) { sum_gradients(set, tile); });
        each_set(work, [this](const Set &set) { take_sums(set); });
    }

    void input_gradient() const {
        const Work work(layout_, norm_.sets());
        each_set(work, [this](const Set &set) {
            prepare_affine(set);
            prepare_gradients(set);
        });
        each_tile_backwards(work, [this](const Set &set, const Tile &tile) { write_gradient(set, tile); });
    }

    void backward() const {
        both_passes([this](const Set &set) { prepare_sums(set); },
                    [this](const Set &set, const Tile &tile) { sum_gradients(set, tile); },
                    [this](const Set &set) {
                        take_sums(set);
                        prepare_gradients(set);
                    },
                    [this](const Set &set, const Tile &tile) { write_gradient(set, tile); });
    }

  private:
    // ---- which of it is a task ----------------------------------------------------------------

    template <class Body>
    void each_set(const Work &work, const Body &body) const {
        parallel_for(norm_.sets(), norm_.sets() * layout_.columns, [&](index n) { body(work.set(n, n)); });
    }

    template <class Body>
    void each_tile(const Work &work, const Body &body) const {
        const index tiles = layout_.tasks();
        parallel_for(norm_.sets() * tiles, p_.shape.elements(), [&](index task) {
            body(work.set(task / tiles, task / tiles), Tile(layout_, task % tiles));
        });
    }

    // For what is written of what each_tile has left in the caches.
    template <class Body>
    void each_tile_backwards(const Work &work, const Body &body) const {
        const index tiles = layout_.tasks();
        parallel_for_backwards(norm_.sets() * tiles, p_.shape.elements(), [&](index task) {
            body(work.set(task / tiles, task / tiles), Tile(layout_, task % tiles));
            finish_streaming();
        });
    }

    // Whole sets as tasks keep a set in cache between the two passes over it. Too few of them to go round, and the
    // tasks are tiles; the results are the same bits.
    template <class Before, class Sum, class Between, class Write>
    void both_passes(const Before &before, const Sum &sum, const Between &between, const Write &write) const {
        const index sets = norm_.sets();
        if (sets >= 4 * threads()) {
            parallel_for(sets, p_.shape.elements(), [&](index n) {
                const Work work(layout_, 1);
                const Set set = work.set(n, 0);
                before(set);
                for (index i = 0; i < layout_.tasks(); ++i) sum(set, Tile(layout_, i));
                between(set);
                for (index i = layout_.tasks(); i > 0; --i) write(set, Tile(layout_, i - 1));
                finish_streaming();
            });
            return;
        }
        const Work work(layout_, sets);
        each_set(work, before);
        each_tile(work, sum);
        each_set(work, between);
        each_tile_backwards(work, write);
    }

    // ---- tiles --------------------------------------------------------------------------------

    At<S> at(const Set &set, const Tile &tile) const {
        return At<S>(p_, set.n * layout_.rows * layout_.columns + tile.offset);
    }
    Block block(const Set &set, const Tile &tile) const {
        const index column = set.column + tile.column;
        return {tile.rows, tile.columns, layout_.columns, column, !layout_.last, prefetches_second_level<S>(p_)};
    }

    void sum_moments(const Set &set, const Tile &tile) const {
        column_moments(at(set, tile).x, block(set, tile), set.first + tile.sums, set.second + tile.sums);
    }
    void write(const Set &set, const Tile &tile) const {
        columns_apply(at(set, tile), block(set, tile), set.columns, streams_rows<S>(p_));
    }
    void sum_gradients(const Set &set, const Tile &tile) const {
        columns_sums(at(set, tile), block(set, tile), set.columns, set.first + tile.sums, set.second + tile.sums);
    }
    void write_gradient(const Set &set, const Tile &tile) const {
        columns_gradient(at(set, tile), block(set, tile), set.columns, streams_rows<S>(p_));
    }

    // ---- sets ---------------------------------------------------------------------------------

    // Of each channel, from those of the columns: a chunk after the other, all channels of it in a row, for they share
    // counts, and so the divisions.
    FLATWATER_ONE_COPY
    void take_moments(const Set &set) const {
        const index channels = layout_.channels, each = layout_.columns_each;
        const Scratch<double> mean(channels), m2(channels), chunk_mean(channels), chunk_m2(channels);
        for (index chunk = 0; chunk < layout_.chunks; ++chunk) {
            const double *means = set.first + chunk * layout_.columns, *m2s = set.second + chunk * layout_.columns;
            const index rows = layout_.rows_of(chunk);
            if (each > 1) {
                for (index c = 0; c < channels; ++c) {
                    const ChannelColumns of = layout_.columns_of(c);
                    const Moments equal =
                        Moments::of_equal_sets(means + of.first, m2s + of.first, of.count, of.step, rows);
                    chunk_mean.get()[c] = equal.mean, chunk_m2.get()[c] = equal.m2;
                }
                means = chunk_mean.get(), m2s = chunk_m2.get();
            }
            Moments::add_to_all(mean.get(), m2.get(), chunk * layout_.chunk_rows * each, means, m2s, rows * each,
                                channels);
        }
        norm_.set_moments(set.n, mean.get(), m2.get());
    }

    FLATWATER_ONE_COPY
    void take_sums(const Set &set) const {
        const index channels = layout_.channels;
        const Scratch<double> dz(channels), dz_xhat(channels);
        for (index c = 0; c < channels; ++c) dz.get()[c] = dz_xhat.get()[c] = 0;
        for (index chunk = 0; chunk < layout_.chunks; ++chunk) {
            layout_.add_columns(dz.get(), set.first + chunk * layout_.columns);
            layout_.add_columns(dz_xhat.get(), set.second + chunk * layout_.columns);
        }
        complete_sums<T>(set.channels, dz.get(), dz_xhat.get());
        norm_.set_sums(set.n, dz.get(), dz_xhat.get());
    }

    // Has fill(columns, first) fill one column for each channel, from `first` on: these fields of it.
    template <class Fill>
    void fill_columns(const Set &set, index field, index end, const Fill &fill) const {
        if (layout_.columns_each == 1) return fill(set.columns, set.column);
        const Columns<T> channels(layout_.channels);
        fill(channels, 0);
        for (; field < end; ++field) layout_.spread(channels.field(field), set.columns.field(field) + set.column);
    }

    // Once its statistics are known: what every column needs to be normalized,
    void prepare_affine(const Set &set) const {
        norm_.get_channels(set.n, set.channels);
        fill_columns(set, Columns<T>::shift, Columns<T>::unit, [&](const Columns<T> &columns, index first) {
            set_affine(set.channels, columns, first);
        });
    }
    // or that and what its sums of gradients need,
    void prepare_sums(const Set &set) const {
        norm_.get_channels(set.n, set.channels);
        fill_columns(set, Columns<T>::shift, Columns<T>::dz_scale, [&](const Columns<T> &columns, index first) {
            set_affine(set.channels, columns, first);
            set_units(set.channels, columns, first);
        });
    }
    // and after either, once those sums are known, what its gradients need.
    void prepare_gradients(const Set &set) const {
        const Scratch<double> dz(layout_.channels), dz_xhat(layout_.channels);
        norm_.get_means(set.n, set.channels, dz.get(), dz_xhat.get());
        fill_columns(set, Columns<T>::unit, Columns<T>::fields, [&](const Columns<T> &columns, index first) {
            set_gradients(set.channels, dz.get(), dz_xhat.get(), columns, first);
        });
    }

    const Problem &p_;
    const Norm norm_;
    const RowLayout layout_;
};

}  // namespace flatwater::FLATWATER_ISA
