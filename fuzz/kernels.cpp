// Random calls of every kernel against the formulas in double: see case.h.
//
// Under libFuzzer (clang) the input is a string of choices. By itself,
//     fuzz_kernels [CALLS [SEED]]
// makes the same calls each time, each from its own seed, which a failure names: fuzz_kernels 1 THAT_SEED.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>

#include "../cpp/team.h"
#include "case.h"

namespace flatwater::fuzz {
namespace {

constexpr double epsilon = 1e-5;

// How far a result may be from the formula: rounding · |result| + arithmetic · what it is a sum of, as in the tests
// (tests/kernels/kernel_harness.py): half a unit in the last place, as a result is stored once, and 64 roundings
// of the precision that is computed with, which is float32 for the half-width dtypes.
struct Tolerance {
    double rounding, arithmetic, smallest;
};
constexpr Tolerance tolerances[] = {{0x1p-24 * 1.01, 4e-6, 0x1p-149},
                                    {0x1p-53 * 1.01, 1e-12, 0},
                                    {0x1p-8 * 1.01, 4e-6, 0x1p-133},
                                    {0x1p-11 * 1.01, 4e-6, 0x1p-24}};

// What one run of the calls has filled.
struct Results {
    Memory y, dx, dresidual, mean, m2, inv_std, sum_dz, sum_dz_xhat;

    explicit Results(const Case &c)
        : y(c.dtype, c.shape.elements(), c.offset),
          dx(c.dtype, c.shape.elements(), c.offset * 3 % 64),
          dresidual(c.dtype, c.shape.elements(), c.offset * 5 % 64),
          mean(DType::f64, c.sets(), 0),
          m2(DType::f64, c.sets(), 0),
          inv_std(DType::f64, c.sets(), 0),
          sum_dz(DType::f64, c.shape.channels, 0),
          sum_dz_xhat(DType::f64, c.shape.channels, 0) {}
};

class Run {
  public:
    Run(const Case &of, const Isa &isa)
        : case_(of),
          isa_(isa),
          kernels_(isa.of(of.dtype)),
          x_(of.dtype, of.shape.elements(), of.offset * 7 % 64),
          dy_(of.dtype, of.shape.elements(), of.offset * 11 % 64),
          residual_(of.dtype, of.shape.elements(), of.offset * 13 % 64) {}

    void check() {
        const Expected expected = fill();
        Results alone(case_), together(case_), halves(case_);
        call(alone, expected, 1, false);
        call(together, expected, case_.threads, false);
        call(halves, expected, case_.threads, true);
        compare(alone, expected);
        for (Results *each : {&alone, &together, &halves}) check_guards(*each);
        for (Memory *each : {&x_, &dy_, &residual_})
            if (!each->guards_are_whole()) fail("an input", "written around it");
        if (doubles(x_) != in_.x || doubles(dy_) != in_.dy || doubles(residual_) != in_.residual)
            fail("an input", "written to");
        for (Results *other : {&together, &halves}) {
            const char *const what = other == &together ? "another number of threads" : "halves";
            if (!(other->y == alone.y && other->dx == alone.dx && other->dresidual == alone.dresidual &&
                  other->mean == alone.mean && other->m2 == alone.m2 && other->inv_std == alone.inv_std &&
                  other->sum_dz == alone.sum_dz && other->sum_dz_xhat == alone.sum_dz_xhat))
                fail(what, "not the same bits");
        }
    }

  private:
    const Case &case_;
    const Isa &isa_;
    const Kernels &kernels_;
    Memory x_, dy_, residual_;
    Inputs in_;

    [[noreturn]] void fail(const char *what, const std::string &why) const {
        throw std::runtime_error(std::string(isa_.name) + ": " + case_.describe() + ": " + what + ": " + why);
    }

    void check_guards(Results &of) const {
        for (Memory *each : {&of.y, &of.dx, &of.dresidual, &of.mean, &of.m2, &of.inv_std, &of.sum_dz, &of.sum_dz_xhat})
            if (!each->guards_are_whole()) fail("an output", "written around it");
    }

    static Doubles doubles(const Memory &memory) {
        Doubles values(std::size_t(memory.size()));
        for (index i = 0; i < memory.size(); ++i) values[std::size_t(i)] = memory.get(i);
        return values;
    }

    // Random inputs. Where z lies within rounding of a kink, dy is 0: which side the kernel sees is left to it. Seen in
    // y, that is as y is stored.
    Expected fill() {
        std::minstd_rand random(std::uint_fast32_t(case_.seed));
        const auto uniform = [&](double low, double high) {
            return std::uniform_real_distribution<double>(low, high)(random);
        };
        for (index i = 0; i < x_.size(); ++i) {
            x_.put(i, case_.center + uniform(-3, 3));
            dy_.put(i, uniform(-2, 2));
            residual_.put(i, case_.residual ? uniform(-2, 2) : 0);
        }
        in_ = {doubles(x_), doubles(dy_), doubles(residual_), {}, {}};
        for (index c = 0; c < case_.shape.channels; ++c) {
            in_.weight.push_back(case_.weight ? uniform(0.5, 3) : 1);
            in_.bias.push_back(case_.bias ? uniform(-1, 1) : 0);
        }
        Case plain = case_;
        plain.activation = Activation::none;
        const Expected before(plain, in_, epsilon);
        case_.each([&](index i, index c, index) {
            const Tolerance &allowed = tolerances[int(case_.dtype)];
            const double stored = case_.by_output ? allowed.rounding * std::abs(before.y[i]) + allowed.smallest : 0;
            const double reach = 16 * allowed.arithmetic * before.z_size[c] + stored;
            if (kink_distance(case_.activation, before.y[i]) <= reach) dy_.put(i, 0), in_.dy[i] = 0;
        });
        return Expected(case_, in_, epsilon);
    }

