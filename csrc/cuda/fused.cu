// The walk element by element, for whatever a plan asks for, and what else goes by the keep stages: masks,
// decided bits, probabilities, the balance of signs. docs/numerics.md is the definition.
#include "cuda/fused.cuh"
#include "cuda/fused.hpp"
#include "cuda/grid.cuh"
#include "cuda/quant4.hpp"

namespace fastmerge {
namespace cuda {
namespace {

template <class Real>
__global__ void __launch_bounds__(THREADS, 1)
    walk_each_kernel(const Job* jobs, const Piece* pieces, int n_pieces) {
    for (int at = int(blockIdx.x); at < n_pieces; at += int(gridDim.x)) {
        const Piece piece = pieces[at];
        const Job& job = jobs[piece.job];
        for (int64_t i = piece.begin + threadIdx.x; i < piece.end; i += THREADS) walk_one<Real>(job, i);
    }
}

constexpr int RUN = 8;  // elements that a thread decides at a time: those of one Philox block

/// Whether what is kept depends on the operands, or on draws alone.
__device__ __forceinline__ bool looks_at_values(const Keep& keep) {
    return keep.trim.value || keep.remove.value || keep.select.value ||
           (keep.drop == DropKind::Ranked && keep.by_value);
}

/// What the keep stages leave of elements [i, i + N) of each expert, as bits: f(k, bits).
template <class Real, int N, class Load, class F>
__device__ __forceinline__ void visit_kept(const Job& job, int64_t i, F&& f) {
    const Keep& keep = job.plan.keep;
    const bool values = looks_at_values(keep);
    Real base[N], d[N], inverse[N];
    Mask<Real> select[N], kept[N];
    FM_UNROLL
    for (int j = 0; j < N; ++j) d[j] = Real(0), select[j] = ~Mask<Real>(0);
    if (values) load_base<Real, N, Load>(job.in, i, base);
    if (keep.select.value) {
        Real var[N];
        load_keyed<Real, N, Load>(job.in, -1, i, var);
        const int64_t first = job.in.start + i;
        apply_cut<Real, N>(cut_of<Real>(keep.select, 0, first, job.in.cols), true, first, var, select);
    }
    for (int k = 0; k < job.in.n_experts; ++k) {
        if (values) load_deltas<Real, N, Load>(job.in, k, i, base, d);
        // Always a mask: a pointer that may be null would keep it in memory.
        keep_expert<Real, N>(keep, job.in, job.ranks, k, i, N, d, select, kept, inverse);
        uint32_t bits = 0;
        FM_UNROLL
        for (int j = 0; j < N; ++j) bits |= uint32_t(kept[j] != 0) << j;
        f(k, bits);
    }
}

/// Whether elements [i, i + m) can be decided as one run.
__device__ __forceinline__ bool is_run(const Job& job, int64_t i, int m) {
    return m == RUN && (job.in.start + i) % RUN == 0 &&
           (!splits_rows(job.plan.keep) || job.in.cols % RUN == 0);
}

template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, 1) keep_mask_kernel(const Job* at, int64_t n, uint8_t* mask) {
    const Job& job = *at;
    const int64_t step = int64_t(gridDim.x) * THREADS * RUN;
    for (int64_t i = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * RUN; i < n; i += step) {
        const int m = n - i < RUN ? int(n - i) : RUN;
        if (is_run(job, i, m))
            visit_kept<Real, RUN, Load>(job, i, [&](int k, uint32_t bits) {
                uint8_t* to = mask + k * n + i;
                // A bit a byte: the product puts each of four bits into a byte of its own.
                uint2 bytes;
                bytes.x = (bits & 15u) * 0x00204081u & 0x01010101u;
                bytes.y = (bits >> 4) * 0x00204081u & 0x01010101u;
                if (reinterpret_cast<uintptr_t>(to) % 8 == 0) return store_stream8(to, bytes);
                FM_UNROLL
                for (int j = 0; j < RUN; ++j) to[j] = uint8_t(bits >> j & 1);
            });
        else
            for (int j = 0; j < m; ++j)
                visit_kept<Real, 1, Load>(job, i + j,
                                          [&](int k, uint32_t bit) { mask[k * n + i + j] = uint8_t(bit); });
    }
}

template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, 1)
    keep_bits_kernel(const Job* at, int64_t n, uint8_t* bits, int64_t stride) {
    const Job& job = *at;
    const int64_t step = int64_t(gridDim.x) * THREADS * RUN;
    // To the end of the last word of 64: what lies behind the elements is not kept.
    for (int64_t i = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * RUN; i < stride * RUN; i += step) {
        const int m = i >= n ? 0 : n - i < RUN ? int(n - i) : RUN;
        uint8_t* to = bits + i / RUN;
        if (is_run(job, i, m)) {
            visit_kept<Real, RUN, Load>(job, i, [&](int k, uint32_t run) { to[k * stride] = uint8_t(run); });
            continue;
        }
        for (int k = 0; k < job.in.n_experts; ++k) to[k * stride] = 0;
        for (int j = 0; j < m; ++j)
            visit_kept<Real, 1, Load>(job, i + j,
                                      [&](int k, uint32_t bit) { to[k * stride] |= uint8_t(bit << j); });
    }
}

template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, 1) keep_probability_kernel(const Job* job, int64_t n, double* p) {
    const int64_t step = int64_t(gridDim.x) * THREADS;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < n; i += step) {
        Real base[1], d[1];
        if (job->in.base) load_block<Real, 1, Load>(job->in.base, job->in.base_type, i, 1, base);
        for (int k = 0; k < job->in.n_experts; ++k) {
            load_delta<Real, 1, Load>(job->in, k, i, 1, base, d);
            const double share =
                rank_share(job->plan.keep, job->in, job->ranks, k, i, double(absolute(d[0])));
            p[k * n + i] = ranked_probability(job->plan.keep, k, share);
        }
    }
}

