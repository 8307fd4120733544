// What N neighbouring coordinates of an element-wise merge go through:
//
//     delta -> keep (trim, select, drop, given) -> weight -> elect -> combine -> base + merged
//
// The loops of csrc/cpu (N = 64) and csrc/cuda (N = 8, 4 or 1) call these; they add no arithmetic of their
// own. docs/numerics.md is the definition. Loops run over all N places with zeros behind a short run, so that
// trip counts are constant and every branch is a select: that is what lets a CPU's compiler vectorise them,
// and a GPU's keep the places in registers.
#pragma once
#include "core/philox.hpp"
#include "core/plan.hpp"
#include "core/types.hpp"
#if !defined(FM_GPU)
#include "core/four_bit/decode.hpp"
#include "core/philox_lanes.hpp"
#endif

namespace fastmerge {
namespace FM_ISA {

// ---- loads ---------------------------------------------------------------------------------------------

/// Reads operands that are not coded.
struct DenseLoad {
    static constexpr bool coded = false;
    template <class Real, int N>
    FM_HD static void run(const void* p, DType t, int64_t i, int m, Real* out) {
        load_run<Real>(p, t, i, m, out);
    }
};

#if !defined(FM_GPU)
/// Reads any operand. csrc/cuda has its own, in kernels that are asked for it.
struct AnyLoad {
    template <class Real, int N>
    static void run(const void* p, DType t, int64_t i, int m, Real* out) {
        if (t != DType::Coded) return load_run<Real>(p, t, i, m, out);
        float decoded[N];
        decode_run(*static_cast<const Coded*>(p), i, m, decoded);
        for (int j = 0; j < m; ++j) out[j] = Real(decoded[j]);
    }
};
using UsualLoad = AnyLoad;
#else
using UsualLoad = DenseLoad;
#endif

/// Load elements [i, i + m) of one operand, relative to the chunk, zero behind; true if one is not finite.
template <class Real, int N = BLOCK, class Load = UsualLoad>
FM_HD inline bool load_block(const void* p, DType t, int64_t i, int m, Real* out) {
    if (m < N)
        for (int j = 0; j < N; ++j) out[j] = Real(0);
    Load::template run<Real, N>(p, t, i, m < N ? m : N, out);
    int bad = 0;
    for (int j = 0; j < N; ++j) bad |= key_of(out[j]) >= KeyOf<Real>::inf;
    return bad != 0;
}

template <class Real, int N = BLOCK>
FM_HD inline void subtract(Real* x, const Real* base) {
    for (int j = 0; j < N; ++j) x[j] = x[j] - base[j];
}

/// Load expert k's deltas (or values, without a base).
template <class Real, int N = BLOCK, class Load = UsualLoad>
FM_HD inline bool load_delta(const Operands& in, int k, int64_t i, int m, const Real* base, Real* d) {
    const bool bad = load_block<Real, N, Load>(in.expert[k], in.expert_type[k], i, m, d);
    if (in.base) subtract<Real, N>(d, base);
    return bad;
}

/// Population variance over K experts; load(k, d) gives their deltas, twice.
template <class Real, int N, class Load>
FM_HD inline void variance_of(int K, Load&& load, Real* var) {
    Real mean[N] = {}, d[N];
    FM_UNROLL
    for (int k = 0; k < K; ++k) {
        load(k, d);
        for (int j = 0; j < N; ++j) mean[j] = k == 0 ? d[j] : mean[j] + d[j];
    }
    for (int j = 0; j < N; ++j) mean[j] = mean[j] / Real(K);
    FM_UNROLL
    for (int k = 0; k < K; ++k) {
        load(k, d);
        for (int j = 0; j < N; ++j) {
            const Real e = d[j] - mean[j];
            const Real square = e * e;
            var[j] = k == 0 ? square : var[j] + square;
        }
    }
    for (int j = 0; j < N; ++j) var[j] = var[j] / Real(K);
}
template <class Real, int N = BLOCK, class Load = UsualLoad>
FM_HD inline void variance_block(const Operands& in, int64_t i, int m, const Real* base, Real* var) {
    variance_of<Real, N>(
        in.n_experts, [&](int k, Real* d) { load_delta<Real, N, Load>(in, k, i, m, base, d); }, var);
}

// ---- keep ----------------------------------------------------------------------------------------------

template <class Real>
using Mask = Key<Real>;  // all ones or zero, as wide as Real, so that masks and values share lanes

/// A cut of one expert and unit: an element is above it iff its key is larger, or equal at an index up to
/// last_tie. Keys are compared as signed integers: -1 has everything above it.
template <class Real>
struct KeyCut {
    typename KeyOf<Real>::signed_type key;
    int64_t last_tie;
};

template <class Real>
FM_HD inline KeyCut<Real> key_cut(double value, int64_t last_tie) {
    using S = typename KeyOf<Real>::signed_type;
    if (value < 0) return {S(-1), -1};
    return {S(order_key(Real(value))), last_tie};
}

/// keep &= is (or is not) above the cut. `first` is the flat index of the run in the tensor.
template <class Real, int N = BLOCK>
FM_HD inline void apply_cut(KeyCut<Real> cut, bool above, int64_t first, const Real* d, Mask<Real>* keep) {
    using K = Key<Real>;
    using S = typename KeyOf<Real>::signed_type;
    const K flip = above ? K(0) : ~K(0);
    const int64_t ahead = cut.last_tie - first;
    if (ahead < 0 || ahead >= N - 1) {
        // Equal keys of the run are all above or none: moving the cut by one says so without positions.
        const S bound = cut.key - S(ahead >= 0);
        for (int j = 0; j < N; ++j) keep[j] &= (K(0) - K(S(order_key(d[j])) > bound)) ^ flip;
        return;
    }
    const int last = int(ahead);
    for (int j = 0; j < N; ++j) {
        const S key = S(order_key(d[j]));
        const K greater = K(0) - K(key > cut.key);
        const K tie = (K(0) - K(key == cut.key)) & (K(0) - K(j <= last));
        keep[j] &= (greater | tie) ^ flip;
    }
}

FM_HD inline int64_t unit_of(Axis axis, int64_t flat, int64_t cols) {
    return axis == Axis::Row ? flat / cols : 0;
}

/// Expert k's cut of the unit that the element of flat index `first` is in.
template <class Real>
FM_HD inline KeyCut<Real> cut_of(const Cut& cut, int k, int64_t first, int64_t cols) {
    const int64_t at = k * cut.units + unit_of(cut.axis, first, cols);
    return key_cut<Real>(cut.value[at], cut.last_tie[at]);
}

/// 16-bit draws of elements [i, i + m), m <= N: element e uses block e >> 3, half-word e & 7. Runs of N < 64
/// are whole and begin at a multiple of N.
template <int N>
FM_HD inline void draws16(uint64_t key, int64_t i, [[maybe_unused]] int m, uint32_t* out) {
    if constexpr (N <= 8) {
        const Philox4 r = philox_block(key, uint64_t(i) >> 3);
        FM_UNROLL
        for (int j = 0; j < N; ++j) out[j] = half_of(r, (N == 8 ? 0 : int(i & 7)) + j);
    } else {
#if !defined(FM_GPU)
        draws16_lanes(key, i, m, out);
#endif
    }
}

/// 32-bit draws, likewise: element e uses block e >> 2, word e & 3.
template <int N>
FM_HD inline void draws32(uint64_t key, int64_t i, int m, uint32_t* out) {
    if constexpr (N <= 8) {
        Philox4 r = philox_block(key, uint64_t(i) >> 2);
        FM_UNROLL
        for (int j = 0; j < N; ++j) {
            if (j == 4) r = philox_block(key, (uint64_t(i) >> 2) + 1);
            out[j] = word_of(r, N == 1 ? int(i & 3) : j & 3);
        }
    } else {
        for (int j = 0; j < m;) {
            const Philox4 r = philox_block(key, uint64_t(i + j) >> 2);
            for (int w = int((i + j) & 3); w < 4 && j < m; ++w, ++j) out[j] = word_of(r, w);
        }
    }
}

/// The threshold arithmetic of a uniform draw; `full` is 2^16 or 2^32.
struct DrawRule {
    bool always = false, never = false, wide = false;
    uint64_t threshold = 0;
    double full = 65536.0, p = 1.0;

