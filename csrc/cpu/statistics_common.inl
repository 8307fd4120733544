// The statistics' fast paths.

// ---- brackets ------------------------------------------------------------------------------------------

constexpr int MAX_BRACKETS = 64;  // bounds the counters on the stack

/// A bracket and what is counted of it, lane by lane. Keys are below 2^31, so that they compare as signed.
struct BracketLanes {
    Ints below_low, high;
    Words above, inside, nonzero;
    bool open, single;  // single: of equal keys the number is all there is to know
};

/// Collect a block's keys that lie in a bracket; `position` is the block's first element's in its span.
inline void collect_block(const Words* keys, const Bracket& bracket, int64_t position, Bracketed& found) {
    const uint64_t above = lanes_above(keys, uint32_t(bracket.high));
    const uint64_t reached = bracket.low ? lanes_above(keys, uint32_t(bracket.low - 1)) : ~uint64_t(0);
    const uint64_t inside = reached & ~above;
    const int64_t count = __builtin_popcountll(inside);
    found.above += __builtin_popcountll(above);
    alignas(WIDE) uint32_t held[BLOCK];
    memcpy(held, keys, sizeof held);
    uint64_t left = inside;
    const auto take = [&](int64_t n) {
        const int j = __builtin_ctzll(left);
        found.key[n] = held[j], found.position[n] = uint16_t(position + j);
        left &= left - 1;
    };
    // Few of a block's keys are in a bracket, but rarely none: two are taken without asking, and written over
    // by the next block's if they were not there.
    left |= uint64_t(inside == 0), take(found.n);
    left |= uint64_t(left == 0), take(found.n + 1);
    if (count > 2)
        for (int64_t n = found.n + 2; left; ++n) take(n);
    found.n += count;
}

template <DType T, bool VARIANCE>
void bracket_lanes(const Operands& in, bool nonzero, int n_ranks, int64_t a, int64_t b,
                   const Bracket* brackets, Bracketed* counts) {
    const int n_keys = VARIANCE ? 1 : in.n_experts;
    BracketLanes lanes[MAX_BRACKETS];
    for (int j = 0; j < n_keys * n_ranks; ++j) {
        BracketLanes& x = lanes[j];
        x.open = brackets[j].open, x.single = !counts[j].key;
        x.below_low = Ints{} + (int32_t(brackets[j].low) - 1), x.high = Ints{} + int32_t(brackets[j].high);
        x.above = x.inside = x.nonzero = Words{};
    }
    int64_t i = a;
    for (; i + BLOCK <= b; i += BLOCK) {
        Floats base[VECTORS], d[VECTORS];
        load_base<T>(in, i, base);
        for (int k = 0; k < n_keys; ++k) {
            if (VARIANCE)
                variance_lanes<T>(in, i, base, d);
            else
                load_deltas<T>(expert_of(in, k), i, base, d);
            Words keys[VECTORS];
            for (int v = 0; v < VECTORS; ++v) keys[v] = order_keys(d[v]);
            for (int r = 0; r < n_ranks; ++r) {
                const int j = k * n_ranks + r;
                BracketLanes& x = lanes[j];
                if (!x.open) continue;
                if (x.single) {
                    Words above_high = x.above;
                    for (int v = 0; v < VECTORS; ++v)
                        above_high = count_where(above_high, above(Ints(keys[v]), x.high));
                    x.above = above_high;
                    Words reached = x.inside;  // what is above, too, until the end
                    for (int v = 0; v < VECTORS; ++v)
                        reached = count_where(reached, above(Ints(keys[v]), x.below_low));
                    x.inside = reached;
                } else {
                    collect_block(keys, brackets[j], i - a, counts[j]);
                }
                if (nonzero)
                    for (int v = 0; v < VECTORS; ++v)
                        x.nonzero = count_where(x.nonzero, above(Ints(keys[v]), Ints{}));
            }
        }
    }
    for (int j = 0; j < n_keys * n_ranks; ++j) {
        if (!lanes[j].open) continue;
        const uint32_t n_above = sum_lanes(lanes[j].above);
        counts[j].above += n_above, counts[j].nonzero += sum_lanes(lanes[j].nonzero);
        if (lanes[j].single) counts[j].n += sum_lanes(lanes[j].inside) - n_above;
    }
    bracket_range<float>(in, VARIANCE, nonzero, n_ranks, i, b, brackets, counts, a);
}

