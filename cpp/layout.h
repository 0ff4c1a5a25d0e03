// How the tensor of a call is cut into tasks and blocks. What is summed in which order depends on the shape alone.
#pragma once

#include <cstdlib>
#include <new>
#include <utility>

#include "coefficients.h"
#include "elements.h"

namespace flatwater::FLATWATER_ISA {

// What is summed in the elements' own precision before the sum goes on in double, in vectors; also
// what stays in the first-level cache between two passes over it.
constexpr index block_vectors = 256;

// The widest tile of columns that is worked on at once: one whose sums stay in the first-level cache, or, for
// processors that would rather read memory in longer runs (Machine), in the second.
constexpr index tile_columns = 512, widest_tile = 2048;

// Channels-first planes of at least this many elements are worked on as pieces: a vector of the
// widest kind fits. Smaller ones are columns.
constexpr index piece_elements = 16;

// How far ahead of where it works a loop over rows asks memory for what it is going to read, at the least, in
// bytes of one tensor. On its own the processor sees no streams in so many rows.
constexpr index bytes_ahead = 8192;

// Channels-first channels of short planes are taken together, sample by sample, so that memory is read in longer runs
// than one plane: up to this many bytes of one tensor, which with the others stay in a second-level cache, and so many.
constexpr index bytes_together = 96 << 10, most_together = 32;

// Groups of short planes, which group norm takes together, too: up to this many bytes of one tensor, which with the
// others stay in a first-level cache.
constexpr index bytes_of_groups = 8 << 10;

// Of one channel and tensor, where the planes to be written are asked for while those that are read are being summed:
// they stay in a second-level cache beside those, and beside the next channels' (Machine).
constexpr index largest_slab = 128 << 10;

// Planes, in bytes: ones shorter than the first are never streamed, ones shorter than the second are short: the processor
// does not see in time where they begin.
constexpr index shortest_plane = 4 * line_bytes, long_plane = 4 << 10;

// Memory for a call's own partial results.
template <class T>
class Scratch {
  public:
    explicit Scratch(index n) : data_(static_cast<T *>(std::malloc(sizeof(T) * std::size_t(n ? n : 1)))) {
        if (!data_) throw std::bad_alloc();
    }
    Scratch(Scratch &&other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    T *get() const { return data_; }
    T &operator[](index i) const { return data_[i]; }

  private:
    T *data_;
};

inline index smaller(index a, index b) { return a < b ? a : b; }
inline index larger(index a, index b) { return a > b ? a : b; }

// `count` runs of `length` consecutive elements, which begin `stride` apart: a channel's planes. Behind them lie those
// of the next `channels` - 1 channels, if `length` is that of a whole plane. The stride of a single run is how far
// before it the one lies that is worked on next; 0 if nobody knows.
struct Pieces {
    index offset, count, length, stride, channels = 1;
    index elements() const { return count * length; }  // of one channel
};

// The same pieces, a block at a time: several short ones together, or a part of a long one.
template <class S>
class Blocks {
  public:
    explicit Blocks(const Pieces &all) : all_(all) {
        const index lanes = all.length < Element<S>::width ? 1 : Element<S>::width;
        capacity_ = block_vectors * lanes;
        parts_ = larger(1, all.length / capacity_);  // the last one takes what is left over, so none is narrow
        together_ = larger(1, capacity_ / larger(1, all.length));
    }

    bool whole_planes() const { return parts_ == 1; }
    index size() const { return parts_ > 1 ? all_.count * parts_ : (all_.count + together_ - 1) / together_; }

    Pieces operator[](index i) const {
        if (parts_ > 1) {
            const index part = i % parts_, from = part * capacity_;
            const index length = part + 1 == parts_ ? all_.length - from : capacity_;
            return {all_.offset + i / parts_ * all_.stride + from, 1, length, 0};
        }
        const index first = i * together_;
        return {all_.offset + first * all_.stride, smaller(together_, all_.count - first), all_.length, all_.stride,
                all_.channels};
    }

    // How far it is from a block to the one after it; 0 from the last.
    index to_next(index i) const { return i + 1 < size() ? (*this)[i + 1].offset - (*this)[i].offset : 0; }

