#include "io/transfer.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "io/checksum.hpp"

namespace fastmerge {
namespace {
constexpr int64_t PIECE =
    int64_t(4) << 20;  // one system call: large enough for the disk, small enough to share
}

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
    for (size_t i = 0; i < segments.size(); ++i)
        for (int64_t done = 0; done < segments[i].n_bytes; done += PIECE) {
            Segment s = segments[i];
            s.n_bytes = std::min(PIECE, s.n_bytes - done);
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

void Transfers::close() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        for (const auto& piece : queue_) --jobs_[piece.first].left;
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
        const TransferError error = move(s);
        const uint64_t sum =
            s.word ? checksum(reinterpret_cast<const void*>(s.address), s.n_bytes, s.word, s.start) : 0;
        std::lock_guard<std::mutex> lock(mutex_);
        Job& job = jobs_[piece.first];
        job.sums[size_t(s.index)] += sum;
        if (error.failed && !job.error.failed) job.error = error;
        if (--job.left == 0) done_.notify_all();
    }
}

TransferError Transfers::move(const Segment& s) const {
    int64_t done = 0;
    while (done < s.n_bytes) {
        char* at = reinterpret_cast<char*>(s.address) + done;
        const ssize_t n = writing_ ? ::pwrite(s.fd, at, size_t(s.n_bytes - done), s.offset + done)
                                   : ::pread(s.fd, at, size_t(s.n_bytes - done), s.offset + done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return {true, errno, s, done};
        if (n == 0) return {true, 0, s, done};
        done += n;
    }
    return {};
}

}  // namespace fastmerge