template <DType T>
void bracket_common(const Operands& in, bool variance, bool nonzero, int n_ranks, int64_t a, int64_t b,
                    const Bracket* brackets, Bracketed* counts) {
    if ((variance ? 1 : in.n_experts) * n_ranks > MAX_BRACKETS)
        return bracket_range<float>(in, variance, nonzero, n_ranks, a, b, brackets, counts, a);
    if (variance) return bracket_lanes<T, true>(in, nonzero, n_ranks, a, b, brackets, counts);
    bracket_lanes<T, false>(in, nonzero, n_ranks, a, b, brackets, counts);
}

constexpr int RUN = 64;  // blocks that a sum is taken over before its lanes go back to memory: a segment

// ---- moments -------------------------------------------------------------------------------------------

/// One expert's moment over whole blocks of a run, a vector of each block at a time, with its sums in
/// registers.
template <DType T, Moment OF>
inline void moment_of_expert(const CommonExpert& e, const Operands& in, int64_t a, const BlockKeep* keep,
                             int n_blocks, bool plain, double* lanes) {
    for (int v = 0; v < VECTORS; ++v) {
        double* at = lanes + v * LANES;
        constexpr int HALF = LANES / 2;
        Doubles sums[4] = {read<Doubles>(at), read<Doubles>(at + HALF), read<Doubles>(at + BLOCK),
                           read<Doubles>(at + BLOCK + HALF)};
        const auto raise = [](Doubles& most, Doubles x) { most = (x > most) | (x != x) ? x : most; };
        for (int block = 0; block < n_blocks; ++block) {
            const int64_t i = a + int64_t(block) * BLOCK + v * LANES;
            if (v == 0) {
                prefetch_block<T>(e.x, i, RUN * BLOCK);
                if (in.base) prefetch_block<T>(base_of(in), i, RUN * BLOCK);
            }
            const Floats x = load_view<T>(e.x, i);
            const Floats size = Floats(Words(in.base ? x - load_view<T>(base_of(in), i) : x) & 0x7fffffffu);
            const Picks kept = plain ? Picks{} : kept_lanes(keep[block], order_keys(size), v);
            TwoDoubles y = to_doubles(size);
            if (OF == Moment::Max) {  // NaN is largest, and stays: nothing compares above it
                raise(sums[0], y.low), raise(sums[1], y.high);
                if (plain) continue;
                y = to_doubles(only(kept, size));
                raise(sums[2], y.low), raise(sums[3], y.high);
                continue;
            }
            if (OF == Moment::Square) y = {y.low * y.low, y.high * y.high};
            sums[0] += y.low, sums[1] += y.high;
            if (!plain) add_where(sums + 2, kept, y);
        }
        memcpy(at, sums, sizeof(Doubles) * 2);
        memcpy(at + BLOCK, plain ? sums : sums + 2, sizeof(Doubles) * 2);
    }
}

