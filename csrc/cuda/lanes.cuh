// Neighbouring elements in one thread's registers: wide loads, widening, wide stores.
#pragma once
#include "cuda/launch.cuh"
// Behind FM_GPU.
#include "core/four_bit/few.hpp"
#include "core/walk.hpp"

namespace fastmerge {
namespace cuda {

using namespace FM_ISA;

/// V elements as they are stored, at most 16 bytes of them: 8 of a 16-bit type (V = 8), 4 of any (V = 4).
struct Raw {
    uint32_t word[4];
};

template <int V>
__device__ __forceinline__ Raw load_raw(const void* p, DType t, int64_t i) {
    if (V == 8 || t == DType::F32) {
        const uint4 q = load_stream16(static_cast<const char*>(p) + i * (V == 8 ? 2 : 4));
        return {{q.x, q.y, q.z, q.w}};
    }
    const uint2 q = load_stream8(static_cast<const uint16_t*>(p) + i);
    return {{q.x, q.y, 0, 0}};
}

template <int V>
__device__ __forceinline__ void widen_raw(const Raw& raw, DType t, float* x) {
    if (V == 4 && t == DType::F32) {
        FM_UNROLL
        for (int j = 0; j < V; ++j) x[j] = bit_cast<float>(raw.word[j & 3]);
    } else if (t == DType::BF16) {
        FM_UNROLL
        for (int j = 0; j < V; ++j) {
            const uint32_t w = raw.word[j / 2];
            x[j] = bit_cast<float>(j & 1 ? w & 0xffff0000u : w << 16);
        }
    } else {
        FM_UNROLL
        for (int j = 0; j < V; ++j) {
            const uint32_t w = raw.word[j / 2];
            x[j] = half_to_float(uint16_t(j & 1 ? w >> 16 : w & 0xffffu));
        }
    }
}

/// Whether runs of V elements are bfloat16 and lie at multiples of their width from element i on.
template <int V>
__device__ __forceinline__ bool is_bf16_run(const void* p, DType t, int64_t i) {
    return t == DType::BF16 && (reinterpret_cast<uintptr_t>(p) + uintptr_t(2 * i)) % (2 * V) == 0;
}

__device__ __forceinline__ uint32_t pair(uint16_t low, uint16_t high) {
    return uint32_t(low) | uint32_t(high) << 16;
}

/// Round V results and store them; the address is aligned to 16 bytes, or to all of them if they are fewer.
template <int V>
__device__ __forceinline__ void store_raw(const float* x, void* p, DType t, int64_t i) {
    if (t == DType::F32) {
        FM_UNROLL
        for (int j = 0; j < V; j += 4) {
            uint4 q;
            q.x = bit_cast<uint32_t>(canonical(x[j])), q.y = bit_cast<uint32_t>(canonical(x[j + 1]));
            q.z = bit_cast<uint32_t>(canonical(x[j + 2])), q.w = bit_cast<uint32_t>(canonical(x[j + 3]));
            store_stream16(static_cast<float*>(p) + i + j, q);
        }
        return;
    }
    uint32_t w[V / 2];
    if (t == DType::BF16) {
        FM_UNROLL
        for (int j = 0; j < V; j += 2) w[j / 2] = pair(float_to_bf16(x[j]), float_to_bf16(x[j + 1]));
    } else {
        FM_UNROLL
        for (int j = 0; j < V; j += 2) w[j / 2] = pair(float_to_half(x[j]), float_to_half(x[j + 1]));
    }
    uint16_t* at = static_cast<uint16_t*>(p) + i;
    if constexpr (V == 8) {
        uint4 q;
        q.x = w[0], q.y = w[1], q.z = w[2], q.w = w[3];
        store_stream16(at, q);
    } else {
        uint2 q;
        q.x = w[0], q.y = w[1];
        store_stream8(at, q);
    }
}

/// m elements of a coded operand, m <= FEW. Not inlined: the registers that formats need are not the
/// kernel's.
[[maybe_unused]] static __device__ __noinline__ void decode_elements(const Coded& coded, int64_t i, int m,
                                                                     float* out) {
    decode_few(coded.format, coded, i, m, out);
}

/// Load V whole elements of any type, by wide loads where they are aligned.
template <class Real, int V, class Load = DenseLoad>
__device__ __forceinline__ void load_elements(const void* p, DType t, int64_t i, Real* x) {
    if constexpr (Load::coded)
        if (t == DType::Coded) {
            float decoded[V];
            decode_elements(*static_cast<const Coded*>(p), i, V, decoded);
            FM_UNROLL
            for (int j = 0; j < V; ++j) x[j] = Real(decoded[j]);
            return;
        }
    if constexpr (sizeof(Real) == 4 && (V == 8 || V == 4)) {
        const char* at = static_cast<const char*>(p) + i * itemsize(t);
        const uintptr_t bytes = V == 8 || t == DType::F32 ? 16 : 8;
        if (reinterpret_cast<uintptr_t>(at) % bytes == 0) {
            if (V == 8 && t == DType::F32) {
                widen_raw<4>(load_raw<4>(at, t, 0), t, x);
                widen_raw<4>(load_raw<4>(at, t, 4), t, x + V / 2);
            } else {
                widen_raw<V>(load_raw<V>(at, t, 0), t, x);
            }
            return;
        }
    }
    FM_UNROLL
    for (int j = 0; j < V; ++j) load_run<Real>(p, t, i + j, 1, x + j);
}

/// Reads any operand, whole runs.
struct AnyLoad {
    static constexpr bool coded = true;
    template <class Real, int N>
    __device__ static void run(const void* p, DType t, int64_t i, int, Real* out) {
        load_elements<Real, N, AnyLoad>(p, t, i, out);
    }
};

/// Load the base's elements; zeros where there is none: subtracting +0 changes nothing.
template <class Real, int V, class Load = DenseLoad>
__device__ __forceinline__ void load_base(const Operands& in, int64_t i, Real* base) {
    if (in.base) return load_elements<Real, V, Load>(in.base, in.base_type, i, base);
    FM_UNROLL
    for (int j = 0; j < V; ++j) base[j] = Real(0);
}

template <class Real, int V, class Load = DenseLoad>
__device__ __forceinline__ void load_deltas(const Operands& in, int k, int64_t i, const Real* base, Real* d) {
    load_elements<Real, V, Load>(in.expert[k], in.expert_type[k], i, d);
    FM_UNROLL
    for (int j = 0; j < V; ++j) d[j] = d[j] - base[j];
}

/// Deltas of expert k, or for k = -1 the variance over experts: what an order statistic is of.
template <class Real, int V, class Load = DenseLoad>
__device__ __forceinline__ void load_keyed(const Operands& in, int k, int64_t i, Real* x) {
    Real base[V];
    load_base<Real, V, Load>(in, i, base);
    if (k >= 0) return load_deltas<Real, V, Load>(in, k, i, base, x);
    variance_of<Real, V>(
        in.n_experts, [&](int e, Real* d) { load_deltas<Real, V, Load>(in, e, i, base, d); }, x);
}

}  // namespace cuda
}  // namespace fastmerge
