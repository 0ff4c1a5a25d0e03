#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "problem.h"

namespace flatwater {

namespace baseline {
extern const Kernels kernels;
}
#ifdef FLATWATER_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

const Kernels *choose_kernels(const char *forced) {
    const auto wanted = [forced](const Kernels &kernels) {
        return !forced || !*forced || std::strcmp(forced, kernels.isa) == 0;
    };
#ifdef FLATWATER_X86
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && wanted(avx512::kernels)) return &avx512::kernels;
    if (has_avx2 && wanted(avx2::kernels)) return &avx2::kernels;
#endif
    return wanted(baseline::kernels) ? &baseline::kernels : nullptr;
}

const Machine &machine() {
    static const Machine found = [] {
        const char *named = std::getenv("FLATWATER_TUNING");
        bool intel = false;
        if (named && *named) {
            intel = std::strcmp(named, "intel") == 0;
            if (!intel && std::strcmp(named, "other") != 0) throw std::invalid_argument(named);
        } else {
#ifdef FLATWATER_X86
            __builtin_cpu_init();
            intel = __builtin_cpu_is("intel");
#endif
        }
        return Machine{intel};
    }();
    return found;
}

const Kernels &kernels() {
    static const Kernels *const chosen = [] {
        const char *forced = std::getenv("FLATWATER_ISA");
        const Kernels *found = choose_kernels(forced);
        if (!found) throw std::invalid_argument(forced);
        machine();
        return found;
    }();
    return *chosen;
}

}  // namespace flatwater
