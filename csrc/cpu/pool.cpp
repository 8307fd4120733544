#include "cpu/pool.hpp"

#include <sched.h>

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
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

std::mutex gate;  // one kernel at a time owns the pool; callers from several Python threads queue here
int wanted = 0;

Pool& pool() {
    static Pool* instance = new Pool;  // never destroyed: threads may outlive static destructors
    return *instance;
}

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
    std::lock_guard<std::mutex> lock(gate);
    wanted = n > 0 ? n : available_threads();
    pool().resize(wanted);
    return wanted;
}

int thread_count() {
    return wanted > 0 ? wanted : available_threads();
}

void run_tasks(int64_t n_tasks, TaskBody body, void* context) {
    std::lock_guard<std::mutex> lock(gate);
    if (wanted == 0) pool().resize(wanted = available_threads());
    pool().run(n_tasks, body, context);
}

}  // namespace fastmerge
