// Threads. A kernel splits its work into tasks that depend on the shape alone, never on how many
// threads there are or which of them does what, so the same input gives the same bits whatever the team.
#pragma once

#include "problem.h"

namespace flatwater {

void set_threads(index threads);
index threads();

using TeamTask = void (*)(void *context, index task);

// Runs every task of [0, tasks) once. Each thread begins with a part of its own, the same in every call
// of one size, and then helps the others with theirs; `backwards` starts each part from its end.
// `elements` is the size of the whole work, for a small one is not worth waking a team for. What a task throws, as
// where there is no memory, the caller gets; whether the other tasks have run is then left open.
void run_team(index tasks, index elements, TeamTask task, void *context, bool backwards);

template <class F>
void parallel_for(index tasks, index elements, F &&task) {
    run_team(
        tasks, elements, [](void *context, index i) { (*static_cast<F *>(context))(i); }, &task, false);
}

// For what a parallel_for before it has left in each thread's cache: the last of it first.
template <class F>
void parallel_for_backwards(index tasks, index elements, F &&task) {
    run_team(
        tasks, elements, [](void *context, index i) { (*static_cast<F *>(context))(i); }, &task, true);
}

}  // namespace flatwater
