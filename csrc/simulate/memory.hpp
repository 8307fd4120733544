// The memory that a simulated device knows: its own, with a limit, and what is pinned of the host's.
#pragma once
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

namespace fastmerge::simulate {

/// Python's MemoryError, with a reason.
class OutOfMemory : public std::bad_alloc {
  public:
    explicit OutOfMemory(std::string reason) : reason_(std::move(reason)) {}
    const char* what() const noexcept override { return reason_.c_str(); }

  private:
    std::string reason_;
};

/// One allocation, or one pinned part of the host's memory.
struct Run {
    uintptr_t first;
    int64_t n_bytes;
    bool is_device;
    std::atomic<int64_t> queued{0};  // copies of it that have not run
};

class Memory {
  public:
    /// moves_data off: device memory is addresses alone, which fault when touched.
    Memory(int64_t device_bytes, int64_t pin_limit, bool moves_data)
        : device_bytes_(device_bytes), pin_limit_(pin_limit), moves_data_(moves_data) {}
    ~Memory();
    Memory(const Memory&) = delete;

    /// Aligned to a page. Throws OutOfMemory.
    uintptr_t allocate(int64_t n_bytes);
    /// False if copies of it are queued: its pages then stay until the end, for they may still be touched.
    bool release(uintptr_t address);
    /// False beyond the limit, or where some of it is pinned already.
    bool pin(uintptr_t address, int64_t n_bytes);
    /// False if copies of it are queued.
    bool unpin(uintptr_t address);

    /// The run that holds all of [address, address + n), with one more copy queued; null if there is none.
    Run* hold(bool is_device, uintptr_t address, int64_t n);
    static void let_go(Run& run) { run.queued.fetch_sub(1, std::memory_order_release); }

    /// From now on, the nth allocation (or pin), counted from 0 since the start, fails.
    void fail_allocation(int64_t nth);
    void fail_pin(int64_t nth);

    int64_t total() const { return device_bytes_; }
    int64_t used() const;
    int64_t peak() const;
    int64_t pinned() const;

  private:
    using Runs = std::map<uintptr_t, std::unique_ptr<Run>>;
    bool forget(Runs& runs, uintptr_t address, int64_t& counted);
    void unmap(const Run& run) const;

    const int64_t device_bytes_, pin_limit_;
    const bool moves_data_;
    mutable std::mutex mutex_;  // taken by the host's threads alone, never by a stream's
    Runs device_, host_;
    std::vector<std::unique_ptr<Run>> retired_;
    int64_t used_ = 0, peak_ = 0, pinned_ = 0;
    int64_t n_allocations_ = 0, n_pins_ = 0, failing_allocation_ = -1, failing_pin_ = -1;
};

}  // namespace fastmerge::simulate
