// The runtime calls that launchers make, as synchronous operations of the host: one device, two
// multiprocessors, two resident blocks on each.
#pragma once
#include <cstdlib>
#include <cstring>

#include "emulate/machine.hpp"

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault,
};
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
struct cudaFuncAttributes {
    size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
    int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes;
};
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorMemoryAllocation:
            return "out of memory";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        case cudaErrorNoDevice:
            return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice:
            return "invalid device ordinal";
    }
    return "unrecognized error code";
}
/// Nothing fails late here: a failed launch aborts, all else returns its own status.
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline cudaError_t cudaPeekAtLastError() {
    return cudaSuccess;
}

// ---- devices --------------------------------------------------------------------------------------------

inline cudaError_t cudaGetDeviceCount(int* count) {
    return *count = 1, cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    return *device = 0, cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    return *version = 13000, cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
    return *version = 13000, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device != 0) return cudaErrorInvalidDevice;
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock:
            return *value = fastmerge::emulate::max_block_threads, cudaSuccess;
        case cudaDevAttrWarpSize:
            return *value = warpSize, cudaSuccess;
        case cudaDevAttrMultiProcessorCount:
            return *value = 2, cudaSuccess;
        case cudaDevAttrL2CacheSize:
            return *value = 1 << 20, cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            return *value = 9, cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            return *value = 0, cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            return *value = int(fastmerge::emulate::max_shared_bytes), cudaSuccess;
    }
    return cudaErrorInvalidValue;
}
inline cudaError_t cudaDeviceSynchronize() {
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return cudaSuccess;
}

// ---- kernels --------------------------------------------------------------------------------------------

template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int threads,
                                                          size_t shared) {
    if (threads < 1 || threads > int(fastmerge::emulate::max_block_threads)) return cudaErrorInvalidValue;
    return *blocks = shared > fastmerge::emulate::max_shared_bytes ? 0 : 2, cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*)(P...), cudaFuncAttribute attribute, int value) {
    const bool fits = attribute != cudaFuncAttributeMaxDynamicSharedMemorySize ||
                      (value >= 0 && size_t(value) <= fastmerge::emulate::max_shared_bytes);
    return fits ? cudaSuccess : cudaErrorInvalidValue;
}
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(P...)) {
    *attributes = {};
    attributes->maxThreadsPerBlock = fastmerge::emulate::max_block_threads;
    attributes->maxDynamicSharedSizeBytes = int(fastmerge::emulate::max_shared_bytes);
    attributes->ptxVersion = attributes->binaryVersion = 90;
    return cudaSuccess;
}

// ---- memory: exactly the size asked for, aligned as cudaMalloc aligns, and never zero by luck -----------

template <class T>
cudaError_t cudaMalloc(T** p, size_t n_bytes) {
    void* memory = nullptr;
    *p = nullptr;
    if (n_bytes && posix_memalign(&memory, 256, n_bytes) != 0) return cudaErrorMemoryAllocation;
    if (memory) memset(memory, fastmerge::emulate::garbage, n_bytes);
    return *p = static_cast<T*>(memory), cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
    return free(p), cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t n_bytes, cudaMemcpyKind) {
    if (n_bytes) memcpy(to, from, n_bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n_bytes, cudaMemcpyKind kind,
                                   cudaStream_t = nullptr) {
    return cudaMemcpy(to, from, n_bytes, kind);
}
inline cudaError_t cudaMemset(void* to, int value, size_t n_bytes) {
    if (n_bytes) memset(to, value, n_bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t n_bytes, cudaStream_t = nullptr) {
    return cudaMemset(to, value, n_bytes);
}
