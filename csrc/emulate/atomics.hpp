// Atomics: plain operations, before and after which others may come between. A counter read and written
// beside an atomic, or published before what it counts, shows as a wrong result. Overloads as CUDA has them
// (no `unsigned long`: such code would not compile there either).
#pragma once
#include "emulate/intrinsics.hpp"
#include "emulate/machine.hpp"

namespace fastmerge::emulate {

/// Replaces *p by next(*p) and returns what was there.
template <class T, class Next>
T atomically(T* p, Next next) {
    check_alignment(p, sizeof(T), "an atomic");
    maybe_yield();
    const T old = *p;
    *p = next(old);
    maybe_yield();
    return old;
}

}  // namespace fastmerge::emulate

#define FM_EMULATE_ATOMIC(name, T, expression)                                            \
    inline T name(T* p, T v) {                                                            \
        return fastmerge::emulate::atomically(p, [v](T old) -> T { return expression; }); \
    }

// Signed sums wrap on CUDA.
FM_EMULATE_ATOMIC(atomicAdd, int, int(unsigned(old) + unsigned(v)))
FM_EMULATE_ATOMIC(atomicAdd, unsigned, old + v)
FM_EMULATE_ATOMIC(atomicAdd, unsigned long long, old + v)
FM_EMULATE_ATOMIC(atomicAdd, float, old + v)
FM_EMULATE_ATOMIC(atomicAdd, double, old + v)
FM_EMULATE_ATOMIC(atomicSub, int, int(unsigned(old) - unsigned(v)))
FM_EMULATE_ATOMIC(atomicSub, unsigned, old - v)
FM_EMULATE_ATOMIC(atomicInc, unsigned, old >= v ? 0u : old + 1)
FM_EMULATE_ATOMIC(atomicDec, unsigned, old == 0 || old > v ? v : old - 1)

FM_EMULATE_ATOMIC(atomicExch, int, (void(old), v))
FM_EMULATE_ATOMIC(atomicExch, unsigned, (void(old), v))
FM_EMULATE_ATOMIC(atomicExch, unsigned long long, (void(old), v))
FM_EMULATE_ATOMIC(atomicExch, float, (void(old), v))

FM_EMULATE_ATOMIC(atomicMin, int, old < v ? old : v)
FM_EMULATE_ATOMIC(atomicMin, unsigned, old < v ? old : v)
FM_EMULATE_ATOMIC(atomicMin, long long, old < v ? old : v)
FM_EMULATE_ATOMIC(atomicMin, unsigned long long, old < v ? old : v)
FM_EMULATE_ATOMIC(atomicMax, int, old > v ? old : v)
FM_EMULATE_ATOMIC(atomicMax, unsigned, old > v ? old : v)
FM_EMULATE_ATOMIC(atomicMax, long long, old > v ? old : v)
FM_EMULATE_ATOMIC(atomicMax, unsigned long long, old > v ? old : v)

FM_EMULATE_ATOMIC(atomicAnd, int, old& v)
FM_EMULATE_ATOMIC(atomicAnd, unsigned, old& v)
FM_EMULATE_ATOMIC(atomicAnd, unsigned long long, old& v)
FM_EMULATE_ATOMIC(atomicOr, int, old | v)
FM_EMULATE_ATOMIC(atomicOr, unsigned, old | v)
FM_EMULATE_ATOMIC(atomicOr, unsigned long long, old | v)
FM_EMULATE_ATOMIC(atomicXor, int, old ^ v)
FM_EMULATE_ATOMIC(atomicXor, unsigned, old ^ v)
FM_EMULATE_ATOMIC(atomicXor, unsigned long long, old ^ v)
#undef FM_EMULATE_ATOMIC

#define FM_EMULATE_CAS(T)                                                                               \
    inline T atomicCAS(T* p, T compare, T v) {                                                          \
        return fastmerge::emulate::atomically(p, [=](T old) -> T { return old == compare ? v : old; }); \
    }
FM_EMULATE_CAS(int)
FM_EMULATE_CAS(unsigned)
FM_EMULATE_CAS(unsigned long long)
FM_EMULATE_CAS(unsigned short)
#undef FM_EMULATE_CAS
