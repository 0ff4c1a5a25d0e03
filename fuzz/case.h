// A random call: what it asks for, the memory it gets, and what should come out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../cpp/problem.h"

namespace flatwater::fuzz {

// What a fuzzer hands over, read as small numbers; all zeros when it has been used up.
class Choices {
  public:
    Choices(const std::uint8_t *data, std::size_t size) : at_(data), end_(data + size) {}
    std::uint8_t byte() { return at_ == end_ ? 0 : *at_++; }
    index below(index n) { return byte() % n; }
    bool flip() { return byte() & 1; }

  private:
    const std::uint8_t *at_, *end_;
};

// Elements of a dtype between two guards, `offset` elements behind a 64-byte boundary: at any alignment that an
// element may have. AddressSanitizer is told of the guards; without it, what is written there is found by check().
class Memory {
  public:
    Memory(DType dtype, index elements, index offset);
    ~Memory();
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;

    template <class T = void>
    T *data() {
        return reinterpret_cast<T *>(bytes_.data() + begin_);
    }
    double get(index i) const;
    void put(index i, double value);  // rounded towards zero
    index size() const { return size_; }
    bool guards_are_whole();
    bool operator==(const Memory &other) const;  // in every bit

  private:
    DType dtype_;
    index size_;
    std::vector<std::byte> bytes_;
    std::size_t begin_, end_;
    void guard(bool closed);
};

struct Case {
    DType dtype;
    Shape shape;
    Activation activation;
    index groups;  // 0: batch norm
    bool residual, weight, bias, frozen, want_dx, want_dresidual, by_output;  // by_output: act' is taken from y
    index threads, offset;
    double center;
    std::uint64_t seed;

    explicit Case(Choices &choices);
    std::string describe() const;
    index sets() const { return groups ? shape.outer * groups : shape.channels; }
    index count() const { return groups ? shape.channels / groups * shape.inner : shape.outer * shape.inner; }

    // Calls body(element, channel, set of statistics) for every element, in the order of samples and channels.
    template <class Body>
    void each(const Body &body) const {
        for (index n = 0; n < shape.outer; ++n)
            for (index c = 0; c < shape.channels; ++c)
                for (index l = 0; l < shape.inner; ++l) {
                    const index row = shape.channels_last ? n * shape.inner + l : n * shape.channels + c;
                    const index i = shape.channels_last ? row * shape.channels + c : row * shape.inner + l;
                    body(i, c, groups ? n * groups + c / (shape.channels / groups) : c);
                }
    }
};

using Doubles = std::vector<double>;

// What goes into the calls, in double; the tensors as their dtype has rounded them.
struct Inputs {
    Doubles x, dy, residual, weight, bias;
};

// The formulas of problem.h in double, and per channel the size of what each result is a sum of: what an error is
// measured against. `mean` and `inv_std` are those of the batch, or the constants that the case is frozen with.
struct Expected {
    Doubles mean, m2, inv_std, y, dz, dx, sum_dz, sum_dz_xhat;
    Doubles z_size, dz_size, dx_size, sum_dz_size, sum_dz_xhat_size;

    Expected(const Case &of, const Inputs &in, double epsilon);
};

// z's distance from a kink of the activation; infinite without one.
double kink_distance(Activation activation, double z);

}  // namespace flatwater::fuzz
