// One block at a time on one processor: who may run, who waits for what, and what nobody may wait for.
//
// A thread runs until it waits, so a kernel without barriers never switches stacks. Whoever runs next is
// drawn from all that can, threads not yet started included, so that nothing holds by an order of threads or
// by warps in lock step. A launch is a function of the seed alone and can be repeated.
#pragma once
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstring>
#include <deque>
#include <mutex>
#include <vector>

#include "emulate/fibre.hpp"
#include "emulate/language.hpp"

namespace fastmerge::emulate {

constexpr unsigned max_block_threads = 1024;
constexpr size_t max_shared_bytes = 227 << 10;
constexpr unsigned char garbage = 0xa5;

struct Thread;

/// A barrier or a collective. `combine` sees the lanes of a warp and gives each one in `mask` its result.
struct Call {
    const char* name;
    void (*combine)(Thread* lanes, uint32_t mask);
};

struct Place {
    const char* file;
    int line;
};

enum class State : uint8_t { Ready, AtBarrier, AtCollective, Exited };

struct Thread {
    uint3 index;
    uint32_t position;  // x fastest: position % 32 is the lane
    State state;
    Fibre* fibre;      // null until the thread first runs
    const Call* call;  // what it waits at
    Place place;
    uint32_t mask;
    int argument, width;  // of a shuffle
    uint64_t value, result;
};

struct Warp {
    uint32_t waiting, exited;  // lanes; those that the block does not have count as exited
};

struct Machine {
    // The launch.
    std::mutex one_launch;
    void (*body)(void*) = nullptr;
    void* arguments = nullptr;
    const void* kernel = nullptr;
    unsigned char* shared = nullptr;
    uint64_t seed = 0, launches = 0, random = 0;
    bool seeded = false;

    // The block.
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Thread*> ready;
    Thread* current = nullptr;
    size_t n_exited = 0;

    // Its barrier: the first to arrive stands for what the others must call.
    const Thread* first = nullptr;
    size_t n_arrived = 0;
    unsigned n_true = 0;

