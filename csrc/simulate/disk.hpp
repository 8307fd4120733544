// A drive at a set bandwidth, for io/transfer.hpp's callers: `Disk` has the methods of `Transfers`.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <queue>
#include <random>
#include <thread>
#include <vector>

#include "io/transfer.hpp"

namespace fastmerge::simulate {

/// What bytes go through, one request after the other: reads and writes of one drive may share it.
class Medium {
  public:
    /// Take the next `seconds` that are free from `ready` on; returns the moment they end.
    double serve(double ready, double seconds) {
        std::lock_guard<std::mutex> lock(mutex_);
        free_at_ = (ready > free_at_ ? ready : free_at_) + seconds;
        return free_at_;
    }

  private:
    std::mutex mutex_;
    double free_at_ = 0;
};

struct DiskSettings {
    bool writing;
    double bandwidth;            // bytes per second
    double latency_seconds = 0;  // from a request to its first byte; requests in flight wait at the same time
    int depth = 8;               // requests in flight; the drive serves them in turn
    int64_t piece_bytes = int64_t(4) << 20;  // of one request
    bool moves_data = true;                  // else nothing is read, written or summed
    double jitter_seconds = 0;               // requests end up to so much later, at random and out of order
    uint64_t seed = 0;
};

/// When a request had the medium: logical times, in seconds of `now`.
struct DiskSpan {
    double start, end;
    int64_t n_bytes;
};

class Disk {
  public:
    /// shares: a disk whose medium this one uses, too.
    explicit Disk(const DiskSettings& settings, const Disk* shares = nullptr);
    ~Disk();
    Disk(const Disk&) = delete;

    int64_t submit(const std::vector<Segment>& segments);
    /// As of `Transfers`, but that a job which `close` drops has failed with ECANCELED.
    TransferError wait(int64_t ticket, std::vector<uint64_t>& sums);
    bool is_done(int64_t ticket);
    /// Seconds that requests of this disk had the medium.
    double busy_seconds() const;
    void close();

    /// Make the nth segment (counted from 0 since the start) fail once `done` bytes of it have moved, with an
    /// errno, or 0: the file ends there.
    void fail(int64_t nth, int code, int64_t done);
    std::vector<DiskSpan> spans() const;

  private:
    struct Piece {
        int64_t ticket = 0;
        Segment segment{};
        double queued = 0;
        double due = 0;
        bool fails = false;
        int code = 0;
    };
    struct Later {
        bool operator()(const Piece& a, const Piece& b) const { return a.due > b.due; }
    };
    struct Job {
        int64_t left = 0;
        TransferError error;
        std::vector<uint64_t> sums;
    };
    void queue(int64_t ticket, Job& job, Segment segment, double queued);
    void serve();
    void admit();
    void finish(const Piece& piece, const TransferError& error, uint64_t sum);

    const DiskSettings settings_;
    const std::shared_ptr<Medium> medium_;
    Transfers transfers_;  // moves the bytes
    mutable std::mutex mutex_;
    std::condition_variable ready_, done_;
    std::deque<Piece> queue_;
    std::priority_queue<Piece, std::vector<Piece>, Later> in_flight_;
    std::priority_queue<double, std::vector<double>, std::greater<double>> free_;  // since when requests are
    std::map<int64_t, Job> jobs_;
    std::map<int64_t, std::pair<int, int64_t>> faults_;
    std::vector<DiskSpan> spans_;
    std::mt19937_64 random_;
    double busy_ = 0;
    int64_t next_ = 1, n_segments_ = 0;
    bool stop_ = false;
    std::mutex closing_;
    std::thread thread_;
};

}  // namespace fastmerge::simulate
