// Integer, floating-point and memory intrinsics.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulate/machine.hpp"

namespace fastmerge::emulate {

/// Vector accesses trap on CUDA where they are not naturally aligned; here they say so.
inline void check_alignment(const void* p, size_t alignment, const char* what) {
    if (reinterpret_cast<uintptr_t>(p) % alignment)
        fail("misaligned address %p of %s of %zu bytes", p, what, alignment);
}

// By copy: a pointer cast to a vector type must not let the compiler assume that no float lies there. The
// pointer's type carries its alignment, so the copy goes by an untyped one and the check speaks first.
template <class T>
T load(const T* p) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16, "an access is 1 to 16 bytes wide");
    const void* from = p;
    check_alignment(from, sizeof(T), "a load");
    T value;
    memcpy(&value, from, sizeof(T));
    return value;
}
template <class T>
void store(T* p, const T& value) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16, "an access is 1 to 16 bytes wide");
    void* to = p;
    check_alignment(to, sizeof(T), "a store");
    memcpy(to, &value, sizeof(T));
}

/// A value that the compiler cannot see through: keeps it from contracting a product and a sum into one
/// rounding, whatever -ffp-contract says.
template <class Real>
Real rounded(Real x) {
#if defined(__x86_64__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
}

template <class To, class From>
To reinterpret(From from) {
    static_assert(sizeof(To) == sizeof(From), "equal sizes");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

template <class T>
struct Just {
    using type = T;
};

}  // namespace fastmerge::emulate

// ---- integers -------------------------------------------------------------------------------------------

inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
    return __builtin_popcountll(x);
}
inline int __clz(int x) {
    return x ? __builtin_clz(unsigned(x)) : 32;
}
inline int __clzll(long long x) {
    return x ? __builtin_clzll((unsigned long long)x) : 64;
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
    return __builtin_ffsll(x);
}
inline unsigned __brev(unsigned x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}
inline unsigned long long __brevll(unsigned long long x) {
    return (unsigned long long)__brev(unsigned(x)) << 32 | __brev(unsigned(x >> 32));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return unsigned((unsigned long long)a * b >> 32);
}
inline int __mulhi(int a, int b) {
    return int((long long)a * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    __extension__ using Wide = unsigned __int128;
    return (unsigned long long)((Wide)a * b >> 64);
}
/// Each of the four lower nibbles of `selector` picks one of the eight bytes of (y:x).
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    // The hardware would copy a sign, the documentation knows three bits only: no kernel should rely on
    // either.
    if (selector & 0x8888u)
        fastmerge::emulate::fail("__byte_perm: selector 0x%04x names a byte above 7", selector);
    const unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) out |= unsigned(bytes >> 8 * (selector >> 4 * i & 7u) & 0xffu) << 8 * i;
    return out;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned((((unsigned long long)high << 32 | low) << (shift & 31u)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)high << 32 | low) >> (shift & 31u));
}

// As CUDA mixes them: equal widths of either sign meet as unsigned; all else is ambiguous.
#define FM_EMULATE_EXTREMES(Result, A, B)          \
    inline Result min(A a, B b) {                  \
        const Result x = (Result)a, y = (Result)b; \
        return x < y ? x : y;                      \
    }                                              \
    inline Result max(A a, B b) {                  \
        const Result x = (Result)a, y = (Result)b; \
        return x > y ? x : y;                      \
    }
#define FM_EMULATE_EXTREMES_OF(Signed, Unsigned)      \
    FM_EMULATE_EXTREMES(Signed, Signed, Signed)       \
    FM_EMULATE_EXTREMES(Unsigned, Unsigned, Unsigned) \
    FM_EMULATE_EXTREMES(Unsigned, Signed, Unsigned)   \
    FM_EMULATE_EXTREMES(Unsigned, Unsigned, Signed)
FM_EMULATE_EXTREMES_OF(int, unsigned)
FM_EMULATE_EXTREMES_OF(long, unsigned long)
FM_EMULATE_EXTREMES_OF(long long, unsigned long long)
#undef FM_EMULATE_EXTREMES_OF
#undef FM_EMULATE_EXTREMES

// Of floats, the one that is no NaN.
inline float min(float a, float b) {
    return fminf(a, b);
}
inline float max(float a, float b) {
    return fmaxf(a, b);
}
inline double min(double a, double b) {
    return fmin(a, b);
}
inline double max(double a, double b) {
    return fmax(a, b);
}

// ---- floating point: rounded to nearest even after each operation ---------------------------------------

#define FM_EMULATE_ARITHMETIC(Real, prefix)        \
    inline Real prefix##add_rn(Real a, Real b) {   \
        return fastmerge::emulate::rounded(a + b); \
    }                                              \
    inline Real prefix##sub_rn(Real a, Real b) {   \
        return fastmerge::emulate::rounded(a - b); \
    }                                              \
    inline Real prefix##mul_rn(Real a, Real b) {   \
        return fastmerge::emulate::rounded(a * b); \
    }                                              \
    inline Real prefix##div_rn(Real a, Real b) {   \
        return fastmerge::emulate::rounded(a / b); \
    }                                              \
    inline Real prefix##sqrt_rn(Real a) {          \
        return std::sqrt(a);                       \
    }                                              \
    inline Real prefix##rcp_rn(Real a) {           \
        return Real(1) / a;                        \
    }
FM_EMULATE_ARITHMETIC(float, __f)
FM_EMULATE_ARITHMETIC(double, __d)
#undef FM_EMULATE_ARITHMETIC

inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline double __fma_rn(double a, double b, double c) {
    return std::fma(a, b, c);
}

inline unsigned __float_as_uint(float x) {
    return fastmerge::emulate::reinterpret<unsigned>(x);
}
inline float __uint_as_float(unsigned x) {
    return fastmerge::emulate::reinterpret<float>(x);
}
inline int __float_as_int(float x) {
    return fastmerge::emulate::reinterpret<int>(x);
}
inline float __int_as_float(int x) {
    return fastmerge::emulate::reinterpret<float>(x);
}
inline long long __double_as_longlong(double x) {
    return fastmerge::emulate::reinterpret<long long>(x);
}
inline double __longlong_as_double(long long x) {
    return fastmerge::emulate::reinterpret<double>(x);
}

// ---- memory: hints mean nothing here, alignment does ----------------------------------------------------

template <class T>
T __ldg(const T* p) {
    return fastmerge::emulate::load(p);
}
template <class T>
T __ldcs(const T* p) {
    return fastmerge::emulate::load(p);
}
template <class T>
T __ldcg(const T* p) {
    return fastmerge::emulate::load(p);
}
template <class T>
void __stcs(T* p, typename fastmerge::emulate::Just<T>::type value) {
    fastmerge::emulate::store(p, value);
}
template <class T>
void __stcg(T* p, typename fastmerge::emulate::Just<T>::type value) {
    fastmerge::emulate::store(p, value);
}

[[noreturn]] inline void __trap(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    fastmerge::emulate::fail("__trap (%s:%d)", file, line);
}
