// A fixed pool of threads; the caller's thread takes part. Results never depend on how tasks are dealt out.
#pragma once
#include <cstdint>

namespace fastmerge {

using TaskBody = void (*)(void* context, int64_t task);

/// Run body(context, t) for t in [0, n_tasks) on all threads; returns when all are done.
void run_tasks(int64_t n_tasks, TaskBody body, void* context);

/// Threads that the process may use: its CPU affinity, cut by a cgroup quota.
int available_threads();

/// Set the number of threads (0: available_threads()); returns the number in use.
int set_threads(int n);
int thread_count();

}  // namespace fastmerge
