#include "simulate/memory.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>

namespace fastmerge::simulate {
namespace {

constexpr int64_t ALIGNMENT = 512;  // bytes: what an allocation is rounded up to, as on a GPU

std::string megabytes(int64_t n_bytes) {
    return std::to_string(n_bytes >> 20) + " MiB";
}

}  // namespace

Memory::~Memory() {
    for (const auto& run : device_) unmap(*run.second);
    for (const auto& run : retired_)
        if (run->is_device) unmap(*run);
}

uintptr_t Memory::allocate(int64_t n_bytes) {
    if (n_bytes < 0) throw std::invalid_argument("an allocation of less than nothing");
    const int64_t size = std::max((n_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, ALIGNMENT);
    std::lock_guard<std::mutex> lock(mutex_);
    if (n_allocations_++ == failing_allocation_) throw OutOfMemory("an allocation was made to fail");
    if (size > device_bytes_ - used_)
        throw OutOfMemory(megabytes(size) + " asked, " + megabytes(device_bytes_ - used_) + " free");
    void* memory = mmap(nullptr, size_t(size), moves_data_ ? PROT_READ | PROT_WRITE : PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw OutOfMemory("the host has no " + megabytes(size) + " of addresses");
#ifdef MADV_HUGEPAGE
    madvise(memory, size_t(size),
            MADV_HUGEPAGE);  // the first copy to it should not take longer than the next
#endif
    const auto address = reinterpret_cast<uintptr_t>(memory);
    device_[address].reset(new Run{address, size, true});
    used_ += size;
    peak_ = std::max(peak_, used_);
    return address;
}

bool Memory::release(uintptr_t address) {
    std::lock_guard<std::mutex> lock(mutex_);
    return forget(device_, address, used_);
}

bool Memory::pin(uintptr_t address, int64_t n_bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (n_pins_++ == failing_pin_ || n_bytes <= 0 || n_bytes > pin_limit_ - pinned_) return false;
    const auto next = host_.lower_bound(address);
    if (next != host_.end() && next->first < address + uintptr_t(n_bytes)) return false;
    if (next != host_.begin()) {
        const Run& before = *std::prev(next)->second;
        if (before.first + uintptr_t(before.n_bytes) > address) return false;
    }
    host_[address].reset(new Run{address, n_bytes, false});
    pinned_ += n_bytes;
    return true;
}

bool Memory::unpin(uintptr_t address) {
    std::lock_guard<std::mutex> lock(mutex_);
    return forget(host_, address, pinned_);
}

bool Memory::forget(Runs& runs, uintptr_t address, int64_t& counted) {
    const auto found = runs.find(address);
    if (found == runs.end()) throw std::invalid_argument("no such memory");
    std::unique_ptr<Run> run = std::move(found->second);
    runs.erase(found);
    counted -= run->n_bytes;
    const bool idle = run->queued.load(std::memory_order_acquire) == 0;
    if (!idle)
        retired_.push_back(std::move(run));
    else if (run->is_device)
        unmap(*run);
    return idle;
}

void Memory::unmap(const Run& run) const {
    munmap(reinterpret_cast<void*>(run.first), size_t(run.n_bytes));
}

Run* Memory::hold(bool is_device, uintptr_t address, int64_t n) {
    std::lock_guard<std::mutex> lock(mutex_);
    Runs& runs = is_device ? device_ : host_;
    const auto next = runs.upper_bound(address);
    if (next == runs.begin()) return nullptr;
    Run& run = *std::prev(next)->second;
    if (address + uintptr_t(n) > run.first + uintptr_t(run.n_bytes)) return nullptr;
    run.queued.fetch_add(1, std::memory_order_relaxed);
    return &run;
}

void Memory::fail_allocation(int64_t nth) {
    std::lock_guard<std::mutex> lock(mutex_);
    failing_allocation_ = nth;
}

void Memory::fail_pin(int64_t nth) {
    std::lock_guard<std::mutex> lock(mutex_);
    failing_pin_ = nth;
}

int64_t Memory::used() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return used_;
}

int64_t Memory::peak() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return peak_;
}

int64_t Memory::pinned() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return pinned_;
}

}  // namespace fastmerge::simulate
