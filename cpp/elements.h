// How vectors, and the scalars of pieces too narrow for them, are read from memory and written there: for every loop.
#pragma once

#include "simd.h"

namespace flatwater::FLATWATER_ISA {

template <class S, class V>
inline V fetch(const S *p) {
    if constexpr (Lanes<V>::count == 1)
        return Element<S>::get(p);
    else
        return Element<S>::load(p);
}

template <class S, class V>
inline void place(S *p, const V &value, const Rounding<S> &rounding = {}) {
    if constexpr (Lanes<V>::count == 1)
        Element<S>::put(p, value);
    else
        Element<S>::store(p, value, rounding);
}

// The lanes [from, to) of a vector whose first lane belongs at p.
template <class S, class V>
inline void place_lanes(S *p, const V &value, index from, index to) {
    S line[Lanes<V>::count];
    place<S, V>(line, value);
    for (index i = from; i < to; ++i) p[i] = line[i];
}

// Writes past the caches: a large result is out of them anyway before somebody reads it, and a
// plain store would first read from memory what it is going to overwrite.
template <class S, class V>
inline void place_streaming(S *p, const V &value, const Rounding<S> &rounding = {}) {
    if constexpr (Lanes<V>::count == 1) {
        Element<S>::put(p, value);
    } else {
        alignas(vector_bytes) S line[Element<S>::width];
        Element<S>::store(line, value, rounding);
#if defined(__AVX512F__)
        if constexpr (sizeof line == 64)
            _mm512_stream_si512(reinterpret_cast<__m512i *>(p), bit_cast<__m512i>(line));
        else
#endif
#if defined(__AVX2__)
            if constexpr (sizeof line == 32)
            _mm256_stream_si256(reinterpret_cast<__m256i *>(p), bit_cast<__m256i>(line));
        else
#endif
            __builtin_memcpy(p, line, sizeof line);
    }
}

inline void finish_streaming() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// How many elements stand before the first one that lies at a multiple of so many bytes, a power of two.
template <class S>
inline index before_multiple(const S *p, index bytes) {
    return index(-reinterpret_cast<std::uintptr_t>(p) % std::uintptr_t(bytes) / sizeof(S));
}

}  // namespace flatwater::FLATWATER_ISA