template <DType T>
void moments_common(Moment of, const Keep& keep, const Operands& in, const Ranks& ranks,
                    const CommonExpert* experts, int64_t a, int64_t b, double* lanes) {
    const bool plain = !keep.any();

    const int64_t head = std::min(b, a + (BLOCK - (in.start + a) % BLOCK) % BLOCK);
    if (a < head) moments_range<float>(of, keep, in, ranks, a, head, lanes);
    for (int64_t i = head; i < b;) {
        const int n_blocks = int(std::min<int64_t>(RUN, (b - i) / BLOCK));
        if (n_blocks == 0) return moments_range<float>(of, keep, in, ranks, i, b, lanes);
        uint64_t select[RUN];
        bool whole = true;
        for (int j = 0; j < n_blocks; ++j) whole &= select_bits<T>(keep, in, i + j * BLOCK, select[j]);
        // A run with a block that needs positions is left to the slow path, for all experts alike.
        BlockKeep kept[RUN];
        for (int k = 0; k < in.n_experts && whole && !plain; ++k)
            if (experts[k].trim || experts[k].remove)
                for (int j = 0; j < n_blocks; ++j) {
                    CommonExpert cuts = experts[k];
                    cuts.threshold = 65536, cuts.decided = nullptr;
                    whole &= keep_of_block(cuts, keep, in, i + j * BLOCK, 0, kept[j]);
                }
        if (!whole) {
            moments_range<float>(of, keep, in, ranks, i, i + n_blocks * BLOCK, lanes);
            i += n_blocks * BLOCK;
            continue;
        }
        for (int k = 0; k < in.n_experts; ++k) {
            for (int j = 0; j < n_blocks && !plain; ++j)
                keep_of_block(experts[k], keep, in, i + j * BLOCK, select[j], kept[j]);
            double* sums = lanes + int64_t(k) * 2 * BLOCK;
            if (of == Moment::Abs)
                moment_of_expert<T, Moment::Abs>(experts[k], in, i, kept, n_blocks, plain, sums);
            else if (of == Moment::Square)
                moment_of_expert<T, Moment::Square>(experts[k], in, i, kept, n_blocks, plain, sums);
            else
                moment_of_expert<T, Moment::Max>(experts[k], in, i, kept, n_blocks, plain, sums);
        }
        i += n_blocks * BLOCK;
    }
}

// ---- inner products ------------------------------------------------------------------------------------

/// Products of expert j with experts k0 .. k0 + N - 1 over whole blocks; sums: [N][BLOCK].
template <DType T, int N>
inline void gram_of(const Operands& in, int j, int k0, int64_t a, int n_blocks, double* sums) {
    for (int v = 0; v < VECTORS; ++v) {
        double* at = sums + v * LANES;
        constexpr int HALF = LANES / 2;
        Doubles low[N], high[N];
        for (int n = 0; n < N; ++n)
            low[n] = read<Doubles>(at + n * BLOCK), high[n] = read<Doubles>(at + n * BLOCK + HALF);
        for (int block = 0; block < n_blocks; ++block) {
            const int64_t i = a + int64_t(block) * BLOCK + v * LANES;
            if (v == 0 && j == 0) {  // of all experts: the next run's, while this one is worked on
                for (int n = 0; n < N; ++n) prefetch_block<T>(expert_of(in, k0 + n), i, RUN * BLOCK);
                if (in.base && k0 == 0) prefetch_block<T>(base_of(in), i, RUN * BLOCK);
            }
            const Floats base = in.base ? load_view<T>(base_of(in), i) : Floats{};
            const TwoDoubles x = to_doubles(load_view<T>(expert_of(in, j), i) - base);
            for (int n = 0; n < N; ++n) {
                const TwoDoubles y =
                    k0 + n == j ? x : to_doubles(load_view<T>(expert_of(in, k0 + n), i) - base);
                low[n] += x.low * y.low, high[n] += x.high * y.high;
            }
        }
        for (int n = 0; n < N; ++n)
            memcpy(at + n * BLOCK, &low[n], sizeof low[n]),
                memcpy(at + n * BLOCK + HALF, &high[n], sizeof high[n]);
    }
}

/// All products of K experts at once, each delta widened once; sums: [pairs][BLOCK].
template <DType T, int K>
inline void gram_all(const Operands& in, int64_t a, int n_blocks, double* sums) {
    constexpr int PAIRS = K * (K + 1) / 2, HALF = LANES / 2;
    for (int v = 0; v < VECTORS; ++v) {
        double* at = sums + v * LANES;
        Doubles low[PAIRS], high[PAIRS];
        for (int p = 0; p < PAIRS; ++p)
            low[p] = read<Doubles>(at + p * BLOCK), high[p] = read<Doubles>(at + p * BLOCK + HALF);
        for (int block = 0; block < n_blocks; ++block) {
            const int64_t i = a + int64_t(block) * BLOCK + v * LANES;
            if (v == 0) {
                for (int k = 0; k < K; ++k) prefetch_block<T>(expert_of(in, k), i, RUN * BLOCK);
                if (in.base) prefetch_block<T>(base_of(in), i, RUN * BLOCK);
            }
            const Floats base = in.base ? load_view<T>(base_of(in), i) : Floats{};
            TwoDoubles d[K];
            for (int k = 0; k < K; ++k) d[k] = to_doubles(load_view<T>(expert_of(in, k), i) - base);
            for (int j = 0, p = 0; j < K; ++j)
                for (int k = j; k < K; ++k, ++p)
                    low[p] += d[j].low * d[k].low, high[p] += d[j].high * d[k].high;
        }
        for (int p = 0; p < PAIRS; ++p)
            memcpy(at + p * BLOCK, &low[p], sizeof low[p]),
                memcpy(at + p * BLOCK + HALF, &high[p], sizeof high[p]);
    }
}

