// Vectors of the width this file is compiled for, and how elements of each dtype reach them.
//
// Everything is written once, as templates over V: a vector for the body of a loop, a scalar for
// its tail. Nothing from the standard library's headers is instantiated here: an inline function
// compiled for AVX-512 could otherwise be the copy that the linker keeps for everybody.
#pragma once

#include "problem.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace flatwater::FLATWATER_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
constexpr index line_bytes = 64;  // of a cache

// One compiled copy, wherever it is called from. Which multiplications and additions are fused is the
// compiler's choice anew in each copy that it makes by inlining, and two roads to one result (whole
// calls and halves, few channels and many) have to agree in every bit. What such a copy calls is inlined, or
// the constants of a loop would be fetched from memory for every vector. Under a sanitizer only the bits matter.
#if defined(FLATWATER_SANITIZED)
#define FLATWATER_ONE_COPY [[gnu::noinline]]
#elif defined(__clang__)
#define FLATWATER_ONE_COPY [[gnu::noinline, gnu::flatten]]
#else
#define FLATWATER_ONE_COPY [[gnu::noinline, gnu::noclone, gnu::flatten]]
#endif

template <class T, int bytes = vector_bytes>
struct VectorOf {
    typedef T type __attribute__((vector_size(bytes)));
};
using vfloat = VectorOf<float>::type;
using vdouble = VectorOf<double>::type;

// scalar: the type of one lane; bits: integers of its width; count: how many; wide: as many doubles; part: as much of
// those as a register holds.
template <class V>
struct Lanes;
template <>
struct Lanes<float> {
    using scalar = float;
    using bits = std::int32_t;
    using wide = double;
    using part = double;
    static constexpr int count = 1;
};
template <>
struct Lanes<double> {
    using scalar = double;
    using bits = std::int64_t;
    using wide = double;
    using part = double;
    static constexpr int count = 1;
};
template <>
struct Lanes<vfloat> {
    using scalar = float;
    using bits = VectorOf<std::int32_t>::type;
    using wide = VectorOf<double, 2 * vector_bytes>::type;
    using part = vdouble;
    static constexpr int count = vector_bytes / 4;
};
template <>
struct Lanes<vdouble> {
    using scalar = double;
    using bits = VectorOf<std::int64_t>::type;
    using wide = vdouble;
    using part = vdouble;
    static constexpr int count = vector_bytes / 8;
};