template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, 1)
    sign_balance_kernel(const Job* job, int64_t n, unsigned long long* balance) {
    const int64_t step = int64_t(gridDim.x) * THREADS;
    int64_t mine = 0;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < n; i += step)
        mine += balance_block<Real, 1, Load>(job->plan, job->in, job->ranks, i, 1);
    for (int distance = 16; distance > 0; distance /= 2)
        mine += __shfl_down_sync(0xffffffffu, mine, distance);
    // Two's complement: adding the bits of a negative number subtracts.
    if (threadIdx.x % 32 == 0 && mine) atomicAdd(balance, static_cast<unsigned long long>(mine));
}

__global__ void philox_kernel(uint32_t* w) {
    const Philox4 r = philox4x32_10(w[0], w[1], w[2], w[3], w[4], w[5]);
    for (int j = 0; j < 4; ++j) w[j] = r.w[j];
}

template <class... P, class... A>
cudaError_t over_elements(void (*kernel)(P...), int64_t n, cudaStream_t stream, A... arguments) {
    const dim3 grid(resident_blocks(kernel, divide_up(n, THREADS), 0));
    return launch(kernel, grid, dim3(THREADS), 0, stream, arguments...);
}

}  // namespace

cudaError_t run_walks(const Batch& batch, cudaStream_t stream) {
    const Job* jobs = batch.jobs();
    for (const Batch::Launch& l : batch.launches()) {
        cudaError_t status = cudaSuccess;
        if (l.variant.shared_bytes > 0) {
            status = run_walks_coded(l, jobs, stream);
        } else if (l.variant.coded) {
            status = run_walks_any(l, jobs, stream);
        } else if (l.variant.unrolled < 0) {
            const auto kernel = l.variant.f64 ? walk_each_kernel<double> : walk_each_kernel<float>;
            status = launch(kernel, dim3(resident_blocks(kernel, l.n_pieces, 0)), dim3(THREADS), 0, stream,
                            jobs, l.pieces, l.n_pieces);
        } else if (l.variant.stage != Stage::Any) {
            status = l.variant.election == Election::None ? run_lean_none(l, jobs, stream)
                                                          : run_lean_mass(l, jobs, stream);
        } else if (l.variant.election == Election::None) {
            status = run_walks_none(l, jobs, stream);
        } else if (l.variant.election == Election::Mass) {
            status = run_walks_mass(l, jobs, stream);
        } else {
            status = run_walks_other(l, jobs, stream);
        }
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

cudaError_t keep_mask(const Job* job, int64_t n, Kind kind, uint8_t* mask, cudaStream_t stream) {
    return over_elements(FM_KERNEL(keep_mask_kernel, kind), n, stream, job, n, mask);
}

cudaError_t keep_bits(const Job* job, int64_t n, Kind kind, uint64_t* bits, int64_t words,
                      cudaStream_t stream) {
    return over_elements(FM_KERNEL(keep_bits_kernel, kind), n, stream, job, n,
                         reinterpret_cast<uint8_t*>(bits), 8 * words);
}

cudaError_t keep_probability(const Job* job, int64_t n, Kind kind, double* p, cudaStream_t stream) {
    return over_elements(FM_KERNEL(keep_probability_kernel, kind), n, stream, job, n, p);
}

cudaError_t philox_words(uint32_t* words, cudaStream_t stream) {
    return launch(philox_kernel, dim3(1), dim3(1), 0, stream, words);
}

cudaError_t sign_balance(const Job* job, int64_t n, Kind kind, unsigned long long* balance,
                         cudaStream_t stream) {
    return over_elements(FM_KERNEL(sign_balance_kernel, kind), n, stream, job, n, balance);
}

}  // namespace cuda
}  // namespace fastmerge