  private:
    Pieces all_;
    index capacity_, parts_, together_;
};

// The columns of one channel in a RowLayout: `count` of them, `step` apart.
struct ChannelColumns {
    index first, step, count;
};

// One of `sets` equal sets as rows of columns. Channels-last, a row is one position, or several of them if the
// channels alone are no whole number of vectors. Of tiny channels-first planes, a row is a sample.
struct RowLayout {
    index channels, rows, columns, columns_each, tile_width, tiles, chunk_rows, chunks;
    bool last;

    template <class S>
    static RowLayout of(const Shape &shape, index sets, index threads) {
        RowLayout l;
        l.channels = shape.channels;
        l.last = shape.channels_last;
        l.rows = l.last ? shape.outer * shape.inner : shape.outer;
        l.columns_each = l.last ? positions<S>(shape.channels, l.rows) : shape.inner;
        if (l.last) l.rows /= l.columns_each;
        l.columns = l.channels * l.columns_each;
        // Between whole channels; the last tile takes what is left over, so none is narrow.
        const index unit = l.last ? Element<S>::width : l.columns_each;
        l.set_tiles(tile_columns, unit);
        // About 32 tasks, none of them too short to be worth its beginning and end. The chunks decide what is summed
        // in which order: the same on every machine, however many of their tiles are taken together.
        const index chunks = larger(1, 32 / (l.tiles * sets)), rows = (l.rows + chunks - 1) / chunks;
        l.chunk_rows = larger(1, (rows + 63) / 64) * 64;
        l.chunks = (l.rows + l.chunk_rows - 1) / l.chunk_rows;
        if (machine().whole_rows && sets * l.chunks >= 2 * threads) l.set_tiles(widest_tile, unit);
        return l;
    }

    ChannelColumns columns_of(index c) const {
        return last ? ChannelColumns{c, channels, columns_each} : ChannelColumns{c * columns_each, 1, columns_each};
    }
    // Adds what was summed in each column to the sum of its channel.
    void add_columns(double *__restrict sums, const double *__restrict columns_sums) const {
        const index to_next_channel = last ? 1 : columns_each, to_next = last ? channels : 1;
        for (index i = 0; i < columns_each; ++i)
            for (index c = 0; c < channels; ++c) sums[c] += columns_sums[c * to_next_channel + i * to_next];
    }
    // Gives each column what is its channel's.
    template <class T>
    void spread(const T *__restrict channels_values, T *__restrict columns_values) const {
        const index to_next_channel = last ? 1 : columns_each, to_next = last ? channels : 1;
        for (index i = 0; i < columns_each; ++i)
            for (index c = 0; c < channels; ++c)
                columns_values[c * to_next_channel + i * to_next] = channels_values[c];
    }
    index rows_of(index chunk) const { return smaller(chunk_rows, rows - chunk * chunk_rows); }
    index tasks() const { return tiles * chunks; }

  private:
    void set_tiles(index widest, index unit) {
        tile_width = columns <= widest ? columns : larger(1, widest / 2 / unit) * unit;
        tiles = larger(1, columns / tile_width);
    }

    // How many positions make a whole number of vectors, if that divides the rows and fits a tile.
    template <class S>
    static index positions(index channels, index rows) {
        for (index k = 1; k * channels <= tile_columns && k <= Element<S>::width; k *= 2)
            if (k * channels % Element<S>::width == 0) return rows % k == 0 ? k : 1;
        return 1;
    }
};

// A part of a RowLayout: some columns of some rows. `sums` is where those of its columns begin, `offset` its first
// element, both from where the set's do.
struct Tile {
    index column, columns, rows, sums, offset;

