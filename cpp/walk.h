// How loops walk over pieces, whatever they compute.
//
// A piece that is no whole number of vectors ends with a vector that begins earlier: what it writes twice
// is the same, and where it sums, the lanes that were there before are cleared. A piece narrower than a
// vector is taken in scalars, by the same loops.
#pragma once

#include "elements.h"
#include "layout.h"

namespace flatwater::FLATWATER_ISA {

// Values that a lane sums in its own precision. Short, for when the mean is 10^4 deviations the deviations are
// multiples of a coarse unit, and roundings of a longer sum of squares all lean one way.
constexpr index short_run = 8;

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

// Calls body(i, put) for vectors that cover a piece; what it writes of vector i into a tensor, it gives to
// put(where, value). Streamed are whole cache lines only: a line of which one half is streamed, and the other written
// otherwise, goes to memory in two. `out` is one of the tensors; in the others, lines begin where they do in this one.
template <class S, class V, bool streaming, class Body>
inline void fill_piece(const S *out, index begin, index length, const Body &body) {
    constexpr index width = Lanes<V>::count, line = line_bytes / index(sizeof(S));
    const index end = begin + length;
    index i = begin;
    const auto put = [](S *p, const V &v) { place<S, V>(p, v); };
    const auto place_until = [&](index stop) {
        for (; i + width <= stop; i += width) body(i, put);
    };
    if constexpr (streaming && width > 1) {
        const auto some = [&](index at, index from, index to) {
            body(at, [=](S *p, const V &v) { place_lanes<S, V>(p, v, from, to); });
        };
        const index first = smaller(begin + before_multiple(out + begin, line_bytes), end);
        if constexpr (width < line) place_until(first);
        if (i < first) {
            const index at = width < line ? smaller(i, end - width) : i;
            some(at, i - at, first - at);
        }
        for (i = first; i + line <= end; i += line)
            for (index j = i; j < i + line; j += width)
                body(j, [](S *p, const V &v) { place_streaming<S, V>(p, v); });
        if constexpr (width < line) place_until(end);
        if (i < end) some(end - width, width - (end - i), width);
    } else {
        place_until(end);
        if (i < end) body(end - width, put);
    }
}

// Where streamed pieces are no whole lines, their ends are read before they are written. So they are prefetched some
// pieces ahead, in the order in which those are worked on: samples backwards, the channels of each forwards.
template <class S>
class Ends {
  public:
    Ends(const Pieces &pieces, const S *out)
        : pieces_(pieces),
          ragged_(before_multiple(out + pieces.offset, line_bytes) || pieces.length * index(sizeof(S)) % line_bytes) {}

    FLATWATER_HINT void prefetch(const S *out, index n, index c) const {
        if (!ragged_) return;
        for (c += pieces_ahead; c >= pieces_.channels; c -= pieces_.channels) --n;
        const S *const piece = out + pieces_.offset + n * pieces_.stride + c * pieces_.length;
        flatwater::FLATWATER_ISA::prefetch(piece);
        flatwater::FLATWATER_ISA::prefetch(piece + pieces_.length);
    }

  private:
    static constexpr index pieces_ahead = 4;
    const Pieces pieces_;
    const bool ragged_;
};

}  // namespace flatwater::FLATWATER_ISA
