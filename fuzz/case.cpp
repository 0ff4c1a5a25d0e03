#include "case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace flatwater::fuzz {
namespace {

constexpr std::size_t guard_bytes = 256;
constexpr std::byte guard_value{0xa5};

std::size_t width(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

double from_half(std::uint16_t bits) {
    const double sign = bits & 0x8000 ? -1 : 1, fraction = bits & 0x3ff;
    const int exponent = bits >> 10 & 31;
    if (exponent == 31) return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
    return sign * (exponent ? std::ldexp(fraction + 1024, exponent - 25) : std::ldexp(fraction, -24));
}

std::uint16_t to_half(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return 0x7e00;
    const std::uint16_t sign = bits >> 16 & 0x8000;
    if (std::abs(value) < 0x1p-14f) return sign;
    return sign | std::uint16_t(std::min<std::uint32_t>((bits >> 13 & 0x3ffff) - (112 << 10), 0x7bff));
}

double activate(Activation activation, double z) {
    switch (activation) {
        case Activation::none: return z;
        case Activation::relu: return std::max(z, 0.0);
        case Activation::relu6: return std::clamp(z, 0.0, 6.0);
        case Activation::leaky_relu: return z > 0 ? z : 0.01 * z;
        case Activation::hardswish: return z * std::clamp(z + 3, 0.0, 6.0) / 6;
        case Activation::swish: return z / (1 + std::exp(-z));
    }
    return z;
}

double slope(Activation activation, double z) {
    switch (activation) {
        case Activation::none: return 1;
        case Activation::relu: return z > 0;
        case Activation::relu6: return z > 0 && z < 6;
        case Activation::leaky_relu: return z >= 0 ? 1 : 0.01;
        case Activation::hardswish: return z <= -3 ? 0 : z >= 3 ? 1 : z / 3 + 0.5;
        case Activation::swish: {
            const double s = 1 / (1 + std::exp(-z));
            return s + z * s * (1 - s);
        }
    }
    return 1;
}

}  // namespace

double kink_distance(Activation activation, double z) {
    switch (activation) {
        case Activation::relu:
        case Activation::leaky_relu: return std::abs(z);
        case Activation::relu6: return std::min(std::abs(z), std::abs(z - 6));
        case Activation::hardswish: return std::min(std::abs(z + 3), std::abs(z - 3));
        default: return std::numeric_limits<double>::infinity();
    }
}

Memory::Memory(DType dtype, index elements, index offset) : dtype_(dtype), size_(elements) {
    const std::size_t used = std::size_t(elements) * width(dtype), room = std::size_t(offset) * width(dtype);
    bytes_.resize(2 * guard_bytes + 64 + room + used, guard_value);
    begin_ = guard_bytes + -(reinterpret_cast<std::uintptr_t>(bytes_.data()) + guard_bytes) % 64 + room;
    end_ = begin_ + used;
    for (index i = 0; i < elements; ++i) put(i, std::nan(""));
    guard(true);
}

Memory::~Memory() { guard(false); }

void Memory::guard([[maybe_unused]] bool closed) {
#ifdef __SANITIZE_ADDRESS__
    if (closed) {
        __asan_poison_memory_region(bytes_.data(), begin_);
        __asan_poison_memory_region(bytes_.data() + end_, bytes_.size() - end_);
    } else {
        __asan_unpoison_memory_region(bytes_.data(), bytes_.size());
    }
#endif
}

bool Memory::guards_are_whole() {
    guard(false);
    const auto is_whole = [](std::byte value) { return value == guard_value; };
    const auto begin = bytes_.begin() + std::ptrdiff_t(begin_), end = bytes_.begin() + std::ptrdiff_t(end_);
    const bool whole = std::all_of(bytes_.begin(), begin, is_whole) && std::all_of(end, bytes_.end(), is_whole);
    guard(true);
    return whole;
}

bool Memory::operator==(const Memory &other) const {
    return size_ == other.size_ &&
           std::memcmp(bytes_.data() + begin_, other.bytes_.data() + other.begin_, end_ - begin_) == 0;
}

double Memory::get(index i) const {
    const std::byte *const from = bytes_.data() + begin_ + std::size_t(i) * width(dtype_);
    if (width(dtype_) == 2) {
        std::uint16_t half;
        std::memcpy(&half, from, 2);
        if (dtype_ == DType::f16) return from_half(half);
        const std::uint32_t bits = std::uint32_t(half) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    float single;
    double value;
    if (dtype_ == DType::f64) return std::memcpy(&value, from, 8), value;
    return std::memcpy(&single, from, 4), single;
}

void Memory::put(index i, double value) {
    std::byte *const to = bytes_.data() + begin_ + std::size_t(i) * width(dtype_);
    const float single = float(value);
    std::uint32_t bits;
    std::memcpy(&bits, &single, 4);
    const std::uint16_t half = dtype_ == DType::f16 ? to_half(single) : std::uint16_t(bits >> 16);
    const void *const from = width(dtype_) == 2   ? static_cast<const void *>(&half)
                             : width(dtype_) == 4 ? static_cast<const void *>(&single)
                                                  : &value;
    std::memcpy(to, from, width(dtype_));
}

Case::Case(Choices &choices) {
    // Around the widths of vectors, of tiles (512 columns) and of blocks (4096 elements), primes, and none.
    static constexpr index sizes[] = {1,   1,   1,   2,   2,    3,    3,    4,    5,    7,    8,   9,
                                      12,  13,  15,  16,  17,   19,   23,   31,   32,   33,   49,  61,
                                      64,  67,  71,  127, 128,  131,  196,  251,  255,  256,  257, 300,
                                      509, 512, 520, 784, 1009, 2048, 4093, 4096, 4999, 9001, 0};
    const auto size = [&] { return sizes[choices.below(std::size(sizes))]; };
    dtype = DType(choices.below(4));
    activation = Activation(choices.below(6));
    shape = {size(), size(), size(), choices.flip()};
    while (shape.elements() > 1 << 15) {
        index &largest = std::max({std::ref(shape.outer), std::ref(shape.channels), std::ref(shape.inner)}).get();
        largest = (largest + 1) / 2;
    }
    residual = choices.flip(), weight = choices.flip(), bias = choices.flip();
    want_dx = choices.below(4) != 0, want_dresidual = choices.flip();
    threads = 1 + choices.below(5), offset = choices.below(64);
    center = choices.flip() ? 0 : 30;
    groups = 0;
    if (choices.flip() && shape.channels)
        for (groups = 1 + choices.below(shape.channels); shape.channels % groups;) --groups;
    frozen = !groups && choices.below(4) == 0;
    by_output = choices.flip() && (activation == Activation::relu || activation == Activation::relu6 ||
                                   activation == Activation::leaky_relu);
    seed = 0;
    for (int i = 0; i < 4; ++i) seed = seed << 8 | choices.byte();
    // Rarely, for it takes long: more than the 16 MiB from which results are written past the caches.
    if (choices.byte() == 255) {
        dtype = DType(choices.below(2));
        const index columns = 1 + choices.below(70), rows = (index(17) << 20) / (dtype == DType::f64 ? 8 : 4) / columns;
        shape = choices.flip() ? Shape{2, columns, rows / 2, choices.flip()} : Shape{rows / 64 + 1, columns, 64, false};
        groups = groups ? 1 : 0;
    }
}

std::string Case::describe() const {
    static constexpr const char *dtypes[] = {"float32", "float64", "bfloat16", "float16"};
    static constexpr const char *names[] = {"none", "relu", "relu6", "leaky_relu", "hardswish", "swish"};
    std::string text = std::string(dtypes[int(dtype)]) + " (" + std::to_string(shape.outer) + ", " +
                       std::to_string(shape.channels) + ", " + std::to_string(shape.inner) + ")";
    text += shape.channels_last ? " channels-last" : "";
    text += groups ? " group norm of " + std::to_string(groups) : " batch norm";
    text += std::string(", ") + names[int(activation)] + (residual ? ", residual" : "") + (weight ? ", weight" : "");
    text += std::string(bias ? ", bias" : "") + (frozen ? ", frozen" : "") + (want_dx ? ", dx" : "");
    text += std::string(want_dresidual ? ", dresidual" : "") + (by_output ? ", by output" : "");
    text += center != 0 ? ", off center" : "";
    return text + ", " + std::to_string(threads) + " threads, offset " + std::to_string(offset);
}

Expected::Expected(const Case &of, const Inputs &in, double epsilon)
    : mean(of.sets()), m2(of.sets()), inv_std(of.sets()), y(in.x.size()), dz(in.x.size()), dx(in.x.size()) {
    for (Doubles *each : {&sum_dz, &sum_dz_xhat, &z_size, &dz_size, &dx_size, &sum_dz_size, &sum_dz_xhat_size})
        each->resize(of.shape.channels);
    const double count = double(of.count());
    of.each([&](index i, index, index set) { mean[set] += in.x[i] / count; });
    of.each([&](index i, index, index set) { m2[set] += (in.x[i] - mean[set]) * (in.x[i] - mean[set]); });
    for (index set = 0; set < of.sets(); ++set) {
        inv_std[set] = 1 / std::sqrt(m2[set] / count + epsilon);
        if (of.frozen) mean[set] += 0.25, inv_std[set] *= 0.75;
    }

    Doubles x_hat(in.x.size()), z(in.x.size()), largest_x_hat(of.shape.channels);
    of.each([&](index i, index c, index set) {
        x_hat[i] = (in.x[i] - mean[set]) * inv_std[set];
        const double plain = in.weight[c] * x_hat[i];
        z[i] = plain + in.bias[c] + in.residual[i];
        y[i] = activate(of.activation, z[i]);
        z_size[c] = std::max(z_size[c], std::abs(plain) + std::abs(in.bias[c]) + std::abs(in.residual[i]));
        largest_x_hat[c] = std::max(largest_x_hat[c], std::abs(x_hat[i]));
    });

    // act' depends on z where it is smooth, and may be nearly 0: then the error of z is all that there is.
    const bool smooth = of.activation == Activation::hardswish || of.activation == Activation::swish;
    Doubles mean_dz(of.sets()), mean_dz_xhat(of.sets());
    double largest_dz = 0, largest_weight = 0;
    of.each([&](index i, index c, index set) {
        dz[i] = in.dy[i] * slope(of.activation, z[i]);
        const double size = smooth ? std::abs(in.dy[i]) * (1 + z_size[c]) : std::abs(dz[i]);
        sum_dz[c] += dz[i], sum_dz_xhat[c] += dz[i] * x_hat[i];
        mean_dz[set] += in.weight[c] * dz[i] / count;
        mean_dz_xhat[set] += in.weight[c] * dz[i] * x_hat[i] / count;
        sum_dz_size[c] += size, sum_dz_xhat_size[c] += size * (1 + largest_x_hat[c]);
        dz_size[c] = std::max(dz_size[c], size);
        largest_dz = std::max(largest_dz, size), largest_weight = std::max(largest_weight, std::abs(in.weight[c]));
    });
    of.each([&](index i, index c, index set) {
        const double means = of.frozen ? 0 : mean_dz[set] + x_hat[i] * mean_dz_xhat[set];
        dx[i] = inv_std[set] * (in.weight[c] * dz[i] - means);
        // A group mixes channels, so the largest |γ| and |dz| count for all of it.
        const double size = of.groups ? largest_weight * largest_dz : std::abs(in.weight[c]) * dz_size[c];
        dx_size[c] = std::max(dx_size[c], inv_std[set] * size * (1 + largest_x_hat[c]));
    });
}

}  // namespace flatwater::fuzz