    Tile(const RowLayout &layout, index task) {
        const index tile = task % layout.tiles, chunk = task / layout.tiles;
        column = tile * layout.tile_width;
        columns = tile + 1 == layout.tiles ? layout.columns - column : layout.tile_width;
        rows = layout.rows_of(chunk);
        sums = chunk * layout.columns + column;
        offset = chunk * layout.chunk_rows * layout.columns + column;
    }
};

inline bool as_pieces(const Shape &shape) { return !shape.channels_last && shape.inner >= piece_elements; }

// Channels-first with one value per plane lies in memory as channels-last does.
inline Shape canonical(Shape shape) {
    if (shape.inner == 1) shape.channels_last = true;
    return shape;
}

inline Channel channel_of(const Problem &p, index statistics, index c) {
    return {p.mean[statistics], p.inv_std[statistics], p.weight ? p.weight[c] : 1, p.bias ? p.bias[c] : 0};
}

// Of one tensor.
template <class S>
index bytes_of(const Problem &p) {
    return p.shape.elements() * index(sizeof(S));
}

template <class S>
bool reaches(const From &from, const Problem &p) {
    const index tensors = from.of_step && (p.residual || p.dresidual) ? 6 : 4;
    return bytes_of<S>(p) >= from.bytes / tensors * 4;
}

// Whether what is written row by row is streamed: it does not stay in any cache until it is read again.
template <class S>
bool streams_rows(const Problem &p) {
    return reaches<S>(machine().stream_rows, p);
}

// The same, plane by plane. Of a plane as short as 7 × 7 the ends, which are not streamed, are nearly all there is.
template <class S>
bool streams_planes(const Problem &p) {
    const index plane = p.shape.inner * index(sizeof(S));
    if (plane < (sizeof(S) == 2 ? machine().shortest_half_plane : shortest_plane)) return false;
    return reaches<S>(plane < long_plane ? machine().stream_short_planes : machine().stream_planes, p);
}

// How planes are written: past the caches, or where they have been asked for while others were being written, or else.
enum class Writing { streamed, asked_for, stored };

// Whether, of a channel or group with so many bytes, what is written stays in the second-level cache beside what is read:
// then it is asked for while that is being summed.
template <class S>
bool outputs_fit(const Problem &p, index slab) {
    return !streams_planes<S>(p) && slab <= largest_slab;
}

template <class S>
Writing writing_of(const Problem &p, index slab) {
    if (streams_planes<S>(p)) return Writing::streamed;
    const bool is_long = p.shape.inner * index(sizeof(S)) >= long_plane;
    return outputs_fit<S>(p, slab) || is_long || machine().always_ahead ? Writing::stored : Writing::asked_for;
}

// Whether loops are compiled for each level of cache that memory may be prefetched into: inside a loop the choice took up
// to a fifth of its time. Processors that would rather have the second have AVX-512; and float64, which networks hardly
// have, is not worth two loops.
template <class S>
constexpr bool two_levels =
    sizeof(typename Element<S>::Vector) == line_bytes && sizeof(typename Element<S>::Compute) < sizeof(double);

// Whether rows of columns are prefetched into the second-level cache only.
template <class S>
bool prefetches_second_level(const Problem &p) {
    return two_levels<S> && reaches<S>(machine().second_level_rows, p);
}

// GCC 12 takes a function that only prefetches for one that does nothing, and drops the calls that it has not inlined.
#define FLATWATER_HINT [[gnu::always_inline]] inline
#define FLATWATER_HINT_LAMBDA __attribute__((always_inline))

// Asks for the cache line of p, into the first-level cache or only the second: a hint; p may lie outside every tensor.
template <class S>
FLATWATER_HINT void prefetch(const S *p, bool second_level = false) {
    if (second_level)
        __builtin_prefetch(p, 0, 2);
    else
        __builtin_prefetch(p, 0, 3);
}

// The activation of a call, and its element pointers at one offset, null where it has none.
template <class S>
struct At {
    const S *x, *residual, *dy;
    S *y, *dx, *dresidual;
    Activation activation;

    At(const Problem &p, index offset)
        : x(move(static_cast<const S *>(p.x), offset)),
          residual(move(static_cast<const S *>(p.residual), offset)),
          dy(move(static_cast<const S *>(p.dy), offset)),
          y(move(static_cast<S *>(p.y), offset)),
          dx(move(static_cast<S *>(p.dx), offset)),
          dresidual(move(static_cast<S *>(p.dresidual), offset)),
          activation(p.activation) {}

    At plus(index offset) const {
        At other = *this;
        other.x = move(x, offset), other.residual = move(residual, offset), other.dy = move(dy, offset);
        other.y = move(y, offset), other.dx = move(dx, offset), other.dresidual = move(dresidual, offset);
        return other;
    }

    // What is read at i.
    FLATWATER_HINT void prefetch_inputs(index i, bool second_level = false) const {
        prefetch(x + i, second_level);
        if (residual) prefetch(residual + i, second_level);
        if (dy) prefetch(dy + i, second_level);
    }

  private:
    template <class P>
    static P *move(P *pointer, index offset) {
        return pointer ? pointer + offset : nullptr;
    }
};

}  // namespace flatwater::FLATWATER_ISA
