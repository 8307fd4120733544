#include "io/transfer.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

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
    for (const Segment& s : segments)
        for (int64_t done = 0; done < s.n_bytes; done += PIECE) {
            const int64_t n = std::min(PIECE, s.n_bytes - done);
            queue_.push_back({ticket, {s.fd, s.offset + done, n, s.address + uintptr_t(done)}});
            ++job.left;
        }
    ready_.notify_all();
    return ticket;
}

TransferError Transfers::wait(int64_t ticket) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto job = jobs_.find(ticket);
    if (job == jobs_.end()) return {};
    done_.wait(lock, [&] { return job->second.left == 0; });
    const TransferError error = job->second.error;
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
        const TransferError error = move(piece.second);
        std::lock_guard<std::mutex> lock(mutex_);
        Job& job = jobs_[piece.first];
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
