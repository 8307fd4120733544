// Moments of CLOCK_MONOTONIC, which is std::chrono::steady_clock's and Python's time.perf_counter's, and
// sleeping until one of them. A sleeper is woken through a word of memory by the futex call itself: mutexes
// and condition variables would order everything that two threads have ever done, and hide from
// ThreadSanitizer that a pipeline forgot to wait for an event.
#pragma once
#include <atomic>
#include <cstdint>

namespace fastmerge::simulate {

/// Seconds.
double now();

/// Sleep while `word` holds `expected`, until it is woken or the moment has come; may return early.
void sleep_while(const std::atomic<uint32_t>& word, uint32_t expected, double until);
/// Wake all that sleep on `word`.
void wake(const std::atomic<uint32_t>& word);

/// Let this thread's sleeps end when they should: the kernel rounds them up by 50 us otherwise.
void sleep_precisely();

/// How long a thread may sleep before it looks whether all is to end.
constexpr double SLICE = 5e-3;  // seconds

}  // namespace fastmerge::simulate
