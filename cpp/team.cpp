#include "team.h"

#include <dlfcn.h>
#include <omp.h>

extern "C" void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);

namespace flatwater {
namespace {

// Below this many elements a single thread is done before a team has woken up.
constexpr index worth_a_team = 1 << 14;

// The OpenMP entry points in use. A second runtime in one process means two teams whose idle
// threads spin against each other on the same cores. So where the framework has already brought
// Intel's runtime (Paddle's wheels do), which also speaks GNU's interface, its team is used.
struct Runtime {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*thread)();
    int (*team_size)();
};

Runtime find_runtime() {
#ifdef __GNUC__
    if (void *library = dlopen("libiomp5.so", RTLD_NOW | RTLD_NOLOAD)) {
        auto parallel = reinterpret_cast<decltype(Runtime::parallel)>(dlsym(library, "GOMP_parallel"));
        auto thread = reinterpret_cast<decltype(Runtime::thread)>(dlsym(library, "omp_get_thread_num"));
        auto team_size = reinterpret_cast<decltype(Runtime::team_size)>(dlsym(library, "omp_get_num_threads"));
        if (parallel && thread && team_size) return {parallel, thread, team_size};
    }
#endif
    return {GOMP_parallel, omp_get_thread_num, omp_get_num_threads};
}

const Runtime &runtime() {
    static const Runtime found = find_runtime();
    return found;
}

index team_threads = 0;  // 0: not asked yet

struct Work {
    index tasks;
    TeamBody body;
    void *context;
};

void member(void *argument) {
    const auto &work = *static_cast<Work *>(argument);
    const index rank = runtime().thread(), size = runtime().team_size();
    work.body(work.context, work.tasks * rank / size, work.tasks * (rank + 1) / size);
}

}  // namespace

void set_threads(index threads) { team_threads = threads; }

index threads() {
    if (team_threads == 0) team_threads = omp_get_max_threads();
    return team_threads;
}

void run_team(index tasks, index elements, TeamBody body, void *context) {
    const index size = elements < worth_a_team ? 1 : threads() < tasks ? threads() : tasks;
    if (size <= 1) {
        body(context, 0, tasks);
        return;
    }
    Work work{tasks, body, context};
    runtime().parallel(member, &work, static_cast<unsigned>(size), 0);
}

}  // namespace flatwater
