// The walk for the shapes that nearly all merges have, with its running sums in registers: float32, operands
// of one type, one coefficient per expert; trim, uniform drop and a vote by mass, each or none of them. It
// computes what walk_range does, stage by stage; runs that do not fill an aligned block are left to that.

/// What the walk needs of one expert, looked up once.
struct CommonExpert {
    const void* x;
    float coefficient, weight, inverse;
    double cut_value;
    int64_t last_tie;
    uint64_t key;
    uint32_t threshold;  // of 16-bit draws; 0 and 65536 need no draw
};

#ifndef PFD
#define PFD 2048
#endif
constexpr int PREFETCH=PFD;
constexpr int MAX_COMMON = 32;  // experts: bounds the draws on the stack

inline bool is_common(const WalkPlan& plan, const Operands& in, bool f64) {
    const Keep& keep = plan.keep;
    if (f64 || in.n_experts < 1 || in.n_experts > MAX_COMMON || plan.axis != Axis::Tensor || plan.take_max ||
        (plan.vote != Vote::None && plan.vote != Vote::Mass))
        return false;
    if (keep.remove.value || keep.select.value || keep.given || keep.drop == DropKind::Ranked) return false;
    if (keep.trim.value && keep.trim.axis != Axis::Tensor) return false;
    for (int k = 0; k < in.n_experts; ++k) {
        if (in.expert_type[k] != in.expert_type[0]) return false;
        if (keep.trim.value && keep.trim.value[k] != keep.trim.value[k]) return false;
        if (keep.drop == DropKind::Uniform && DrawRule(keep.p_low[k]).wide) return false;
    }
    return in.expert_type[0] != DType::F64 && (!in.base || in.base_type == in.expert_type[0]);
}

/// The elected camp's value over its divisor, as elect_block; votes by mass are the values themselves.
inline Floats elect_lanes(const WalkPlan& plan, Floats plus_value, Floats minus_value, Floats plus_weight,
                          Floats minus_weight) {
    const Floats zeros = {};
    const Floats total = plus_value + minus_value;
    const Ints zero = total == zeros;
    const Ints plus = (total > zeros) | (plan.on_zero == OnZero::Plus ? zero : Ints{});
    Floats merged = plus ? plus_value : minus_value;
    if (plan.divide == Divide::Constant) merged = merged / float(plan.divisor);
    if (plan.divide == Divide::Weight) {
        const Floats sum = plus ? plus_weight : minus_weight, floor = zeros + float(plan.floor);
        const Floats weight =
            float(plan.floor) > 0 ? (sum < floor ? floor : sum) : (sum == zeros ? zeros + 1.0f : sum);
        merged = merged / weight;
    }
    return plan.on_zero == OnZero::Nothing ? (zero ? zeros : merged) : merged;
}

