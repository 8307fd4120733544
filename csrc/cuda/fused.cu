// The walk element by element, for whatever a plan asks for, and what else goes by the keep stages: masks,
// decided bits, probabilities, the balance of signs. docs/numerics.md is the definition.
#include "cuda/fused.cuh"
#include "cuda/fused.hpp"
#include "cuda/grid.cuh"

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

/// What the keep stages leave of element i of each expert: f(k, kept).
template <class Real, class F>
__device__ __forceinline__ void visit_kept(const Job& job, int64_t i, F&& f) {
    Real base[1];
    if (job.in.base) load_block<Real, 1>(job.in.base, job.in.base_type, i, 1, base);
    visit_experts<Real, 1>(job.plan.keep, job.in, job.ranks, i, 1, base,
                           [&](int k, const Real*, const Real*, const Mask<Real>* kept, const Real*) {
                               f(k, kept ? kept[0] != 0 : true);
                           });
}

template <class Real>
__global__ void __launch_bounds__(THREADS, 1) keep_mask_kernel(const Job* job, int64_t n, uint8_t* mask) {
    const int64_t step = int64_t(gridDim.x) * THREADS;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < n; i += step)
        visit_kept<Real>(*job, i, [&](int k, bool kept) { mask[k * n + i] = kept; });
}

/// A warp decides 32 elements at a time and writes half a word.
template <class Real>
__global__ void __launch_bounds__(THREADS, 1)
    keep_bits_kernel(const Job* job, int64_t n, uint32_t* bits, int64_t half_words) {
    const int64_t step = int64_t(gridDim.x) * THREADS, rounded = (n + 63) / 64 * 64;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < rounded; i += step) {
        const bool inside = i < n;
        visit_kept<Real>(*job, inside ? i : n - 1, [&](int k, bool kept) {
            const uint32_t half = __ballot_sync(0xffffffffu, kept && inside);
            if (threadIdx.x % 32 == 0) bits[k * half_words + i / 32] = half;
        });
    }
}

template <class Real>
__global__ void __launch_bounds__(THREADS, 1) keep_probability_kernel(const Job* job, int64_t n, double* p) {
    const int64_t step = int64_t(gridDim.x) * THREADS;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < n; i += step) {
        Real base[1], d[1];
        if (job->in.base) load_block<Real, 1>(job->in.base, job->in.base_type, i, 1, base);
        for (int k = 0; k < job->in.n_experts; ++k) {
            load_delta<Real, 1>(job->in, k, i, 1, base, d);
            const double share =
                rank_share(job->plan.keep, job->in, job->ranks, k, i, double(absolute(d[0])));
            p[k * n + i] = ranked_probability(job->plan.keep, k, share);
        }
    }
}

template <class Real>
__global__ void __launch_bounds__(THREADS, 1)
    sign_balance_kernel(const Job* job, int64_t n, unsigned long long* balance) {
    const int64_t step = int64_t(gridDim.x) * THREADS;
    int64_t mine = 0;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < n; i += step)
        mine += balance_block<Real, 1>(job->plan, job->in, job->ranks, i, 1);
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
        if (l.variant.unrolled < 0) {
            const auto kernel = l.variant.f64 ? walk_each_kernel<double> : walk_each_kernel<float>;
            status = launch(kernel, dim3(resident_blocks(kernel, l.n_pieces, 0)), dim3(THREADS), 0, stream,
                            jobs, l.pieces, l.n_pieces);
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

cudaError_t keep_mask(const Job* job, int64_t n, bool f64, uint8_t* mask, cudaStream_t stream) {
    return over_elements(f64 ? keep_mask_kernel<double> : keep_mask_kernel<float>, n, stream, job, n, mask);
}

cudaError_t keep_bits(const Job* job, int64_t n, bool f64, uint64_t* bits, int64_t words,
                      cudaStream_t stream) {
    return over_elements(f64 ? keep_bits_kernel<double> : keep_bits_kernel<float>, n, stream, job, n,
                         reinterpret_cast<uint32_t*>(bits), 2 * words);
}

cudaError_t keep_probability(const Job* job, int64_t n, bool f64, double* p, cudaStream_t stream) {
    return over_elements(f64 ? keep_probability_kernel<double> : keep_probability_kernel<float>, n, stream,
                         job, n, p);
}

cudaError_t philox_words(uint32_t* words, cudaStream_t stream) {
    return launch(philox_kernel, dim3(1), dim3(1), 0, stream, words);
}

cudaError_t sign_balance(const Job* job, int64_t n, bool f64, unsigned long long* balance,
                         cudaStream_t stream) {
    return over_elements(f64 ? sign_balance_kernel<double> : sign_balance_kernel<float>, n, stream, job, n,
                         balance);
}

}  // namespace cuda
}  // namespace fastmerge
