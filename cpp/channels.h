// What columns need, computed for many channels at once, in loops that a compiler makes vectors of.
#pragma once

#include "columns.h"

namespace flatwater::FLATWATER_ISA {

// Many channels, one array for each field, in memory of somebody else's: so many values.
class Channels {
  public:
    static index values(index count) { return 4 * count; }
    Channels(index count, double *values) : count_(count), values_(values) {}

    index count() const { return count_; }
    double *mean() const { return values_; }
    double *inv_std() const { return values_ + count_; }
    double *weight() const { return values_ + 2 * count_; }
    double *bias() const { return values_ + 3 * count_; }

    void set(index i, const Channel &channel) const {
        mean()[i] = channel.mean, inv_std()[i] = channel.inv_std;
        weight()[i] = channel.weight, bias()[i] = channel.bias;
    }
    Channel operator[](index c) const { return {mean()[c], inv_std()[c], weight()[c], bias()[c]}; }

  private:
    index count_;
    double *values_;
};

// Each of these fills columns from `first` on.
template <class T>
FLATWATER_ONE_COPY
void set_affine(const Channels &channels, const Columns<T> &columns, index first) {
    T *const shift = columns.field(columns.shift) + first, *const scale = columns.field(columns.scale) + first;
    T *const offset = columns.field(columns.offset) + first;
    for (index c = 0; c < channels.count(); ++c) {
        const auto f = Affine<T>(channels[c]);
        shift[c] = f.shift, scale[c] = f.scale, offset[c] = f.offset;
    }
}

template <class T>
FLATWATER_ONE_COPY
void set_units(const Channels &channels, const Columns<T> &columns, index first) {
    T *const unit = columns.field(columns.unit) + first;
    for (index c = 0; c < channels.count(); ++c) unit[c] = T(unit_of<T>(channels.inv_std()[c]));
}

// The means are those of γ·dz and γ·dz·x̂ over everything that shares the statistics.
template <class T>
FLATWATER_ONE_COPY
void set_gradients(const Channels &channels, const double *mean_dz, const double *mean_dz_xhat,
                   const Columns<T> &columns, index first) {
    T *const unit = columns.field(columns.unit) + first, *const dz_scale = columns.field(columns.dz_scale) + first;
    T *const x_scale = columns.field(columns.x_scale) + first;
    T *const offset = columns.field(columns.dx_offset) + first;
    for (index c = 0; c < channels.count(); ++c) {
        const auto g = Gradient<T>(channels[c], mean_dz[c], mean_dz_xhat[c]);
        unit[c] = g.unit, dz_scale[c] = g.dz_scale, x_scale[c] = g.x_scale, offset[c] = g.offset;
    }
}

// Σdz·x̂ of each channel from Σdz and Σdz·(x - shift)·unit, in place.
template <class T>
FLATWATER_ONE_COPY
void complete_sums(const Channels &channels, const double *dz, double *dz_xhat) {
    for (index c = 0; c < channels.count(); ++c)
        dz_xhat[c] = GradientSums::from_shifted<T>({dz[c], dz_xhat[c]}, channels[c]).dz_xhat;
}

}  // namespace flatwater::FLATWATER_ISA
