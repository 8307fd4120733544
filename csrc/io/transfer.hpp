// Positioned reads and writes on threads of their own, so that moving bytes overlaps computing.
#pragma once
#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace fastmerge {

/// Bytes between a file and memory. A large segment bypasses the page cache where `direct_fd` is open and
/// address and offset agree modulo DIRECT_ALIGNMENT, but for partial blocks at its ends.
struct Segment {
    int fd;          // MAPPED: address lies in a mapped file, whose pages are brought in
    int direct_fd;   // the same file opened with O_DIRECT, or -1
    int64_t offset;  // in the file, bytes
    int64_t n_bytes;
    uintptr_t address;
    int word = 0;       // writes: 1, 2, 4 or 8 asks for the checksum in words of so many bytes
    int64_t start = 0;  // of the segment in its tensor, bytes
    int index = 0;      // in its job
};

constexpr int MAPPED = -1;
constexpr int64_t DIRECT_ALIGNMENT = 4096;
constexpr int64_t DIRECT_LEAST =
    64 << 10;  // bytes; what is smaller is not worth a trip to the disk of its own

/// What went wrong: code 0 is a short read (the file ended early), else an errno.
struct TransferError {
    bool failed = false;
    int code = 0;
    Segment segment{};
    int64_t done = 0;  // bytes of the segment moved before it failed
};

/// A pool of threads for one direction. Jobs are lists of segments; pieces of one job run in parallel.
class Transfers {
  public:
    Transfers(bool writing, int n_threads);
    ~Transfers();

    /// Queue a job; returns its ticket. Segments' memory must stay valid until `wait` returns.
    int64_t submit(const std::vector<Segment>& segments);
    /// Block until the job is done; returns its first error, if any. sums: checksum of each segment, taken
    /// from memory by the thread that has just written it.
    TransferError wait(int64_t ticket, std::vector<uint64_t>& sums);
    /// Whether `wait` would return at once.
    bool is_done(int64_t ticket);
    /// Seconds that the threads spent moving bytes so far, all added up.
    double busy_seconds() const { return double(busy_ns_.load()) * 1e-9; }
    /// Drop what has not started and wait for what has. Whoever waits for what is dropped, or submits
    /// afterwards, gets ECANCELED.
    void close();

  private:
    struct Job {
        int64_t left = 0;
        TransferError error;
        std::vector<uint64_t> sums;
    };
    void serve();
    TransferError move(const Segment& s) const;
    ssize_t step(const Segment& s, int64_t done, bool& direct) const;

    const bool writing_;
    std::atomic<int64_t> busy_ns_{0};
    std::mutex mutex_;
    std::condition_variable ready_, done_;
    std::deque<std::pair<int64_t, Segment>> queue_;
    std::map<int64_t, Job> jobs_;
    int64_t next_ = 1;
    bool stop_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace fastmerge