template <class To, class From>
inline To bit_cast(const From &from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

template <class V>
inline V splat(typename Lanes<V>::scalar value) {
    return V{} + value;
}

template <class V>
inline typename Lanes<V>::wide widen_lanes(const V &v) {
    if constexpr (Lanes<V>::count == 1)
        return v;
    else
        return __builtin_convertvector(v, typename Lanes<V>::wide);
}

template <class V>
inline V narrow_lanes(const typename Lanes<V>::wide &v) {
    if constexpr (Lanes<V>::count == 1)
        return V(v);
    else
        return __builtin_convertvector(v, V);
}

// Doubles for the lanes of V, a register each. GCC adds and multiplies a vector of two registers by registers, but
// compares it, and chooses in it, lane by lane: such is done to these.
template <class V>
struct Parts {
    using Part = typename Lanes<V>::part;
    static constexpr int count = sizeof(typename Lanes<V>::wide) / sizeof(Part);
    Part of[count];

    static Parts widened(const V &v) { return bit_cast<Parts>(widen_lanes(v)); }
    V narrowed() const { return narrow_lanes<V>(bit_cast<typename Lanes<V>::wide>(*this)); }
};

// Whether a comparison holds in any lane.
template <class Mask>
inline bool any(const Mask &mask) {
    const Mask none{};
    return __builtin_memcmp(&mask, &none, sizeof none) != 0;
}

// The lanes of v, of type T, by an operation on two vectors or two lanes; in a tree: the same bits for the same vector.
template <class T, class V, class Operation>
inline T fold_lanes(const V &v, const Operation &operation) {
    if constexpr (sizeof v == sizeof(T)) {
        return bit_cast<T>(v);
    } else {
        struct Halves {
            typename VectorOf<T, sizeof(V) / 2>::type low, high;
        };
        const auto halves = bit_cast<Halves>(v);
        return fold_lanes<T>(operation(halves.low, halves.high), operation);
    }
}

template <class Wide>
inline double sum_of_doubles(const Wide &v) {
    return fold_lanes<double>(v, [](const auto &a, const auto &b) { return a + b; });
}

template <class V>
inline double sum_of_lanes(const V &v) {
    return sum_of_doubles(widen_lanes(v));
}

// How far the smallest lane and the largest are apart.
template <class V>
inline double spread_of_lanes(const V &v) {
    using T = typename Lanes<V>::scalar;
    return double(fold_lanes<T>(v, [](const auto &a, const auto &b) { return a > b ? a : b; })) -
           double(fold_lanes<T>(v, [](const auto &a, const auto &b) { return a < b ? a : b; }));
}

// exp(x) for |x| <= 87 (float) or 700 (double), to within 2 ulp: x = n·ln 2 + r, Taylor in r.
template <class V>
inline V exp_of(const V &x) {
    using T = typename Lanes<V>::scalar;
    using Bits = typename Lanes<V>::bits;
    constexpr bool single = sizeof(T) == 4;
    constexpr T round_to_integer = single ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^(mantissa bits)
    constexpr T ln2_high = single ? T(0.693145751953125) : T(0.693147180369123816490);
    constexpr T ln2_low = single ? T(1.428606765330187e-06) : T(1.90821492927058770002e-10);
    constexpr int mantissa = single ? 23 : 52;
    constexpr int degree = single ? 7 : 13;

    const V shifted = x * T(1.4426950408889634074) + round_to_integer;
    const V n = shifted - round_to_integer;
    const V r = (x - n * ln2_high) - n * ln2_low;
    V p = splat<V>(1);
    for (int i = degree; i > 0; --i) p = p * r * T(1.0 / i) + T(1);
    const V power = bit_cast<V>(Bits((bit_cast<Bits>(shifted) << mantissa) + bit_cast<Bits>(splat<V>(1))));
    return p * power;
}

// Half-width floats, converted with integer arithmetic: exact, and the same on every machine.
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

#if defined(__AVX512F__)
// To bfloat16, to nearest, ties to even, in four instructions, for which `narrow` takes eight. The lower half of a NaN
// has to be 0, as it is in those that bfloat16 has, that a processor makes of numbers, and that Affine and Gradient
// hold: no carry makes a number of it then.
template <>
struct Rounding<bf16> {
    using Halves = VectorOf<std::uint16_t, vector_bytes / 2>::type;
    __m512i below_half = _mm512_set1_epi32(0x7fff), odd = _mm512_set1_epi32(0x10000), one = _mm512_set1_epi32(1);
    __m512i upper = bit_cast<__m512i>(VectorOf<std::uint16_t>::type{1,  3,  5,  7,  9,  11, 13, 15,
                                                                    17, 19, 21, 23, 25, 27, 29, 31});

    // For long loops, in which GCC would make each constant anew for every vector: of these it does not know the value.
    static Rounding held() {
        Rounding r;
        asm("" : "+v"(r.below_half), "+v"(r.odd), "+v"(r.one), "+v"(r.upper));
        return r;
    }

    Halves operator()(const vfloat &value) const {
        const __m512i bits = bit_cast<__m512i>(value), more = _mm512_add_epi32(bits, below_half);
        const __m512i rounded = _mm512_mask_add_epi32(more, _mm512_test_epi32_mask(bits, odd), more, one);
        struct Two {
            Halves low, high;
        };
        return bit_cast<Two>(_mm512_permutexvar_epi16(upper, rounded)).low;
    }
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

}  // namespace flatwater::FLATWATER_ISA
