#include "team.h"

#include <dlfcn.h>
#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <exception>
#include <vector>

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
};

// Whether this process is a child of one that had a team of GNU's runtime: it would wait for ever for threads
// that only its parent has.
std::atomic<bool> team_lost = false;

Runtime find_runtime() {
#ifdef __GNUC__
    if (void *library = dlopen("libiomp5.so", RTLD_NOW | RTLD_NOLOAD)) {
        auto parallel = reinterpret_cast<decltype(Runtime::parallel)>(dlsym(library, "GOMP_parallel"));
        auto thread = reinterpret_cast<decltype(Runtime::thread)>(dlsym(library, "omp_get_thread_num"));
        if (parallel && thread) return {parallel, thread};
    }
#endif
    pthread_atfork(nullptr, nullptr, [] { team_lost = true; });  // Intel's runtime sees to it by itself
    return {GOMP_parallel, omp_get_thread_num};
}

const Runtime &runtime() {
    static const Runtime found = find_runtime();
    return found;
}

std::atomic<index> team_threads = 0;  // 0: not asked yet; Python threads may call at the same time

// What is left of one thread's part: tasks [begin, end), claimed one at a time by whoever comes.
// On a cache line of its own, for its owner claims from it all the time.
struct alignas(64) Part {
    index begin, end;
    std::atomic<index> claimed{0};

    bool claim(index &task, bool backwards) {
        const index k = claimed.fetch_add(1, std::memory_order_relaxed);
        if (k >= end - begin) return false;
        task = backwards ? end - 1 - k : begin + k;
        return true;
    }
};

struct Work {
    std::vector<Part> parts;
    TeamTask task;
    void *context;
    bool backwards;
    std::atomic_flag has_thrown{};
    std::exception_ptr thrown{};  // by the first task that did
};

void member(void *argument) {
    auto &work = *static_cast<Work *>(argument);
    const std::size_t size = work.parts.size(), rank = std::size_t(runtime().thread());
    try {
        // A thread that has come late, or whose processor others use as well, keeps nobody waiting.
        for (std::size_t i = 0; i < size; ++i)
            for (index task; work.parts[(rank + i) % size].claim(task, work.backwards);) work.task(work.context, task);
    } catch (...) {  // it would end the process: no exception leaves a parallel region
        if (!work.has_thrown.test_and_set()) work.thrown = std::current_exception();
    }
}

}  // namespace

void set_threads(index threads) { team_threads = threads; }

index threads() {
    index known = team_threads.load(std::memory_order_relaxed);
    if (known == 0) team_threads = known = omp_get_max_threads();
    return known;
}

void run_team(index tasks, index elements, TeamTask task, void *context, bool backwards) {
    const index size = elements < worth_a_team ? 1 : threads() < tasks ? threads() : tasks;
    if (size <= 1 || team_lost) {
        for (index i = 0; i < tasks; ++i) task(context, backwards ? tasks - 1 - i : i);
        return;
    }
    Work work{std::vector<Part>(std::size_t(size)), task, context, backwards};
    for (index i = 0; i < size; ++i) {
        work.parts[std::size_t(i)].begin = tasks * i / size;
        work.parts[std::size_t(i)].end = tasks * (i + 1) / size;
    }
    runtime().parallel(member, &work, static_cast<unsigned>(size), 0);
    if (work.thrown) std::rethrow_exception(work.thrown);
}

}  // namespace flatwater
