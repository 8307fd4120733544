// Barriers and warp collectives. Each takes the place of its call as a hidden last argument, for messages.
#pragma once
#include <type_traits>

#include "emulate/machine.hpp"

#define FM_EMULATE_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace fastmerge::emulate {

constexpr uint32_t all_lanes = 0xffffffffu;

// ---- values travel as 64 bits ---------------------------------------------------------------------------

template <class T>
uint64_t to_word(T value) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                  "warp collectives take 32- and 64-bit integers, float and double");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof value);
    return word;
}
template <class T>
T from_word(uint64_t word) {
    T value;
    memcpy(&value, &word, sizeof value);
    return value;
}

// ---- what a warp computes -------------------------------------------------------------------------------

/// Calls `each(lane number, lane)` for the lanes in `mask`.
template <class Each>
void for_lanes(Thread* lanes, uint32_t mask, Each each) {
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        const int i = __builtin_ctz(rest);
        each(i, lanes[i]);
    }
}

/// `source(lane, argument, first and last lane of its segment)` is the lane to read, or -1 for the own value.
/// A lane outside the mask has no value: garbage, other garbage each time.
template <int (*source)(int, int, int, int)>
void shuffle(Thread* lanes, uint32_t mask) {
    for_lanes(lanes, mask, [&](int i, Thread& t) {
        const int first = i & ~(t.width - 1), last = first + t.width - 1;
        const int from = source(i, t.argument & 31, first, last);
        if (from < 0)
            t.result = t.value;
        else
            t.result = mask >> from & 1u ? lanes[from].value : draw();
    });
}

inline int from_index(int, int argument, int first, int last) {
    return first + (argument & (last - first));
}
inline int from_above(int lane, int argument, int, int last) {
    return lane + argument <= last ? lane + argument : -1;
}
inline int from_below(int lane, int argument, int first, int) {
    return lane - argument >= first ? lane - argument : -1;
}
inline int from_partner(int lane, int argument, int, int last) {
    return (lane ^ argument) <= last ? lane ^ argument
                                     : -1;  // an earlier segment may be read, a later may not
}

inline void vote(Thread* lanes, uint32_t mask) {
    uint64_t ballot = 0;
    for_lanes(lanes, mask, [&](int i, Thread& t) { ballot |= uint64_t(t.value != 0) << i; });
    for_lanes(lanes, mask, [&](int, Thread& t) { t.result = ballot; });
}

inline void match(Thread* lanes, uint32_t mask) {
    for_lanes(lanes, mask, [&](int, Thread& t) {
        t.result = 0;
        for_lanes(lanes, mask, [&](int i, Thread& u) { t.result |= uint64_t(t.value == u.value) << i; });
    });
}

template <class T, class Combine>
void reduce(Thread* lanes, uint32_t mask) {
    T total = from_word<T>(lanes[__builtin_ctz(mask)].value);
    for_lanes(lanes, mask & (mask - 1),
              [&](int, Thread& t) { total = Combine()(total, from_word<T>(t.value)); });
    for_lanes(lanes, mask, [&](int, Thread& t) { t.result = to_word(total); });
}

inline void nothing(Thread*, uint32_t) {}

inline constexpr Call syncthreads{"__syncthreads", nullptr}, syncthreads_or{"__syncthreads_or", nullptr},
    syncthreads_and{"__syncthreads_and", nullptr}, syncthreads_count{"__syncthreads_count", nullptr},
    syncwarp{"__syncwarp", nothing}, shfl{"__shfl_sync", shuffle<from_index>},
    shfl_up{"__shfl_up_sync", shuffle<from_below>}, shfl_down{"__shfl_down_sync", shuffle<from_above>},
    shfl_xor{"__shfl_xor_sync", shuffle<from_partner>}, ballot{"__ballot_sync", vote},
    any{"__any_sync", vote}, all{"__all_sync", vote}, match_any{"__match_any_sync", match};

template <class T>
T shuffled(const Call& call, uint32_t mask, T value, int argument, int width, Place place) {
    if (width < 1 || width > warpSize || (width & (width - 1)))
        fail("%s (%s:%d): width %d is no power of two from 1 to 32", call.name, place.file, place.line,
             width);
    return from_word<T>(collect(call, mask, to_word(value), argument, width, place));
}

}  // namespace fastmerge::emulate

// ---- the block ------------------------------------------------------------------------------------------

