// Threads. A kernel splits its work into tasks that depend on the shape alone, never on how many
// threads there are, so the same input gives the same bits whatever the team.
#pragma once

#include "problem.h"

namespace flatwater {

void set_threads(index threads);
index threads();

using TeamBody = void (*)(void *context, index begin, index end);

// Runs body over [0, tasks), each thread a contiguous part of it; `elements` is the size of the
// whole work, for a small one is not worth waking a team for.
void run_team(index tasks, index elements, TeamBody body, void *context);

template <class F>
void parallel_for(index tasks, index elements, F &&task) {
    run_team(
        tasks, elements,
        [](void *context, index begin, index end) {
            auto &run = *static_cast<F *>(context);
            for (index i = begin; i < end; ++i) run(i);
        },
        &task);
}

}  // namespace flatwater
