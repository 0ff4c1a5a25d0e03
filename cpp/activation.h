// The fused activations and their derivatives. At a kink the derivative is the one that Paddle
// takes: relu'(0) = 0, relu6' = 1 strictly inside (0, 6), leaky_relu' = 1 for z >= 0,
// hardswish' = 0 for z <= -3 and 1 for z >= 3. NaN stays NaN, so every comparison is written
// such that it is false for NaN where the value is kept.
#pragma once

#include "simd.h"

namespace flatwater::FLATWATER_ISA {

constexpr double leaky_slope = 0.01;

// For backward loops that know y = act(z) instead of z, where act' follows from it. As far as y differs from z only by
// the rounding to the elements' dtype, it is as rounded that it is compared with a kink.
constexpr Activation relu_of_y{16}, relu6_of_y{17}, leaky_relu_of_y{18};
template <Activation A>
constexpr bool is_of_y = A == relu_of_y || A == relu6_of_y || A == leaky_relu_of_y;

// Which of them stands for this activation; itself if none does.
inline Activation of_y(Activation a) {
    if (a == Activation::relu) return relu_of_y;
    if (a == Activation::relu6) return relu6_of_y;
    return a == Activation::leaky_relu ? leaky_relu_of_y : a;
}

// Calls loop<A>() for an activation. Norms choose here, for the blocks that they have worked on, so that only the loops
// over elements are compiled for each.
template <class Loop>
inline void for_activation(Activation a, const Loop &loop) {
    switch (a) {
        case Activation::none: return loop.template operator()<Activation::none>();
        case Activation::relu: return loop.template operator()<Activation::relu>();
        case Activation::relu6: return loop.template operator()<Activation::relu6>();
        case Activation::leaky_relu: return loop.template operator()<Activation::leaky_relu>();
        case Activation::hardswish: return loop.template operator()<Activation::hardswish>();
        case Activation::swish: return loop.template operator()<Activation::swish>();
    }
}
// The same where its derivative is needed.
template <class Loop>
inline void for_gradient(Activation a, const Loop &loop) {
    if (a == relu_of_y) return loop.template operator()<relu_of_y>();
    if (a == relu6_of_y) return loop.template operator()<relu6_of_y>();
    if (a == leaky_relu_of_y) return loop.template operator()<leaky_relu_of_y>();
    for_activation(a, loop);
}

template <class V>
inline V sigmoid(const V &z) {
    using T = typename Lanes<V>::scalar;
    const V limit = splat<V>(sizeof(T) == 4 ? T(87) : T(700));
    const V inside = z > limit ? limit : (z < -limit ? -limit : z);
    return T(1) / (T(1) + exp_of<V>(-inside));
}

template <Activation A, class V>
inline V activate(const V &z) {
    using T = typename Lanes<V>::scalar;
    const V zero = splat<V>(0);
    if constexpr (A == Activation::relu) return z < zero ? zero : z;
    if constexpr (A == Activation::relu6) {
        const V six = splat<V>(6);
        return z < zero ? zero : (z > six ? six : z);
    }
    if constexpr (A == Activation::leaky_relu) return z < zero ? V(z * T(leaky_slope)) : V(z + zero);  // -0 becomes 0
    if constexpr (A == Activation::hardswish) {
        const V gate = z + T(3), six = splat<V>(6);
        return z * (gate < zero ? zero : (gate > six ? six : gate)) * T(1.0 / 6);
    }
    if constexpr (A == Activation::swish) return z * sigmoid<V>(z);
    return z;
}

// dz = dy · act'(z); for the loops that know y, z is y.
template <Activation A, class V>
inline V activation_gradient(const V &z, const V &dy) {
    using T = typename Lanes<V>::scalar;
    const V zero = splat<V>(0);
    if constexpr (A == Activation::relu) return z > zero ? dy : zero;
    if constexpr (A == Activation::relu6) return z > zero ? (z < splat<V>(6) ? dy : zero) : zero;
    if constexpr (A == Activation::leaky_relu) return z >= zero ? dy : V(dy * T(leaky_slope));
    if constexpr (A == Activation::hardswish) {
        const V three = splat<V>(3), middle = dy * (z * T(1.0 / 3) + T(0.5));
        return z <= -three ? zero : (z >= three ? dy : middle);
    }
    if constexpr (A == Activation::swish) {
        const V s = sigmoid<V>(z);
        return dy * (s + z * s * (T(1) - s));
    }
    if constexpr (A == relu_of_y) return activation_gradient<Activation::relu, V>(z, dy);
    if constexpr (A == relu6_of_y) return activation_gradient<Activation::relu6, V>(z, dy);
    if constexpr (A == leaky_relu_of_y) {
        // The sign is all that is left of a z so small that 0.01·z has become -0.
        using Bits = typename Lanes<V>::bits;
        const auto positive = Bits(z >= zero) & Bits(bit_cast<Bits>(z) >= Bits{});
        return positive ? dy : V(dy * T(leaky_slope));
    }
    return dy;
}

}  // namespace flatwater::FLATWATER_ISA