    std::deque<Fibre> fibres;
    std::vector<Fibre*> idle;
    Fibre host;
};

inline Machine machine;

// ---- failure: one line that says where ------------------------------------------------------------------

/// Writes the kernel's name, or its address where neither the dynamic symbols nor a sanitizer know it.
inline void name_kernel(char* out, size_t n) {
    snprintf(out, n, "%p", machine.kernel);
    Dl_info info;
    if (dladdr(machine.kernel, &info) && info.dli_sname && info.dli_saddr == machine.kernel) {
        int status = 0;
        char* plain = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
        snprintf(out, n, "%s", plain ? plain : info.dli_sname);
        free(plain);
        return;
    }
#if defined(FM_EMULATE_ASAN)
    // One on, for it takes an address to be behind the call that is asked for.
    if (machine.kernel)
        __sanitizer_symbolize_pc(static_cast<char*>(const_cast<void*>(machine.kernel)) + 1, "%f", out, n);
#endif
}

inline void write_where(char* out, size_t n) {
    char name[256] = "";
    name_kernel(name, sizeof name);
    int used = snprintf(out, n, "emulate: kernel %s, launch %llu of seed %llu", name,
                        (unsigned long long)machine.launches, (unsigned long long)machine.seed);
    if (const Thread* t = machine.current)
        snprintf(out + used, n - size_t(used), ", block (%u,%u,%u), thread (%u,%u,%u)", blockIdx.x,
                 blockIdx.y, blockIdx.z, t->index.x, t->index.y, t->index.z);
}

[[noreturn]] [[gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
    char where[512], what[1024];
    write_where(where, sizeof where);
    va_list list;
    va_start(list, format);
    vsnprintf(what, sizeof what, format, list);
    va_end(list);
    fprintf(stderr, "%s: %s\n", where, what);
    abort();
}

#if defined(FM_EMULATE_ASAN)
/// A sanitizer's report names the line; this adds the block and the thread.
inline void name_thread_at_death() {
    if (!machine.current) return;
    char where[512];
    write_where(where, sizeof where);
    fprintf(stderr, "%s: stopped by a sanitizer\n", where);
}
#endif

/// What a waiting thread waits at, for a message. `out` holds 256 characters.
inline const char* describe_wait(const Thread& t, char* out) {
    int used =
        snprintf(out, 256, "thread (%u,%u,%u) waits at %s", t.index.x, t.index.y, t.index.z, t.call->name);
    if (t.state == State::AtCollective)
        used += snprintf(out + used, size_t(256 - used), " with mask 0x%08x", t.mask);
    snprintf(out + used, size_t(256 - used), " (%.150s:%d)", t.place.file, t.place.line);
    return out;
}

/// Nobody can run and somebody waits: lists one thread for each thing that is waited for, up to four.
[[noreturn]] inline void fail_deadlock() {
    std::vector<const Thread*> shown;
    char list[1024] = "", one[256];
    machine.current = nullptr;  // no thread in particular
    for (const Thread& t : machine.threads) {
        if (t.state == State::Exited) continue;
        const bool same = std::any_of(shown.begin(), shown.end(), [&](const Thread* s) {
            return s->call == t.call && s->mask == t.mask && s->place.line == t.place.line;
        });
        if (same || shown.size() == 4) continue;
        shown.push_back(&t);
        strncat(list, shown.size() > 1 ? "; " : "", sizeof list - strlen(list) - 1);
        strncat(list, describe_wait(t, one), sizeof list - strlen(list) - 1);
    }
    fail("deadlock in block (%u,%u,%u), no thread can run: %s", blockIdx.x, blockIdx.y, blockIdx.z, list);
}

// ---- randomness: splitmix64 -----------------------------------------------------------------------------

inline uint64_t mixed(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
inline uint64_t draw() {
    return mixed(machine.random += 0x9e3779b97f4a7c15ull);
}
inline size_t draw_below(size_t n) {
    return size_t(((draw() >> 32) * n) >> 32);
}

/// Starts the schedules anew; without it they start at FASTMERGE_EMULATE_SEED, or at 1.
inline void set_seed(uint64_t seed) {
    machine.seed = seed, machine.launches = 0, machine.seeded = true;
}

// ---- who runs -------------------------------------------------------------------------------------------

inline void run_fibre();

inline Fibre* take_fibre() {
    Machine& m = machine;
    if (m.idle.empty()) {
        m.fibres.emplace_back();
        prepare_fibre(m.fibres.back(), m.fibres.size(), run_fibre);
        return &m.fibres.back();
    }
    Fibre* fibre = m.idle.back();
    m.idle.pop_back();
    return fibre;
}

inline void make_ready(Thread& t) {
    t.state = State::Ready;
    machine.ready.push_back(&t);
}

/// Gives the processor to a thread drawn from the ready ones; returns when `self` has a thread to run again.
inline void reschedule(Fibre& self) {
    Machine& m = machine;
    if (m.ready.empty()) fail_deadlock();
    Thread*& slot = m.ready[draw_below(m.ready.size())];
    Thread* next = slot;
    slot = m.ready.back();
    m.ready.pop_back();
    if (!next->fibre) next->fibre = take_fibre();
    m.current = next, threadIdx = next->index;
    if (next->fibre != &self) switch_fibre(self, *next->fibre);
}

/// Lets others go first: where memory is shared without a barrier, any order is possible.
inline void yield() {
    Thread& self = *machine.current;
    machine.ready.push_back(&self);
    reschedule(*self.fibre);
}
inline void maybe_yield() {
    if ((draw() & 7u) == 0) yield();
}

inline void finish_thread() {
    Machine& m = machine;
    Thread& self = *m.current;
    char text[256];
    if (m.n_arrived) fail("divergent barrier: exits while %s", describe_wait(*m.first, text));
    Warp& warp = m.warps[self.position / 32];
    const uint32_t lane = self.position % 32;
    for (uint32_t rest = warp.waiting; rest; rest &= rest - 1) {
        const Thread& other = m.threads[self.position - lane + uint32_t(__builtin_ctz(rest))];
        if (other.mask >> lane & 1u) fail("exits while %s, which names its lane", describe_wait(other, text));
    }
    warp.exited |= 1u << lane;
    self.state = State::Exited;
    Fibre& fibre = *self.fibre;
    m.idle.push_back(&fibre);
    if (++m.n_exited < m.threads.size()) return reschedule(fibre);
    m.current = nullptr;
    switch_fibre(fibre, m.host);
}

inline void run_fibre() {
    arrive_on_fibre(nullptr);
    for (;;) {
        machine.body(machine.arguments);
        finish_thread();
    }
}

// ---- waiting --------------------------------------------------------------------------------------------

/// Waits for all threads of the block; returns how many of them brought a predicate that holds.
inline uint64_t barrier(const Call& call, bool predicate, Place place) {
    Machine& m = machine;
    Thread& self = *m.current;
    self.call = &call, self.place = place, self.mask = 0, self.state = State::AtBarrier;
    char text[256];
    if (m.n_exited)
        fail("divergent barrier: %u threads of the block have exited, %s", unsigned(m.n_exited),
             describe_wait(self, text));
    if (!m.n_arrived) m.first = &self, m.n_true = 0;
    const Place other = m.first->place;
    if (m.first->call != &call || other.line != place.line || strcmp(other.file, place.file) != 0)
        fail("divergent barrier: %s (%s:%d), but %s", call.name, place.file, place.line,
             describe_wait(*m.first, text));
    m.n_true += predicate;
    if (++m.n_arrived == m.threads.size()) {
        m.n_arrived = 0;
        for (Thread& t : m.threads) t.result = m.n_true, make_ready(t);
    }
    reschedule(*self.fibre);
    return self.result;
}

/// Waits for all lanes in `mask`, which must make the same call with the same mask; returns the own result.
inline uint64_t collect(const Call& call, uint32_t mask, uint64_t value, int argument, int width,
                        Place place) {
    Machine& m = machine;
    Thread& self = *m.current;
    const uint32_t lane = self.position % 32;
    Thread* lanes = &self - lane;
    Warp& warp = m.warps[self.position / 32];
    self.call = &call, self.place = place, self.mask = mask, self.state = State::AtCollective;
    self.value = value, self.argument = argument, self.width = width;
    char text[256];
    if (!(mask >> lane & 1u)) fail("lane %u is not in its own mask: %s", lane, describe_wait(self, text));
    if (warp.exited & mask)
        fail("mask names lane %d, which has exited or is outside the block: %s",
             __builtin_ctz(warp.exited & mask), describe_wait(self, text));
    warp.waiting |= 1u << lane;
    bool all = (warp.waiting & mask) == mask;
    if (const uint32_t others = warp.waiting & mask & ~(1u << lane)) {
        const Thread& other = lanes[__builtin_ctz(others)];
        if (other.mask == mask && other.call != &call)
            fail("different collectives with one mask: %s (%s:%d), but %s", call.name, place.file, place.line,
                 describe_wait(other, text));
    }
    for (uint32_t rest = all ? mask : 0u; rest; rest &= rest - 1)
        all &=
            lanes[__builtin_ctz(rest)].mask == mask;  // another mask: that lane has business elsewhere first
    if (all) {
        call.combine(lanes, mask);
        warp.waiting &= ~mask;
        for (uint32_t rest = mask; rest; rest &= rest - 1) make_ready(lanes[__builtin_ctz(rest)]);
    }
    reschedule(*self.fibre);
    return self.result;
}

// ---- a launch -------------------------------------------------------------------------------------------

inline void run_block(uint3 block) {
    Machine& m = machine;
    const uint32_t n = uint32_t(m.threads.size());
    m.n_exited = m.n_arrived = 0;
    m.ready.clear();
    for (uint32_t w = 0; w < m.warps.size(); ++w)
        m.warps[w] = {0u, n - w * 32 < 32 ? ~0u << (n - w * 32) : 0u};
    for (Thread& t : m.threads) t.fibre = nullptr, make_ready(t);
    blockIdx = block;
    reschedule(m.host);
}

inline void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
    const size_t n = size_t(block.x) * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        fail("grid (%u,%u,%u) is outside [1, 2^31-1] x [1, 65535] x [1, 65535]", grid.x, grid.y, grid.z);
    if (!n || n > max_block_threads || block.z > 64)
        fail("block (%u,%u,%u) must have 1 to %u threads, at most 64 in z", block.x, block.y, block.z,
             max_block_threads);
    if (shared_bytes > max_shared_bytes)
        fail("%zu bytes of shared memory, more than the %zu that a block can have", shared_bytes,
             max_shared_bytes);
}

/// Sets the schedule's seed and the name that a failure of the launch goes by.
inline void start_launch(const void* kernel) {
    Machine& m = machine;
    if (!m.seeded) {
        const char* text = getenv("FASTMERGE_EMULATE_SEED");
        set_seed(text ? strtoull(text, nullptr, 0) : 1);
#if defined(FM_EMULATE_ASAN)
        __sanitizer_set_death_callback(name_thread_at_death);
#endif
    }
    m.kernel = kernel;
    m.current = nullptr;
    m.random = mixed(mixed(m.seed) + m.launches);
}

/// Runs a whole grid, blocks one after another in a random order.
inline void run_grid(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                     void* arguments) {
    Machine& m = machine;
    const std::lock_guard<std::mutex> lock(m.one_launch);
    start_launch(kernel);
    check_launch(grid, block, shared_bytes);
    m.body = body, m.arguments = arguments;
    // Exactly the launched size, so that the address sanitizer sees an access one byte behind it.
    m.shared = shared_bytes ? static_cast<unsigned char*>(malloc(shared_bytes)) : nullptr;

    m.threads.assign(size_t(block.x) * block.y * block.z, Thread{});
    m.warps.resize((m.threads.size() + 31) / 32);
    m.ready.reserve(m.threads.size());
    for (uint32_t i = 0; i < m.threads.size(); ++i)
        m.threads[i].position = i,
        m.threads[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    blockDim = block, gridDim = grid;

    std::vector<uint64_t> order(size_t(grid.x) * grid.y * grid.z);
    for (size_t i = 0; i < order.size(); ++i) {  // a shuffle from inside out
        const size_t j = draw_below(i + 1);
        order[i] = order[j], order[j] = i;
    }
    for (const uint64_t b : order) {
        if (m.shared) memset(m.shared, garbage, shared_bytes);
        run_block({unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)});
    }
    free(m.shared);
    m.shared = nullptr;
    ++m.launches;
}

/// Where a block's dynamic shared memory starts; aligned to 16, as FM_SHARED promises on CUDA.
inline void* shared_memory(size_t alignment) {
    if (alignment > 16) fail("shared memory is aligned to 16 bytes, not to %zu", alignment);
    return machine.shared;
}

}  // namespace fastmerge::emulate
