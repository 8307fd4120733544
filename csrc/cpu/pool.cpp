#include "cpu/pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

namespace fastmerge {
namespace {

class Pool {
  public:
    ~Pool() { resize(1); }

    int size() const { return int(workers_.size()) + 1; }

    void resize(int n) {
        if (n == size()) return;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (auto& w : workers_) w.join();
        workers_.clear();
        stop_ = false;
        for (int t = 1; t < n; ++t) workers_.emplace_back([this, seen = round_] { serve(seen); });
    }

    void run(int64_t n_tasks, TaskBody body, void* context) {
        if (workers_.empty() || n_tasks <= 1) {
            for (int64_t t = 0; t < n_tasks; ++t) body(context, t);
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            body_ = body, context_ = context, n_tasks_ = n_tasks;
            next_ = 0, busy_ = int(workers_.size()), ++round_;
        }
        wake_.notify_all();
        work();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
    }

  private:
    void work() {
        for (int64_t t; (t = next_.fetch_add(1)) < n_tasks_;) body_(context_, t);
    }

    void serve(uint64_t seen) {
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return stop_ || round_ != seen; });
                if (stop_) return;
                seen = round_;
            }
            work();
            std::lock_guard<std::mutex> lock(mutex_);
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    std::atomic<int64_t> next_{0};
    TaskBody body_ = nullptr;
    void* context_ = nullptr;
    int64_t n_tasks_ = 0;
    int busy_ = 0;
    uint64_t round_ = 0;
    bool stop_ = false;
};

/// The pool and the mutex by which callers from several threads queue: one kernel at a time owns the pool.
struct State {
    std::mutex gate;
    Pool pool;
    int wanted = 0;
};
// Never destroyed: threads may outlive static destructors.
State* state = new State;

#if defined(__unix__) || defined(__APPLE__)
// A forked child has none of its parent's threads, and perhaps a mutex that nobody will unlock: it starts
// anew.
const int at_fork = pthread_atfork(nullptr, nullptr, [] {
    const int wanted = state->wanted;
    state = new State;
    state->wanted = wanted;
});
#endif

int cgroup_quota() {
    FILE* f = std::fopen("/sys/fs/cgroup/cpu.max", "r");
    if (!f) return 0;
    char quota[32];
    long long period = 0;
    const int fields = std::fscanf(f, "%31s %lld", quota, &period);
    std::fclose(f);
    if (fields != 2 || !std::strcmp(quota, "max") || period <= 0) return 0;
    return int(std::ceil(std::strtod(quota, nullptr) / double(period)));
}

}  // namespace

int available_threads() {
    int n = int(std::thread::hardware_concurrency());
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
    const int quota = cgroup_quota();
    if (quota > 0 && quota < n) n = quota;
#endif
    return n < 1 ? 1 : n;
}

int set_threads(int n) {
    std::lock_guard<std::mutex> lock(state->gate);
    state->wanted = n > 0 ? n : available_threads();
    state->pool.resize(state->wanted);
    return state->wanted;
}

int thread_count() {
    return state->wanted > 0 ? state->wanted : available_threads();
}

void run_tasks(int64_t n_tasks, TaskBody body, void* context) {
    std::lock_guard<std::mutex> lock(state->gate);
    if (state->wanted == 0) state->wanted = available_threads();
    state->pool.resize(state->wanted);
    state->pool.run(n_tasks, body, context);
}

}  // namespace fastmerge
