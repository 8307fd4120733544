// The walk's fast path: one coefficient per expert; a sum, or a vote by mass or by delta.

/// Fill `experts`; false if the walk has no fast path.
inline bool common_walk(const WalkPlan& plan, const Operands& in, const Ranks& ranks, bool f64,
                        CommonExpert* experts) {
    if (plan.axis != Axis::Tensor || plan.take_max ||
        (plan.vote != Vote::None && plan.vote != Vote::Mass && plan.vote != Vote::Delta) ||
        !common_experts(plan.keep, in, ranks, f64, experts))
        return false;
    for (int k = 0; k < in.n_experts; ++k) {
        experts[k].coefficient = float(plan.coefficient[k]);
        experts[k].weight = plan.divisor_weight ? float(plan.divisor_weight[k]) : 1.0f;
    }
    return true;
}

/// Both camps' running sums of one vector; votes by mass are the values themselves.
struct CampLanes {
    Floats plus_value, minus_value, plus_weight, minus_weight, plus_votes, minus_votes;
};

/// What divides by a constant: its reciprocal where that gives the same, which a power of two's does.
struct Divisor {
    explicit Divisor(float value) : by(value), exact(false) {
        const uint32_t u = bit_cast<uint32_t>(value), exponent = u >> 23 & 0xffu;
        if ((u & 0x7fffffu) == 0 && exponent > 0 && exponent < 254) by = 1.0f / value, exact = true;
    }
    Floats divide(Floats x) const { return exact ? x * by : x / by; }

    float by;
    bool exact;
};

/// As elect_block.
inline Floats elect_lanes(const WalkPlan& plan, Divisor divisor, const CampLanes& c, bool votes) {
    const Floats zeros = {};
    const Floats total = votes ? c.plus_votes + c.minus_votes : c.plus_value + c.minus_value;
    const Picks zero = zero_lanes(total);
    const Picks wins = positive(total);
    const auto elected = [&](Floats plus, Floats minus) {
        const Floats merged = where(wins, plus, minus);
        return plan.on_zero == OnZero::Plus ? where(zero, plus, merged) : merged;
    };
    Floats merged = elected(c.plus_value, c.minus_value);
    if (plan.divide == Divide::Constant) merged = divisor.divide(merged);
    if (plan.divide == Divide::Weight) {
        const Floats sum = elected(c.plus_weight, c.minus_weight), floor = zeros + float(plan.floor);
        const Floats weight = float(plan.floor) > 0 ? where(below(sum, floor), floor, sum)
                                                    : where(zero_lanes(sum), zeros + 1.0f, sum);
        merged = merged / weight;
    }
    return plan.on_zero == OnZero::Nothing ? where(zero, zeros, merged) : merged;
}

/// Vectors that are in work at once: as many as have their sums in registers.
constexpr int TILE = VECTORS < 4 ? VECTORS : 4;

/// How much of `BlockKeep` a walk needs.
enum class Keeps { All, Large, Some };

template <DType T, Vote BY, Keeps KEEPS>
inline void walk_tile(const WalkPlan& plan, const Operands& in, const CommonExpert* experts,
                      const BlockKeep* kept, Divisor divisor, int64_t i, int v0, Floats* merged,
                      Words& largest) {
    constexpr bool PLAIN = BY == Vote::None && KEEPS == Keeps::All;
    const bool weighed = plan.divide == Divide::Weight;
    const bool rescale = plan.keep.rescale && plan.keep.drop == DropKind::Uniform;
    const Floats zeros = {};
    Floats base[TILE];
    CampLanes camps[TILE] = {};
    for (int v = 0; v < TILE; ++v) {
        base[v] = in.base ? load_view<T>(base_of(in), i + (v0 + v) * LANES) : zeros;
        merged[v] = -zeros;  // a sum that starts from -0 is its first value
    }
    for (int k = 0; k < in.n_experts; ++k) {
        const CommonExpert& e = experts[k];
        for (int v = 0; v < TILE; ++v) {
            Floats d = load_view<T>(e.x, i + (v0 + v) * LANES) - base[v];
            const Words key = order_keys(d);
            if (!PLAIN) largest = most(largest, key);
            if (KEEPS == Keeps::Large) d = only(above(Ints(key), Ints{} + kept[k].trim), d);
            if (KEEPS == Keeps::Some) d = only(kept_lanes(kept[k], key, v0 + v), d);
            if (KEEPS == Keeps::Some && rescale) d = d * e.inverse;
            const Floats value = d * e.coefficient;
            if (BY == Vote::None) {
                merged[v] += value;
                continue;
            }
            CampLanes& c = camps[v];
            const Floats vote = BY == Vote::Delta ? d : value;
            const Picks plus = positive(vote), minus = negative(vote);
            c.plus_value = add_where(c.plus_value, plus, value);
            c.minus_value = add_where(c.minus_value, minus, value);
            if (BY == Vote::Delta) {
                c.plus_votes = add_where(c.plus_votes, plus, vote);
                c.minus_votes = add_where(c.minus_votes, minus, vote);
            }
            if (weighed) {
                c.plus_weight = add_where(c.plus_weight, plus, zeros + e.weight);
                c.minus_weight = add_where(c.minus_weight, minus, zeros + e.weight);
            }
        }
    }
    for (int v = 0; v < TILE; ++v) {
        if (PLAIN) largest = most(largest, order_keys(merged[v]));  // a sum of all shows what one of them is
        if (BY != Vote::None)
            merged[v] = elect_lanes(plan, divisor, camps[v], BY == Vote::Delta);
        else if (plan.divide == Divide::Constant)
            merged[v] = divisor.divide(merged[v]);
        if (plan.lambda != 1.0) merged[v] = merged[v] * float(plan.lambda);
        if (plan.add_base) merged[v] = base[v] + merged[v];
    }
}