    void call(Results &to, const Expected &expected, index team, bool halves) {
        set_threads(team);
        Problem p{};
        p.dtype = case_.dtype, p.shape = case_.shape, p.activation = case_.activation;
        p.groups = case_.groups ? case_.groups : case_.shape.channels;
        p.epsilon = epsilon;
        p.x = x_.data(), p.y = to.y.data();
        if (case_.residual) p.residual = residual_.data();
        if (case_.weight) p.weight = in_.weight.data();
        if (case_.bias) p.bias = in_.bias.data();
        p.mean = to.mean.data<double>(), p.m2 = to.m2.data<double>(), p.inv_std = to.inv_std.data<double>();
        p.sum_dz = to.sum_dz.data<double>(), p.sum_dz_xhat = to.sum_dz_xhat.data<double>();
        forward(p, expected, halves);

        // The residual that was added is not read where y is.
        if (case_.by_output)
            p.residual = nullptr;
        else
            p.y = nullptr;
        p.dy = dy_.data();
        if (case_.want_dx) p.dx = to.dx.data();
        if (case_.want_dresidual) p.dresidual = to.dresidual.data();
        p.count = case_.frozen ? 0 : case_.count();
        if (case_.groups) return kernels_.group_norm_backward(p);
        if (!halves) return kernels_.batch_norm_backward(p);
        Problem sums = p;
        sums.dx = sums.dresidual = nullptr;
        kernels_.batch_gradient_sums(sums);
        if (p.dx || p.dresidual) kernels_.batch_input_gradient(p);
    }

    // The statistics that are constants are in `mean` and `inv_std` before the call; the others are afterwards.
    void forward(const Problem &p, const Expected &expected, bool halves) const {
        if (case_.frozen) {
            kernels_.batch_statistics(p);
            std::copy(expected.mean.begin(), expected.mean.end(), p.mean);
            std::copy(expected.inv_std.begin(), expected.inv_std.end(), p.inv_std);
            return kernels_.batch_normalize(p);
        }
        (case_.groups ? kernels_.group_norm_forward : kernels_.batch_norm_forward)(p);
        if (!halves) return;
        (case_.groups ? kernels_.group_statistics : kernels_.batch_statistics)(p);
        (case_.groups ? kernels_.group_normalize : kernels_.batch_normalize)(p);
    }

    void near(const char *what, const Memory &actual, index i, double expected, const Tolerance &allowed,
              double size) const {
        const double error = std::abs(actual.get(i) - expected);
        const double limit = allowed.rounding * std::abs(expected) + allowed.arithmetic * size + allowed.smallest;
        if (error <= limit) return;
        fail(what, "element " + std::to_string(i) + " is " + std::to_string(actual.get(i)) + " instead of " +
                       std::to_string(expected) + ", off by " + std::to_string(error / limit) + " of what is allowed");
    }

    void compare(const Results &actual, const Expected &expected) const {
        if (case_.shape.elements() == 0) return;
        const Tolerance allowed = tolerances[int(case_.dtype)];
        case_.each([&](index i, index c, index) {
            near("y", actual.y, i, expected.y[i], allowed, expected.z_size[c]);
            if (case_.want_dx) near("dx", actual.dx, i, expected.dx[i], allowed, expected.dx_size[c]);
            if (case_.want_dresidual)
                near("dresidual", actual.dresidual, i, expected.dz[i], allowed, expected.dz_size[c]);
        });
        // Statistics and sums are stored in double: their error is the arithmetic's, and the formula's own.
        const Tolerance stored{0x1p-51, allowed.arithmetic, 1e-24 * double(case_.count())};
        for (index set = 0; set < case_.sets(); ++set) {
            const double m2 = expected.m2[set], deviation = std::sqrt(m2 / double(case_.count()));
            near("mean", actual.mean, set, expected.mean[set], stored, deviation);
            near("m2", actual.m2, set, m2, stored, m2);
            near("inv_std", actual.inv_std, set, expected.inv_std[set], stored, expected.inv_std[set]);
        }
        for (index c = 0; c < case_.shape.channels; ++c) {
            near("sum_dz", actual.sum_dz, c, expected.sum_dz[c], stored, expected.sum_dz_size[c]);
            near("sum_dz_xhat", actual.sum_dz_xhat, c, expected.sum_dz_xhat[c], stored, expected.sum_dz_xhat_size[c]);
        }
    }
};

void check(const std::uint8_t *data, std::size_t size) {
    static const Isa *const isa = choose_isa(std::getenv("FLATWATER_ISA"));
    if (!isa) throw std::invalid_argument("FLATWATER_ISA names no instruction set of this machine");
    Choices choices(data, size);
    const Case chosen(choices);
    Run(chosen, *isa).check();
}

}  // namespace
}  // namespace flatwater::fuzz

#ifdef FLATWATER_LIBFUZZER

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    flatwater::fuzz::check(data, size);
    return 0;
}

#else

int main(int count, char **arguments) try {
    const unsigned long calls = count > 1 ? std::stoul(arguments[1]) : 2000;
    const unsigned long first = count > 2 ? std::stoul(arguments[2]) : 0;
    for (unsigned long seed = first; seed < first + calls; ++seed) {
        std::mt19937 random(static_cast<std::mt19937::result_type>(seed));
        std::uint8_t choices[32];
        for (std::uint8_t &choice : choices) choice = std::uint8_t(random());
        try {
            flatwater::fuzz::check(choices, sizeof choices);
        } catch (...) {
            std::fprintf(stderr, "seed %lu\n", seed);
            throw;
        }
    }
    std::printf("%lu calls, as the formulas have it\n", calls);
} catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}

#endif
