// The fused walk of whole, aligned runs: base and every expert are read once, the result is written once.
// (K + 1 + 1) * itemsize bytes per element. The arithmetic is core/walk.hpp's; only what lies around it,
// loads that are all under way before the first is needed and constants looked up once a piece, is here.
#pragma once
#include "cuda/fused.hpp"
#include "cuda/grid.cuh"
#include "cuda/lanes.cuh"

namespace fastmerge {
namespace cuda {

/// One expert of the piece in work, in shared memory.
struct Prepared {
    const void* data;
    int64_t kept;  // of ranks.kept, in words: where this expert's bits begin
    uint64_t key;
    DType type;
    int32_t trim, remove;  // keys kept are above `trim` and not above `remove`; see piece_bound
    uint32_t threshold;    // of 16-bit draws; 65536 keeps all, 0 nothing
    float coefficient, weight, scale, inverse;
};

struct PreparedPiece {
    Job job;
    int32_t select;  // as Prepared::trim, of the variance
};

/// A cut of a whole tensor as the largest key that is not above it among elements from `first` on; the last
/// tie is not among them.
__device__ inline int32_t piece_bound(const Cut& cut, int k, int64_t first) {
    if (!cut.value || cut.axis != Axis::Tensor) return -1;
    const KeyCut<float> c = key_cut<float>(cut.value[k * cut.units], cut.last_tie[k * cut.units]);
    return c.key - int32_t(c.last_tie >= first);
}

/// As piece_bound, of any cut, for the run [first, first + V); false if its ties lie on both sides.
template <int V>
__device__ __forceinline__ bool run_bound(const Cut& cut, int k, int64_t first, int64_t cols,
                                          int32_t& bound) {
    const KeyCut<float> c = cut_of<float>(cut, k, first, cols);
    bound = c.key - int32_t(c.last_tie >= first + V - 1);
    return c.last_tie < first || c.last_tie >= first + V - 1;
}

__device__ inline void prepare(const Job* jobs, const Piece& piece, PreparedPiece& p, Prepared* experts) {
    if (threadIdx.x == 0) p.job = jobs[piece.job];
    __syncthreads();
    const Job& job = p.job;
    const WalkPlan& plan = job.plan;
    const Keep& keep = plan.keep;
    const int64_t first = job.in.start + piece.begin;
    for (int k = int(threadIdx.x); k < job.in.n_experts; k += THREADS) {
        Prepared& e = experts[k];
        e.data = job.in.expert[k], e.type = job.in.expert_type[k];
        e.kept = int64_t(k) * job.ranks.stride;
        e.trim = piece_bound(keep.trim, k, first), e.remove = piece_bound(keep.remove, k, first);
        e.threshold = 65536, e.key = 0, e.inverse = 1.0f;
        if (keep.drop == DropKind::Uniform && !job.ranks.kept) {
            const DrawRule rule(keep.p_low[k]);
            e.key = keep.key[k];
            e.threshold = rule.always ? 65536 : rule.never ? 0 : uint32_t(rule.threshold);
            if (keep.rescale) e.inverse = float(rule.inverse(false));
        }
        e.coefficient = float(plan.coefficient[k * plan.units]);
        e.weight = plan.divisor_weight ? float(plan.divisor_weight[k]) : 1.0f;
        e.scale = plan.vote_scale ? float(plan.vote_scale[k]) : 1.0f;
    }
    if (threadIdx.x == 0) p.select = piece_bound(keep.select, 0, first);
    __syncthreads();
}

/// One element, by whatever the plan asks for.
template <class Real>
__device__ __forceinline__ void walk_one(const Job& job, int64_t i) {
    Real merged[1];
    const bool bad = walk_block<Real, 1>(job.plan, job.in, job.ranks, i, 1, merged);
    if (bad) atomicOr(job.bad, 1);
    store_run<Real>(merged, job.out, job.out_type, i, 1);
}

/// A run that the fast path leaves: not inlined, so that its registers are not the fast path's.
static __device__ __noinline__ void walk_each(const Job& job, int64_t i, int m) {
    for (int j = 0; j < m; ++j) walk_one<float>(job, i + j);
}

/// Which of V keys are above a bound, as bits.
template <int V>
__device__ __forceinline__ uint32_t bits_above(const float* d, int32_t bound) {
    uint32_t bits = 0;
    FM_UNROLL
    for (int j = 0; j < V; ++j) bits |= uint32_t(int32_t(order_key(d[j])) > bound) << j;
    return bits;
}

/// 16-bit draws below a threshold, as bits; `first` is a multiple of V.
template <int V>
__device__ __forceinline__ uint32_t bits_drawn(uint64_t key, int64_t first, uint32_t threshold) {
    uint32_t draw[V], bits = 0;
    draws16<V>(key, first, V, draw);
    FM_UNROLL
    for (int j = 0; j < V; ++j) bits |= uint32_t(draw[j] < threshold) << j;
    return bits;
}

/// An operand may be infinite, or a difference has overflowed: look at the operands themselves.
template <int V>
static __device__ __noinline__ void report_nonfinite(const Job& job, int64_t i) {
    bool bad = false;
    float x[V];
    if (job.in.base) bad |= load_block<float, V>(job.in.base, job.in.base_type, i, V, x);
    for (int k = 0; k < job.in.n_experts; ++k)
        bad |= load_block<float, V>(job.in.expert[k], job.in.expert_type[k], i, V, x);
    if (bad) atomicOr(job.bad, 1);
}

/// K > 0: experts in registers, at most K; 0: any number, read one after another, and any cuts.
template <int K, int V, Election ELECTION>
__device__ __forceinline__ void walk_run(const PreparedPiece& p, const Prepared* experts, int64_t i) {
    constexpr int HELD = K ? K : 1;
    constexpr bool CAREFUL = K == 0, SELECTS = K == 0 || ELECTION == Election::Other;  // see Batch
    const Job& job = p.job;
    const WalkPlan& plan = job.plan;
    const Keep& keep = plan.keep;
    const int n = K >= 1 && K <= MOST_EXACT ? K : job.in.n_experts;
    const int64_t first = job.in.start + i;

    if (CAREFUL) {  // before anything is loaded: the call needs the registers
        int32_t bound;
        bool split = keep.select.value && !run_bound<V>(keep.select, 0, first, job.in.cols, bound);
        for (int k = 0; k < n; ++k) {
            if (keep.trim.value) split |= !run_bound<V>(keep.trim, k, first, job.in.cols, bound);
            if (keep.remove.value) split |= !run_bound<V>(keep.remove, k, first, job.in.cols, bound);
        }
        if (split) return walk_each(job, i, V);
    }

    Raw raw[HELD] = {}, raw_base = {};
    if (job.in.base) raw_base = load_raw<V>(job.in.base, job.in.base_type, i);
    if constexpr (K > 0) {
        FM_UNROLL
        for (int k = 0; k < K; ++k)
            if (k < n) raw[k] = load_raw<V>(experts[k].data, experts[k].type, i);
    }
    float base[V];
    widen_raw<V>(raw_base, job.in.base ? job.in.base_type : DType::BF16, base);

    const auto delta = [&](int k, float* d) {
        const Raw r = K ? raw[K ? k : 0] : load_raw<V>(experts[k].data, experts[k].type, i);
        widen_raw<V>(r, experts[k].type, d);
        FM_UNROLL
        for (int j = 0; j < V; ++j) d[j] = d[j] - base[j];
    };

    uint32_t selected = (1u << V) - 1;
    if (SELECTS && keep.select.value) {
        int32_t bound = p.select;
        if (CAREFUL) run_bound<V>(keep.select, 0, first, job.in.cols, bound);
        float var[V];
        if constexpr (K > MOST_EXACT) {  // as variance_of, with experts that are not there left out
            float d[V], mean[V];
            FM_UNROLL
            for (int k = 0; k < K; ++k)
                if (k < n) {
                    delta(k, d);
                    FM_UNROLL
                    for (int j = 0; j < V; ++j) mean[j] = k == 0 ? d[j] : mean[j] + d[j];
                }
            FM_UNROLL
            for (int j = 0; j < V; ++j) mean[j] = mean[j] / float(n);
            FM_UNROLL
            for (int k = 0; k < K; ++k)
                if (k < n) {
                    delta(k, d);
                    FM_UNROLL
                    for (int j = 0; j < V; ++j) {
                        const float e = d[j] - mean[j];
                        const float square = e * e;
                        var[j] = k == 0 ? square : var[j] + square;
                    }
                }
            FM_UNROLL
            for (int j = 0; j < V; ++j) var[j] = var[j] / float(n);
        } else {
            variance_of<float, V>(n, delta, var);
        }
        selected = bits_above<V>(var, bound);
    }

    float merged[V];
    Camps<float, V> camps;
    if (ELECTION != Election::None) camps.clear();
    const Vote vote = ELECTION == Election::None   ? Vote::None
                      : ELECTION == Election::Mass ? Vote::Mass
                                                   : plan.vote;
    const bool take_max = ELECTION == Election::Other && plan.take_max;
    uint32_t largest = 0;
    const auto visit = [&](int k) {
        const Prepared& e = experts[k];
        float d[V], value[V];
        delta(k, d);
        FM_UNROLL
        for (int j = 0; j < V; ++j) {
            const uint32_t key = key_of(d[j]);
            largest = key > largest ? key : largest;
        }
        uint32_t bits = selected;
        if (keep.trim.value) {
            int32_t bound = e.trim;
            if (CAREFUL) run_bound<V>(keep.trim, k, first, job.in.cols, bound);
            bits &= bits_above<V>(d, bound);
        }
        if (keep.remove.value) {
            int32_t bound = e.remove;
            if (CAREFUL) run_bound<V>(keep.remove, k, first, job.in.cols, bound);
            bits &= ~bits_above<V>(d, bound);
        }
        if (job.ranks.kept) bits &= uint32_t(job.ranks.kept[e.kept + i / 64] >> (i % 64));
        if (e.threshold < 65536) bits &= e.threshold ? bits_drawn<V>(e.key, first, e.threshold) : 0;
        FM_UNROLL
        for (int j = 0; j < V; ++j) d[j] = bits >> j & 1 ? d[j] : 0.0f;
        if (keep.rescale) {
            FM_UNROLL
            for (int j = 0; j < V; ++j) d[j] = d[j] * e.inverse;
        }
        FM_UNROLL
        for (int j = 0; j < V; ++j) value[j] = d[j] * e.coefficient;
        if (ELECTION == Election::None)
            combine_plain<float, V>(false, k == 0, value, merged);
        else
            add_to_camps<float, V>(vote, take_max, e.weight, e.scale, d, value, camps);
    };
    if constexpr (K > 0) {
        FM_UNROLL
        for (int k = 0; k < K; ++k)
            if (k < n) visit(k);
    } else {
        for (int k = 0; k < n; ++k) visit(k);
    }
    finish_block<float, V>(plan, vote, camps, base, merged);
    if (largest >= KeyOf<float>::inf) report_nonfinite<V>(job, i);
    store_raw<V>(merged, job.out, job.out_type, i);
}

template <int K, int V, Election ELECTION>
__global__ void __launch_bounds__(THREADS, 1)
    walk_kernel(const Job* jobs, const Piece* pieces, int n_pieces) {
    FM_SHARED(PreparedPiece, p);
    Prepared* experts = reinterpret_cast<Prepared*>(p + 1);
    for (int at = int(blockIdx.x); at < n_pieces; at += int(gridDim.x)) {
        const Piece piece = pieces[at];
        prepare(jobs, piece, *p, experts);
        for (int64_t i = piece.begin + int64_t(threadIdx.x) * V; i < piece.end; i += THREADS * V)
            walk_run<K, V, ELECTION>(*p, experts, i);
        __syncthreads();  // the next piece's constants overwrite these
    }
}

/// Launch one kernel of the family on as many blocks as fit at once.
template <int K, int V, Election ELECTION>
cudaError_t launch_walk_variant(const Batch::Launch& l, const Job* jobs, cudaStream_t stream) {
    const size_t shared = sizeof(PreparedPiece) + sizeof(Prepared) * size_t(l.most_experts);
    const auto kernel = walk_kernel<K, V, ELECTION>;
    return launch(kernel, dim3(resident_blocks(kernel, l.n_pieces, shared)), dim3(THREADS), shared, stream,
                  jobs, l.pieces, l.n_pieces);
}

template <int V, Election ELECTION>
cudaError_t launch_walk_counted(const Batch::Launch& l, const Job* jobs, cudaStream_t stream) {
    switch (l.variant.unrolled) {
#define FM_COUNT(K) \
    case K:         \
        return launch_walk_variant<K, V, ELECTION>(l, jobs, stream);
        FM_COUNT(0)
        FM_COUNT(1)
        FM_COUNT(2)
        FM_COUNT(3)
        FM_COUNT(4)
        FM_COUNT(5)
        FM_COUNT(6)
        FM_COUNT(7)
        FM_COUNT(8)
        FM_COUNT(12)
        FM_COUNT(16)
#undef FM_COUNT
    }
    return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace fastmerge
