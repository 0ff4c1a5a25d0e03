// From statistics to the few numbers per channel that a loop over elements needs.
#pragma once

#include "simd.h"

namespace flatwater::FLATWATER_ISA {

// Statistics of one channel, over which the elements of a block are normalized.
struct Channel {
    double mean, inv_std, weight, bias;
};

// z = (x - shift)·scale + offset. The mean is split: `shift` is its value in the precision of the
// elements, so that x - shift is exact where it matters, and the rest of it goes into `offset`.
template <class T>
struct Affine {
    T shift, scale, offset;

    FLATWATER_ONE_COPY
    explicit Affine(const Channel &channel)
        : shift(T(channel.mean)),
          scale(T(channel.inv_std * channel.weight)),
          offset(T(channel.bias - rest(channel) * channel.inv_std * channel.weight)) {}

    static double rest(const Channel &channel) { return channel.mean - double(T(channel.mean)); }
};

// Σdz and Σdz·x̂ of one channel, from Σdz and Σdz·(x - shift).
struct GradientSums {
    double dz = 0, dz_xhat = 0;

    template <class T>
    FLATWATER_ONE_COPY
    static GradientSums from_shifted(double dz, double dz_shifted, const Channel &channel) {
        return {dz, channel.inv_std * (dz_shifted - Affine<T>::rest(channel) * dz)};
    }
};

// dx = dz·dz_scale + (x - shift)·x_scale + offset, which is
//     dx = inv_std·(γ·dz - mean(γ·dz) - x̂·mean(γ·dz·x̂))
// with the means over everything that shares the statistics. Constant statistics: both means 0.
template <class T>
struct Gradient {
    T dz_scale, x_scale, offset;

    FLATWATER_ONE_COPY
    Gradient(const Channel &channel, double mean_dz, double mean_dz_xhat) {
        const double slope = -channel.inv_std * channel.inv_std * mean_dz_xhat;
        dz_scale = T(channel.inv_std * channel.weight);
        x_scale = T(slope);
        offset = T(-channel.inv_std * mean_dz - slope * Affine<T>::rest(channel));
    }
};

// Mean and m2 = Σ(x - mean)² of a set of values; two sets combine exactly (Chan, Golub, LeVeque 1983).
struct Moments {
    index count = 0;
    double mean = 0, m2 = 0;

    void add(const Moments &other) {
        if (other.count == 0) return;
        const double total = double(count + other.count), delta = other.mean - mean;
        if (count == 0) {
            *this = other;
            return;
        }
        // An infinite mean stays infinite, as a sum would have it, instead of becoming ∞ - ∞.
        mean = finite(delta) ? mean + delta * (double(other.count) / total) : mean + other.mean;
        m2 += other.m2 + delta * delta * (double(count) * double(other.count) / total);
        count += other.count;
    }

    // Of n sets of `size` values each: as adding them one by one, without a division for each.
    static Moments of_equal_sets(const double *means, const double *m2s, index n, index size) {
        double sum = 0, within = 0, between = 0;
        for (index i = 0; i < n; ++i) sum += means[i], within += m2s[i];
        const double mean = sum / double(n);
        for (index i = 0; i < n; ++i) between += (means[i] - mean) * (means[i] - mean);
        return {n * size, mean, within + double(size) * between};
    }

    static bool finite(double value) { return value - value == 0; }
};

FLATWATER_ONE_COPY
inline double inverse_deviation(double m2, index count, double epsilon) {
    return 1 / __builtin_sqrt(m2 / double(count) + epsilon);
}

}  // namespace flatwater::FLATWATER_ISA
