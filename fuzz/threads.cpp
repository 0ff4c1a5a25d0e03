// GNU's interface to OpenMP, on threads of the C++ library: ThreadSanitizer sees how these begin and end, but not how
// libgomp's do, and an emulator of another processor may lack an OpenMP library altogether.
#include <thread>
#include <vector>

namespace {
thread_local int rank = 0;
}

extern "C" {

void GOMP_parallel(void (*member)(void *), void *argument, unsigned threads, unsigned) {
    std::vector<std::thread> team;
    for (unsigned i = 1; i < threads; ++i)
        team.emplace_back([=] {
            rank = int(i);
            member(argument);
        });
    member(argument);
    for (std::thread &thread : team) thread.join();
}

int omp_get_thread_num() { return rank; }
int omp_get_max_threads() { return 1; }
}
