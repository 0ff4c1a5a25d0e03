// What elements of each dtype are computed with, and how vectors of them, and the scalars of pieces too narrow for
// vectors, are read from memory and written there: for every loop.
#pragma once

#include "simd.h"

namespace flatwater::FLATWATER_ISA {

// Elements are named as DType names them. Half-width floats are converted with integer arithmetic: exact, and the same
// on every machine.
using f32 = float;
using f64 = double;
struct bf16 {
    std::uint16_t bits;
};
struct f16 {
    std::uint16_t bits;
};

template <class F, class U>  // F: float or vfloat; U: the unsigned integers of its width
inline F widen(U half, bf16) {
    return bit_cast<F>(U(half << 16));
}

template <class F, class U>
inline F widen(U half, f16) {
    const U sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
    const U finite = bit_cast<U>(F(bit_cast<F>(magnitude) * 0x1p112f));
    return bit_cast<F>(U(sign | ((half & 0x7fffu) >= 0x7c00u ? U(magnitude | 0x7f800000u) : finite)));
}

template <class U, class F>
inline U narrow(F value, bf16) {
    const U bits = bit_cast<U>(value), upper = bits >> 16;
    const U rounded = (bits + 0x7fffu + (upper & 1u)) >> 16;  // to nearest, ties to even
    return value == value ? rounded : U(upper | 0x40u);
}

template <class U, class F>
inline U narrow(F value, f16) {
    const U bits = bit_cast<U>(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const U subnormal = bit_cast<U>(F(bit_cast<F>(magnitude) + 0.5f)) - 0x3f000000u;  // the addition rounds
    const U special = magnitude > 0x7f800000u ? U((magnitude & 0u) + 0x7e00u) : U((magnitude & 0u) + 0x7c00u);
    const U finite = magnitude < 0x38800000u ? subnormal : normal;
    return sign | (magnitude >= 0x47800000u ? special : finite);
}

// What rounding to S takes besides the value.
template <class S>
struct Rounding {
    static Rounding held() { return {}; }
};

#if defined(__AVX2__)
// To bfloat16, to nearest, ties to even, in half as many instructions as `narrow` takes. The lower half of a NaN has to
// be 0, as it is in those that bfloat16 has, that a processor makes of numbers, and that Affine and Gradient hold: no
// carry makes a number of it then.
template <>
struct Rounding<bf16> {
    using Words = VectorOf<std::uint32_t>::type;
    using Halves = VectorOf<std::uint16_t, vector_bytes / 2>::type;
    Words below_half = Words{} + 0x7fffu, one = Words{} + 1u;

    // For long loops, in which GCC would make each constant anew for every vector: of these it does not know the value.
    static Rounding held() {
        Rounding r;
        asm("" : "+v"(r.below_half), "+v"(r.one));
#if defined(__AVX512F__)
        asm("" : "+v"(r.odd), "+v"(r.upper));
#endif
        return r;
    }

#if defined(__AVX512F__)
    Words odd = Words{} + 0x10000u;
    VectorOf<std::uint16_t>::type upper{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

    Halves operator()(const vfloat &value) const {
        const __m512i bits = bit_cast<__m512i>(value), more = __m512i(bit_cast<Words>(value) + below_half);
        const __mmask16 is_odd = _mm512_test_epi32_mask(bits, __m512i(odd));
        const __m512i rounded = _mm512_mask_add_epi32(more, is_odd, more, __m512i(one));
        return bit_cast<Two<Halves>>(_mm512_permutexvar_epi16(__m512i(upper), rounded)).first;
    }
#else
    Halves operator()(const vfloat &value) const {
        const Words bits = bit_cast<Words>(value), rounded = (bits + below_half + (bits >> 16 & one)) >> 16;
        const auto halves = bit_cast<Two<VectorOf<std::uint32_t, vector_bytes / 2>::type>>(rounded);
        return bit_cast<Halves>(_mm_packus_epi32(__m128i(halves.first), __m128i(halves.second)));
    }
#endif

  private:
    template <class T>
    struct Two {
        T first, second;
    };
};
#endif

// How elements stored as S are computed with: always in Compute, one rounding when they are stored.
template <class S>
struct Element {
    using Compute = S;
    using Vector = typename VectorOf<S>::type;
    static constexpr index width = vector_bytes / sizeof(S);
    static Vector load(const S *p) {
        Vector v;
        __builtin_memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(S *p, const Vector &v, const Rounding<S> & = {}) { __builtin_memcpy(p, &v, sizeof v); }
    static S get(const S *p) { return *p; }
    static void put(S *p, S value) { *p = value; }
};

template <class S>
struct HalfElement {
    using Compute = float;
    using Vector = vfloat;
    static constexpr index width = vector_bytes / 4;
    using Halves = VectorOf<std::uint16_t, vector_bytes / 2>::type;
    using Words = VectorOf<std::uint32_t>::type;
    static Vector load(const S *p) {
        Halves halves;
        __builtin_memcpy(&halves, p, sizeof halves);
        return widen<vfloat>(words_of(halves), S{});
    }
    static void store(S *p, const Vector &v, const Rounding<S> &rounding = {}) {
        const Halves halves = halves_of(v, rounding);
        __builtin_memcpy(p, &halves, sizeof halves);
    }
    static float get(const S *p) { return widen<float>(std::uint32_t(p->bits), S{}); }
    static void put(S *p, float value) { p->bits = std::uint16_t(narrow<std::uint32_t>(value, S{})); }

  private:
    // One instruction each, for which GCC 12 takes six.
    static Words words_of(const Halves &halves) {
#if defined(__AVX512F__)
        return bit_cast<Words>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(halves)));
#elif defined(__AVX2__)
        return bit_cast<Words>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(halves)));
#else
        return __builtin_convertvector(halves, Words);
#endif
    }
    static Halves halves_of(const Vector &v, const Rounding<S> &rounding) {
        if constexpr (requires { rounding(v); })
            return rounding(v);
        else
            return __builtin_convertvector(narrow<Words>(v, S{}), Halves);
    }
};

template <>
struct Element<bf16> : HalfElement<bf16> {};
template <>
struct Element<f16> : HalfElement<f16> {};

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
