#include "simulate/device.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>

#include "simulate/clock.hpp"

namespace fastmerge::simulate {
namespace {

constexpr size_t MOST_OUTWARD = 1024;  // copies out that one copy in can overlap, at the very most

}  // namespace

Device::Device(const Settings& settings)
    : settings_(settings), memory_(settings.memory_bytes, settings.pin_limit, settings.moves_data) {
    if (!(settings.copy_in_bandwidth > 0 && settings.copy_out_bandwidth > 0 && settings.duplex > 0 &&
          settings.duplex <= 1))
        throw std::invalid_argument("bandwidths are above 0, duplex in (0, 1]");
    for (int name = 0; name < N_STREAMS; ++name) {
        Stream& s = streams_[size_t(name)];
        s.oldest = s.newest = new Operation;
        s.random.seed(settings.seed * N_STREAMS + uint64_t(name));
    }
    for (int name = 0; name < N_STREAMS; ++name)
        streams_[size_t(name)].thread = std::thread([this, name] { serve(name); });
}

Device::~Device() {
    close();
    for (Stream& s : streams_)
        while (s.oldest) {
            const std::unique_ptr<Operation> done(s.oldest);
            s.oldest = done->next;
        }
}

void Device::check_alive() const {
    if (!stopped_.load(std::memory_order_relaxed)) return;
    std::lock_guard<std::mutex> lock(fault_mutex_);
    throw std::runtime_error(fault_);
}

/// Let nothing run from here on; the first reason stays.
void Device::stop(const std::string& fault) {
    std::lock_guard<std::mutex> lock(fault_mutex_);
    if (stopped_.load(std::memory_order_relaxed)) return;
    fault_ = fault;
    stopped_.store(1, std::memory_order_release);
    wake(stopped_);
}

void Device::close() {
    std::lock_guard<std::mutex> lock(closing_);
    stop("the device is closed");
    for (Stream& s : streams_)
        if (s.thread.joinable()) s.thread.join();
}

uintptr_t Device::allocate(int64_t n_bytes) {
    check_alive();
    return memory_.allocate(n_bytes);
}

void Device::release(uintptr_t address) {
    if (!memory_.release(address)) stop("device memory was released while a copy of it was queued");
}

bool Device::pin(uintptr_t address, int64_t n_bytes) {
    return !stopped_.load(std::memory_order_relaxed) && memory_.pin(address, n_bytes);
}

void Device::unpin(uintptr_t address) {
    if (!memory_.unpin(address)) stop("host memory was unpinned while a copy of it was queued");
}

Device::Stream& Device::stream(int name) {
    if (name < 0 || name >= N_STREAMS) throw std::invalid_argument("no such stream");
    return streams_[size_t(name)];
}

Device::Event& Device::event(int64_t id) {
    std::lock_guard<std::mutex> lock(events_mutex_);
    if (id < 0 || size_t(id) >= events_.size()) throw std::invalid_argument("no such event");
    return events_[size_t(id)];
}

// ---- the host's side -------------------------------------------------------------------------------

void Device::push(Stream& s, Operation* operation) {
    std::lock_guard<std::mutex> lock(s.queueing);
    if (operation->kind == Kind::Copy || operation->kind == Kind::Compute) {
        const auto fault = s.faults.find(s.n_works++);
        if (fault != s.faults.end()) operation->fault = fault->second;
    }
    operation->queued = now();
    Operation& before = *s.newest;
    s.newest = before.next = operation;
    // From here on the stream may free `before`: waking an address that is gone wakes nobody.
    before.linked.store(1, std::memory_order_release);
    wake(before.linked);
}

int64_t Device::copy(int name, uintptr_t target, uintptr_t source, int64_t n) {
    check_alive();
    if (name == COMPUTE || n < 0) throw std::invalid_argument("copies run in the streams of copies");
    Stream& s = stream(name);
    const bool inward = name == COPY_IN;
    auto operation = std::make_unique<Operation>();
    operation->kind = Kind::Copy;
    operation->seconds = settings_.copy_latency;
    operation->bandwidth = inward ? settings_.copy_in_bandwidth : settings_.copy_out_bandwidth;
    operation->target = target, operation->source = source, operation->n_bytes = n;
    bool blocks = false;
    if (n) {
        Run* on_device = memory_.hold(true, inward ? target : source, n);
        if (!on_device) throw std::runtime_error("a copy of device memory that is not allocated");
        Run* on_host = memory_.hold(false, inward ? source : target, n);
        blocks = !on_host;
        if (blocks && settings_.pageable_bandwidth <= 0) {
            Memory::let_go(*on_device);
            throw std::runtime_error("a copy of host memory that is not pinned");
        }
        if (blocks) operation->bandwidth = settings_.pageable_bandwidth;
        operation->to = inward ? on_device : on_host, operation->from = inward ? on_host : on_device;
    }
    push(s, operation.release());
    return blocks ? mark(name) : -1;
}

void Device::compute(double seconds, int64_t n_bytes) {
    check_alive();
    auto* operation = new Operation;
    operation->kind = Kind::Compute;
    operation->seconds = settings_.launch_latency + std::max(seconds, 0.0);
    operation->bandwidth = std::numeric_limits<double>::infinity();
    operation->n_bytes = n_bytes;
    push(streams_[COMPUTE], operation);
}

int64_t Device::mark(int name) {
    check_alive();
    Stream& s = stream(name);
    auto* operation = new Operation;
    operation->kind = Kind::Mark;
    int64_t id;
    {
        std::lock_guard<std::mutex> lock(events_mutex_);
        id = int64_t(events_.size());
        operation->event = &events_.emplace_back();
    }
    push(s, operation);
    return id;
}

void Device::follow(int name, int64_t id) {
    check_alive();
    Stream& s = stream(name);
    Event& followed = event(id);
    auto* operation = new Operation;
    operation->kind = Kind::Follow;
    operation->event = &followed;
    push(s, operation);
}

void Device::wait(int64_t id) {
    const Event& awaited = event(id);
    check_alive();
    if (!await(awaited)) check_alive();
}

bool Device::is_done(int64_t id) {
    const Event& asked = event(id);
    check_alive();
    return asked.done.load(std::memory_order_acquire) != 0;
}

void Device::synchronize() {
    std::array<int64_t, N_STREAMS> ends;
    for (int name = 0; name < N_STREAMS; ++name) ends[size_t(name)] = mark(name);
    for (const int64_t end : ends) wait(end);
}

void Device::fail(int name, int64_t nth, const std::string& message) {
    if (message.empty()) throw std::invalid_argument("a fault without a word");
    Stream& s = stream(name);
    std::lock_guard<std::mutex> lock(s.queueing);
    s.faults[nth] = message;
}

std::vector<Span> Device::spans() const {
    std::vector<Span> all;
    for (const Stream& s : streams_) {
        std::lock_guard<std::mutex> lock(s.recording);
        all.insert(all.end(), s.spans.begin(), s.spans.end());
    }
    return all;
}

// ---- the streams' side -----------------------------------------------------------------------------

void Device::serve(int name) {
    sleep_precisely();
    Stream& s = streams_[size_t(name)];
    for (;;) {
        while (!s.oldest->linked.load(std::memory_order_acquire)) {
            if (stopped_.load(std::memory_order_relaxed)) return;
            sleep_while(s.oldest->linked, 0, now() + SLICE);
        }
        const std::unique_ptr<Operation> done(s.oldest);
        s.oldest = done->next;
        if (!perform(name, *s.oldest)) return;
    }
}

/// Whether the event came to be done; false: the device stopped first.
bool Device::await(const Event& event) const {
    while (!event.done.load(std::memory_order_acquire)) {
        if (stopped_.load(std::memory_order_relaxed)) return false;
        sleep_while(event.done, 0, now() + SLICE);
    }
    return true;
}

/// False: the device has stopped.
bool Device::perform(int name, Operation& operation) {
    Stream& s = streams_[size_t(name)];
    if (operation.kind == Kind::Follow) {
        if (!await(*operation.event)) return false;
        s.end = std::max(s.end, operation.event->moment);
        return true;
    }
    const double start = std::max(s.end, operation.queued);
    if (operation.kind == Kind::Mark) {
        operation.event->moment = start;
        operation.event->done.store(1, std::memory_order_release);
        wake(operation.event->done);
        return true;
    }
    if (settings_.jitter_seconds > 0)
        operation.seconds += std::uniform_real_distribution<>(0, settings_.jitter_seconds)(s.random);
    double end = end_of(name, operation, start);
    if (name == COPY_OUT && settings_.duplex < 1) {
        std::lock_guard<std::mutex> lock(outward_mutex_);
        outward_.push_back({start, end});
        if (outward_.size() > MOST_OUTWARD) outward_.pop_front();
    }
    for (;;) {
        if (stopped_.load(std::memory_order_relaxed)) return false;
        if (now() < end)
            sleep_while(stopped_, 0, end);
        else if (const double later = end_of(name, operation, start); later > end)
            end = later;  // a copy out has begun meanwhile
        else
            break;
    }
    if (!operation.fault.empty()) {
        stop(operation.fault);
        return false;
    }
    if (operation.kind == Kind::Copy && operation.n_bytes) {
        if (settings_.moves_data)
            std::memcpy(reinterpret_cast<void*>(operation.target),
                        reinterpret_cast<const void*>(operation.source), size_t(operation.n_bytes));
        if (operation.to) Memory::let_go(*operation.to);
        if (operation.from) Memory::let_go(*operation.from);
    }
    s.end = end;
    std::lock_guard<std::mutex> lock(s.recording);
    s.spans.push_back({name, start, end, operation.n_bytes, operation.kind == Kind::Copy});
    return true;
}

/// When an operation that starts then ends, as far as is known now.
double Device::end_of(int name, const Operation& operation, double start) const {
    double at = start + operation.seconds;
    if (operation.kind != Kind::Copy) return at;
    const double alone = double(operation.n_bytes) / operation.bandwidth;
    if (name != COPY_IN || settings_.duplex >= 1) return at + alone;
    double left = alone;  // seconds at full speed
    std::lock_guard<std::mutex> lock(outward_mutex_);
    for (const auto& [begin, end] : outward_) {
        if (end <= at) continue;
        if (begin > at) {
            if (left <= begin - at) return at + left;
            left -= begin - at, at = begin;
        }
        const double done = (end - at) * settings_.duplex;
        if (left <= done) return at + left / settings_.duplex;
        left -= done, at = end;
    }
    return at + left;
}

}  // namespace fastmerge::simulate
