#include "problem.h"

namespace flatwater {

template <class T>
void update_running(T *running_mean, T *running_variance, const double *mean, const double *m2, index channels,
                    index count, double momentum, bool unbiased) {
    if (count == 0) return;
    const double divisor = unbiased && count > 1 ? double(count - 1) : double(count);
    for (index c = 0; c < channels; ++c) {
        running_mean[c] = T(momentum * running_mean[c] + (1 - momentum) * mean[c]);
        running_variance[c] = T(momentum * running_variance[c] + (1 - momentum) * (m2[c] / divisor));
    }
}

template void update_running(float *, float *, const double *, const double *, index, index, double, bool);
template void update_running(double *, double *, const double *, const double *, index, index, double, bool);

}  // namespace flatwater
