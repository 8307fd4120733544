#include "simulate/clock.hpp"

#include <linux/futex.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <cmath>

namespace fastmerge::simulate {

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

void sleep_while(const std::atomic<uint32_t>& word, uint32_t expected, double until) {
    static_assert(sizeof(word) == 4);
    const double whole = std::floor(until);
    const timespec t{time_t(whole), long((until - whole) * 1e9)};
    // With a bit set, the time is absolute.
    syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, expected, &t, nullptr, FUTEX_BITSET_MATCH_ANY);
}

void wake(const std::atomic<uint32_t>& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

void sleep_precisely() {
    prctl(PR_SET_TIMERSLACK, 1000UL, 0, 0, 0);  // nanoseconds
}

}  // namespace fastmerge::simulate
