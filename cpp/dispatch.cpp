#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "problem.h"

namespace flatwater {

// What has been compiled of kernels.cpp, in the order of DType.
#define FLATWATER_COMPILED(isa)                                                                        \
    namespace isa {                                                                                    \
    extern const Kernels kernels_of_f32, kernels_of_f64, kernels_of_bf16, kernels_of_f16;              \
    constexpr Isa all = {#isa, {&kernels_of_f32, &kernels_of_f64, &kernels_of_bf16, &kernels_of_f16}}; \
    }

FLATWATER_COMPILED(baseline)
#ifdef FLATWATER_X86
FLATWATER_COMPILED(avx2)
FLATWATER_COMPILED(avx512)
#endif

const Isa *choose_isa(const char *forced) {
    const auto wanted = [forced](const Isa &isa) {
        return !forced || !*forced || std::strcmp(forced, isa.name) == 0;
    };
#ifdef FLATWATER_X86
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && wanted(avx512::all)) return &avx512::all;
    if (has_avx2 && wanted(avx2::all)) return &avx2::all;
#endif
    return wanted(baseline::all) ? &baseline::all : nullptr;
}

namespace {

constexpr index any_size = std::numeric_limits<index>::max(), mebibyte = 1 << 20;

constexpr From tensor_of(index mebibytes) { return {mebibytes * mebibyte, false}; }
constexpr From step_of(index mebibytes) { return {mebibytes * mebibyte / 4, true}; }

// Each as measured on two cores of a virtual machine: Sapphire Rapids or later, Zen 4, and Zen 5 for all others.
constexpr Machine machines[] = {
    {
        .name = "intel",
        .whole_rows = true,
        .stream_rows = tensor_of(16),
        .stream_planes = tensor_of(16),
        .stream_short_planes = step_of(4 * 28),
        .shortest_half_plane = 256,
        .second_level_rows = tensor_of(28),
        .second_level_planes = false,
        .always_ahead = false,
    },
    {
        .name = "zen4",
        .whole_rows = false,
        .stream_rows = step_of(22),
        .stream_planes = step_of(48),
        .stream_short_planes = step_of(48),
        .shortest_half_plane = 512,
        .second_level_rows = step_of(22),
        .second_level_planes = true,
        .always_ahead = true,
    },
    {
        .name = "other",
        .whole_rows = false,
        .stream_rows = tensor_of(16),
        .stream_planes = tensor_of(16),
        .stream_short_planes = tensor_of(16),
        .shortest_half_plane = 256,
        .second_level_rows = {any_size, false},
        .second_level_planes = false,
        .always_ahead = true,
    },
};

const char *this_machine() {
#ifdef FLATWATER_X86
    __builtin_cpu_init();
    if (__builtin_cpu_is("intel")) return "intel";
    if (__builtin_cpu_is("amdfam19h")) return "zen4";  // Zen 3 too, which is next to it
#endif
    return "other";
}

}  // namespace

const Machine &machine() {
    static const Machine *const found = [] {
        const char *named = std::getenv("FLATWATER_TUNING");
        const char *const name = named && *named ? named : this_machine();
        for (const Machine &each : machines)
            if (std::strcmp(each.name, name) == 0) return &each;
        throw std::invalid_argument(name);
    }();
    return *found;
}

const Isa &isa() {
    static const Isa *const chosen = [] {
        const char *forced = std::getenv("FLATWATER_ISA");
        const Isa *found = choose_isa(forced);
        if (!found) throw std::invalid_argument(forced);
        machine();
        return found;
    }();
    return *chosen;
}

}  // namespace flatwater