template <DType T>
void gram_common(const Operands& in, int64_t a, int64_t b, int64_t position, double* lanes) {
    const int64_t head = std::min(b, a + (BLOCK - (position + a) % BLOCK) % BLOCK);
    if (a < head) gram_range<float>(in, a, head, position, lanes);
    for (int64_t i = head; i < b;) {
        const int n_blocks = int(std::min<int64_t>(RUN, (b - i) / BLOCK));
        if (n_blocks == 0) return gram_range<float>(in, i, b, position, lanes);
        double* sums = lanes;
        const int K = in.n_experts;
        if (K == 1) gram_all<T, 1>(in, i, n_blocks, sums);
        if (K == 2) gram_all<T, 2>(in, i, n_blocks, sums);
        if (K == 3) gram_all<T, 3>(in, i, n_blocks, sums);
        if (K == 4) gram_all<T, 4>(in, i, n_blocks, sums);
        for (int j = 0; j < K && K > 4; ++j)
            for (int k = j; k < in.n_experts;) {
                const int left = in.n_experts - k;
                const int n = left >= 4 ? 4 : left;
                if (n == 4)
                    gram_of<T, 4>(in, j, k, i, n_blocks, sums);
                else if (n == 3)
                    gram_of<T, 3>(in, j, k, i, n_blocks, sums);
                else if (n == 2)
                    gram_of<T, 2>(in, j, k, i, n_blocks, sums);
                else
                    gram_of<T, 1>(in, j, k, i, n_blocks, sums);
                sums += n * BLOCK, k += n;
            }
        i += n_blocks * BLOCK;
    }
}

// ---- ranked drops --------------------------------------------------------------------------------------

/// Ranks of single elements, asked for in ascending order of index. Whoever shares a bin with many has many
/// equals: what was counted for one serves the next.
class RowRanks {
  public:
    RowRanks(const uint32_t* keys, int64_t m) : keys_(keys), m_(m) {}

    uint32_t of(int64_t index) {
        const uint32_t key = keys_[index];
        int s = 0;
        while (s < used_ && slot_[s].key != key) ++s;
        if (s == used_) {
            s = used_ < SLOTS ? used_++ : next_++ % SLOTS;
            slot_[s] = {key, less_than(key), 0, 0};
        }
        Slot& slot = slot_[s];
        slot.equal += count_equal(key, slot.seen, index);
        slot.seen = index;
        return slot.less + slot.equal;
    }

  private:
    static constexpr int SLOTS = 16;
    struct Slot {
        uint32_t key, less, equal;  // equal: among the first `seen` elements
        int64_t seen;
    };
    uint32_t less_than(uint32_t key) const {
        Words count[2] = {};
        const Ints bound = Ints{} + int32_t(key);
        for (int64_t j = 0; j < m_; j += 2 * LANES) {
            count[0] = count_where(count[0], above(bound, read<Ints>(keys_ + j)));
            count[1] = count_where(count[1], above(bound, read<Ints>(keys_ + j + LANES)));
        }
        return sum_lanes(count[0] + count[1]);
    }
    uint32_t count_equal(uint32_t key, int64_t from, int64_t to) const {
        Words count = {};
        uint32_t rest = 0;
        for (; from + LANES <= to; from += LANES) count -= Words(read<Words>(keys_ + from) == Words{} + key);
        for (; from < to; ++from) rest += keys_[from] == key;
        return rest + sum_lanes(count);
    }
    const uint32_t* keys_;
    int64_t m_;
    int used_ = 0, next_ = 0;
    Slot slot_[SLOTS];
};