template <DType T, bool TRIM, bool DROP, bool VOTE>
bool walk_common(const WalkPlan& plan, const Operands& in, const Ranks& ranks, int64_t a, int64_t b,
                 void* out, DType out_type) {
    const int K = in.n_experts;
    CommonExpert experts[MAX_COMMON];
    for (int k = 0; k < K; ++k) {
        CommonExpert& e = experts[k];
        e.x = in.expert[k], e.coefficient = float(plan.coefficient[k]);
        e.weight = plan.divisor_weight ? float(plan.divisor_weight[k]) : 1.0f;
        if (TRIM) e.cut_value = plan.keep.trim.value[k], e.last_tie = plan.keep.trim.last_tie[k];
        if (DROP) {
            const DrawRule rule(plan.keep.p_low[k]);
            e.key = plan.keep.key[k];
            e.threshold = rule.always ? 65536 : rule.never ? 0 : uint32_t(rule.threshold);
            e.inverse = float(rule.inverse(false));
        }
    }
    const bool weighed = plan.divide == Divide::Weight, rescale = plan.keep.rescale;
    const float lambda = float(plan.lambda);
    const Floats zeros = {};
    Words seen = {};  // sign bit set: an operand is not finite
    bool bad = false;
    for (int64_t i = a; i < b;) {
        const int m = block_length(in, i, b, false);
        const int64_t first = in.start + i;
        // Equal magnitudes of a whole block are all above the cut or none, but in the one block of last_tie:
        // moving the cut by one then says it without looking at positions.
        int32_t cut[MAX_COMMON];
        bool whole = m == BLOCK;
        if (TRIM)
            for (int k = 0; k < K; ++k) {
                const int64_t ahead = experts[k].last_tie - first;
                const double value = experts[k].cut_value;
                cut[k] = value < 0 ? -1 : int32_t(key_of(float(value))) - (ahead >= BLOCK - 1);
                whole &= value < 0 || ahead < 0 || ahead >= BLOCK - 1;
            }
        if (!whole) {
            bad |= walk_range<float>(plan, in, ranks, i, i + m, out, out_type);
            i += m;
            continue;
        }
        uint16_t draw[DROP ? MAX_COMMON : 1][BLOCK];
        if (DROP)
            for (int k = 0; k < K; ++k)
                if (experts[k].threshold - 1u < 65535u) draws16_block(experts[k].key, first, draw[k]);
        constexpr int SIZE = T == DType::F32 ? 4 : 2;
        for (int j = 0; j < BLOCK * SIZE; j += 64) {
            if (in.base) __builtin_prefetch(static_cast<const char*>(in.base) + i * SIZE + j + PREFETCH);
            for (int k = 0; k < K; ++k)
                __builtin_prefetch(static_cast<const char*>(experts[k].x) + i * SIZE + j + PREFETCH);
        }
        float merged[BLOCK];
        for (int j = 0; j < BLOCK; j += LANES) {
            // Without a base, subtracting +0 changes nothing; a sum that starts from -0 is its first value.
            const Floats base = in.base ? load_lanes<T>(in.base, i + j) : zeros;
            seen |= (Words(base) & 0x7f800000u) + 0x00800000u;
            Floats sum = -zeros, plus_value = {}, minus_value = {}, plus_weight = {}, minus_weight = {};
            for (int k = 0; k < K; ++k) {
                const CommonExpert& e = experts[k];
                const Floats x = load_lanes<T>(e.x, i + j);
                seen |= (Words(x) & 0x7f800000u) + 0x00800000u;
                Floats v = x - base;
                if (TRIM) v = Floats(Ints(v) & ((Ints(v) & 0x7fffffff) > cut[k]));
                if (DROP) {
                    if (e.threshold == 0)
                        v = zeros;
                    else if (e.threshold < 65536)
                        v = Floats(Ints(v) & (Ints(widen(read<Halves>(draw[k] + j))) < int(e.threshold)));
                    if (rescale) v = v * e.inverse;
                }
                const Floats value = v * e.coefficient;
                if (VOTE) {
                    const Ints plus = value > zeros, minus = ~(value >= zeros);
                    plus_value += plus ? value : zeros;
                    minus_value += minus ? value : zeros;
                    if (weighed) {
                        plus_weight += plus ? zeros + e.weight : zeros;
                        minus_weight += minus ? zeros + e.weight : zeros;
                    }
                } else {
                    sum += value;
                }
            }
            if (VOTE)
                sum = elect_lanes(plan, plus_value, minus_value, plus_weight, minus_weight);
            else if (plan.divide == Divide::Constant)
                sum = sum / float(plan.divisor);
            if (plan.lambda != 1.0) sum = sum * lambda;
            if (plan.add_base) sum = base + sum;
            memcpy(merged + j, &sum, sizeof sum);
        }
        store_run(merged, out, out_type, i, BLOCK);
        i += BLOCK;
    }
    for (int j = 0; j < LANES; ++j) bad |= (seen[j] >> 31) != 0;
    return bad;
}

/// The instantiation for the plan's stages.
template <DType T>
bool walk_common_of(const WalkPlan& p, const Operands& in, const Ranks& r, int64_t a, int64_t b, void* out,
                    DType t) {
    const int shape =
        (p.keep.trim.value != nullptr) | (p.keep.drop != DropKind::None) << 1 | (p.vote != Vote::None) << 2;
    switch (shape) {
        case 0:
            return walk_common<T, false, false, false>(p, in, r, a, b, out, t);
        case 1:
            return walk_common<T, true, false, false>(p, in, r, a, b, out, t);
        case 2:
            return walk_common<T, false, true, false>(p, in, r, a, b, out, t);
        case 3:
            return walk_common<T, true, true, false>(p, in, r, a, b, out, t);
        case 4:
            return walk_common<T, false, false, true>(p, in, r, a, b, out, t);
        case 5:
            return walk_common<T, true, false, true>(p, in, r, a, b, out, t);
        case 6:
            return walk_common<T, false, true, true>(p, in, r, a, b, out, t);
        default:
            return walk_common<T, true, true, true>(p, in, r, a, b, out, t);
    }
}
