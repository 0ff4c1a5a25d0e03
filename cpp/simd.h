// Vectors of the width this file is compiled for, and what is done to them.
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

}  // namespace flatwater::FLATWATER_ISA
