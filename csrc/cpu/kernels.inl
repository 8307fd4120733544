// The loop nests around core/stages.hpp. Included once per instruction set with FM_ISA set to its name; knows
// nothing of the instruction set itself. Templates of the standard library may be instantiated here only
// with types of this namespace: a shared instantiation could carry AVX-512 code into other callers.
#include <algorithm>
#include <memory>

#include "core/four_bit/decode.hpp"
#include "core/four_bit/encode.hpp"
#include "core/walk.hpp"
#include "cpu/kernels.hpp"

namespace fastmerge {
namespace FM_ISA {
namespace {

/// Length of the block that starts at chunk index i: ends at a multiple of BLOCK and, if asked, of a row.
inline int block_length(const Operands& in, int64_t i, int64_t b, bool split_rows) {
    const int64_t flat = in.start + i;
    int64_t m = BLOCK - flat % BLOCK;
    if (split_rows) m = std::min<int64_t>(m, in.cols - flat % in.cols);
    return int(std::min(m, b - i));
}

/// Merge elements [a, b) of the chunk block by block.
template <class Real>
bool walk_range(const WalkPlan& plan, const Operands& in, const Ranks& ranks, int64_t a, int64_t b, void* out,
                DType out_type) {
    const bool split = splits_rows(plan.keep) || plan.axis == Axis::Row;
    bool bad = false;
    for (int64_t i = a; i < b;) {
        const int m = block_length(in, i, b, split);
        Real merged[BLOCK];
        bad |= walk_block<Real>(plan, in, ranks, i, m, merged);
        store_run(merged, out, out_type, i, m);
        i += m;
    }
    return bad;
}

#include "cpu/common.inl"
#include "cpu/walk_common.inl"

template <class Real>
void keep_mask_range(const Keep& keep, const Operands& in, const Ranks& ranks, int64_t a, int64_t b,
                     uint8_t* out) {
    for (int64_t i = a; i < b;) {
        const int m = block_length(in, i, b, splits_rows(keep));
        Real base[BLOCK];
        if (in.base) load_block<Real>(in.base, in.base_type, i, m, base);
        visit_experts<Real>(keep, in, ranks, i, m, base,
                            [&](int k, const Real*, const Real*, const Mask<Real>* kept, const Real*) {
                                uint8_t* row = out + int64_t(k) * in.n + i;
                                for (int j = 0; j < m; ++j) row[j] = kept ? kept[j] != 0 : 1;
                            });
        i += m;
    }
}

/// Add a run's moment to its lanes, or raise them to it; a full block has a constant trip count.
template <class Real>
inline void add_moment(Moment of, const Real* x, int m, double* __restrict lane) {
    const auto visit = [&](auto each) {
        if (m == BLOCK)
            for (int j = 0; j < BLOCK; ++j) each(j, double(absolute(x[j])));
        else
            for (int j = 0; j < m; ++j) each(j, double(absolute(x[j])));
    };
    if (of == Moment::Abs)
        visit([&](int j, double y) { lane[j] += y; });
    else if (of == Moment::Square)
        visit([&](int j, double y) { lane[j] += y * y; });
    else
        visit([&](int j, double y) { lane[j] = y > lane[j] || y != y ? y : lane[j]; });  // NaN is largest
}

template <class Real>
void moments_range(Moment of, const Keep& keep, const Operands& in, const Ranks& ranks, int64_t a, int64_t b,
                   double* lanes) {
    for (int64_t i = a; i < b;) {
        const int m = block_length(in, i, b, splits_rows(keep));
        const int lane = int((in.start + i) % BLOCK);
        Real base[BLOCK];
        if (in.base) load_block<Real>(in.base, in.base_type, i, m, base);
        visit_experts<Real>(keep, in, ranks, i, m, base,
                            [&](int k, const Real* d, const Real* v, const Mask<Real>*, const Real*) {
                                double* all = lanes + int64_t(k) * 2 * BLOCK + lane;
                                add_moment(of, d, m, all);
                                add_moment(of, v, m, all + BLOCK);
                            });
        i += m;
    }
}

template <class Real>
void gram_range(const Operands& in, int64_t a, int64_t b, int64_t position, double* lanes) {
    const int K = in.n_experts;
    const std::unique_ptr<Real[]> d(new Real[size_t(K) * BLOCK]);
    for (int64_t i = a; i < b;) {
        const int lane = int((position + i) % BLOCK);
        const int m = int(std::min<int64_t>(BLOCK - lane, b - i));
        Real base[BLOCK];
        if (in.base) load_block<Real>(in.base, in.base_type, i, m, base);
        for (int k = 0; k < K; ++k) load_delta(in, k, i, m, base, d.get() + size_t(k) * BLOCK);
        double* sum = lanes + lane;
        for (int j = 0; j < K; ++j)
            for (int k = j; k < K; ++k, sum += BLOCK) {
                const Real *x = d.get() + size_t(j) * BLOCK, *y = d.get() + size_t(k) * BLOCK;
                for (int e = 0; e < m; ++e) sum[e] += double(x[e]) * double(y[e]);
            }
        i += m;
    }
}

template <class Real>
void gram_columns_range(const Operands& in, int64_t r0, int64_t r1, int64_t c0, int64_t c1, double* sums) {
    const int K = in.n_experts;
    const std::unique_ptr<Real[]> d(new Real[size_t(K) * BLOCK]);
    for (int64_t r = r0; r < r1; ++r)
        for (int64_t c = c0; c < c1; c += BLOCK) {
            const int m = int(std::min<int64_t>(BLOCK, c1 - c));
            const int64_t i = r * in.cols + c;
            Real base[BLOCK];
            if (in.base) load_block<Real>(in.base, in.base_type, i, m, base);
            for (int k = 0; k < K; ++k) load_delta(in, k, i, m, base, d.get() + size_t(k) * BLOCK);
            double* sum = sums + c;
            for (int j = 0; j < K; ++j)
                for (int k = j; k < K; ++k, sum += in.cols) {
                    const Real *x = d.get() + size_t(j) * BLOCK, *y = d.get() + size_t(k) * BLOCK;
                    for (int e = 0; e < m; ++e) sum[e] += double(x[e]) * double(y[e]);
                }
        }
}

template <class Real>
int64_t sign_balance_range(const WalkPlan& plan, const Operands& in, const Ranks& ranks, int64_t a,
                           int64_t b) {
    const bool split = splits_rows(plan.keep) || plan.axis == Axis::Row;
    int64_t balance = 0;
    for (int64_t i = a; i < b;) {
        const int m = block_length(in, i, b, split);
        balance += balance_block<Real>(plan, in, ranks, i, m);
        i += m;
    }
    return balance;
}

/// Visit the keys of [a, b) a block at a time: f(i, m, keys).
template <class Real, class F>
inline void visit_keys(const Operands& in, int k, int64_t a, int64_t b, F&& f) {
    for (int64_t i = a; i < b; i += BLOCK) {
        const int m = int(std::min<int64_t>(BLOCK, b - i));
        Real base[BLOCK], d[BLOCK];
        Key<Real> keys[BLOCK];
        if (in.base) load_block<Real>(in.base, in.base_type, i, m, base);
        if (k < 0)
            variance_block(in, i, m, base, d);
        else
            load_delta(in, k, i, m, base, d);
        for (int j = 0; j < BLOCK; ++j) keys[j] = order_key(d[j]);
        f(i, m, keys);
    }
}

template <class Real>
void keys_range(const Operands& in, int k, int64_t a, int64_t b, uint64_t* out) {
    visit_keys<Real>(in, k, a, b, [&](int64_t i, int m, const Key<Real>* keys) {
        for (int j = 0; j < m; ++j) out[i - a + j] = keys[j];
    });
}

template <class Real>
void histogram_range(const Operands& in, int k, int64_t a, int64_t b, int shift, int width, uint64_t prefix,
                     uint64_t* bins) {
    const Key<Real> digit = Key<Real>((uint64_t(1) << width) - 1);
    const bool all = shift + width >= int(8 * sizeof(Real)) - 1;  // the top digit has no prefix
    visit_keys<Real>(in, k, a, b, [&](int64_t, int m, const Key<Real>* keys) {
        for (int j = 0; j < m; ++j)
            if (all || uint64_t(keys[j] >> (shift + width)) == prefix) ++bins[(keys[j] >> shift) & digit];
    });
}

template <class Real>
void bracket_range(const Operands& in, bool variance, bool nonzero, int n_ranks, int64_t a, int64_t b,
                   const Bracket* brackets, Bracketed* counts, int64_t span) {
    const int n_keys = variance ? 1 : in.n_experts;
    for (int64_t i = a; i < b; i += BLOCK) {
        const int m = int(std::min<int64_t>(BLOCK, b - i));
        const uint64_t valid = m == BLOCK ? ~uint64_t(0) : (uint64_t(1) << m) - 1;
        Real base[BLOCK], d[BLOCK];
        Key<Real> keys[BLOCK];
        if (in.base) load_block<Real>(in.base, in.base_type, i, m, base);
        for (int k = 0; k < n_keys; ++k) {
            if (variance)
                variance_block(in, i, m, base, d);
            else
                load_delta(in, k, i, m, base, d);
            for (int j = 0; j < BLOCK; ++j) keys[j] = order_key(d[j]);
            for (int r = 0; r < n_ranks; ++r) {
                const Bracket& bracket = brackets[k * n_ranks + r];
                if (!bracket.open) continue;
                Bracketed& found = counts[k * n_ranks + r];
                const uint64_t above = greater_mask(keys, Key<Real>(bracket.high)) & valid;
                const uint64_t reached =
                    bracket.low ? greater_mask(keys, Key<Real>(bracket.low - 1)) & valid : valid;
                found.above += __builtin_popcountll(above);
                if (nonzero) found.nonzero += __builtin_popcountll(greater_mask(keys, Key<Real>(0)) & valid);
                const uint64_t inside = reached & ~above;
                // Few of a block's keys are in a bracket: one by one costs no more than compressing vectors.
                int64_t n = found.n;
                if (found.key)
                    for (uint64_t left = inside; left; left &= left - 1, ++n) {
                        const int j = __builtin_ctzll(left);
                        found.key[n] = keys[j], found.position[n] = uint16_t(i - span + j);
                    }
                found.n += __builtin_popcountll(inside);
            }
        }
    }
}

template <class Real>
int64_t count_equal_range(const Operands& in, int k, int64_t a, int64_t b, uint64_t key) {
    int64_t count = 0;
    visit_keys<Real>(in, k, a, b, [&](int64_t, int m, const Key<Real>* keys) {
        int equal = 0;
        for (int j = 0; j < m; ++j) equal += keys[j] == Key<Real>(key);
        count += equal;
    });
    return count;
}

template <class Real>
int64_t find_equal_range(const Operands& in, int k, int64_t a, int64_t b, uint64_t key, int64_t q) {
    int64_t at = -1;
    visit_keys<Real>(in, k, a, b, [&](int64_t i, int m, const Key<Real>* keys) {
        for (int j = 0; j < m && at < 0; ++j)
            if (keys[j] == Key<Real>(key) && --q == 0) at = i + j;
    });
    return at;
}

template <class Real>
struct Ranked {
    Key<Real> key;
    uint32_t index;
    bool operator<(const Ranked& o) const { return key != o.key ? key < o.key : index < o.index; }
};

/// Radix sort by the key's 31 bits, least digit first: stable, so equal keys stay in order of index.
inline void radix_ranks(Ranked<float>* order, Ranked<float>* other, int64_t m, uint32_t* rank) {
    constexpr int WIDTH = 11, PASSES = 3, BINS = 1 << WIDTH;
    uint32_t start[PASSES][BINS] = {};
    for (int64_t i = 0; i < m; ++i)
        for (int p = 0; p < PASSES; ++p) ++start[p][order[i].key >> (p * WIDTH) & (BINS - 1)];
    for (int p = 0; p < PASSES; ++p) {
        uint32_t sum = 0;
        for (uint32_t& bin : start[p]) {
            const uint32_t count = bin;
            bin = sum, sum += count;
        }
        const auto place = [&](int64_t i) { return start[p][order[i].key >> (p * WIDTH) & (BINS - 1)]++; };
        if (p == PASSES - 1) {
            for (int64_t i = 0; i < m; ++i) rank[order[i].index] = place(i);
            return;
        }
        for (int64_t i = 0; i < m; ++i) other[place(i)] = order[i];
        Ranked<float>* const sorted = other;
        other = order, order = sorted;
    }
}

template <class Real>
void rank_unit_range(const Operands& in, int k, int64_t a, int64_t m, uint32_t* rank) {
    const bool radix = sizeof(Real) == sizeof(float) && m >= 512;  // below, clearing the bins costs more
    const std::unique_ptr<Ranked<Real>[]> order(new Ranked<Real>[size_t(radix ? 2 * m : m)]);
    visit_keys<Real>(in, k, a, a + m, [&](int64_t i, int len, const Key<Real>* keys) {
        for (int j = 0; j < len; ++j) order[i - a + j] = {keys[j], uint32_t(i - a + j)};
    });
    if constexpr (sizeof(Real) == sizeof(float))
        if (radix) return radix_ranks(order.get(), order.get() + m, m, rank);
    std::sort(order.get(), order.get() + m);
    for (int64_t r = 0; r < m; ++r) rank[order[r].index] = uint32_t(r);
}

#include "cpu/coded.inl"
#include "cpu/statistics_common.inl"

// The instantiation of a template for the operands' types.
#define FM_BY_TYPE(in, name, ...)                  \
    switch (type_of(in)) {                         \
        case DType::BF16:                          \
            return name<DType::BF16>(__VA_ARGS__); \
        case DType::F16:                           \
            return name<DType::F16>(__VA_ARGS__);  \
        case DType::F32:                           \
            return name<DType::F32>(__VA_ARGS__);  \
        default:                                   \
            return name<MIXED>(__VA_ARGS__);       \
    }

// The table's entries choose the compute type; everything below them is a template over it.
#define FM_CHOOSE(call_f32, call_f64) return f64 ? call_f64 : call_f32

bool walk(const WalkPlan& p, const Operands& in, const Ranks& r, bool f64, int64_t a, int64_t b, void* out,
          DType t) {
    if (is_coded(in)) {
        bool bad = false;
        by_tile(in, f64, a, b, [&](const Operands& tile, int64_t i, int64_t j) {
            bad |= walk(p, tile, r, f64, i, j, out, t);
        });
        return bad;
    }
    if (CommonExpert experts[MAX_COMMON]; common_walk(p, in, r, f64, experts))
        FM_BY_TYPE(in, walk_voted, p, in, r, experts, a, b, out, t);
    FM_CHOOSE(walk_range<float>(p, in, r, a, b, out, t), walk_range<double>(p, in, r, a, b, out, t));
}
void keep_mask(const Keep& p, const Operands& in, const Ranks& r, bool f64, int64_t a, int64_t b,
               uint8_t* out) {
    FM_CHOOSE(keep_mask_range<float>(p, in, r, a, b, out), keep_mask_range<double>(p, in, r, a, b, out));
}
void moments(Moment of, const Keep& p, const Operands& in, const Ranks& r, bool f64, int64_t a, int64_t b,
             double* lanes) {
    if (is_coded(in))
        return by_tile(in, f64, a, b, [&](const Operands& tile, int64_t i, int64_t j) {
            moments(of, p, tile, r, f64, i, j, lanes);
        });
    if (CommonExpert experts[MAX_COMMON]; common_experts(p, in, r, f64, experts))
        FM_BY_TYPE(in, moments_common, of, p, in, r, experts, a, b, lanes);
    FM_CHOOSE(moments_range<float>(of, p, in, r, a, b, lanes),
              moments_range<double>(of, p, in, r, a, b, lanes));
}
void gram(const Operands& in, bool f64, int64_t a, int64_t b, int64_t position, double* lanes) {
    if (is_coded(in))
        return by_tile(in, f64, a, b, [&](const Operands& tile, int64_t i, int64_t j) {
            gram(tile, f64, i, j, position, lanes);
        });
    if (is_single(in, f64)) FM_BY_TYPE(in, gram_common, in, a, b, position, lanes);
    FM_CHOOSE(gram_range<float>(in, a, b, position, lanes), gram_range<double>(in, a, b, position, lanes));
}
void gram_columns(const Operands& in, bool f64, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                  double* sums) {
    FM_CHOOSE(gram_columns_range<float>(in, r0, r1, c0, c1, sums),
              gram_columns_range<double>(in, r0, r1, c0, c1, sums));
}
int64_t sign_balance(const WalkPlan& p, const Operands& in, const Ranks& r, bool f64, int64_t a, int64_t b) {
    FM_CHOOSE(sign_balance_range<float>(p, in, r, a, b), sign_balance_range<double>(p, in, r, a, b));
}
void keys(const Operands& in, int k, bool f64, int64_t a, int64_t b, uint64_t* out) {
    if (is_coded(in))
        return by_tile(in, f64, a, b, [&](const Operands& tile, int64_t i, int64_t j) {
            keys(tile, k, f64, i, j, out + (i - a));
        });
    FM_CHOOSE(keys_range<float>(in, k, a, b, out), keys_range<double>(in, k, a, b, out));
}
void histogram(const Operands& in, int k, bool f64, int64_t a, int64_t b, int shift, int width,
               uint64_t prefix, uint64_t* bins) {
    FM_CHOOSE(histogram_range<float>(in, k, a, b, shift, width, prefix, bins),
              histogram_range<double>(in, k, a, b, shift, width, prefix, bins));
}
void bracket(const Operands& in, bool variance, bool nonzero, int n_ranks, bool f64, int64_t a, int64_t b,
             const Bracket* brackets, Bracketed* counts) {
    if (is_coded(in))
        return by_tile(in, f64, a, b, [&](const Operands& tile, int64_t i, int64_t j) {
            const int n = (variance ? 1 : in.n_experts) * n_ranks;
            int64_t before[MAX_BRACKETS];
            if (n > MAX_BRACKETS) {
                FM_CHOOSE(bracket_range<float>(tile, variance, nonzero, n_ranks, i, j, brackets, counts, a),
                          bracket_range<double>(tile, variance, nonzero, n_ranks, i, j, brackets, counts, a));
            }
            for (int c = 0; c < n; ++c) before[c] = counts[c].n;
            bracket(tile, variance, nonzero, n_ranks, f64, i, j, brackets, counts);
            for (int c = 0; c < n; ++c)  // positions are the span's, not the tile's
                for (int64_t at = before[c]; counts[c].key && at < counts[c].n; ++at)
                    counts[c].position[at] = uint16_t(counts[c].position[at] + (i - a));
        });
    if (is_single(in, f64))
        FM_BY_TYPE(in, bracket_common, in, variance, nonzero, n_ranks, a, b, brackets, counts);
    FM_CHOOSE(bracket_range<float>(in, variance, nonzero, n_ranks, a, b, brackets, counts, a),
              bracket_range<double>(in, variance, nonzero, n_ranks, a, b, brackets, counts, a));
}
int64_t count_equal(const Operands& in, int k, bool f64, int64_t a, int64_t b, uint64_t key) {
    FM_CHOOSE(count_equal_range<float>(in, k, a, b, key), count_equal_range<double>(in, k, a, b, key));
}
int64_t find_equal(const Operands& in, int k, bool f64, int64_t a, int64_t b, uint64_t key, int64_t q) {
    FM_CHOOSE(find_equal_range<float>(in, k, a, b, key, q), find_equal_range<double>(in, k, a, b, key, q));
}
void rank_unit(const Operands& in, int k, bool f64, int64_t a, int64_t m, uint32_t* rank) {
    FM_CHOOSE(rank_unit_range<float>(in, k, a, m, rank), rank_unit_range<double>(in, k, a, m, rank));
}
bool ranks_rows(const Keep& keep, const Operands& in, bool f64) {
    return keep.drop_axis == Axis::Row && !keep.by_value && !keep.rescale && !keep.given &&
           in.cols % BLOCK == 0 && in.cols >= RANK_BINS && in.start % BLOCK == 0 && is_single(in, f64) &&
           !is_coded(in);
}
bool draws(const Keep& keep, const Operands& in, bool f64) {
    bool wide = keep.rescale || keep.given || in.start % BLOCK != 0 || !is_single(in, f64);
    for (int k = 0; k < in.n_experts; ++k) wide |= DrawRule(keep.p_low[k]).wide;
    return !wide;
}
void draw(const Keep& keep, int k, int64_t first, int64_t n, uint64_t* kept) {
    const DrawRule rule(keep.p_low[k]);
    const PhiloxKeys keys(keep.key[k]);
    for (int64_t i = 0; i < n; i += BLOCK)
        kept[i / BLOCK] = rule.always  ? ~uint64_t(0)
                          : rule.never ? 0
                                       : drawn_bits(keys, first + i, uint32_t(rule.threshold));
}
void rank_row(const Operands& in, int k, int64_t a, const uint32_t* threshold, uint64_t key,
              uint32_t* scratch, uint64_t* kept) {
    FM_BY_TYPE(in, rank_row_common, in, k, a, threshold, key, scratch, kept);
}
#undef FM_CHOOSE

#define FM_TEXT_(x) #x
#define FM_TEXT(x) FM_TEXT_(x)

}  // namespace

extern const KernelTable table;
const KernelTable table = {
    FM_TEXT(FM_ISA), walk,         walk_coded, walk_peak, keep_mask, moments,     gram,
    gram_columns,    sign_balance, keys,       histogram, bracket,   count_equal, find_equal,
    rank_unit,       ranks_rows,   draws,      draw,      rank_row,  decode_run,  encode_tile};

}  // namespace FM_ISA
}  // namespace fastmerge
