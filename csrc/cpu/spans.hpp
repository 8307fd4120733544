// How sweeps deal elements out to threads.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/pool.hpp"

namespace fastmerge {

/// Elements of one task: long enough to hide a hand-over, short enough to balance.
constexpr int64_t SPAN = 32768;

template <class F>
void parallel(int64_t n_tasks, F f) {
    run_tasks(n_tasks, [](void* c, int64_t t) { (*static_cast<F*>(c))(t); }, &f);
}

/// f(a, b) over [0, n) in spans.
template <class F>
void parallel_spans(int64_t n, F f) {
    parallel((n + SPAN - 1) / SPAN, [&](int64_t t) { f(t * SPAN, std::min(n, (t + 1) * SPAN)); });
}

}  // namespace fastmerge
