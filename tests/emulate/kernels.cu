// Small kernels, one for each way that threads of a block work together. test_emulator.py runs them on the
// CPU, compiles them with nvcc where there is one, and takes away the barriers marked "needed" to see that
// the results then go wrong.
#include "cuda/launch.cuh"

namespace toys {

constexpr int block_threads = 256;

/// out[block] = sum of in over the block's elements; a tree in shared memory.
__global__ void __launch_bounds__(block_threads) reduce_block_kernel(const unsigned* __restrict__ in,  // [n]
                                                                     unsigned* __restrict__ out,  // [blocks]
                                                                     long long n) {
    FM_SHARED(unsigned, partial);  // [block_threads]
    const int t = int(threadIdx.x);
    const long long i = (long long)blockIdx.x * block_threads + t;
    partial[t] = i < n ? __ldg(in + i) : 0u;
    __syncthreads();
    for (int half = block_threads / 2; half > 0; half /= 2) {
        if (t < half) partial[t] += partial[t + half];
        __syncthreads();  // needed between steps
    }
    if (t == 0) out[blockIdx.x] = partial[0];
}

/// The same within each warp only: out[warp], and no lock step to lean on.
__global__ void __launch_bounds__(block_threads)
    reduce_warp_kernel(const unsigned* __restrict__ in,  // [blocks * block_threads]
                       unsigned* __restrict__ out) {     // [blocks * block_threads / 32]
    FM_SHARED(unsigned, partial);                        // [block_threads]
    const int t = int(threadIdx.x), lane = t % warpSize;
    const long long i = (long long)blockIdx.x * block_threads + t;
    partial[t] = in[i];
    for (int half = warpSize / 2; half > 0; half /= 2) {
        __syncwarp();  // needed between steps of a warp
        if (lane < half) partial[t] += partial[t + half];
    }
    if (lane == 0) out[i / warpSize] = partial[t];
}

/// out[block] = sum as a double: shuffles within warps, then across their sums.
__global__ void __launch_bounds__(block_threads)
    reduce_shuffle_kernel(const unsigned* __restrict__ in,  // [n]
                          double* __restrict__ out,         // [blocks]
                          long long n) {
    FM_SHARED(double, of_warp);  // [block_threads / 32]
    const int t = int(threadIdx.x), lane = t % warpSize, warp = t / warpSize;
    const long long i = (long long)blockIdx.x * block_threads + t;
    double sum = i < n ? double(in[i]) : 0.0;
#pragma unroll
    for (int step = warpSize / 2; step > 0; step /= 2)
        sum += __shfl_down_sync(0xffffffffu, sum, unsigned(step));
    if (lane == 0) of_warp[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        constexpr int warps = block_threads / 32;
        const unsigned few = (1u << warps) - 1u;
        if (lane < warps) {
            sum = of_warp[lane];
            for (int step = warps / 2; step > 0; step /= 2) sum += __shfl_xor_sync(few, sum, step, warps);
            if (lane == 0) out[blockIdx.x] = sum;
        }
    }
}

/// counts[bin] += how often each low byte occurs; shared counters first, one global addition per block and
/// bin.
__global__ void __launch_bounds__(block_threads)
    count_bytes_kernel(const unsigned* __restrict__ in,          // [n]
                       unsigned long long* __restrict__ counts,  // [256]
                       long long n) {
    FM_SHARED(unsigned, here);  // [256]
    for (int bin = int(threadIdx.x); bin < 256; bin += int(blockDim.x)) here[255 - bin] = 0;
    __syncthreads();  // needed before counting
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride)
        atomicAdd(&here[in[i] & 255u], 1u);
    __syncthreads();
    for (int bin = int(threadIdx.x); bin < 256; bin += int(blockDim.x))
        if (here[bin]) atomicAdd(&counts[bin], (unsigned long long)here[bin]);
}

/// The odd elements of each block in order at the block's place in `out`, their number in `kept`.
__global__ void __launch_bounds__(block_threads)
    compact_odd_kernel(const unsigned* __restrict__ in,  // [n]
                       unsigned* __restrict__ out,       // [blocks * block_threads]
                       int* __restrict__ kept,           // [blocks]
                       long long n) {
    FM_SHARED(int, of_warp);  // [block_threads / 32]
    const int t = int(threadIdx.x), lane = t % warpSize, warp = t / warpSize;
    const long long i = (long long)blockIdx.x * block_threads + t;
    const unsigned value = i < n ? in[i] : 0u;
    const bool keep = value & 1u;
    const unsigned ballot = __ballot_sync(0xffffffffu, keep);
    if (lane == 0) of_warp[warp] = __popc(ballot);
    const int total = __syncthreads_count(keep);
    int before = __popc(ballot & ((1u << lane) - 1u));
    for (int w = 0; w < warp; ++w) before += of_warp[w];
    if (keep) out[(long long)blockIdx.x * block_threads + before] = value;
    if (t == 0) kept[blockIdx.x] = total;
}

