// A run of N neighbouring coordinates through all stages of a plan, whatever it asks for. Fast paths of
// csrc/cpu and csrc/cuda do the same for the plans that most merges use; everything else comes here.
#pragma once
#include "core/stages.hpp"

namespace fastmerge {
namespace FM_ISA {

/// Whether a run must not cross rows.
FM_HD inline bool splits_rows(const Keep& k) {
    return (k.trim.value && k.trim.axis == Axis::Row) || (k.remove.value && k.remove.axis == Axis::Row);
}

/// Keep probability of a ranked drop; q is the element's rank or value, scaled to [0, 1].
FM_HD inline double ranked_probability(const Keep& plan, int k, double q) {
    const double rise = (plan.p_high[k] - plan.p_low[k]) * q;
    return plan.p_low[k] + rise;
}

/// Scale expert k's chunk element i of magnitude `size` to [0, 1], by rank or by value; see docs/numerics.md.
FM_HD inline double rank_share(const Keep& plan, const Operands& in, const Ranks& ranks, int k, int64_t i,
                               double size) {
    if (plan.by_value) {
        const int64_t at = k * (in.n / ranks.unit) + i / ranks.unit;
        const double low = ranks.low[at], width = ranks.high[at] - low;
        return (size - low) / (width + 1e-7);
    }
    if (ranks.unit == 1) return 0.5;
    return double(ranks.rank[int64_t(k) * in.n + i]) / double(ranks.unit - 1);
}

/// What the keep stages leave of expert k's deltas d. select: what the variance selects, or null; inverse:
/// the rescale factors, written if the answer is true.
template <class Real, int N = BLOCK>
FM_HD inline bool keep_expert(const Keep& keep, const Operands& in, const Ranks& ranks, int k, int64_t i,
                              int m, const Real* d, const Mask<Real>* select, Mask<Real>* kept,
                              Real* inverse) {
    if constexpr (N <= 8) m = N;  // such runs are whole: a constant keeps their places in registers
    const DropKind drop = ranks.kept ? DropKind::None : keep.drop;  // decided already
    double p[N] = {};
    if (drop == DropKind::Ranked)
        for (int j = 0; j < m; ++j)
            p[j] = ranked_probability(keep, k, rank_share(keep, in, ranks, k, i + j, double(absolute(d[j]))));
    const bool scaled =
        keep_block<Real, N>(keep, drop, in.cols, k, in.start, i, m, d, select, p, kept, inverse);
    if (ranks.kept)
        for (int j = 0; j < m; ++j) {
            const uint64_t word = ranks.kept[int64_t(k) * ranks.stride + (i + j) / 64];
            kept[j] &= Mask<Real>(0) - Mask<Real>(word >> ((i + j) % 64) & 1);
        }
    return scaled;
}

/// What the variance selects of a run.
template <class Real, int N = BLOCK, class Load = UsualLoad>
FM_HD inline void select_block(const Keep& keep, const Operands& in, int64_t i, int m, const Real* base,
                               Mask<Real>* select) {
    Real var[N];
    variance_block<Real, N, Load>(in, i, m, base, var);
    for (int j = 0; j < N; ++j) select[j] = ~Mask<Real>(0);
    apply_cut<Real, N>(cut_of<Real>(keep.select, 0, in.start + i, in.cols), true, in.start + i, var, select);
}

/// A run of every expert, in order: f(k, d, v, keep, inverse) with v the kept delta, not yet rescaled; keep
/// is null where everything is kept, inverse where nothing is rescaled. True if an expert is not finite.
template <class Real, int N = BLOCK, class Load = UsualLoad, class F>
FM_HD inline bool visit_experts(const Keep& keep, const Operands& in, const Ranks& ranks, int64_t i, int m,
                                const Real* base, F&& f) {
    const bool plain = !keep.any() && !ranks.kept;
    Mask<Real> select[N];
    if (keep.select.value) select_block<Real, N, Load>(keep, in, i, m, base, select);
    bool bad = false;
    for (int k = 0; k < in.n_experts; ++k) {
        Real d[N], v[N], inv[N];
        Mask<Real> kept[N];
        bad |= load_delta<Real, N, Load>(in, k, i, m, base, d);
        if (plain) {
            f(k, d, d, static_cast<const Mask<Real>*>(nullptr), static_cast<const Real*>(nullptr));
            continue;
        }
        const bool scaled = keep_expert<Real, N>(keep, in, ranks, k, i, m, d,
                                                 keep.select.value ? select : nullptr, kept, inv);
        for (int j = 0; j < N; ++j) v[j] = d[j];
        zero_dropped<Real, N>(kept, v);
        f(k, d, v, kept, scaled ? inv : nullptr);
    }
    return bad;
}

/// Coefficients of a run: one for all its elements, or one per column.
template <class Real, int N = BLOCK>
FM_HD inline void weigh(const WalkPlan& plan, const Operands& in, int k, int64_t i, int m, const Real* v,
                        Real* value) {
    const double* c = plan.coefficient + int64_t(k) * plan.units;
    if (plan.axis == Axis::Column) {
        Real coefficient[N] = {};
        for (int j = 0; j < m; ++j) coefficient[j] = Real(c[(in.start + i + j) % in.cols]);
        for (int j = 0; j < N; ++j) value[j] = v[j] * coefficient[j];
        return;
    }
    const Real coefficient = Real(c[unit_of(plan.axis, in.start + i, in.cols)]);
    for (int j = 0; j < N; ++j) value[j] = v[j] * coefficient;
}

/// Rescale and weigh what is kept of expert k.
template <class Real, int N = BLOCK>
FM_HD inline void rescale_and_weigh(const WalkPlan& plan, const Operands& in, int k, int64_t i, int m,
                                    const Real* kept, const Real* inverse, Real* v, Real* value) {
    for (int j = 0; j < N; ++j) v[j] = inverse ? kept[j] * inverse[j] : kept[j];
    weigh<Real, N>(plan, in, k, i, m, v, value);
}

/// Add expert k's values to a sum, or replace smaller ones of a maximum; k = 0 begins.
template <class Real, int N = BLOCK>
FM_HD inline void combine_plain(bool take_max, bool begins, const Real* value, Real* merged) {
    if (begins) {
        for (int j = 0; j < N; ++j) merged[j] = value[j];
    } else if (take_max) {
        for (int j = 0; j < N; ++j)
            merged[j] = order_key(value[j]) > order_key(merged[j]) ? value[j] : merged[j];
    } else {
        for (int j = 0; j < N; ++j) merged[j] = merged[j] + value[j];
    }
}

/// What is left to do when all experts are in: elect or divide, times lambda, plus base.
template <class Real, int N = BLOCK>
FM_HD inline void finish_block(const WalkPlan& plan, Vote vote, const Camps<Real, N>& camps, const Real* base,
                               Real* merged) {
    const Real divisor = Real(plan.divisor);
    if (vote != Vote::None)
        elect_block<Real, N>(vote, plan.on_zero, plan.divide, divisor, Real(plan.floor), camps, merged);
    else if (plan.divide == Divide::Constant)
        for (int j = 0; j < N; ++j) merged[j] = merged[j] / divisor;
    if (plan.lambda != 1.0) {
        const Real lambda = Real(plan.lambda);
        for (int j = 0; j < N; ++j) merged[j] = merged[j] * lambda;
    }
    if (plan.add_base)
        for (int j = 0; j < N; ++j) merged[j] = base[j] + merged[j];
}

/// Merge a run: elements [i, i + m) of the chunk. True if an operand is not finite.
template <class Real, int N = BLOCK, class Load = UsualLoad>
FM_HD inline bool walk_block(const WalkPlan& plan, const Operands& in, const Ranks& ranks, int64_t i, int m,
                             Real* merged) {
    Real base[N];
    bool bad = false;
    if (in.base) bad |= load_block<Real, N, Load>(in.base, in.base_type, i, m, base);
    if (in.n_experts == 0) {  // nothing to merge: the base itself
        for (int j = 0; j < N; ++j) merged[j] = base[j];
        return bad;
    }
    Camps<Real, N> camps;
    if (plan.vote != Vote::None) camps.clear();
    bad |= visit_experts<Real, N, Load>(
        plan.keep, in, ranks, i, m, base,
        [&](int k, const Real*, const Real* kept, const Mask<Real>*, const Real* inverse) {
            Real v[N], value[N];
            rescale_and_weigh<Real, N>(plan, in, k, i, m, kept, inverse, v, value);
            if (plan.vote == Vote::None) return combine_plain<Real, N>(plan.take_max, k == 0, value, merged);
            const Real w = plan.divisor_weight ? Real(plan.divisor_weight[k]) : Real(1);
            const Real s = plan.vote_scale ? Real(plan.vote_scale[k]) : Real(1);
            add_to_camps<Real, N>(plan.vote, plan.take_max, w, s, v, value, camps);
        });
    finish_block<Real, N>(plan, plan.vote, camps, base, merged);
    return bad;
}

/// How many of a run elect plus, less those that elect minus.
template <class Real, int N = BLOCK, class Load = UsualLoad>
FM_HD inline int64_t balance_block(const WalkPlan& plan, const Operands& in, const Ranks& ranks, int64_t i,
                                   int m) {
    Real base[N];
    if (in.base) load_block<Real, N, Load>(in.base, in.base_type, i, m, base);
    Camps<Real, N> camps;
    camps.clear();
    visit_experts<Real, N, Load>(
        plan.keep, in, ranks, i, m, base,
        [&](int k, const Real*, const Real* kept, const Mask<Real>*, const Real* inverse) {
            Real v[N], value[N];
            rescale_and_weigh<Real, N>(plan, in, k, i, m, kept, inverse, v, value);
            const Real s = plan.vote_scale ? Real(plan.vote_scale[k]) : Real(1);
            add_to_camps<Real, N>(plan.vote, false, Real(1), s, v, value, camps);
        });
    int64_t balance = 0;
    for (int j = 0; j < m; ++j) {
        const Real total =
            plan.vote == Vote::NormFrac ? camps.best_vote[j] : camps.plus_votes[j] + camps.minus_votes[j];
        balance += int(total > 0) - int(!(total >= 0));
    }
    return balance;
}

}  // namespace FM_ISA
}  // namespace fastmerge
