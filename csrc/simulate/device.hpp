// A device without a GPU: memory and three streams that keep real time at set bandwidths.
//
// A stream is a thread that works through what is queued in it. What it works on takes as long as the
// bandwidth says, and its end is a moment computed from the end of what came before, not from when the thread
// woke: sleeping too long never adds up. A copy reads its source and writes its target at the end of its
// time, so whoever touches either before its event is done gets, or makes, wrong bytes.
//
// Threads are ordered by what would order them on a GPU, and by nothing else: an operation happens after it
// was queued and after the events it follows, `wait` returns after the event. Under ThreadSanitizer a
// pipeline that forgets to wait is therefore reported however the race went.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "simulate/memory.hpp"

namespace fastmerge::simulate {

enum StreamName { COPY_IN = 0, COMPUTE = 1, COPY_OUT = 2, N_STREAMS = 3 };

struct Settings {
    double copy_in_bandwidth;   // bytes per second
    double copy_out_bandwidth;  // bytes per second
    int64_t memory_bytes;
    double copy_latency = 0;        // seconds, of every copy
    double launch_latency = 0;      // seconds, of every computation
    double duplex = 1;              // copies in run at this share of their bandwidth while one out runs
    double pageable_bandwidth = 0;  // of host memory that is not pinned, and the host waits; 0: an error
    int64_t pin_limit = INT64_MAX;  // bytes
    bool moves_data = true;
    double jitter_seconds = 0;  // operations take up to so much longer, at random
    uint64_t seed = 0;
};

/// What a stream did: logical times, in seconds of `now`.
struct Span {
    int stream;
    double start, end;
    int64_t n_bytes;
    bool is_copy;
};

/// Every call throws std::runtime_error once an operation has failed: what has failed is in the message.
class Device {
  public:
    explicit Device(const Settings& settings);
    ~Device();
    Device(const Device&) = delete;

    uintptr_t allocate(int64_t n_bytes);
    void release(uintptr_t address);
    bool pin(uintptr_t address, int64_t n_bytes);
    void unpin(uintptr_t address);
    Memory& memory() { return memory_; }

    /// Queue a copy to the device (COPY_IN) or from it (COPY_OUT). Returns an event that the caller must wait
    /// for, or -1: host memory that is not pinned keeps the host.
    int64_t copy(int stream, uintptr_t target, uintptr_t source, int64_t n);
    /// Queue something that takes so long in COMPUTE. n_bytes is for the record.
    void compute(double seconds, int64_t n_bytes);
    /// The place behind what is queued in the stream.
    int64_t mark(int stream);
    /// What is queued in the stream from now on starts when the event is done.
    void follow(int stream, int64_t event);
    void wait(int64_t event);
    bool is_done(int64_t event);
    /// Wait for everything queued so far.
    void synchronize();

    /// Make the nth copy or computation of a stream fail, counted from 0 since the start.
    void fail(int stream, int64_t nth, const std::string& message);
    std::vector<Span> spans() const;
    /// Drop what is queued and end the threads; what waits is told so.
    void close();

  private:
    struct Event {
        std::atomic<uint32_t> done{0};
        double moment = 0;  // written before done is
    };
    enum class Kind { Nothing, Copy, Compute, Mark, Follow };
    struct Operation {
        Kind kind = Kind::Nothing;
        double queued = 0;   // moment
        double seconds = 0;  // how long it takes beside its bytes
        double bandwidth = 0;
        uintptr_t target = 0, source = 0;
        int64_t n_bytes = 0;
        Run *to = nullptr, *from = nullptr;
        Event* event = nullptr;
        std::string fault;  // of one that is to fail
        std::atomic<uint32_t> linked{0};
        Operation* next = nullptr;  // written before linked is
    };
    struct Stream {
        std::mutex queueing;  // taken by the host's threads alone
        Operation* newest = nullptr;
        int64_t n_works = 0;
        std::map<int64_t, std::string> faults;

        Operation* oldest = nullptr;  // done with; the stream's thread goes on to its next
        double end = 0;               // moment at which the last operation ended
        std::mt19937_64 random;

        mutable std::mutex recording;
        std::vector<Span> spans;
        std::thread thread;
    };

    void check_alive() const;
    Stream& stream(int name);
    Event& event(int64_t id);
    void push(Stream& s, Operation* operation);
    void serve(int name);
    bool perform(int name, Operation& operation);
    bool await(const Event& event) const;
    double end_of(int name, const Operation& operation, double start) const;
    void stop(const std::string& fault);

    const Settings settings_;
    Memory memory_;
    std::array<Stream, N_STREAMS> streams_;

    std::mutex events_mutex_;  // taken by the host's threads alone
    std::deque<Event> events_;

    mutable std::mutex outward_mutex_;
    std::deque<std::pair<double, double>> outward_;  // when copies out ran, where that slows copies in

    std::atomic<uint32_t> stopped_{0};
    mutable std::mutex fault_mutex_;
    std::string fault_;
    std::mutex closing_;
};

}  // namespace fastmerge::simulate
