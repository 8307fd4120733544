#include "io/mapping.hpp"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <stdexcept>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

namespace fastmerge {
namespace {

const uintptr_t PAGE = uintptr_t(sysconf(_SC_PAGESIZE));

// What the SIGBUS handler reads must be plain and fixed in place: it may run in any thread at any time.
constexpr int MOST_MAPPINGS = 4096;
struct Range {
    std::atomic<uintptr_t> begin{0}, end{0};
};
Range ranges[MOST_MAPPINGS];
std::atomic<int64_t> lost{0};
std::mutex registry;
int live = 0;
struct sigaction before;

/// Put a page of zeros where the file's page is gone and go on; anything else is for the former handler.
void on_bus_error(int signal, siginfo_t* info, void* context) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
    for (const Range& r : ranges)
        if (at >= r.begin.load() && at < r.end.load()) {
            void* page = reinterpret_cast<void*>(at & ~(PAGE - 1));
            if (mmap(page, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) {
                lost.fetch_add(1);
                return;
            }
        }
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(signal, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(signal);
    } else {
        ::signal(SIGBUS, SIG_DFL);  // returning repeats the access, which now ends the process
    }
}

void add_range(uintptr_t begin, uintptr_t end) {
    std::lock_guard<std::mutex> lock(registry);
    if (live++ == 0) {
        struct sigaction action{};
        action.sa_sigaction = on_bus_error;
        action.sa_flags = SA_SIGINFO;
        sigaction(SIGBUS, &action, &before);
    }
    for (Range& r : ranges)
        if (r.end.load() == 0) {
            r.begin = begin, r.end = end;
            return;
        }
    throw std::runtime_error("too many files are mapped");
}

void remove_range(uintptr_t begin) {
    std::lock_guard<std::mutex> lock(registry);
    for (Range& r : ranges)
        if (r.end.load() && r.begin.load() == begin) {
            r.end = 0, r.begin = 0;
            break;
        }
    if (--live == 0) sigaction(SIGBUS, &before, nullptr);
}

}  // namespace

Mapping::Mapping(int fd, int64_t size) : size_(size) {
    if (size_ < 0) throw std::runtime_error("negative size");
    memory_ = mmap(nullptr, size_t(std::max<int64_t>(size, 1)), PROT_READ, MAP_SHARED, fd, 0);
    if (memory_ == MAP_FAILED) throw std::runtime_error(std::strerror(errno));
    add_range(address(), address() + uintptr_t(size_));
}

Mapping::~Mapping() {
    remove_range(address());
    munmap(memory_, size_t(std::max<int64_t>(size_, 1)));
}

int populate(uintptr_t address, int64_t n) {
    const uintptr_t a = address & ~(PAGE - 1), b = (address + uintptr_t(n) + PAGE - 1) & ~(PAGE - 1);
    madvise(reinterpret_cast<void*>(a), b - a, MADV_WILLNEED);  // what is not cached comes in large requests
    if (madvise(reinterpret_cast<void*>(a), b - a, MADV_POPULATE_READ) == 0) return 0;
    if (errno != EINVAL) return errno;
    // A kernel before 5.14: touch one byte per page.
    volatile unsigned char sum = 0;
    for (uintptr_t p = a; p < b; p += PAGE) sum = sum + *reinterpret_cast<const volatile unsigned char*>(p);
    return 0;
}

void Mapping::release(uintptr_t begin, int64_t n) const {
    // A fault maps up to a huge page, what lies before it included: from its beginning, or that would stay.
    constexpr uintptr_t HUGE = uintptr_t(2) << 20;
    const uintptr_t a = std::max(address(), begin & ~(HUGE - 1));
    const uintptr_t b = (begin + uintptr_t(n) + PAGE - 1) & ~(PAGE - 1);
    if (begin >= address() && begin + uintptr_t(n) <= address() + uintptr_t(size_) && a < b)
        madvise(reinterpret_cast<void*>(a), b - a, MADV_DONTNEED);
}

int64_t lost_pages() {
    return lost;
}

}  // namespace fastmerge
