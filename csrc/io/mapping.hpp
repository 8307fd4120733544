// Input files mapped for reading: a warm file is merged straight from the page cache, without a copy.
#pragma once
#include <cstdint>

namespace fastmerge {

/// A whole file mapped read-only. A page that is gone when it is touched (the file was truncated meanwhile)
/// reads as zeros and is counted in `lost_pages` instead of killing the process: whoever merges asks
/// afterwards.
class Mapping {
  public:
    /// Throws std::runtime_error with the system's reason.
    Mapping(int fd, int64_t size);
    ~Mapping();
    Mapping(const Mapping&) = delete;

    uintptr_t address() const { return reinterpret_cast<uintptr_t>(memory_); }
    int64_t size() const { return size_; }
    /// Take the pages of [begin, begin + n) out of the process again; the page cache keeps them.
    void release(uintptr_t begin, int64_t n) const;

  private:
    void* memory_;
    int64_t size_;
};

/// Bring the pages of [address, address + n) in, so that no compute thread faults. 0 or an errno; EFAULT: the
/// file has no such pages any more, or they cannot be read.
int populate(uintptr_t address, int64_t n);
/// Pages that were gone when touched, in all mappings since the process started.
int64_t lost_pages();

}  // namespace fastmerge
