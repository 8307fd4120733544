// The fused walk of the merges that most are: up to MOST_EXACT experts, base, experts and result in bfloat16,
// and what keeps an element known when the kernel is compiled. Arithmetic and result are those of fused.cuh,
// in a half to a third of the instructions: everything is assumed to be finite, and a run in which something
// is not, which costs one operation an element to know, is merged element by element instead.
#pragma once
#include "cuda/fused.cuh"

namespace fastmerge {
namespace cuda {

/// One expert of the piece in work, in shared memory.
struct LeanExpert {
    const void* data;
    uint64_t key;
    float above, up_to;  // |d| of what is kept is greater than `above` and at most `up_to`
    uint32_t threshold;  // of 16-bit draws
    float inverse, coefficient, weight;
};

/// What is left to do when all experts are in, in registers: read where it is needed, it would be branches.
struct LeanEnd {
    float divisor, floor, lambda;
    bool divides, by_weight, zero_is_plus, zero_is_nothing, add_base;

    __device__ explicit LeanEnd(const WalkPlan& plan) {
        divides = plan.divide != Divide::None, by_weight = plan.divide == Divide::Weight;
        divisor = plan.divide == Divide::Constant ? float(plan.divisor) : 1.0f;
        floor = plan.floor > 0 ? float(plan.floor) : -bit_cast<float>(0x7f800000u);
        lambda = float(plan.lambda);
        zero_is_plus = plan.on_zero == OnZero::Plus, zero_is_nothing = plan.on_zero == OnZero::Nothing;
        add_base = plan.add_base;
    }
};

struct LeanPiece {
    Job job;
    LeanExpert expert[MOST_EXACT];
};

/// A bound of keys as one of magnitudes: what is above it has larger keys. A cut at infinity has nothing
/// above it.
__device__ inline float magnitude_bound(int32_t key) {
    constexpr int32_t inf = int32_t(KeyOf<float>::inf);
    return key < 0 ? -1.0f : bit_cast<float>(key < inf ? key : inf);
}

__device__ inline void prepare_lean(const Job* jobs, const Piece& piece, LeanPiece& p) {
    if (threadIdx.x == 0) p.job = jobs[piece.job];
    __syncthreads();
    const Job& job = p.job;
    const WalkPlan& plan = job.plan;
    const Keep& keep = plan.keep;
    const int k = int(threadIdx.x);
    if (k < job.in.n_experts) {
        LeanExpert& e = p.expert[k];
        const int64_t first = job.in.start + piece.begin;
        e.data = job.in.expert[k];
        e.above = keep.trim.value ? magnitude_bound(piece_bound(keep.trim, k, first)) : -1.0f;
        const int32_t removed = keep.remove.value ? piece_bound(keep.remove, k, first) : INT32_MAX;
        e.up_to = magnitude_bound(removed);
        e.threshold = 65536, e.key = 0, e.inverse = 1.0f;
        if (keep.drop == DropKind::Uniform) {
            const DrawRule rule(keep.p_low[k]);
            e.key = keep.key[k];
            e.threshold = rule.always ? 65536 : rule.never ? 0 : uint32_t(rule.threshold);
            if (keep.rescale) e.inverse = float(rule.inverse(false));
        }
        e.coefficient = float(plan.coefficient[k * plan.units]);
        e.weight = plan.divisor_weight ? float(plan.divisor_weight[k]) : 1.0f;
    }
    __syncthreads();
}

__device__ __forceinline__ void widen_pairs(const Raw& raw, float* x) {
    FM_UNROLL
    for (int j = 0; j < 8; j += 2) {
        const uint32_t w = raw.word[j / 2];
        x[j] = bit_cast<float>(w << 16), x[j + 1] = bit_cast<float>(w & 0xffff0000u);
    }
}

/// Round two finite numbers to bfloat16.
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#else
    return pair(float_to_bf16(low), float_to_bf16(high));
#endif
}

/// Merge elements [i, i + 8).
template <int K, Election ELECTION, Stage STAGE>
__device__ __forceinline__ void lean_run(const LeanPiece& p, const LeanEnd& end, int64_t i) {
    constexpr int V = 8;
    const Job& job = p.job;
    Raw raw[K], raw_base = {};
    if (job.in.base) raw_base = load_raw<V>(job.in.base, DType::BF16, i);
    FM_UNROLL
    for (int k = 0; k < K; ++k) raw[k] = load_raw<V>(p.expert[k].data, DType::BF16, i);

    float base[V], merged[V], plus[V] = {}, minus[V] = {}, plus_weight[V] = {}, minus_weight[V] = {};
    widen_pairs(raw_base, base);
    float finite[4] = {};  // stays zero: 0 times infinity, or NaN, is NaN
    FM_UNROLL
    for (int k = 0; k < K; ++k) {
        const LeanExpert& e = p.expert[k];
        float d[V];
        widen_pairs(raw[k], d);
        Philox4 draw;
        if (STAGE == Stage::Draw) draw = philox_block(e.key, uint64_t(job.in.start + i) >> 3);
        FM_UNROLL
        for (int j = 0; j < V; ++j) {
            float x = d[j] - base[j];
            if (STAGE == Stage::Draw) x = x * e.inverse;
            finite[j & 3] = fmaf(x, 0.0f, finite[j & 3]);
            if (STAGE == Stage::Cut) x = fabsf(x) > e.above && fabsf(x) <= e.up_to ? x : 0.0f;
            if (STAGE == Stage::Draw) x = half_of(draw, j) < e.threshold ? x : 0.0f;
            const float value = x * e.coefficient;
            if (ELECTION == Election::None) {
                merged[j] = k == 0 ? value : merged[j] + value;
            } else {  // as add_to_camps: no value is NaN
                plus[j] = plus[j] + fmaxf(value, 0.0f);
                minus[j] = minus[j] + fminf(value, 0.0f);
                plus_weight[j] = value > 0 ? plus_weight[j] + e.weight : plus_weight[j];
                minus_weight[j] = value < 0 ? minus_weight[j] + e.weight : minus_weight[j];
            }
        }
    }
    if (ELECTION == Election::None) {
        if (end.divides) FM_UNROLL
        for (int j = 0; j < V; ++j) merged[j] = merged[j] / end.divisor;
    } else {  // as elect_block: with one division, by 1 where there is none
        FM_UNROLL
        for (int j = 0; j < V; ++j) {
            const float total = plus[j] + minus[j];
            const bool zero = total == 0, up = (total > 0) | (zero & end.zero_is_plus);
            const float sum = up ? plus_weight[j] : minus_weight[j], held = fmaxf(sum, end.floor);
            const float weight = held == 0 ? 1.0f : held, by = end.by_weight ? weight : end.divisor;
            const float value = (zero & end.zero_is_nothing) ? 0.0f : up ? plus[j] : minus[j];
            merged[j] = value / by;
        }
    }
    FM_UNROLL
    for (int j = 0; j < V; ++j) merged[j] = merged[j] * end.lambda;
    if (end.add_base) FM_UNROLL
    for (int j = 0; j < V; ++j) merged[j] = base[j] + merged[j];
    FM_UNROLL
    for (int j = 0; j < V; ++j) finite[j & 3] = fmaf(merged[j], 0.0f, finite[j & 3]);
    if (!(finite[0] + finite[1] + finite[2] + finite[3] == 0.0f)) return walk_each(job, i, V);
    uint4 q;
    q.x = rounded_pair(merged[0], merged[1]), q.y = rounded_pair(merged[2], merged[3]);
    q.z = rounded_pair(merged[4], merged[5]), q.w = rounded_pair(merged[6], merged[7]);
    store_stream16(static_cast<uint16_t*>(job.out) + i, q);
}

template <int K, Election ELECTION, Stage STAGE>
__global__ void __launch_bounds__(THREADS, (K <= 4 ? 3 : 2) + (ELECTION == Election::None ? 1 : 0))
    lean_kernel(const Job* jobs, const Piece* pieces, int n_pieces) {
    FM_SHARED(LeanPiece, p);
    for (int at = int(blockIdx.x); at < n_pieces; at += int(gridDim.x)) {
        const Piece piece = pieces[at];
        prepare_lean(jobs, piece, *p);
        const LeanEnd end(p->job.plan);
        for (int64_t i = piece.begin + int64_t(threadIdx.x) * 8; i < piece.end; i += THREADS * 8)
            lean_run<K, ELECTION, STAGE>(*p, end, i);
        __syncthreads();  // the next piece's constants overwrite these
    }
}

template <int K, Election ELECTION>
cudaError_t launch_lean_staged(const Batch::Launch& l, const Job* jobs, cudaStream_t stream) {
    const auto kernel = l.variant.stage == Stage::All   ? lean_kernel<K, ELECTION, Stage::All>
                        : l.variant.stage == Stage::Cut ? lean_kernel<K, ELECTION, Stage::Cut>
                                                        : lean_kernel<K, ELECTION, Stage::Draw>;
    constexpr size_t shared = sizeof(LeanPiece);
    return launch(kernel, dim3(resident_blocks(kernel, l.n_pieces, shared)), dim3(THREADS), shared, stream,
                  jobs, l.pieces, l.n_pieces);
}

template <Election ELECTION>
cudaError_t launch_lean(const Batch::Launch& l, const Job* jobs, cudaStream_t stream) {
    switch (l.variant.unrolled) {
#define FM_COUNT(K) \
    case K:         \
        return launch_lean_staged<K, ELECTION>(l, jobs, stream);
        FM_COUNT(1)
        FM_COUNT(2)
        FM_COUNT(3)
        FM_COUNT(4)
        FM_COUNT(5)
        FM_COUNT(6)
        FM_COUNT(7)
        FM_COUNT(8)
#undef FM_COUNT
    }
    return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace fastmerge
