// The part of CUDA that is language: qualifiers, vector types with their alignment, built-in variables.
//
// `__shared__` is left undefined on purpose: a static shared array would be one object for all blocks and
// out of the address sanitizer's sight. Kernels take dynamic shared memory through FM_SHARED.
#pragma once
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// Nothing, not an attribute: libstdc++ spells __attribute__((__noinline__)).
#define __noinline__

// ---- vector types: as wide as the access they stand for, so that a misaligned one is undefined here too -

#define FM_EMULATE_VECTORS(T, name, align2, align4)     \
    struct name##1 {                                    \
        T x;                                            \
    };                                                  \
    struct alignas(align2) name##2 {                    \
        T x, y;                                         \
    };                                                  \
    struct name##3 {                                    \
        T x, y, z;                                      \
    };                                                  \
    struct alignas(align4) name##4 {                    \
        T x, y, z, w;                                   \
    };                                                  \
    inline name##1 make_##name##1(T x) {                \
        return {x};                                     \
    }                                                   \
    inline name##2 make_##name##2(T x, T y) {           \
        return {x, y};                                  \
    }                                                   \
    inline name##3 make_##name##3(T x, T y, T z) {      \
        return {x, y, z};                               \
    }                                                   \
    inline name##4 make_##name##4(T x, T y, T z, T w) { \
        return {x, y, z, w};                            \
    }

FM_EMULATE_VECTORS(signed char, char, 2, 4)
FM_EMULATE_VECTORS(unsigned char, uchar, 2, 4)
FM_EMULATE_VECTORS(short, short, 4, 8)
FM_EMULATE_VECTORS(unsigned short, ushort, 4, 8)
FM_EMULATE_VECTORS(int, int, 8, 16)
FM_EMULATE_VECTORS(unsigned, uint, 8, 16)
FM_EMULATE_VECTORS(long long, longlong, 16, 16)
FM_EMULATE_VECTORS(unsigned long long, ulonglong, 16, 16)
FM_EMULATE_VECTORS(float, float, 8, 16)
FM_EMULATE_VECTORS(double, double, 16, 16)
#undef FM_EMULATE_VECTORS

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    constexpr operator uint3() const { return {x, y, z}; }
};

// ---- built-in variables: set whenever another thread gets the processor ---------------------------------

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;
