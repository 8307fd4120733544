// Kernels that are wrong, each in one way that the emulator must name.
#include "cuda/launch.cuh"

namespace faults {

using fastmerge::launch;

__global__ void write_behind_shared_kernel(int bytes) {
    FM_SHARED(unsigned char, all);
    all[threadIdx.x] = 1;
    if (int(threadIdx.x) == bytes - 1) all[bytes] = 1;
}

__global__ void exit_before_barrier_kernel() {
    if (threadIdx.x == 7) return;
    __syncthreads();
}

__global__ void two_barriers_kernel() {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}

// The first warp wants the block, lane 0 of the second wants a lane that has gone to the block's barrier.
__global__ void deadlock_kernel() {
    if (threadIdx.x < 40 || threadIdx.x >= 48)
        __syncthreads();
    else
        __syncwarp(0xffffffffu);
}

__global__ void different_masks_kernel(int* out) {
    const unsigned mask = threadIdx.x < 16 ? 0xffffffffu : 0xfffffff0u;
    *out = __shfl_sync(mask, int(threadIdx.x), 5);
}

__global__ void different_collectives_kernel(int* out) {
    if (threadIdx.x % 2)
        *out = __any_sync(0xffffffffu, 1);
    else
        *out = __all_sync(0xffffffffu, 1);
}

__global__ void lane_outside_mask_kernel(int* out) {
    *out = __shfl_sync(0x0000ffffu, int(threadIdx.x), 0);
}

__global__ void lane_exited_kernel(int* out) {
    if (threadIdx.x == 3) return;
    *out = __any_sync(0xffffffffu, 1);
}

__global__ void load_misaligned_kernel(const unsigned char* in, unsigned* out) {
    *out = fastmerge::load_stream16(in + 8 * threadIdx.x).x;
}

__global__ void atomic_misaligned_kernel(unsigned char* p) {
    atomicAdd(reinterpret_cast<unsigned*>(p + threadIdx.x), 1u);
}

__global__ void trap_kernel() {
    if (threadIdx.x == 5) __trap();
}

__global__ void overflow_kernel(int* p) {
    *p = 0x7fffffff;
    *p += 1;
}

__global__ void nothing_kernel() {}

/// Returns false for an unknown name; a known one does not return.
inline bool run(const char* name) {
    static unsigned char bytes[64];
    static int value;
    const auto is = [name](const char* other) { return strcmp(name, other) == 0; };
    const cudaStream_t stream = nullptr;
    if (is("write_behind_shared")) launch(write_behind_shared_kernel, 3, 64, 64, stream, 64);
    if (is("exit_before_barrier")) launch(exit_before_barrier_kernel, 2, 64, 0, stream);
    if (is("two_barriers")) launch(two_barriers_kernel, 1, 64, 0, stream);
    if (is("deadlock")) launch(deadlock_kernel, 1, 64, 0, stream);
    if (is("different_masks")) launch(different_masks_kernel, 1, 32, 0, stream, &value);
    if (is("different_collectives")) launch(different_collectives_kernel, 1, 32, 0, stream, &value);
    if (is("lane_outside_mask")) launch(lane_outside_mask_kernel, 1, 32, 0, stream, &value);
    if (is("lane_exited")) launch(lane_exited_kernel, 1, 32, 0, stream, &value);
    if (is("lane_outside_block")) launch(different_collectives_kernel, 1, 20, 0, stream, &value);
    if (is("load_misaligned"))
        launch(load_misaligned_kernel, 1, 4, 0, stream, bytes, reinterpret_cast<unsigned*>(&value));
    if (is("atomic_misaligned")) launch(atomic_misaligned_kernel, 1, 8, 0, stream, bytes);
    if (is("trap")) launch(trap_kernel, 1, 8, 0, stream);
    if (is("overflow")) launch(overflow_kernel, 1, 1, 0, stream, &value);
    if (is("block_too_large")) launch(nothing_kernel, 1, dim3(32, 33), 0, stream);
    if (is("grid_zero")) launch(nothing_kernel, dim3(1, 0), 32, 0, stream);
    if (is("shared_too_large")) launch(nothing_kernel, 1, 32, (227 << 10) + 1, stream);
    return false;
}

}  // namespace faults
