// Arithmetic of one element or, on the host, of a register of them: formats are written once, over both.
//
// V is float or Floats, its integers int32_t or Ints. Every operation is rounded once and is the same in
// each.
#pragma once
#include <cmath>

#include "core/four_bit/format.hpp"
#if !defined(FM_GPU)
#define FM_LANES 1
#include "core/four_bit/lanes.hpp"
#endif

// What loops over elements are made of has to be inlined, lambdas too.
#if defined(__CUDACC__)
#define FM_EACH FM_HD __forceinline__
#define FM_EACH_LAMBDA
#else
#define FM_EACH __attribute__((always_inline)) inline
#define FM_EACH_LAMBDA __attribute__((always_inline))
#endif

// Coding is the work of one thread on the host; on a GPU, of a team, whose lanes all run through it and share
// out the elements. FM_APART: what takes many registers, none of them its caller's.
#if defined(FM_GPU) && defined(__CUDACC__)
#define FM_TEAM __device__
#define FM_EACH_TEAM __device__ __forceinline__
#define FM_APART __device__ __noinline__
#else
#define FM_TEAM
#define FM_EACH_TEAM FM_EACH
#define FM_APART
#endif

namespace fastmerge {
namespace FM_ISA {

FM_EACH int32_t as_int(float x) {
    return bit_cast<int32_t>(x);
}
FM_EACH float as_float(int32_t bits) {
    return bit_cast<float>(bits);
}
FM_EACH float to_float(int32_t n) {
    return float(n);
}
/// Towards zero.
FM_EACH int32_t truncated(float x) {
    return int32_t(x);
}
/// The larger, `b` if either is NaN.
FM_EACH float larger(float a, float b) {
    return a > b ? a : b;
}
FM_EACH float smaller(float a, float b) {
    return a < b ? a : b;
}
FM_EACH int32_t larger(int32_t a, int32_t b) {
    return a > b ? a : b;
}
FM_EACH float root_of(float x) {
    return sqrtf(x);
}
/// v > t ? yes : no
FM_EACH float if_above(float v, float t, float yes, float no) {
    return v > t ? yes : no;
}
FM_EACH int32_t if_above(float v, float t, int32_t yes, int32_t no) {
    return v > t ? yes : no;
}
/// n, and k more where v > t.
FM_EACH int32_t plus_if_above(int32_t n, float v, float t, int32_t k = 1) {
    return n + (v > t ? k : 0);
}

template <DType T>
FM_EACH float rounded_to(float x) {
    if constexpr (T == DType::F16) return half_to_float(float_to_half(x));
    if constexpr (T == DType::BF16) return bf16_to_float(float_to_bf16(x));
    return x;
}

FM_EACH float rounded_to(DType t, float x) {
    return t == DType::F16 ? rounded_to<DType::F16>(x) : t == DType::BF16 ? rounded_to<DType::BF16>(x) : x;
}

#if defined(FM_LANES)
FM_EACH Floats spread(float x) {
    return x - Floats{};
}
FM_EACH Floats spread(Floats x) {
    return x;
}
FM_EACH Ints as_int(Floats x) {
    return Ints(x);
}
FM_EACH Floats as_float(Ints bits) {
    return Floats(bits);
}
FM_EACH Floats to_float(Ints n) {
    return __builtin_convertvector(n, Floats);
}
FM_EACH Ints truncated(Floats x) {
    return __builtin_convertvector(x, Ints);
}
FM_EACH Floats larger(Floats a, float b) {
    return larger(a, spread(b));
}
FM_EACH Floats smaller(Floats a, float b) {
    return smaller(a, spread(b));
}
FM_EACH Floats root_of(Floats x) {
    for (int j = 0; j < LANES; ++j) x[j] = sqrtf(x[j]);
    return x;
}
template <class T, class Yes, class No>
FM_EACH Floats if_above(Floats v, T t, Yes yes, No no) {
    return where(below(spread(t), v), spread(yes), spread(no));
}
FM_EACH Ints if_above(Floats v, Floats t, Ints yes, Ints no) {
    return where(below(t, v), yes, no);
}
FM_EACH Ints if_above(Floats v, float t, int32_t yes, Ints no) {
    return where(below(spread(t), v), yes - Ints{}, no);
}
FM_EACH Ints plus_if_above(Ints n, Floats v, float t, int32_t k = 1) {
    return plus_where(n, below(spread(t), v), k);
}

/// As float_to_half and back.
FM_EACH Floats half_rounded(Floats x) {
    const Words u = Words(x), magnitude = u & 0x7fffffffu;
    const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Words subnormal = Words(Floats(magnitude) + 0.5f) - 0x3f000000u;
    Ints half = where(above(Ints(magnitude), 0x387fffff - Ints{}), Ints(normal), Ints(subnormal));
    half = where(above(Ints(magnitude), 0x477fefff - Ints{}), 0x7c00 - Ints{}, half);
    const Words scaled = Words(Floats(half << 13) * 5.192296858534828e33f);  // as half_to_float
    const Ints special = where(above(half, 0x7bff - Ints{}), 0x7f800000 - Ints{}, Ints{});
    return Floats(scaled | Words(special) | (u & 0x80000000u));
}

template <DType T>
FM_EACH Floats rounded_to(Floats x) {
    if constexpr (T == DType::F16) return half_rounded(x);
    const Words u = Words(x);
    if constexpr (T == DType::BF16) return Floats((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
    return x;
}
#endif

// ---- over both -----------------------------------------------------------------------------------------

/// NaN becomes `low`.
template <class V>
FM_EACH V clamped(V x, float low, float high) {
#if defined(__CUDA_ARCH__)
    return fminf(fmaxf(x, low), high);  // the same, an instruction each
#else
    return smaller(larger(x, low), high);
#endif
}

/// The nearest integer, halves to even. |x| < 2^22: the sum has no bits below one.
template <class V>
FM_EACH auto nearest_int(V x) {
    return as_int(x + 12582912.f) - 0x4b400000;
}

/// The same as V.
template <class V>
FM_EACH V nearest_whole(V x) {
    return (x + 12582912.f) - 12582912.f;
}

FM_EACH int32_t magnitude_bits(float x) {
    return as_int(x) & 0x7fffffff;
}

/// An integer with the order of x; -0 is below 0. Its own inverse.
template <class I>
FM_EACH I ordered(I bits) {
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// ---- teams ---------------------------------------------------------------------------------------------

#if defined(FM_GPU)
/// Lanes of a team: neighbours in a warp, as many as squared_error has running sums. What they find together
/// each of them knows.
constexpr int TEAM = 16;

FM_TEAM inline int team_lane() {
    return int(threadIdx.x % TEAM);
}
template <int SIZE = TEAM>
FM_TEAM inline uint32_t team_mask() {
    return ((1u << SIZE) - 1) << (threadIdx.x % 32 / SIZE * SIZE);
}
FM_TEAM inline int32_t largest_of_team(int32_t x) {
    FM_UNROLL
    for (int distance = TEAM / 2; distance > 0; distance /= 2)
        x = larger(x, __shfl_xor_sync(team_mask(), x, distance, TEAM));
    return x;
}
#else
constexpr int TEAM = 1;

inline int team_lane() {
    return 0;
}
inline int32_t largest_of_team(int32_t x) {
    return x;
}
#endif

// ---- over a group's elements ---------------------------------------------------------------------------

/// Largest magnitude of n elements.
FM_TEAM inline float peak_of(const float* x, int64_t n) {
    int32_t peak = 0;
    int64_t j = 0;
#if defined(FM_LANES)
    Ints most = {};
    for (; j + LANES <= n; j += LANES) most = larger(most, Ints(absolute(read<Floats>(x + j))));
    peak = largest_lane(most);
#endif
    for (j += team_lane(); j < n; j += TEAM) peak = larger(peak, magnitude_bits(x[j]));
    return as_float(largest_of_team(peak));
}

struct Range {
    float low, high;
};

/// Least and largest of n elements, n > 0.
FM_TEAM inline Range range_of(const float* x, int64_t n) {
    int32_t low = ~ordered(as_int(x[0])), high = ~low;  // of ~key the largest is the least key's
    int64_t j = 0;
#if defined(FM_LANES)
    Ints lows = low - Ints{}, highs = high - Ints{};
    for (; j + LANES <= n; j += LANES) {
        const Ints key = ordered(Ints(read<Floats>(x + j)));
        lows = larger(lows, ~key), highs = larger(highs, key);
    }
    low = largest_lane(lows), high = largest_lane(highs);
#endif
    for (j += team_lane(); j < n; j += TEAM) {
        const int32_t key = ordered(as_int(x[j]));
        low = larger(low, ~key), high = larger(high, key);
    }
    return {as_float(ordered(~largest_of_team(low))), as_float(ordered(largest_of_team(high)))};
}

/// The same, with 0 among the elements.
FM_TEAM inline Range range_with_zero(const float* x, int64_t n) {
    const Range r = range_of(x, n);
    return {r.low < 0 ? r.low : 0.f, r.high > 0 ? r.high : 0.f};
}

#if defined(FM_LANES)
/// Codes of 16 elements.
template <class Coder>
FM_EACH Codes codes_of(const float* x, const Coder& code) {
    Codes c;
    for (int v = 0; v < 16 / LANES; ++v) c.part[v] = code(read<Floats>(x + v * LANES));
    return c;
}
#endif

/// code(x[j]) of n elements, a byte each.
template <class Coder>
FM_EACH_TEAM void encode_bytes(const float* x, int64_t n, const Coder& code, uint8_t* bytes) {
    int64_t j = 0;
#if defined(FM_LANES)
    for (; j + 16 <= n; j += 16) store_codes(codes_of(x + j, code), bytes + j);
#endif
    for (j += team_lane(); j < n; j += TEAM) bytes[j] = uint8_t(code(x[j]));
}

/// Two neighbours a byte; of an odd count the last nibble is `rest`.
template <bool HIGH_FIRST, class Coder>
FM_EACH_TEAM void encode_pairs(const float* x, int64_t n, const Coder& code, int rest, uint8_t* bytes) {
    int64_t j = 0;
#if defined(FM_LANES)
    for (; j + 16 <= n; j += 16) store_pairs<HIGH_FIRST>(codes_of(x + j, code), bytes + j / 2);
#endif
    for (j += 2 * team_lane(); j < n; j += 2 * TEAM) {
        const int a = code(x[j]), b = j + 1 < n ? code(x[j + 1]) : rest;
        bytes[j / 2] = uint8_t(HIGH_FIRST ? a << 4 | b : a | b << 4);
    }
}

/// Of 32: element j in the low nibble of byte j, element j + 16 in the high one.
template <class Coder>
FM_EACH_TEAM void encode_halves(const float* x, const Coder& code, uint8_t* bytes) {
#if defined(FM_LANES)
    store_halves(codes_of(x, code), codes_of(x + 16, code), bytes);
#else
    for (int j = team_lane(); j < 16; j += TEAM) bytes[j] = uint8_t(code(x[j]) | code(x[j + 16]) << 4);
#endif
}

}  // namespace FM_ISA
}  // namespace fastmerge
