// From statistics to the few numbers per channel that a loop over elements needs. Where products are added to something,
// it is one product: of two, a compiler may fuse either, and not the same one in every copy that it makes by inlining.
#pragma once

#include "simd.h"

namespace flatwater::FLATWATER_ISA {

// Statistics of one channel, over which the elements of a block are normalized.
struct Channel {
    double mean, inv_std, weight, bias;
};

// A coefficient as loops over elements take it. NaN becomes one whose lower half is 0 (Rounding), whatever a user has.
template <class T>
inline T coefficient(double value) {
    return T(value == value ? value : __builtin_nan(""));
}

// z = (x - shift)·scale + offset. The mean is split: `shift` is its value in the precision of the
// elements, so that x - shift is exact where it matters, and the rest of it goes into `offset`. All of it goes there
// if it is less than a sixteenth of a deviation: to subtract it from every element would cost a rounding, and save
// little.
template <class T>
struct Affine {
    T shift, scale, offset;

    Affine() = default;
    explicit Affine(const Channel &channel)
        : shift(shift_of(channel)),
          scale(coefficient<T>(channel.inv_std * channel.weight)),
          offset(coefficient<T>(channel.bias - rest(channel) * channel.inv_std * channel.weight)) {}

    static T shift_of(const Channel &channel) {
        return coefficient<T>(__builtin_fabs(channel.mean * channel.inv_std) < 1.0 / 16 ? 0 : channel.mean);
    }
    static double rest(const Channel &channel) { return channel.mean - double(shift_of(channel)); }
};

// The power of two next below inv_std. Loops over elements take (x - shift)·unit for x̂, which neither overflows nor
// vanishes however far apart the values of a channel are, and costs no rounding; what is missing is put right here.
template <class T>
inline double unit_of(double inv_std) {
    constexpr double least = sizeof(T) == sizeof(float) ? 0x1p-126 : 0x1p-1022;
    constexpr double most = sizeof(T) == sizeof(float) ? 0x1p127 : 0x1p1023;
    const double power = bit_cast<double>(bit_cast<std::uint64_t>(inv_std) & (std::uint64_t(0x7ff) << 52));
    return power < least ? least : power > most ? most : power;
}

// Σdz and Σdz·x̂ of one channel.
struct GradientSums {
    double dz = 0, dz_xhat = 0;

    void add(const GradientSums &other) {
        dz += other.dz;
        dz_xhat += other.dz_xhat;
    }

    template <class T>
    static GradientSums from_shifted(const GradientSums &sums, const Channel &channel) {
        const double unit = unit_of<T>(channel.inv_std), rest = Affine<T>::rest(channel);
        return {sums.dz, channel.inv_std / unit * (sums.dz_xhat - rest * unit * sums.dz)};
    }
};

// dx = dz·dz_scale + (x - shift)·unit·x_scale + offset, which is
//     dx = inv_std·(γ·dz - mean(γ·dz) - x̂·mean(γ·dz·x̂))
// with the means over everything that shares the statistics. Constant statistics: both means 0.
template <class T>
struct Gradient {
    T unit, dz_scale, x_scale, offset;

    Gradient() = default;
    Gradient(const Channel &channel, double mean_dz, double mean_dz_xhat)
        : Gradient(channel, unit_of<T>(channel.inv_std), mean_dz, mean_dz_xhat) {}

  private:
    Gradient(const Channel &channel, double unit, double mean_dz, double mean_dz_xhat)
        : unit(T(unit)),
          dz_scale(coefficient<T>(channel.inv_std * channel.weight)),
          x_scale(coefficient<T>(-channel.inv_std * mean_dz_xhat * (channel.inv_std / unit))),
          offset(coefficient<T>(channel.inv_std *
                   (Affine<T>::rest(channel) * channel.inv_std * mean_dz_xhat - mean_dz))) {}
};

// How mean and m2 = Σ(x - mean)² of two sets of so many values become those of their union (Chan, Golub, LeVeque
// 1983). V: double, or a vector of them, for as many pairs of sets.
struct Union {
    double share, between;

    Union(index count, index added)
        : share(double(added) / double(count + added)),
          between(double(count) * double(added) / double(count + added)) {}

    template <class V>
    void add(V &mean, V &m2, const V &added_mean, const V &added_m2) const {
        const V delta = added_mean - mean;
        // An infinite mean stays infinite, as a sum would have it, instead of becoming ∞ - ∞.
        mean = delta - delta == 0.0 ? mean + delta * share : mean + added_mean;
        m2 += added_m2 + delta * delta * between;
    }
};

// Mean and m2 of a set of values.
struct Moments {
    index count = 0;
    double mean = 0, m2 = 0;

    FLATWATER_ONE_COPY
    void add(const Moments &other) {
        if (other.count == 0) return;
        if (count == 0) {
            *this = other;
            return;
        }
        Union(count, other.count).add(mean, m2, other.mean, other.m2);
        count += other.count;
    }

    // Of n values, from the sums of their deviations from a pivot, and of the squares of those.
    static Moments of_deviations(index n, double pivot, double sum, double squares) {
        const double m2 = squares - sum * sum / double(n);
        return {n, pivot + sum / double(n), m2 < 0 ? 0 : m2};
    }

    // Of n sets of `size` values each, `step` apart: as adding them one by one, without a division for each.
    static Moments of_equal_sets(const double *means, const double *m2s, index n, index step, index size) {
        double sum = 0, within = 0, between = 0;
        for (index i = 0; i < n * step; i += step) sum += means[i], within += m2s[i];
        const double mean = sum / double(n);
        for (index i = 0; i < n * step; i += step) between += (means[i] - mean) * (means[i] - mean);
        return {n * size, mean, within + double(size) * between};
    }

    // Adds one more set of `added` values to each of many channels, which have `before` so far.
    FLATWATER_ONE_COPY
    static void add_to_all(double *__restrict means, double *__restrict m2s, index before,
                           const double *__restrict added_means, const double *__restrict added_m2s, index added,
                           index channels) {
        if (before == 0) {
            for (index c = 0; c < channels; ++c) means[c] = added_means[c], m2s[c] = added_m2s[c];
            return;
        }
        const Union both(before, added);
        for (index c = 0; c < channels; ++c) both.add(means[c], m2s[c], added_means[c], added_m2s[c]);
    }

    static bool finite(double value) { return value - value == 0; }
};

// The mean square of deviations below which some may have been lost below float's numbers.
constexpr double least_square = 1e-28;

// Whether squares of deviations, summed in T, were neither lost below its numbers nor beyond them. Those of a constant
// are all 0, and so may those be that were lost: it takes a look at the values themselves.
template <class T, class IsConstant>
inline bool squares_are_exact(double squares, index count, const IsConstant &is_constant) {
    if (sizeof(T) == sizeof(double)) return true;
    return squares == 0 ? is_constant() : squares > least_square * double(count) && Moments::finite(squares);
}

inline double inverse_deviation(double m2, index count, double epsilon) {
    return 1 / __builtin_sqrt(m2 / double(count) + epsilon);
}

}  // namespace flatwater::FLATWATER_ISA