    FM_HD explicit DrawRule(double probability) : p(probability) {
        always = p >= 1.0, never = !(p > 0.0);
        if (always || never) return;
        wide = p < 0.005 || p > 0.995;
        full = wide ? 4294967296.0 : 65536.0;
        const double t = p * full + 0.5;
        threshold = uint64_t(t);
        if (threshold < 1) threshold = 1;
        if (threshold > uint64_t(full) - 1) threshold = uint64_t(full) - 1;
    }
    /// What a rescale multiplies survivors by; a mask from outside was not drawn at `threshold`.
    FM_HD double inverse(bool given) const {
        if (always || never) return 1.0;
        return given ? 1.0 / p : full / double(threshold);
    }
};

/// Decide which elements of one block of expert k survive.
/// @param drop    that of the plan, or None where it is decided already
/// @param p_rank  [N] keep probabilities of a ranked drop, else null
/// @param select  [N] mask of the variance selection, or null
/// @param inv     [N] the drop's rescale factors, written when it rescales
/// @return whether `inv` was written
template <class Real, int N = BLOCK>
FM_HD inline bool keep_block(const Keep& plan, DropKind drop, int64_t cols, int k, int64_t chunk_start,
                             int64_t i, int m, const Real* d, const Mask<Real>* select, const double* p_rank,
                             Mask<Real>* keep, Real* inv) {
    const int64_t first = chunk_start + i;
    for (int j = 0; j < N; ++j) keep[j] = ~Mask<Real>(0);
    if (plan.trim.value) apply_cut<Real, N>(cut_of<Real>(plan.trim, k, first, cols), true, first, d, keep);
    if (plan.remove.value)
        apply_cut<Real, N>(cut_of<Real>(plan.remove, k, first, cols), false, first, d, keep);
    if (select)
        for (int j = 0; j < N; ++j) keep[j] &= select[j];
    if (plan.given) {
        const uint8_t* mask = plan.given[k] + i;
        for (int j = 0; j < m; ++j) keep[j] &= Mask<Real>(0) - Mask<Real>(mask[j] != 0);
    }
    const bool given = plan.given != nullptr;
    if (drop == DropKind::Uniform) {
        const DrawRule rule(plan.p_low[k]);
        if (!given && rule.never)
            for (int j = 0; j < N; ++j) keep[j] = 0;
        if (!given && !rule.always && !rule.never) {
            uint32_t draw[N] = {};
            if (rule.wide)
                draws32<N>(plan.key[k], first, m, draw);
            else
                draws16<N>(plan.key[k], first, m, draw);
            const uint32_t t = uint32_t(rule.threshold);
            for (int j = 0; j < N; ++j) keep[j] &= Mask<Real>(0) - Mask<Real>(draw[j] < t);
        }
        if (!plan.rescale) return false;
        const Real factor = Real(rule.inverse(given));
        for (int j = 0; j < N; ++j) inv[j] = factor;
        return true;
    }
    if (drop == DropKind::Ranked) {
        const bool always = plan.p_low[k] >= 1.0, never = !(plan.p_high[k] > 0.0);
        if (never && !given)
            for (int j = 0; j < N; ++j) keep[j] = 0;
        if (always || never) {
            for (int j = 0; j < N; ++j) inv[j] = Real(1);
            return plan.rescale;
        }
        uint32_t draw[N] = {};
        if (!given) draws16<N>(plan.key[k], first, m, draw);
        FM_UNROLL
        for (int j = 0; j < m; ++j) {
            double t = p_rank[j] * 65536.0 + 0.5;
            t = !(t >= 0) ? 0 : t > 65536.0 ? 65536.0 : t;  // NaN draws nothing
            const uint32_t threshold = uint32_t(t);
            if (!given) keep[j] &= Mask<Real>(0) - Mask<Real>(draw[j] < threshold);
            if (given)
                inv[j] = p_rank[j] > 0 && p_rank[j] < 1 ? Real(1.0 / p_rank[j]) : Real(1);
            else
                inv[j] = threshold ? Real(65536.0 / double(threshold)) : Real(0);
        }
        for (int j = m; j < N; ++j) inv[j] = Real(0);
        return plan.rescale;
    }
    return false;
}

template <class Real, int N = BLOCK>
FM_HD inline void zero_dropped(const Mask<Real>* keep, Real* v) {
    for (int j = 0; j < N; ++j) v[j] = bit_cast<Real>(Key<Real>(bit_cast<Key<Real>>(v[j]) & keep[j]));
}

// ---- elect and combine ---------------------------------------------------------------------------------

/// Running sums of both camps of a block: one pass over the experts, one camp is used at the end.
template <class Real, int N = BLOCK>
struct Camps {
    Real plus_votes[N], minus_votes[N];
    Real plus_value[N], minus_value[N];
    Real plus_weight[N], minus_weight[N];
    Real best_score[N], best_vote[N];

