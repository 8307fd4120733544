#include "simulate/disk.hpp"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <stdexcept>

#include "simulate/clock.hpp"

namespace fastmerge::simulate {
namespace {

std::chrono::steady_clock::time_point moment(double seconds) {
    return std::chrono::steady_clock::time_point(std::chrono::nanoseconds(int64_t(seconds * 1e9)));
}

}  // namespace

Disk::Disk(const DiskSettings& settings, const Disk* shares)
    : settings_(settings),
      medium_(shares ? shares->medium_ : std::make_shared<Medium>()),
      transfers_(settings.writing, 1) {
    if (!(settings.bandwidth > 0) || settings.depth < 1 || settings.piece_bytes < 8)
        throw std::invalid_argument("a disk has a bandwidth, requests in flight and bytes in each");
    random_.seed(settings.seed);
    for (int i = 0; i < settings.depth; ++i) free_.push(0);
    thread_ = std::thread([this] { serve(); });
}

Disk::~Disk() {
    close();
}

int64_t Disk::submit(const std::vector<Segment>& segments) {
    std::lock_guard<std::mutex> lock(mutex_);
    const int64_t ticket = next_++;
    Job& job = jobs_[ticket];
    job.sums.assign(segments.size(), 0);
    const double queued = now();
    for (size_t i = 0; i < segments.size(); ++i) {
        Segment s = segments[i];
        s.index = int(i);
        queue(ticket, job, s, queued);
    }
    if (stop_ && job.left) job.left = 0, job.error = {true, ECANCELED, segments[0], 0};
    if (stop_) queue_.clear();
    ready_.notify_all();
    return ticket;
}

/// Cut a segment into requests, none of which ends inside a checksum's word: a segment starts on one.
void Disk::queue(int64_t ticket, Job& job, Segment segment, double queued) {
    const auto fault = faults_.find(n_segments_++);
    const bool fails = fault != faults_.end();
    const int64_t n = fails ? std::min(fault->second.second, segment.n_bytes) : segment.n_bytes;
    const int64_t step = settings_.piece_bytes / 8 * 8;
    for (int64_t done = 0, end; done < n || (fails && done == n); done = end) {
        end = std::min(n, done + step);
        Piece piece;
        piece.ticket = ticket, piece.segment = segment, piece.queued = queued;
        Segment& s = piece.segment;
        s.n_bytes = end - done;
        s.offset += done, s.address += uintptr_t(done), s.start += done;
        piece.fails = fails && end == n;
        if (piece.fails) piece.code = fault->second.first, s.word = 0;
        queue_.push_back(piece);
        ++job.left;
        if (piece.fails) return;
    }
}

TransferError Disk::wait(int64_t ticket, std::vector<uint64_t>& sums) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto job = jobs_.find(ticket);
    if (job == jobs_.end()) return {};
    done_.wait(lock, [&] { return job->second.left == 0; });
    const TransferError error = job->second.error;
    sums = std::move(job->second.sums);
    jobs_.erase(job);
    return error;
}

bool Disk::is_done(int64_t ticket) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto job = jobs_.find(ticket);
    return job == jobs_.end() || job->second.left == 0;
}

double Disk::busy_seconds() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return busy_;
}

std::vector<DiskSpan> Disk::spans() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return spans_;
}

void Disk::fail(int64_t nth, int code, int64_t done) {
    std::lock_guard<std::mutex> lock(mutex_);
    faults_[nth] = {code, done};
}

void Disk::close() {
    std::lock_guard<std::mutex> closing(closing_);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    ready_.notify_all();
    if (thread_.joinable()) thread_.join();
    {
        std::lock_guard<std::mutex> lock(mutex_);
        for (; !in_flight_.empty(); in_flight_.pop()) queue_.push_back(in_flight_.top());
        for (const Piece& piece : queue_) {
            Job& job = jobs_[piece.ticket];
            --job.left;
            if (!job.error.failed) job.error = {true, ECANCELED, piece.segment, 0};
        }
        queue_.clear();
    }
    done_.notify_all();
    transfers_.close();
}

void Disk::serve() {
    sleep_precisely();
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stop_) {
        while (!queue_.empty() && int(in_flight_.size()) < settings_.depth) admit();
        if (in_flight_.empty()) {
            ready_.wait(lock);
        } else if (const double due = in_flight_.top().due; now() < due) {
            ready_.wait_until(lock, moment(due));
        } else {
            const Piece piece = in_flight_.top();
            in_flight_.pop();
            free_.push(due);
            TransferError error;
            std::vector<uint64_t> sums{0};
            if (settings_.moves_data) {
                lock.unlock();
                error = transfers_.wait(transfers_.submit({piece.segment}), sums);
                lock.lock();
            }
            finish(piece, error, sums[0]);
        }
    }
}

/// Let the oldest piece have the medium next. Its turn is computed from when a request was free for it, not
/// from when this thread woke.
void Disk::admit() {
    Piece piece = queue_.front();
    queue_.pop_front();
    const double ready = std::max(piece.queued, free_.top()) + settings_.latency_seconds;
    free_.pop();
    const double seconds = double(piece.segment.n_bytes) / settings_.bandwidth;
    const double end = medium_->serve(ready, seconds);
    piece.due = end;
    if (settings_.jitter_seconds > 0)
        piece.due += std::uniform_real_distribution<>(0, settings_.jitter_seconds)(random_);
    spans_.push_back({end - seconds, end, piece.segment.n_bytes});
    busy_ += seconds;
    in_flight_.push(piece);
}

void Disk::finish(const Piece& piece, const TransferError& error, uint64_t sum) {
    Job& job = jobs_[piece.ticket];
    job.sums[size_t(piece.segment.index)] += sum;
    if (!job.error.failed) {
        if (error.failed)
            job.error = error;
        else if (piece.fails)
            job.error = {true, piece.code, piece.segment, piece.segment.n_bytes};
    }
    if (--job.left == 0) done_.notify_all();
}

}  // namespace fastmerge::simulate