inline void __syncthreads(FM_EMULATE_PLACE) {
    fastmerge::emulate::barrier(fastmerge::emulate::syncthreads, false, {file, line});
}
inline int __syncthreads_or(int predicate, FM_EMULATE_PLACE) {
    return fastmerge::emulate::barrier(fastmerge::emulate::syncthreads_or, predicate != 0, {file, line}) != 0;
}
inline int __syncthreads_and(int predicate, FM_EMULATE_PLACE) {
    return fastmerge::emulate::barrier(fastmerge::emulate::syncthreads_and, predicate == 0, {file, line}) ==
           0;
}
inline int __syncthreads_count(int predicate, FM_EMULATE_PLACE) {
    return int(
        fastmerge::emulate::barrier(fastmerge::emulate::syncthreads_count, predicate != 0, {file, line}));
}

// ---- the warp -------------------------------------------------------------------------------------------

inline void __syncwarp(unsigned mask = fastmerge::emulate::all_lanes, FM_EMULATE_PLACE) {
    fastmerge::emulate::collect(fastmerge::emulate::syncwarp, mask, 0, 0, 0, {file, line});
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, FM_EMULATE_PLACE) {
    return fastmerge::emulate::shuffled(fastmerge::emulate::shfl, mask, value, lane, width, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, FM_EMULATE_PLACE) {
    return fastmerge::emulate::shuffled(fastmerge::emulate::shfl_up, mask, value, int(delta), width,
                                        {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, FM_EMULATE_PLACE) {
    return fastmerge::emulate::shuffled(fastmerge::emulate::shfl_down, mask, value, int(delta), width,
                                        {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, FM_EMULATE_PLACE) {
    return fastmerge::emulate::shuffled(fastmerge::emulate::shfl_xor, mask, value, lane_mask, width,
                                        {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, FM_EMULATE_PLACE) {
    using namespace fastmerge::emulate;
    return unsigned(collect(ballot, mask, predicate != 0, 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, FM_EMULATE_PLACE) {
    using namespace fastmerge::emulate;
    return collect(any, mask, predicate != 0, 0, 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FM_EMULATE_PLACE) {
    using namespace fastmerge::emulate;
    return collect(all, mask, predicate == 0, 0, 0, {file, line}) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, FM_EMULATE_PLACE) {
    using namespace fastmerge::emulate;
    static_assert(std::is_integral_v<T>, "compared are the bits of integers");
    return unsigned(collect(match_any, mask, to_word(value), 0, 0, {file, line}));
}

// sm_80 and later reduce 32-bit integers over a warp in one instruction.
#define FM_EMULATE_REDUCE(T, name, expression)                                        \
    inline T __reduce_##name##_sync(unsigned mask, T value, FM_EMULATE_PLACE) {       \
        using namespace fastmerge::emulate;                                           \
        struct Combine {                                                              \
            T operator()(T a, T b) const { return expression; }                       \
        };                                                                            \
        static constexpr Call call{"__reduce_" #name "_sync", reduce<T, Combine>};    \
        return from_word<T>(collect(call, mask, to_word(value), 0, 0, {file, line})); \
    }
FM_EMULATE_REDUCE(unsigned, add, a + b)
FM_EMULATE_REDUCE(unsigned, min, a < b ? a : b)
FM_EMULATE_REDUCE(unsigned, max, a > b ? a : b)
FM_EMULATE_REDUCE(unsigned, and, a& b)
FM_EMULATE_REDUCE(unsigned, or, a | b)
FM_EMULATE_REDUCE(unsigned, xor, a ^ b)
FM_EMULATE_REDUCE(int, add, int(unsigned(a) + unsigned(b)))
FM_EMULATE_REDUCE(int, min, a < b ? a : b)
FM_EMULATE_REDUCE(int, max, a > b ? a : b)
#undef FM_EMULATE_REDUCE

/// Which lanes are together is the scheduler's affair: no kernel may ask.
inline unsigned __activemask(FM_EMULATE_PLACE) {
    fastmerge::emulate::fail("__activemask (%s:%d) says nothing that may be relied on; pass masks along",
                             file, line);
}

// Memory is sequentially consistent here; a fence is only a place where others may come between.
inline void __threadfence_block() {
    fastmerge::emulate::maybe_yield();
}
inline void __threadfence() {
    fastmerge::emulate::maybe_yield();
}
inline void __threadfence_system() {
    fastmerge::emulate::maybe_yield();
}
inline void __nanosleep(unsigned) {
    fastmerge::emulate::yield();
}
