// Element types, exact widening to the compute type, and the one rounding at the store.
//
// Everything here is branch-free on the hot path so that loops over 64 elements vectorise, and uses integer
// arithmetic for the narrow types so that every instruction set and device gives the same bits
// (hardware bf16 conversions flush subnormals on some machines).
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FM_HD __host__ __device__
#define FM_UNROLL _Pragma("unroll")    // what an index into registers needs
#define FM_ROLLED _Pragma("unroll 1")  // where copies of a body would be too many, or take too many registers
#else
#define FM_HD
#define FM_UNROLL
#define FM_ROLLED
#endif

// Compiled once per instruction set: the namespace keeps the linker from sharing one copy of an inline
// function between levels, which would run AVX-512 code on a machine without it.
#ifndef FM_ISA
#define FM_ISA generic
#endif

namespace fastmerge {

/// Coded: a pointer to elements of this type is one to a `Coded` (core/four_bit/format.hpp).
enum class DType : int32_t { F64 = 0, F32 = 1, F16 = 2, BF16 = 3, Coded = 4 };

FM_HD inline int itemsize(DType t) {
    return t == DType::F64 ? 8 : t == DType::F32 ? 4 : 2;
}

namespace FM_ISA {

template <class To, class From>
FM_HD inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

FM_HD inline float bf16_to_float(uint16_t h) {
    return bit_cast<float>(uint32_t(h) << 16);
}

FM_HD inline float half_to_float(uint16_t h) {
#if defined(__CUDA_ARCH__)
    float exact;  // one instruction where the device has it; subnormals are kept
    asm("cvt.f32.f16 %0, %1;" : "=f"(exact) : "h"(h));
    return exact;
#endif
    // Scaling by 2^112 moves fp16's exponent bias to fp32's and normalises subnormals exactly.
    const uint32_t magnitude = uint32_t(h & 0x7fffu) << 13;
    const float scaled = bit_cast<float>(magnitude) * 5.192296858534828e33f;  // 2^112
    const uint32_t special = (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return bit_cast<float>((bit_cast<uint32_t>(scaled) | special) | (uint32_t(h & 0x8000u) << 16));
}

FM_HD inline uint16_t float_to_bf16(float f) {
    const uint32_t u = bit_cast<uint32_t>(f);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t nan = ((u >> 16) & 0x8000u) | 0x7fc0u;
    return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

FM_HD inline uint16_t float_to_half(float f) {
    const uint32_t u = bit_cast<uint32_t>(f);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t magnitude = u & 0x7fffffffu;
    // Normal: rebias by subtraction, add the rounding increment of the 13 dropped bits.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal: adding 0.5 aligns the mantissa so that the float addition rounds to nearest-even.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t out = magnitude < 0x38800000u ? subnormal : normal;
    out = magnitude >= 0x477ff000u ? 0x7c00u : out;  // 65520 and above overflow
    out = magnitude > 0x7f800000u ? 0x7e00u : out;
    return uint16_t(sign | out);
}

// float64 to float32 by round-to-odd: a following rounding to 16 bits is then a single one.
FM_HD inline float double_to_odd_float(double x) {
    const float f = float(x);
    const double back = double(f);
    uint32_t u = bit_cast<uint32_t>(f);
    const bool inexact = back != x && x == x;
    const bool grow = (x < 0 ? -x : x) > (back < 0 ? -back : back);
    if (inexact && (u & 1u) == 0) {
        if ((u & 0x7fffffffu) == 0)
            u = (x < 0 ? 0x80000000u : 0u) | 1u;
        else
            u += grow ? 1u : 0xffffffffu;
    }
    return bit_cast<float>(u);
}

FM_HD inline float canonical(float f) {
    const uint32_t u = bit_cast<uint32_t>(f);
    return bit_cast<float>((u & 0x7fffffffu) > 0x7f800000u ? (u & 0x80000000u) | 0x7fc00000u : u);
}
FM_HD inline double canonical(double f) {
    const uint64_t u = bit_cast<uint64_t>(f), magnitude = u & 0x7fffffffffffffffull;
    return bit_cast<double>(
        magnitude > 0x7ff0000000000000ull ? (u & 0x8000000000000000ull) | 0x7ff8000000000000ull : u);
}

// ---- keys: |x| as an unsigned integer, monotone in |x| -------------------------------------------------

template <class Real>
struct KeyOf;
template <>
struct KeyOf<float> {
    using type = uint32_t;
    using signed_type = int32_t;
    static constexpr uint32_t mask = 0x7fffffffu, inf = 0x7f800000u;
};
template <>
struct KeyOf<double> {
    using type = uint64_t;
    using signed_type = int64_t;
    static constexpr uint64_t mask = 0x7fffffffffffffffull, inf = 0x7ff0000000000000ull;
};
template <class Real>
using Key = typename KeyOf<Real>::type;

template <class Real>
FM_HD inline Key<Real> key_of(Real x) {
    return bit_cast<Key<Real>>(x) & KeyOf<Real>::mask;
}

/// The key that order statistics, cuts and maxima compare: all NaNs are equal and largest. Payloads must not
/// decide an order: hardware conversions differ in them.
template <class Real>
FM_HD inline Key<Real> order_key(Real x) {
    const Key<Real> k = key_of(x), nan = KeyOf<Real>::inf + 1;
    return k < nan ? k : nan;
}

template <class Real>
FM_HD inline Real absolute(Real x) {
    return bit_cast<Real>(key_of(x));
}

// ---- loads and stores of a run of elements -------------------------------------------------------------

template <class Real>
FM_HD inline void load_run(const void* p, DType t, int64_t first, int m, Real* out) {
    switch (t) {
        case DType::F64: {
            const double* q = static_cast<const double*>(p) + first;
            for (int j = 0; j < m; ++j) out[j] = Real(q[j]);
            break;
        }
        case DType::F32: {
            const float* q = static_cast<const float*>(p) + first;
            for (int j = 0; j < m; ++j) out[j] = Real(q[j]);
            break;
        }
        case DType::F16: {
            const uint16_t* q = static_cast<const uint16_t*>(p) + first;
            for (int j = 0; j < m; ++j) out[j] = Real(half_to_float(q[j]));
            break;
        }
        case DType::BF16: {
            const uint16_t* q = static_cast<const uint16_t*>(p) + first;
            for (int j = 0; j < m; ++j) out[j] = Real(bf16_to_float(q[j]));
            break;
        }
        case DType::Coded:
            break;  // load_block's
    }
}

FM_HD inline float for_narrow(float x) {
    return x;
}
FM_HD inline float for_narrow(double x) {
    return double_to_odd_float(x);
}

template <class Real>
FM_HD inline void store_run(const Real* in, void* p, DType t, int64_t first, int m) {
    switch (t) {
        case DType::F64: {
            double* q = static_cast<double*>(p) + first;
            for (int j = 0; j < m; ++j) q[j] = canonical(double(in[j]));
            break;
        }
        case DType::F32: {
            float* q = static_cast<float*>(p) + first;
            for (int j = 0; j < m; ++j) q[j] = canonical(float(in[j]));
            break;
        }
        case DType::F16: {
            uint16_t* q = static_cast<uint16_t*>(p) + first;
            for (int j = 0; j < m; ++j) q[j] = float_to_half(for_narrow(in[j]));
            break;
        }
        case DType::BF16: {
            uint16_t* q = static_cast<uint16_t*>(p) + first;
            for (int j = 0; j < m; ++j) q[j] = float_to_bf16(for_narrow(in[j]));
            break;
        }
        case DType::Coded:
            break;  // encode_tile's
    }
}

}  // namespace FM_ISA
}  // namespace fastmerge