    FM_HD void clear() {
        for (int j = 0; j < N; ++j) {
            plus_votes[j] = minus_votes[j] = plus_value[j] = minus_value[j] = Real(0);
            plus_weight[j] = minus_weight[j] = best_score[j] = best_vote[j] = Real(0);
        }
    }
};

/// Add expert k's block: v are kept deltas, value = v * coefficient.
template <class Real, int N = BLOCK>
FM_HD inline void add_to_camps(Vote by, bool take_max, Real weight, Real vote_scale, const Real* v,
                               const Real* value, Camps<Real, N>& c) {
    Real vote[N] = {};
    switch (by) {
        case Vote::Mass:
            for (int j = 0; j < N; ++j) vote[j] = value[j];
            break;
        case Vote::Count:
            for (int j = 0; j < N; ++j) vote[j] = v[j] > 0 ? Real(1) : v[j] < 0 ? Real(-1) : v[j];
            break;
        case Vote::NormMass:
            for (int j = 0; j < N; ++j) {
                const Real square = v[j] * absolute(v[j]);
                vote[j] = square * vote_scale;
            }
            break;
        case Vote::NormFrac:
            for (int j = 0; j < N; ++j) {
                const Real square = v[j] * v[j];
                const Real score = square * vote_scale;
                const bool better = score > c.best_score[j];
                c.best_score[j] = better ? score : c.best_score[j];
                c.best_vote[j] = better ? (v[j] > 0 ? Real(1) : Real(-1)) : c.best_vote[j];
                vote[j] = v[j];
            }
            break;
        case Vote::Delta:
        case Vote::None:
            for (int j = 0; j < N; ++j) vote[j] = v[j];
            break;
    }
    for (int j = 0; j < N; ++j) {
        const Real s = vote[j], x = value[j];
        const bool plus = s > 0, minus = !(s >= 0);  // NaN is carried by the minus camp
        // The same as adding +0 elsewhere: no sum is ever -0.
        c.plus_votes[j] = plus ? c.plus_votes[j] + s : c.plus_votes[j];
        c.minus_votes[j] = minus ? c.minus_votes[j] + s : c.minus_votes[j];
        c.plus_weight[j] = plus ? c.plus_weight[j] + weight : c.plus_weight[j];
        c.minus_weight[j] = minus ? c.minus_weight[j] + weight : c.minus_weight[j];
        if (take_max) {
            c.plus_value[j] = plus && order_key(x) > order_key(c.plus_value[j]) ? x : c.plus_value[j];
            c.minus_value[j] = minus && order_key(x) > order_key(c.minus_value[j]) ? x : c.minus_value[j];
        } else {
            c.plus_value[j] = plus ? c.plus_value[j] + x : c.plus_value[j];
            c.minus_value[j] = minus ? c.minus_value[j] + x : c.minus_value[j];
        }
    }
}

/// The elected camp's value over its divisor: a constant, the camp's weight, or none.
template <class Real, int N = BLOCK>
FM_HD inline void elect_block(Vote by, OnZero on_zero, Divide divide, Real divisor, Real floor,
                              const Camps<Real, N>& c, Real* merged) {
    for (int j = 0; j < N; ++j) {
        const Real total = by == Vote::NormFrac ? c.best_vote[j] : c.plus_votes[j] + c.minus_votes[j];
        const bool zero = total == 0;
        const bool plus = zero ? on_zero == OnZero::Plus : total > 0;
        const bool nothing = zero && on_zero == OnZero::Nothing;
        const Real value = plus ? c.plus_value[j] : c.minus_value[j];
        const Real sum = plus ? c.plus_weight[j] : c.minus_weight[j];
        const Real weight = floor > 0 ? (sum < floor ? floor : sum) : (sum == 0 ? Real(1) : sum);
        const Real quotient = value / (divide == Divide::Weight ? weight : divisor);
        merged[j] = nothing ? Real(0) : divide == Divide::None ? value : quotient;
    }
}

}  // namespace FM_ISA
}  // namespace fastmerge
