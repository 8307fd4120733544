#include "io/transfer.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

#include "io/checksum.hpp"
#include "io/mapping.hpp"

namespace fastmerge {
namespace {

constexpr int64_t PIECE = int64_t(4) << 20;  // one system call: large enough for the disk, small to share

/// End of the piece that starts `done` bytes into s: on a multiple of PIECE in the file, so that only the
/// ends of a segment are partial blocks, but never within a checksum's word.
int64_t piece_end(const Segment& s, int64_t done) {
    const int64_t end = (s.offset + done) / PIECE * PIECE + PIECE - s.offset;
    if (end >= s.n_bytes) return s.n_bytes;
    return s.word ? std::max(end - (s.start + end) % s.word, done + s.word) : end;
}

}  // namespace

Transfers::Transfers(bool writing, int n_threads) : writing_(writing) {
    for (int t = 0; t < n_threads; ++t) threads_.emplace_back([this] { serve(); });
}

Transfers::~Transfers() {
    close();
}

int64_t Transfers::submit(const std::vector<Segment>& segments) {
    std::lock_guard<std::mutex> lock(mutex_);
    const int64_t ticket = next_++;
    Job& job = jobs_[ticket];
    job.sums.assign(segments.size(), 0);
    if (stop_) {
        job.error = {true, ECANCELED, {}, 0};
        return ticket;
    }
    for (size_t i = 0; i < segments.size(); ++i)
        for (int64_t done = 0, end; done < segments[i].n_bytes; done = end) {
            Segment s = segments[i];
            end = piece_end(s, done);
            s.n_bytes = end - done;
            s.offset += done, s.address += uintptr_t(done), s.start += done, s.index = int(i);
            queue_.push_back({ticket, s});
            ++job.left;
        }
    ready_.notify_all();
    return ticket;
}

TransferError Transfers::wait(int64_t ticket, std::vector<uint64_t>& sums) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto job = jobs_.find(ticket);
    if (job == jobs_.end()) return {};
    done_.wait(lock, [&] { return job->second.left == 0; });
    const TransferError error = job->second.error;
    sums = std::move(job->second.sums);
    jobs_.erase(job);
    return error;
}

bool Transfers::is_done(int64_t ticket) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto job = jobs_.find(ticket);
    return job == jobs_.end() || job->second.left == 0;
}

void Transfers::close() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        for (const auto& piece : queue_) {
            Job& job = jobs_[piece.first];
            --job.left;
            if (!job.error.failed) job.error = {true, ECANCELED, piece.second, 0};
        }
        queue_.clear();
    }
    ready_.notify_all();
    done_.notify_all();
    for (auto& t : threads_) t.join();
    threads_.clear();
}

void Transfers::serve() {
    for (;;) {
        std::pair<int64_t, Segment> piece;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            ready_.wait(lock, [this] { return stop_ || !queue_.empty(); });
            if (stop_) return;
            piece = queue_.front();
            queue_.pop_front();
        }
        const Segment& s = piece.second;
        const auto start = std::chrono::steady_clock::now();
        const TransferError error = move(s);
        const uint64_t sum =
            s.word ? checksum(reinterpret_cast<const void*>(s.address), s.n_bytes, s.word, s.start) : 0;
        busy_ns_ += std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
        std::lock_guard<std::mutex> lock(mutex_);
        Job& job = jobs_[piece.first];
        job.sums[size_t(s.index)] += sum;
        if (error.failed && !job.error.failed) job.error = error;
        if (--job.left == 0) done_.notify_all();
    }
}

/// One system call's worth of the rest of a segment; direct: whether it is to bypass, and did bypass, the
/// cache.
ssize_t Transfers::step(const Segment& s, int64_t done, bool& direct) const {
    char* at = reinterpret_cast<char*>(s.address) + done;
    const int64_t offset = s.offset + done;
    int64_t n = s.n_bytes - done;
    const int64_t into = offset % DIRECT_ALIGNMENT;
    if (direct && into) n = std::min(n, DIRECT_ALIGNMENT - into);  // up to a whole block
    direct = direct && !into && n >= DIRECT_ALIGNMENT;
    if (direct) n -= n % DIRECT_ALIGNMENT;
    const int fd = direct ? s.direct_fd : s.fd;
    return writing_ ? ::pwrite(fd, at, size_t(n), offset) : ::pread(fd, at, size_t(n), offset);
}

TransferError Transfers::move(const Segment& s) const {
    if (s.fd == MAPPED) {
        const int code = populate(s.address, s.n_bytes);
        return {code != 0, code, s, 0};
    }
    bool may_bypass = s.direct_fd >= 0 && (int64_t(s.address) - s.offset) % DIRECT_ALIGNMENT == 0 &&
                      s.n_bytes >= DIRECT_LEAST;
    for (int64_t done = 0; done < s.n_bytes;) {
        bool direct = may_bypass;
        const ssize_t n = step(s, done, direct);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && direct && errno == EINVAL) {  // a file system that takes O_DIRECT but not these blocks
            may_bypass = false;
            continue;
        }
        if (n < 0) return {true, errno, s, done};
        if (n == 0) return {true, 0, s, done};
        done += n;
    }
    return {};
}

}  // namespace fastmerge
