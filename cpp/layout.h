// How the tensor of a call is cut into tasks. The cut depends on the shape alone.
#pragma once

#include <cstdlib>
#include <new>

#include "columns.h"
#include "team.h"

namespace flatwater::FLATWATER_ISA {

// Channels-first planes of at least this many elements are worked on as segments; smaller ones
// would spend their time on beginnings and ends, and on jumps through memory.
constexpr index segment_elements = 256;

// A result of this size does not stay in any cache until it is read again.
constexpr index streaming_bytes = index(16) << 20;

// Memory for a call's own partial results.
template <class T>
class Scratch {
  public:
    explicit Scratch(index n) : data_(static_cast<T *>(std::malloc(sizeof(T) * std::size_t(n ? n : 1)))) {
        if (!data_) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    T *get() const { return data_; }
    T &operator[](index i) const { return data_[i]; }

  private:
    T *data_;
};

// The tensor as rows of columns, for batch norm: `inner` columns for each channel.
struct RowLayout {
    index rows, inner, channels, tile_channels, tiles, chunk_rows, chunks;

    explicit RowLayout(const Shape &shape) {
        const bool last = shape.channels_last;
        rows = last ? shape.outer * shape.inner : shape.outer;
        inner = last ? 1 : shape.inner;
        channels = shape.channels;
        tile_channels = tile_columns / 2 / inner;
        if (tile_channels < 1) tile_channels = 1;
        tiles = channels / tile_channels;  // the last tile takes what is left over, so none is narrow
        if (tiles < 1) tiles = 1;
        chunk_rows = (rows + 31) / 32;
        chunk_rows = chunk_rows < block_rows ? block_rows : (chunk_rows + block_rows - 1) / block_rows * block_rows;
        chunks = (rows + chunk_rows - 1) / chunk_rows;
    }

    index columns() const { return channels * inner; }
    index tasks() const { return tiles * chunks; }
};

// A part of a RowLayout: the channels [c0, c1) in the rows [r0, r0 + rows).
struct Tile {
    index c0, c1, r0, rows, chunk, columns, offset;

    Tile(const RowLayout &layout, index task) {
        const index tile = task % layout.tiles;
        chunk = task / layout.tiles;
        c0 = tile * layout.tile_channels;
        c1 = tile + 1 == layout.tiles ? layout.channels : c0 + layout.tile_channels;
        r0 = chunk * layout.chunk_rows;
        rows = layout.rows - r0 < layout.chunk_rows ? layout.rows - r0 : layout.chunk_rows;
        columns = (c1 - c0) * layout.inner;
        offset = r0 * layout.columns() + c0 * layout.inner;
    }
};

inline bool as_segments(const Shape &shape) { return !shape.channels_last && shape.inner >= segment_elements; }

// Channels-first with one value per plane lies in memory as channels-last does.
inline Shape canonical(Shape shape) {
    if (shape.inner == 1) shape.channels_last = true;
    return shape;
}

inline Channel channel_of(const Problem &p, index statistics, index c) {
    return {p.mean[statistics], p.inv_std[statistics], p.weight ? p.weight[c] : 1, p.bias ? p.bias[c] : 0};
}

template <class S>
bool is_large(const Problem &p) {
    return p.shape.elements() * index(sizeof(S)) >= streaming_bytes;
}

// dβ and dγ: what the planes of each channel contribute, sample after sample.
inline void sum_over_samples(const Problem &p, const GradientSums *planes) {
    const index channels = p.shape.channels;
    for (index c = 0; c < channels; ++c) {
        p.sum_dz[c] = p.sum_dz_xhat[c] = 0;
        for (index n = 0; n < p.shape.outer; ++n) {
            p.sum_dz[c] += planes[n * channels + c].dz;
            p.sum_dz_xhat[c] += planes[n * channels + c].dz_xhat;
        }
    }
}

// The element pointers of a call at one offset, null where the call has none.
template <class S>
struct At {
    const S *x, *residual, *dy;
    S *y, *dx, *dresidual;

    At(const Problem &p, index offset)
        : x(move(static_cast<const S *>(p.x), offset)),
          residual(move(static_cast<const S *>(p.residual), offset)),
          dy(move(static_cast<const S *>(p.dy), offset)),
          y(move(static_cast<S *>(p.y), offset)),
          dx(move(static_cast<S *>(p.dx), offset)),
          dresidual(move(static_cast<S *>(p.dresidual), offset)) {}

  private:
    template <class P>
    static P *move(P *pointer, index offset) {
        return pointer ? pointer + offset : nullptr;
    }
};

}  // namespace flatwater::FLATWATER_ISA
