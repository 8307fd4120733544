// The few things that kernels and launchers need from the platform: a launch, dynamic shared memory, the
// device a call is for, and accesses that stream past the caches. Included first by every .cu file; a host
// compiler gets csrc/emulate in place of CUDA.
#pragma once

#define FM_GPU 1  // for what headers of csrc/core have for one side alone, also where a GPU is emulated

#if defined(__CUDACC__)
#include <cuda_runtime.h>
/// Declares `T* name` at the start of the block's dynamic shared memory, aligned to 16 bytes.
#define FM_SHARED(T, name)                                     \
    extern __shared__ __align__(16) unsigned char fm_shared[]; \
    T* const name = reinterpret_cast<T*>(fm_shared)
#else
#include <tuple>

#include "emulate/cuda.hpp"
#define FM_SHARED(T, name) T* const name = static_cast<T*>(::fastmerge::emulate::shared_memory(alignof(T)))
#endif

namespace fastmerge {

// ---- launch ---------------------------------------------------------------------------------------------

/// Without cudaFuncSetAttribute a block has no more dynamic shared memory than this.
constexpr size_t default_shared_bytes = 48 << 10;

/// Lets a block of `kernel` have as much dynamic shared memory; before its occupancy is asked for, too.
template <class... P>
cudaError_t allow_shared(void (*kernel)(P...), size_t bytes) {
    if (bytes <= default_shared_bytes) return cudaSuccess;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

/// Launches `kernel` on `stream` of the current device; arguments convert as in a call.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   A... args) {
    static_assert(sizeof...(P) == sizeof...(A), "a launch passes every parameter of its kernel");
#if defined(__CUDACC__)
    const cudaError_t status = allow_shared(kernel, shared_bytes);
    if (status != cudaSuccess) return status;
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(args)...);
    return cudaGetLastError();
#else
    (void)stream;
    std::tuple<P...> parameters(static_cast<P>(args)...);
    auto body = [&] { std::apply(kernel, parameters); };  // every thread has its own copy of the parameters
    emulate::run_grid(
        reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
        [](void* p) { (*static_cast<decltype(body)*>(p))(); }, &body);
    return cudaSuccess;
#endif
}

/// Makes `device` current for a scope.
struct device_guard {
    int previous = 0;
    bool switched = false;
    cudaError_t status;

    explicit device_guard(int device) : status(cudaGetDevice(&previous)) {
        if (status != cudaSuccess || device == previous) return;
        status = cudaSetDevice(device);
        switched = status == cudaSuccess;
    }
    ~device_guard() {
        if (switched) cudaSetDevice(previous);
    }
    device_guard(const device_guard&) = delete;
    device_guard& operator=(const device_guard&) = delete;
};

// ---- accesses to bytes used once; addresses are multiples of the width ----------------------------------

__device__ __forceinline__ uint4 load_stream16(const void* p) {
    return __ldcs(static_cast<const uint4*>(p));
}
__device__ __forceinline__ uint2 load_stream8(const void* p) {
    return __ldcs(static_cast<const uint2*>(p));
}
__device__ __forceinline__ void store_stream16(void* p, uint4 value) {
    __stcs(static_cast<uint4*>(p), value);
}
__device__ __forceinline__ void store_stream8(void* p, uint2 value) {
    __stcs(static_cast<uint2*>(p), value);
}

}  // namespace fastmerge