/// counts[key] += how often each key below 8 occurs; one addition for all equal lanes of a warp.
__global__ void __launch_bounds__(block_threads) count_keys_kernel(const unsigned* __restrict__ in,  // [n]
                                                                   unsigned* __restrict__ counts,    // [8]
                                                                   long long n) {
    const long long i = (long long)blockIdx.x * block_threads + threadIdx.x;
    const unsigned live = __ballot_sync(0xffffffffu, i < n);
    if (i >= n) return;
    const unsigned key = in[i] & 7u, equal = __match_any_sync(live, key);
    if (int(threadIdx.x) % warpSize == __ffs(int(equal)) - 1)
        atomicAdd(&counts[key], unsigned(__popc(equal)));
}

/// *total = sum of in: the block that takes the last ticket adds what all blocks left.
__global__ void __launch_bounds__(block_threads)
    sum_at_last_kernel(const unsigned* __restrict__ in,  // [blocks * block_threads]
                       unsigned* partial,                // [blocks]
                       unsigned* ticket,                 // [1], 0 before
                       unsigned* __restrict__ total) {   // [1]
    FM_SHARED(unsigned, shared);                         // [2]
    const long long i = (long long)blockIdx.x * block_threads + threadIdx.x;
    if (threadIdx.x == 0) shared[0] = 0;
    __syncthreads();
    atomicAdd(&shared[0], in[i]);
    __syncthreads();
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = shared[0];
        __threadfence();
        shared[1] = atomicAdd(ticket, 1u);
    }
    __syncthreads();
    if (shared[1] != gridDim.x - 1 || threadIdx.x != 0) return;
    __threadfence();
    unsigned sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += __ldcg(partial + b);
    *total = sum;
}

/// out[t] of one warp after each kind of shuffle, for every width: [6 widths][4 kinds][32 lanes].
__global__ void shuffle_kernel(int* __restrict__ out, int by) {
    const int lane = int(threadIdx.x);
    for (int step = 0; step < 6; ++step) {
        const int width = 1 << step;
        int* row = out + step * 128 + lane;
        row[0] = __shfl_sync(0xffffffffu, lane, by, width);
        row[32] = int(__shfl_up_sync(0xffffffffu, 100ll + lane, unsigned(by), width)) - 100;
        row[64] = int(__shfl_down_sync(0xffffffffu, float(lane), unsigned(by), width));
        row[96] = int(__shfl_xor_sync(0xffffffffu, unsigned(lane), by, width));
    }
}

/// out[16 * i .. 16 * i + 15] = the same bytes of in, in both widths of a streaming access.
__global__ void copy_stream_kernel(const unsigned char* __restrict__ in,  // [16 * n], 16-byte aligned
                                   unsigned char* __restrict__ out,       // [16 * n], 16-byte aligned
                                   long long n) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    if (i % 2) {
        fastmerge::store_stream16(out + 16 * i, fastmerge::load_stream16(in + 16 * i));
    } else {
        fastmerge::store_stream8(out + 16 * i, fastmerge::load_stream8(in + 16 * i));
        fastmerge::store_stream8(out + 16 * i + 8, fastmerge::load_stream8(in + 16 * i + 8));
    }
}

/// *counter counts the threads, wrongly: the read and the write are apart, and an atomic comes between.
__global__ void count_threads_wrongly_kernel(unsigned* counter, unsigned* other) {
    const unsigned seen = *counter;
    atomicAdd(other, 1u);
    *counter = seen + 1;
}

/// For timing: nothing but the index, then `barriers` rounds of a barrier.
__global__ void wait_kernel(unsigned* __restrict__ out, int barriers) {
    unsigned x = threadIdx.x;
    for (int i = 0; i < barriers; ++i) {
        x = x * 3 + 1;
        __syncthreads();
    }
    out[(size_t)blockIdx.x * blockDim.x + threadIdx.x] = x;
}

/// The same with shuffles of a warp in place of the barriers.
__global__ void exchange_kernel(unsigned* __restrict__ out, int shuffles) {
    unsigned x = threadIdx.x;
    for (int i = 0; i < shuffles; ++i) x += __shfl_xor_sync(0xffffffffu, x, 1);
    out[(size_t)blockIdx.x * blockDim.x + threadIdx.x] = x;
}

}  // namespace toys
