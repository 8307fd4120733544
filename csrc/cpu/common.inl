// What the fast paths share: float32, whole aligned blocks, values in registers. Each computes what its
// namesake in kernels.inl does, stage by stage; runs that do not fill an aligned block are left to that. They
// are templates over the operands' type, or MIXED where each has its own.

/// Whether the operands are widened to float32.
inline bool is_single(const Operands& in, bool f64) {
    return !f64 && in.n_experts >= 1;  // float64 operands are computed in float64
}

constexpr DType MIXED = DType(-1);

/// The operands' one type, or MIXED.
inline DType type_of(const Operands& in) {
    for (int k = 1; k < in.n_experts; ++k)
        if (in.expert_type[k] != in.expert_type[0]) return MIXED;
    return in.base && in.base_type != in.expert_type[0] ? MIXED : in.expert_type[0];
}

struct View {
    const void* data;
    DType type;
};
inline View base_of(const Operands& in) {
    return {in.base, in.base_type};
}
inline View expert_of(const Operands& in, int k) {
    return {in.expert[k], in.expert_type[k]};
}

template <DType T>
inline Floats load_view(View x, int64_t i) {
    if constexpr (T != MIXED) return load_lanes<T>(x.data, i);
    if (x.type == DType::BF16) return load_lanes<DType::BF16>(x.data, i);
    if (x.type == DType::F16) return load_lanes<DType::F16>(x.data, i);
    return load_lanes<DType::F32>(x.data, i);
}

constexpr int VECTORS = BLOCK / LANES;  // of a block

/// Ask for the cache lines that hold one operand's block `ahead` elements later. The processor's own
/// prefetchers lose their way among many streams: without this the kernels wait for memory half of their
/// time.
template <DType T>
inline void prefetch_block(View x, int64_t i, int64_t ahead = 1024) {
    const int64_t size = T == MIXED ? itemsize(x.type) : itemsize(T);
    const char* at = static_cast<const char*>(x.data) + (i + ahead) * size;
    for (int64_t j = 0; j < BLOCK * size; j += 64) __builtin_prefetch(at + j);
}

/// The base's block; zeros where there is none: subtracting +0 changes nothing.
template <DType T>
inline void load_base(const Operands& in, int64_t i, Floats* base) {
    if (in.base) prefetch_block<T>(base_of(in), i);
    for (int v = 0; v < VECTORS; ++v) base[v] = in.base ? load_view<T>(base_of(in), i + v * LANES) : Floats{};
}

/// Deltas of expert data x.
template <DType T>
inline void load_deltas(View x, int64_t i, const Floats* base, Floats* d) {
    prefetch_block<T>(x, i);
    for (int v = 0; v < VECTORS; ++v) d[v] = load_view<T>(x, i + v * LANES) - base[v];
}

/// As order_key.
inline Words order_keys(Floats x) {
    return least(Words(x) & 0x7fffffffu, Words{} + (KeyOf<float>::inf + 1));
}

/// As variance_block.
template <DType T>
inline void variance_lanes(const Operands& in, int64_t i, const Floats* base, Floats* var) {
    const int K = in.n_experts;
    const float count = float(K);
    Floats d[VECTORS], mean[VECTORS];
    load_deltas<T>(expert_of(in, 0), i, base, mean);
    for (int k = 1; k < K; ++k) {
        load_deltas<T>(expert_of(in, k), i, base, d);
        for (int v = 0; v < VECTORS; ++v) mean[v] = mean[v] + d[v];
    }
    for (int v = 0; v < VECTORS; ++v) mean[v] = mean[v] / count;
    for (int v = 0; v < VECTORS; ++v) var[v] = Floats{};  // squares are never -0
    for (int k = 0; k < K; ++k) {
        load_deltas<T>(expert_of(in, k), i, base, d);
        for (int v = 0; v < VECTORS; ++v) {
            const Floats e = d[v] - mean[v];
            var[v] = var[v] + e * e;
        }
    }
    for (int v = 0; v < VECTORS; ++v) var[v] = var[v] / count;
}

/// Draws of a block as bits: bit j is set iff element j's draw is below the threshold. `first` is its flat
/// index.
__attribute__((always_inline)) inline uint64_t drawn_bits(const PhiloxKeys& key, int64_t first,
                                                          uint32_t threshold) {
    constexpr int N = WIDE / 8;
    uint64_t bits = 0;
    for (int b = 0; b < 8; b += N) {
        Longs low, high;
        philox_lanes(key, uint64_t(first >> 3) + uint64_t(b), low, high);
        bits |= halves_below(interleave(low, high), threshold) << (8 * b);
    }
    return bits;
}

/// Whether an operand of elements [a, b) is not finite.
inline bool any_nonfinite(const Operands& in, int64_t a, int64_t b) {
    float x[BLOCK];
    for (int64_t i = a; i < b; i += BLOCK) {
        const int m = int(std::min<int64_t>(BLOCK, b - i));
        if (in.base && load_block<float>(in.base, in.base_type, i, m, x)) return true;
        for (int k = 0; k < in.n_experts; ++k)
            if (load_block<float>(in.expert[k], in.expert_type[k], i, m, x)) return true;
    }
    return false;
}