/// Most elements need no rank: that of their magnitude's bin bounds it from both sides, and the draw lies
/// outside of what the bounds leave open. Bins are of the leading six bits of the mantissa in the sixteen
/// binades below the row's largest; zeros, which many deltas are, have one of their own.
template <DType T>
void rank_row_common(const Operands& in, int k, int64_t a, const uint32_t* threshold, uint64_t key,
                     uint32_t* scratch, uint64_t* kept) {
    constexpr int SHIFT = 18;
    const int64_t m = in.cols;
    uint32_t *keys = scratch, *bin = keys + m, *open = bin + m;
    uint32_t *count = open + m, *bounds = count + 2 * RANK_BINS;
    Words highest = {};
    for (int64_t j = 0; j < m; j += BLOCK) {
        Floats base[VECTORS], d[VECTORS];
        load_base<T>(in, a + j, base);
        load_deltas<T>(expert_of(in, k), a + j, base, d);
        for (int v = 0; v < VECTORS; ++v) {
            const Words x = order_keys(d[v]);
            highest = most(highest, x);
            memcpy(keys + j + v * LANES, &x, sizeof x);
        }
    }
    uint32_t largest = 0;
    for (int j = 0; j < LANES; ++j) largest = std::max(largest, highest[j]);
    const int32_t lowest = int32_t(largest >> SHIFT) - (RANK_BINS - 2);
    for (int64_t j = 0; j < m; j += LANES) {
        const Words x = read<Words>(keys + j);
        const Ints place = Ints(x >> SHIFT) - lowest;
        const Ints clamped = place > 0 ? place : Ints{};
        const Words b = Words((clamped + 1) & (x != Words{}));
        memcpy(bin + j, &b, sizeof b);
    }
    memset(count, 0, sizeof(uint32_t) * 2 * RANK_BINS);
    for (int64_t j = 0; j < m; j += 2) ++count[bin[j]], ++count[RANK_BINS + bin[j + 1]];
    uint32_t first = 0;
    for (int b = 0; b < RANK_BINS; ++b) {
        const uint32_t n = count[b] + count[RANK_BINS + b];
        if (n == 0) continue;
        // A draw below `low` is kept, one above `high` dropped; 65536, which no draw reaches, does not fit.
        const uint32_t low = std::min(threshold[first], 65535u), high = threshold[first + n - 1];
        bounds[b] = low | (high ? high - 1 : 0) << 16;
        first += n;
    }
    int64_t n_open = 0;
    for (int64_t j = 0; j < m; j += BLOCK) {
        uint16_t draw[BLOCK];
        draws16_block(key, in.start + a + j, draw);
        uint64_t keep = 0, left = 0;
        for (int v = 0; v < VECTORS; ++v) {
            const Ints drawn = Ints(widen(read<Halves>(draw + v * LANES)));
            const Words bound = gather(bounds, bin + j + v * LANES);
            const Picks below = above(Ints(bound & 0xffffu), drawn),
                        dropped = above(drawn, Ints(bound >> 16));
            keep |= bits_of(below, v), left |= bits_of(dropped, v);
        }
        kept[j / BLOCK] = keep;
        for (left = ~(left | keep); left; left &= left - 1)
            open[n_open++] = uint32_t(j + __builtin_ctzll(left));
        memcpy(bin + j, draw, sizeof draw);  // the bins are not needed again
    }
    RowRanks ranks(keys, m);
    for (int64_t o = 0; o < n_open; ++o) {
        const int64_t j = open[o];
        const uint32_t rank = ranks.of(j);
        uint16_t drawn;
        memcpy(&drawn, reinterpret_cast<const char*>(bin + j / BLOCK * BLOCK) + 2 * (j % BLOCK),
               sizeof drawn);
        kept[j / BLOCK] |= uint64_t(drawn < threshold[rank]) << (j % BLOCK);
    }
}