template <DType T, Vote BY, Keeps KEEPS>
bool walk_blocks(const WalkPlan& plan, const Operands& in, const Ranks& ranks, const CommonExpert* experts,
                 int64_t a, int64_t b, void* out, DType out_type) {
    const Divisor divisor(float(plan.divisor));
    Words largest = {};
    bool bad = false;
    for (int64_t i = a; i < b;) {
        const int m = block_length(in, i, b, false);
        BlockKeep kept[MAX_COMMON];
        uint64_t select;
        bool whole = m == BLOCK;
        if (whole && KEEPS != Keeps::All) {
            whole = select_bits<T>(plan.keep, in, i, select);
            for (int k = 0; k < in.n_experts && whole; ++k)
                whole = keep_of_block(experts[k], plan.keep, in, i, select, kept[k]);
        }
        if (!whole) {
            bad |= walk_range<float>(plan, in, ranks, i, i + m, out, out_type);
            i += m;
            continue;
        }
        if (in.base) prefetch_block<T>(base_of(in), i);
        for (int k = 0; k < in.n_experts; ++k) prefetch_block<T>(experts[k].x, i);
        Floats merged[VECTORS];
        for (int v = 0; v < VECTORS; v += TILE)
            walk_tile<T, BY, KEEPS>(plan, in, experts, kept, divisor, i, v, merged + v, largest);
        if (out_type == DType::BF16) {
            for (int v = 0; v < VECTORS; ++v) {
                const Halves h = to_bf16(merged[v]);
                memcpy(static_cast<uint16_t*>(out) + i + v * LANES, &h, sizeof h);
            }
        } else {
            float held[BLOCK];
            memcpy(held, merged, sizeof held);
            store_run(held, out, out_type, i, BLOCK);
        }
        i += BLOCK;
    }
    // A delta or a sum may overflow where no operand is infinite: look again before saying so.
    bool suspect = false;
    for (int j = 0; j < LANES; ++j) suspect |= largest[j] >= KeyOf<float>::inf;
    return bad || (suspect && any_nonfinite(in, a, b));
}

template <DType T, Vote BY>
bool walk_kept(const WalkPlan& p, const Operands& in, const Ranks& r, const CommonExpert* e, int64_t a,
               int64_t b, void* out, DType t) {
    const Keep& k = p.keep;
    if (!k.any()) return walk_blocks<T, BY, Keeps::All>(p, in, r, e, a, b, out, t);
    if (!k.remove.value && !k.select.value && k.drop == DropKind::None)
        return walk_blocks<T, BY, Keeps::Large>(p, in, r, e, a, b, out, t);
    return walk_blocks<T, BY, Keeps::Some>(p, in, r, e, a, b, out, t);
}

template <DType T>
bool walk_voted(const WalkPlan& p, const Operands& in, const Ranks& r, const CommonExpert* e, int64_t a,
                int64_t b, void* out, DType t) {
    if (p.vote == Vote::None) return walk_kept<T, Vote::None>(p, in, r, e, a, b, out, t);
    if (p.vote == Vote::Mass) return walk_kept<T, Vote::Mass>(p, in, r, e, a, b, out, t);
    return walk_kept<T, Vote::Delta>(p, in, r, e, a, b, out, t);
}