// ---- what is kept --------------------------------------------------------------------------------------

constexpr int MAX_COMMON = 64;  // experts: bounds what lies on the stack

/// What a fast path needs of one expert, looked up once; the walk's part is filled by `common_walk`.
struct CommonExpert {
    View x;
    const double* trim;  // [units] cuts, or null
    const double* remove;
    const int64_t *trim_tie, *remove_tie;
    const uint64_t* decided;  // a bit each, or null
    PhiloxKeys key;
    uint32_t threshold;  // of 16-bit draws; 65536 draws nothing and keeps all, 0 nothing
    float coefficient, weight, inverse;
};

/// Fill `experts`; false if the keep stages have no fast path.
inline bool common_experts(const Keep& keep, const Operands& in, const Ranks& ranks, bool f64,
                           CommonExpert* experts) {
    const auto fits = [&](const Cut& cut) {
        return !cut.value || cut.axis == Axis::Tensor || in.cols % BLOCK == 0;
    };
    if (!is_single(in, f64) || in.n_experts > MAX_COMMON || keep.given || !fits(keep.trim) ||
        !fits(keep.remove) || (keep.drop == DropKind::Ranked && !ranks.kept))
        return false;
    for (int k = 0; k < in.n_experts; ++k) {
        CommonExpert& e = experts[k];
        const auto of = [&](auto* values, const Cut& cut) {
            return values ? values + k * cut.units : nullptr;
        };
        e.x = expert_of(in, k);
        e.trim = of(keep.trim.value, keep.trim), e.trim_tie = of(keep.trim.last_tie, keep.trim);
        e.remove = of(keep.remove.value, keep.remove), e.remove_tie = of(keep.remove.last_tie, keep.remove);
        e.decided = ranks.kept ? ranks.kept + int64_t(k) * ranks.stride : nullptr;
        e.threshold = 65536;
        if (keep.drop == DropKind::Uniform && !ranks.kept) {
            const DrawRule rule(keep.p_low[k]);
            if (rule.wide) return false;
            e.key = PhiloxKeys(keep.key[k]), e.inverse = float(rule.inverse(false));
            e.threshold = rule.always ? 65536 : rule.never ? 0 : uint32_t(rule.threshold);
        }
    }
    return true;
}

/// A cut as the largest key of a whole block that is not above it. Equal magnitudes of a block are all above
/// the cut or none, but in the one block of last_tie (false): moving the cut by one then says it without
/// looking at positions.
inline bool block_cut(double value, int64_t last_tie, int64_t first, int32_t& cut) {
    const int64_t ahead = last_tie - first;
    const bool ties = ahead >= BLOCK - 1;
    cut = value < 0 ? -1 : int32_t(order_key(float(value))) - ties;
    return value < 0 || ahead < 0 || ties;
}

/// Which elements of one expert's block are kept: by cuts of the key, and a bit each for all else.
struct BlockKeep {
    uint64_t bits;
    int32_t trim, remove;  // keys kept are above `trim` and not above `remove`
};

/// Decide a whole block that begins at chunk index i; false if it needs positions. select: bits shared by
/// all.
__attribute__((always_inline)) inline bool keep_of_block(const CommonExpert& e, const Keep& keep,
                                                         const Operands& in, int64_t i, uint64_t select,
                                                         BlockKeep& out) {
    const int64_t first = in.start + i;
    out = {select, -1, 0x7fffffff};
    if (e.trim) {
        const int64_t u = unit_of(keep.trim.axis, first, in.cols);
        if (!block_cut(e.trim[u], e.trim_tie[u], first, out.trim)) return false;
    }
    if (e.remove) {
        const int64_t u = unit_of(keep.remove.axis, first, in.cols);
        if (!block_cut(e.remove[u], e.remove_tie[u], first, out.remove)) return false;
    }
    if (e.decided) out.bits &= e.decided[i / BLOCK];
    if (e.threshold == 0) out.bits = 0;
    if (out.bits && e.threshold < 65536) out.bits &= drawn_bits(e.key, first, e.threshold);
    return true;
}

/// The picks of vector v, whose keys are given.
inline Picks kept_lanes(const BlockKeep& keep, Words key, int v) {
    const Picks large = above(Ints(key), Ints{} + keep.trim),
                small = not_above(Ints(key), Ints{} + keep.remove);
    return both(both(large, small), picks_of(keep.bits, v));
}

/// The variance selection of a whole block; false if it needs positions.
template <DType T>
inline bool select_bits(const Keep& keep, const Operands& in, int64_t i, uint64_t& bits) {
    bits = ~uint64_t(0);
    if (!keep.select.value) return true;
    int32_t cut;
    if (!block_cut(keep.select.value[0], keep.select.last_tie[0], in.start + i, cut)) return false;
    if (cut < 0) return true;
    Floats base[VECTORS], var[VECTORS];
    Words keys[VECTORS];
    load_base<T>(in, i, base);
    variance_lanes<T>(in, i, base, var);
    for (int v = 0; v < VECTORS; ++v) keys[v] = order_keys(var[v]);
    bits = lanes_above(keys, uint32_t(cut));
    return true;
}
