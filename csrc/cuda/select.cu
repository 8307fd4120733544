// Exact rank cuts: the key of the r-th largest |delta|, then the flat index of its last tie that is above.
//
// A sample brackets the key; one reading of the operands, (K + 1) * itemsize bytes per element, counts what
// is above the bracket and at its ends and keeps the keys between, piece by piece. Among those the key is
// found digit by digit, 11, 10 and 10 bits, and the piece that holds the last tie, which is read once more. A
// cut outside its bracket, a piece with too many keys in it and float64 cost time only: their digits are
// counted from the operands. Everything is integer, so that no order of work shows in a result.
#include "cuda/grid.cuh"
#include "cuda/lanes.cuh"
#include "cuda/select.hpp"

namespace fastmerge {
namespace cuda {
namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr int64_t END = 0x7fffffffffffffffll;

template <class Real>
__device__ __forceinline__ double value_of(uint64_t key) {
    return double(bit_cast<Real>(Key<Real>(key)));
}

__device__ __forceinline__ bool has_prefix(uint64_t key, const Target& t, int shift, int width, bool first) {
    return first || key >> (shift + width) == t.prefix;
}

template <class Real>
constexpr int KEYS_AT_ONCE = sizeof(Real) == 4 ? 8 : 1;

/// Keys of V neighbouring deltas.
template <class Real, int V, class Load>
__device__ __forceinline__ void load_keys(const Operands& in, int k, int64_t i, Key<Real>* keys) {
    Real base[V], d[V];
    load_base<Real, V, Load>(in, i, base);
    load_deltas<Real, V, Load>(in, k, i, base, d);
    FM_UNROLL
    for (int j = 0; j < V; ++j) keys[j] = order_key(d[j]);
}

__device__ __forceinline__ bool aligned16(const void* p, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(static_cast<const char*>(p) + bytes) % 16 == 0;
}

/// Eight keys, by two wide stores.
__device__ __forceinline__ void store_keys(const uint32_t* keys, uint32_t* to) {
    uint4* const wide = reinterpret_cast<uint4*>(to);
    wide[0] = make_uint4(keys[0], keys[1], keys[2], keys[3]);
    wide[1] = make_uint4(keys[4], keys[5], keys[6], keys[7]);
}

/// Keys of [begin, end) of the chunk, in no particular order, a run of neighbours at a time per thread:
/// f(i, keys), with an array of them. AHEAD: how many runs are loaded before the first is used.
template <class Real, class Load, int AHEAD, class F>
__device__ __forceinline__ void visit_runs(const Operands& in, int k, int64_t begin, int64_t end, F&& f) {
    constexpr int V = KEYS_AT_ONCE<Real>;
    // Aligned as the chunk's first element is: what loads are aligned is the operands' own.
    const int64_t whole = begin + (end - begin) / V * V, step = THREADS * V;
    int64_t i = begin + int64_t(threadIdx.x) * V;
    if constexpr (V == 8 && AHEAD > 1)
        // What nearly all merges read: only where types are known can loads go ahead of uses.
        if (in.base && in.base_type == DType::BF16 && in.expert_type[k] == DType::BF16 &&
            aligned16(in.base, 2 * begin) && aligned16(in.expert[k], 2 * begin)) {
            const void *const base = in.base, *const expert = in.expert[k];
            for (; i < whole; i += AHEAD * step) {
                Raw b[AHEAD] = {}, x[AHEAD] = {};
                FM_UNROLL
                for (int a = 0; a < AHEAD; ++a)
                    if (i + a * step < whole) {
                        b[a] = load_raw<V>(base, DType::BF16, i + a * step);
                        x[a] = load_raw<V>(expert, DType::BF16, i + a * step);
                    }
                FM_UNROLL
                for (int a = 0; a < AHEAD; ++a)
                    if (i + a * step < whole) {
                        float base_of[V], d[V];
                        uint32_t keys[V];
                        widen_raw<V>(b[a], DType::BF16, base_of);
                        widen_raw<V>(x[a], DType::BF16, d);
                        FM_UNROLL
                        for (int j = 0; j < V; ++j) keys[j] = order_key(d[j] - base_of[j]);
                        f(i + a * step, keys);
                    }
            }
        }
    for (; i < whole; i += step) {
        Key<Real> keys[V];
        load_keys<Real, V, Load>(in, k, i, keys);
        f(i, keys);
    }
    for (i = whole + threadIdx.x; i < end; i += THREADS) {
        Key<Real> key[1];
        load_keys<Real, 1, Load>(in, k, i, key);
        f(i, key);
    }
}

/// The same one by one: f(key).
template <class Real, class Load, class F>
__device__ __forceinline__ void visit_keys(const Operands& in, int k, int64_t begin, int64_t end, F&& f) {
    visit_runs<Real, Load, 1>(in, k, begin, end, [&](int64_t, const auto& keys) {
        FM_UNROLL
        for (int j = 0; j < int(sizeof keys / sizeof *keys); ++j) f(keys[j]);
    });
}

struct Span {
    int64_t begin, end;
};
__device__ __forceinline__ Span piece_span(const Operands& in, int64_t piece) {
    const int64_t begin = piece * PIECE_ELEMENTS, end = begin + PIECE_ELEMENTS;
    return {begin, end < in.n ? end : in.n};
}

/// Keys of a piece among which the cut of target t may be, with how often each comes: f(key, times).
template <class Real, class Load, class F>
__device__ __forceinline__ void visit_candidates(const Operands& in, const Selection& s, int64_t t, int k,
                                                 int64_t piece, F&& f) {
    Key<Real> low = 0, width = ~low;
    if constexpr (sizeof(Real) == 4)
        if (const Bracket b = s.brackets[t]; b.holds) {
            const Inside inside = s.inside[t * s.n_pieces + piece];
            if (inside.between <= MOST_BETWEEN) {
                const uint32_t* keys = s.between + (t * s.n_pieces + piece) * MOST_BETWEEN;
                for (uint32_t i = threadIdx.x; i < inside.between; i += THREADS) f(keys[i], 1);
                if (threadIdx.x < 2)
                    f(threadIdx.x ? b.low : b.high, threadIdx.x ? inside.at_low : inside.at_high);
                return;
            }
            low = b.low, width = b.high - b.low;
        }
    const Span span = piece_span(in, piece);
    visit_keys<Real, Load>(in, k, span.begin, span.end, [&](Key<Real> key) {
        if (key - low <= width) f(key, 1);
    });
}

/// Adds of one bin after another, equal neighbours at once: deltas share few bins, and zeros one.
struct BinRun {
    uint32_t* bins;
    int bin = -1;
    uint32_t n = 0;
    __device__ explicit BinRun(uint32_t* b) : bins(b) {}
    __device__ __forceinline__ void add(int b, uint32_t times = 1) {
        if (b != bin) flush(), bin = b, n = 0;
        n += times;
    }
    __device__ __forceinline__ void flush() {
        if (n) atomicAdd(bins + bin, n);
    }
};

template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, 1)
    count_digits_kernel(const Job* job, Selection s, int shift, int width, bool first) {
    FM_SHARED(uint32_t, bins);  // [n_ranks, DIGIT_BINS]
    const Operands& in = job->in;
    const int n_bins = s.n_ranks * DIGIT_BINS;
    // Keys vary fastest: neighbouring blocks read the same piece of the base.
    for (int64_t task = blockIdx.x; task < s.n_pieces * s.n_keys; task += gridDim.x) {
        const int k = int(task % s.n_keys);
        for (int b = int(threadIdx.x); b < n_bins; b += THREADS) bins[b] = 0;
        __syncthreads();
        uint32_t nonzero = 0;
        for (int r = 0; r < s.n_ranks; ++r) {
            const int64_t at = int64_t(r) * s.n_keys + k;
            const Target t = s.targets[at];
            if (t.open != 1) continue;
            BinRun run(bins + r * DIGIT_BINS);
            visit_candidates<Real, Load>(in, s, at, k, task / s.n_keys, [&](uint64_t key, uint32_t times) {
                if (r == 0 && key) nonzero += times;
                if (has_prefix(key, t, shift, width, first))
                    run.add(int(key >> shift & ((1u << width) - 1)), times);
            });
            run.flush();
        }
        if (sizeof(Real) == 8 && s.fraction >= 0 && first && nonzero)
            atomicAdd(s.nonzero + k, static_cast<unsigned long long>(nonzero));
        __syncthreads();
        for (int b = int(threadIdx.x); b < n_bins; b += THREADS)
            if (bins[b]) {
                const int64_t t = int64_t(b / DIGIT_BINS) * s.n_keys + k;
                atomicAdd(s.bins + t * DIGIT_BINS + b % DIGIT_BINS, static_cast<unsigned long long>(bins[b]));
            }
        __syncthreads();
    }
}

/// Sums of what a block's threads hold.
template <class T>
struct Sums {
    T before, all;  // of the threads before this one, and of all
};

constexpr int MOST_WARPS = 32;  // of a block

/// All threads of the block take part. shared: [MOST_WARPS].
template <class T>
__device__ __forceinline__ Sums<T> sums_of(T mine, T* shared) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
    T upto = mine;
    for (int distance = 1; distance < 32; distance *= 2) {
        const T other = __shfl_up_sync(ALL, upto, distance);
        if (lane >= distance) upto += other;
    }
    if (lane == 31) shared[warp] = upto;
    __syncthreads();
    Sums<T> sums = {upto - mine, 0};
    for (int w = 0; w < warps; ++w) {
        if (w < warp) sums.before += shared[w];
        sums.all += shared[w];
    }
    __syncthreads();
    return sums;
}

/// The digit at which `rank` keys from the largest down are reached; rank becomes that within the digit's
/// bin. bins: aligned to 16 bytes. shared: [MOST_WARPS].
template <int N_THREADS, class Count>
__device__ __forceinline__ int choose_digit(const Count* bins, int64_t& rank, int64_t* shared) {
    constexpr int EACH = DIGIT_BINS / N_THREADS;
    struct alignas(EACH * sizeof(Count) < 16 ? EACH * sizeof(Count) : 16) Bins {
        Count n[EACH];
    };
    const int run = N_THREADS - 1 - int(threadIdx.x);  // downwards
    const Bins own = reinterpret_cast<const Bins*>(bins)[run];
    Count mine = 0;
    FM_UNROLL
    for (int j = 0; j < EACH; ++j) mine += own.n[j];
    Count before = sums_of(mine, reinterpret_cast<Count*>(shared)).before;
    const Count want = Count(rank);
    if (before < want && want <= before + mine) {
        FM_UNROLL
        for (int j = EACH - 1; j >= 0; --j) {
            if (before < want && want <= before + own.n[j])
                shared[0] = run * EACH + j, shared[1] = int64_t(want - before);
            before += own.n[j];
        }
    }
    __syncthreads();
    const int digit = int(shared[0]);
    rank = shared[1];
    __syncthreads();
    return digit;
}

/// A rank of n elements as a target; ranks beyond either end are settled at once.
__device__ __forceinline__ void open_target(Target& t, int64_t rank, int64_t n) {
    const double infinity = bit_cast<double>(uint64_t(0x7ff0000000000000ull));
    t.rank = rank, t.prefix = 0, t.piece = -1;
    t.open = rank > 0 && rank < n, t.pad = 0;
    t.value = rank <= 0 ? infinity : -1.0;
    t.last_tie = rank <= 0 ? -1 : END;
}

/// The rank that a fraction of the nonzero elements makes; all of them leave the zeros out, however many.
__device__ __forceinline__ void open_fraction(Target& t, double fraction, int64_t nonzero) {
    const int64_t rank = int64_t(fraction * double(nonzero));
    open_target(t, rank, nonzero);
    if (rank > 0 && rank >= nonzero) t.value = 0.0, t.last_tie = -1;
}

__global__ void __launch_bounds__(THREADS, 1)
    open_targets_kernel(Selection s, const int64_t* ranks, int64_t units, int64_t n) {
    const int64_t step = int64_t(gridDim.x) * THREADS, all = int64_t(s.n_ranks) * s.n_keys * units;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < all; i += step) {
        Target t;
        open_target(t, s.fraction >= 0 ? 0 : ranks[i / units], n);
        if (s.fraction >= 0) t.open = n > 0;  // what rank it is is known when the nonzero ones are counted
        s.targets[i] = t;
    }
}

// ---- brackets ------------------------------------------------------------------------------------------

constexpr int SAMPLE_THREADS = 1024, SAMPLED_EACH = SAMPLE / SAMPLE_THREADS;

/// Runs of eight keys all over the chunk, at places that are uneven and always the same.
template <class Load>
__global__ void __launch_bounds__(THREADS, 1) sample_keys_kernel(const Job* job, Selection s) {
    constexpr int RUN = 8, RUNS = SAMPLE / RUN;
    const Operands& in = job->in;
    const int64_t stride = in.n / RUNS, step = int64_t(gridDim.x) * THREADS;
    for (int64_t g = int64_t(blockIdx.x) * THREADS + threadIdx.x; g < int64_t(RUNS) * s.n_keys; g += step) {
        const int k = int(g / RUNS), run = int(g % RUNS);
        // A low-discrepancy sequence: no period of a tensor's rows coincides with it.
        const int64_t shift = int64_t(uint64_t(uint32_t(run) * 0x9e3779b9u) * uint64_t(stride - RUN) >> 32);
        uint32_t keys[RUN];
        load_keys<float, RUN, Load>(in, k, (run * stride + shift) / RUN * RUN, keys);
        FM_UNROLL
        for (int j = 0; j < RUN; ++j) s.sample[g * RUN + j] = keys[j];
    }
}

/// Two keys of the sample between which, both included, a target's cut almost surely lies. Keys that very
/// many elements share, as zero is, are ends of every bracket that they are in: those are counted apart.
__global__ void __launch_bounds__(SAMPLE_THREADS, 1) set_brackets_kernel(Selection s) {
    FM_SHARED(int64_t, shared);  // [MOST_WARPS], then the bins
    uint32_t* bins = reinterpret_cast<uint32_t*>(shared + MOST_WARPS);
    constexpr double DEVIATIONS = 7, MARGIN = 4;  // neighbours resemble each other: five would do for others
    constexpr uint32_t LARGEST = KeyOf<float>::inf + 1;
    const Target& t = s.targets[blockIdx.x];
    if (t.open != 1) return;
    const uint32_t* sample = s.sample + int64_t(blockIdx.x) % s.n_keys * SAMPLE + threadIdx.x;
    uint32_t key[SAMPLED_EACH];
    int64_t of = SAMPLE;
    double share = s.fraction;
    FM_UNROLL
    for (int j = 0; j < SAMPLED_EACH; ++j) key[j] = sample[j * SAMPLE_THREADS];
    if (s.fraction >= 0) {
        int64_t nonzero = 0;
        FM_UNROLL
        for (int j = 0; j < SAMPLED_EACH; ++j) nonzero += key[j] != 0;
        of = sums_of(nonzero, shared).all;
    } else {
        share = double(t.rank) / double(s.n);
    }
    const double about = share * double(of), margin = DEVIATIONS * sqrt(about * (1 - share)) + MARGIN;
    int64_t rank[2] = {int64_t(about - margin), int64_t(about + margin) + 1};
    const bool beyond[2] = {rank[0]<1, rank[1]> SAMPLE};
    rank[0] = beyond[0] ? 1 : rank[0], rank[1] = beyond[1] ? SAMPLE : rank[1];
    Target end[2] = {};
    FM_ROLLED
    for (int step = 0; step < 2 * n_digits(false); ++step) {
        const int d = step / 2, e = step % 2;
        const int shift = digit_shift(false, d), width = digit_width(false, d);
        if (step != 1) {  // the first digit's counts serve both ends
            for (int b = int(threadIdx.x); b < DIGIT_BINS; b += SAMPLE_THREADS) bins[b] = 0;
            __syncthreads();
            BinRun run(bins);
            FM_UNROLL
            for (int j = 0; j < SAMPLED_EACH; ++j)
                if (has_prefix(key[j], end[e], shift, width, d == 0))
                    run.add(int(key[j] >> shift & ((1u << width) - 1)));
            run.flush();
            __syncthreads();
        }
        const int digit = choose_digit<SAMPLE_THREADS>(bins, rank[e], shared);
        end[e].prefix = end[e].prefix << width | uint64_t(digit);
    }
    if (threadIdx.x == 0)
        s.brackets[blockIdx.x] = {beyond[1] ? 0 : uint32_t(end[1].prefix),
                                  beyond[0] ? LARGEST : uint32_t(end[0].prefix), 0};
}

/// The reading: of each piece, how many keys are above the bracket and at its ends, and the keys between, in
/// no particular order.
template <class Load>
__global__ void __launch_bounds__(THREADS, Load::coded ? 1 : 4)
    keep_between_kernel(const Job* job, Selection s) {
    FM_SHARED(uint32_t, kept);  // [MOST_BETWEEN], then counts
    // Above, from the high end on, from the low end on, between, nonzero.
    uint32_t* const counts = kept + MOST_BETWEEN;
    const Operands& in = job->in;
    for (int64_t task = blockIdx.x; task < s.n_pieces * s.n_keys; task += gridDim.x) {
        const int k = int(task % s.n_keys);
        const int64_t piece = task / s.n_keys;
        const Span span = piece_span(in, piece);
        for (int r = 0; r < s.n_ranks; ++r) {
            const int64_t t = int64_t(r) * s.n_keys + k;
            if (s.targets[t].open != 1) continue;
            const uint32_t low = s.brackets[t].low, high = s.brackets[t].high;
            const uint32_t inner = high > low ? high - low - 1 : 0;
            if (threadIdx.x < 5) counts[threadIdx.x] = 0;
            __syncthreads();
            uint32_t above = 0, from_high = 0, from_low = 0, zeros = 0, seen = 0;
            visit_runs<float, Load, 2>(in, k, span.begin, span.end, [&](int64_t, const auto& keys) {
                constexpr int N = sizeof keys / sizeof *keys;
                uint32_t bits = 0;
                FM_UNROLL
                for (int j = 0; j < N; ++j) {
                    // Keys have 31 bits: a difference's sign is an order, and cheaper to add than a flag.
                    above += (high - keys[j]) >> 31;
                    from_high += (high - 1 - keys[j]) >> 31, from_low += (low - 1 - keys[j]) >> 31;
                    bits |= uint32_t(keys[j] - low - 1 < inner) << j;
                }
                if (s.fraction >= 0) {
                    seen += N;
                    FM_UNROLL
                    for (int j = 0; j < N; ++j) zeros += keys[j] == 0;
                }
                if (!bits) return;
                const unsigned n = unsigned(__popc(bits));
                const uint32_t at = atomicAdd(counts + 3, n);
                if (at + n > MOST_BETWEEN) return;  // the count tells that not all are kept
                uint32_t* to = kept + at;
                FM_UNROLL
                for (int j = 0; j < N; ++j)
                    if (bits >> j & 1) *to++ = keys[j];
            });
            const uint32_t found[5] = {above, from_high, from_low, 0, seen - zeros};
            FM_UNROLL
            for (int c = 0; c < 5; ++c) {
                const uint32_t of_warp = __reduce_add_sync(ALL, found[c]);
                if (threadIdx.x % 32 == 0 && of_warp) atomicAdd(counts + c, of_warp);
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                const uint32_t at_high = counts[1] - counts[0];
                s.inside[t * s.n_pieces + piece] = {counts[0], at_high, counts[2] - counts[1] - counts[3],
                                                    counts[3]};
                if (counts[4]) atomicAdd(s.nonzero + k, static_cast<unsigned long long>(counts[4]));
            }
            if (counts[3] <= MOST_BETWEEN)
                for (uint32_t i = threadIdx.x; i < counts[3]; i += THREADS)
                    s.between[(t * s.n_pieces + piece) * MOST_BETWEEN + i] = kept[i];
            __syncthreads();
        }
    }
}

/// Whether each bracket holds its cut: if so, ranks are of what it holds.
__global__ void __launch_bounds__(THREADS, 1) check_brackets_kernel(Selection s) {
    FM_SHARED(int64_t, shared);  // [MOST_WARPS]
    Target t = s.targets[blockIdx.x];
    if (t.open != 1) return;
    int64_t above = 0, inside = 0;
    for (int64_t p = threadIdx.x; p < s.n_pieces; p += THREADS) {
        const Inside x = s.inside[blockIdx.x * s.n_pieces + p];
        above += x.above, inside += int64_t(x.at_high) + x.at_low + x.between;
    }
    above = sums_of(above, shared).all, inside = sums_of(inside, shared).all;
    if (threadIdx.x != 0) return;
    if (s.fraction >= 0) open_fraction(t, s.fraction, int64_t(s.nonzero[blockIdx.x]));
    if (t.open == 1 && above < t.rank && t.rank <= above + inside)
        t.rank -= above, s.brackets[blockIdx.x].holds = 1;
    s.targets[blockIdx.x] = t;
}

// ---- digits --------------------------------------------------------------------------------------------

template <class Real>
__global__ void __launch_bounds__(THREADS, 1)
    choose_digits_kernel(Selection s, int width, bool first, bool last) {
    FM_SHARED(int64_t, shared);  // [MOST_WARPS]
    Target& at = s.targets[blockIdx.x];
    unsigned long long* bins = s.bins + int64_t(blockIdx.x) * DIGIT_BINS;
    Target t = at;
    if (sizeof(Real) == 8 && t.open == 1 && first && s.fraction >= 0)
        open_fraction(t, s.fraction, int64_t(s.nonzero[blockIdx.x]));
    if (t.open == 1) {  // the same for all threads
        const int digit = choose_digit<THREADS>(bins, t.rank, shared);
        t.prefix = t.prefix << width | uint64_t(digit);
        if (last) {
            t.value = value_of<Real>(t.prefix);
            t.open = s.all_ties ? 0 : 2;
            t.last_tie = END;
        }
    }
    for (int b = int(threadIdx.x); b < DIGIT_BINS; b += THREADS) bins[b] = 0;
    __syncthreads();
    if (threadIdx.x == 0) at = t;
}

template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, 1) count_equals_kernel(const Job* job, Selection s) {
    const Operands& in = job->in;
    for (int64_t task = blockIdx.x; task < s.n_pieces * s.n_keys; task += gridDim.x) {
        const int k = int(task % s.n_keys);
        const int64_t piece = task / s.n_keys;
        for (int r = 0; r < s.n_ranks; ++r) {
            const int64_t t = int64_t(r) * s.n_keys + k;
            if (s.targets[t].open != 2) continue;
            const uint64_t cut = s.targets[t].prefix;
            uint32_t equal = 0;
            visit_candidates<Real, Load>(in, s, t, k, piece, [&](uint64_t key, uint32_t times) {
                if (key == cut) equal += times;
            });
            equal = __reduce_add_sync(ALL, equal);
            if (threadIdx.x % 32 == 0 && equal) atomicAdd(s.equal + t * s.n_pieces + piece, equal);
        }
    }
}

__global__ void __launch_bounds__(THREADS, 1) locate_ties_kernel(Selection s) {
    FM_SHARED(int64_t, shared);  // [MOST_WARPS]
    Target& t = s.targets[blockIdx.x];
    if (t.open != 2) return;
    const int64_t rank = t.rank;
    const uint32_t* equal = s.equal + int64_t(blockIdx.x) * s.n_pieces;
    __syncthreads();  // all have read the target before one writes it
    int64_t passed = 0;
    for (int64_t first = 0; first < s.n_pieces; first += THREADS) {
        const int64_t p = first + threadIdx.x, mine = p < s.n_pieces ? equal[p] : 0;
        const Sums<int64_t> sums = sums_of(mine, shared);
        const int64_t before = passed + sums.before;
        if (before < rank && rank <= before + mine) t.piece = p, t.rank = rank - before;
        passed += sums.all;
        if (passed >= rank) return;
    }
}

/// Find the q-th match of [begin, end): its index, or -1. A window of stretches is counted, a warp each, and
/// the stretch that holds it is looked at again. matches(i, m): bits of the m <= V elements from i on.
/// shared: int64_t [MOST_WARPS], then uint32_t [blockDim.x].
template <int V, class F>
__device__ __forceinline__ int64_t find_match(int64_t begin, int64_t end, int64_t q, int64_t* shared,
                                              F&& matches) {
    uint32_t* counts = reinterpret_cast<uint32_t*>(shared + MOST_WARPS);
    constexpr int64_t STRETCH = 32 * V;
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, threads = int(blockDim.x);
    const auto look = [&](int64_t i) -> uint32_t {
        return i < end ? matches(i, int(end - i < V ? end - i : V)) : 0;
    };
    for (int64_t first = begin; first < end; first += threads * STRETCH) {
        for (int s = warp; s < threads; s += threads / 32) {
            const int64_t at = first + s * STRETCH;
            uint32_t n = 0;
            if (at < end) n = __reduce_add_sync(ALL, unsigned(__popc(look(at + lane * V))));
            if (lane == 0) counts[s] = n;
        }
        __syncthreads();
        const int64_t mine = counts[threadIdx.x];
        const Sums<int64_t> sums = sums_of(mine, shared);
        if (sums.all < q) {
            q -= sums.all;
            continue;
        }
        if (sums.before < q && q <= sums.before + mine) shared[0] = threadIdx.x, shared[1] = sums.before;
        __syncthreads();
        if (warp == 0) {
            const int64_t i = first + shared[0] * STRETCH + lane * V;
            int left = int(q - shared[1]);
            uint32_t bits = look(i);
            int upto = __popc(bits);
            for (int distance = 1; distance < 32; distance *= 2) {
                const int other = __shfl_up_sync(ALL, upto, distance);
                if (lane >= distance) upto += other;
            }
            left -= upto - __popc(bits);
            if (0 < left && left <= __popc(bits)) {
                for (; left > 1; --left) bits &= bits - 1;
                shared[2] = i + __ffs(int(bits)) - 1;
            }
        }
        __syncthreads();
        const int64_t found = shared[2];
        __syncthreads();
        return found;
    }
    return -1;
}

constexpr size_t find_match_bytes(int threads) {
    return sizeof(int64_t) * MOST_WARPS + sizeof(uint32_t) * size_t(threads);
}

/// Threads of a block that looks for ties: the chunk's loads take long, and a cut has but one block.
template <class Load>
constexpr int TIE_THREADS = Load::coded ? THREADS : 1024;

template <class Real, class Load>
__global__ void __launch_bounds__(TIE_THREADS<Load>, 1)
    find_ties_kernel(const Job* job, Selection s, int64_t offset) {
    FM_SHARED(int64_t, shared);  // of find_match
    const Operands& in = job->in;
    Target& at = s.targets[blockIdx.x];
    Target t = at;
    if (t.open != 2 || t.piece < 0) return;
    __syncthreads();
    const Span span = piece_span(in, t.piece);
    const int k = int(blockIdx.x) % s.n_keys;
    constexpr int V = KEYS_AT_ONCE<Real>;
    const int64_t found = find_match<V>(span.begin, span.end, t.rank, shared, [&](int64_t i, int m) {
        uint32_t bits = 0;
        Key<Real> keys[V];
        if (m == V) {
            load_keys<Real, V, Load>(in, k, i, keys);
            FM_UNROLL
            for (int j = 0; j < V; ++j) bits |= uint32_t(keys[j] == t.prefix) << j;
            return bits;
        }
        FM_ROLLED
        for (int j = 0; j < m; ++j) {
            load_keys<Real, 1, Load>(in, k, i + j, keys);
            bits |= uint32_t(keys[0] == t.prefix) << j;
        }
        return bits;
    });
    if (found >= 0) t.last_tie = offset + in.start + found, t.open = 0;
    if (threadIdx.x == 0) at = t;
}

/// Bytes of keys that a block keeps while it selects: more would leave a processor with too few blocks.
constexpr int64_t HELD_BYTES = 80 << 10;

/// A block selects all cuts of one unit and key. held: it keeps the unit's keys, else it reads them again.
template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, Load::coded ? 1 : 3)
    select_units_kernel(const Job* job, Selection s, int64_t unit, int64_t units, bool held) {
    FM_SHARED(int64_t, shared);  // of find_match; then the bins, then the keys
    uint32_t* bins = reinterpret_cast<uint32_t*>(shared + MOST_WARPS) + THREADS;
    Key<Real>* keys = reinterpret_cast<Key<Real>*>(bins + DIGIT_BINS);
    const Operands& in = job->in;
    const int64_t here = in.n / unit, first_unit = in.start / unit;
    constexpr bool F64 = sizeof(Real) == 8;
    for (int64_t task = blockIdx.x; task < here * s.n_keys; task += gridDim.x) {
        const int k = int(task % s.n_keys);
        const int64_t u = task / s.n_keys, begin = u * unit, end = begin + unit;
        if (held) {
            visit_runs<Real, Load, 2>(in, k, begin, end, [&](int64_t i, const auto& x) {
                Key<Real>* const to = keys + (i - begin);
                if constexpr (sizeof x == 32)
                    store_keys(x, to);
                else
                    to[0] = x[0];
            });
            __syncthreads();
        }
        const auto key_at = [&](int64_t i) {
            Key<Real> x[1];
            if (held) return keys[i];
            load_keys<Real, 1, Load>(in, k, begin + i, x);
            return x[0];
        };
        const auto visit = [&](auto&& f) {
            if (held)
                for (int i = int(threadIdx.x); i < int(unit); i += THREADS) f(keys[i]);
            else
                for (int64_t i = threadIdx.x; i < unit; i += THREADS) f(key_at(i));
        };
        int64_t nonzero = 0;
        if (s.fraction >= 0) {
            visit([&](Key<Real> x) { nonzero += x != 0; });
            nonzero = sums_of(nonzero, shared).all;
        }
        for (int r = 0; r < s.n_ranks; ++r) {
            Target& at = s.targets[(int64_t(r) * s.n_keys + k) * units + first_unit + u];
            Target t = at;
            __syncthreads();
            if (t.open == 1 && s.fraction >= 0) open_fraction(t, s.fraction, nonzero);
            if (t.open == 1) {
                FM_ROLLED
                for (int d = 0; d < n_digits(F64); ++d) {
                    const int shift = digit_shift(F64, d), width = digit_width(F64, d);
                    for (int b = int(threadIdx.x); b < DIGIT_BINS; b += THREADS) bins[b] = 0;
                    __syncthreads();
                    BinRun run(bins);
                    visit([&](Key<Real> x) {
                        if (has_prefix(x, t, shift, width, d == 0))
                            run.add(int(x >> shift & ((1u << width) - 1)));
                    });
                    run.flush();
                    __syncthreads();
                    const int digit = choose_digit<THREADS>(bins, t.rank, shared);
                    t.prefix = t.prefix << width | uint64_t(digit);
                }
                t.value = value_of<Real>(t.prefix), t.last_tie = END;
                const Key<Real> cut = Key<Real>(t.prefix);
                if (!s.all_ties)
                    t.last_tie = in.start + begin +
                                 find_match<1>(0, unit, t.rank, shared,
                                               [&](int64_t i, int) { return uint32_t(key_at(i) == cut); });
            }
            if (threadIdx.x == 0) t.open = 0, at = t;
            __syncthreads();
        }
    }
}

template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, 1)
    order_keys_kernel(const Job* job, int first, int last, Key<Real>* keys) {
    constexpr int V = KEYS_AT_ONCE<Real>;
    const Operands& in = job->in;
    const int64_t step = int64_t(gridDim.x) * THREADS * V;
    for (int k = first; k < last; ++k)
        for (int64_t i = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * V; i < in.n; i += step) {
            Key<Real>* const to = keys + (k - first) * in.n + i;
            if constexpr (V == 8)
                if (i + V <= in.n && aligned16(to, 0)) {
                    Real x[V];
                    load_keyed<Real, V, Load>(in, k, i, x);
                    uint32_t found[V];
                    FM_UNROLL
                    for (int j = 0; j < V; ++j) found[j] = order_key(x[j]);
                    store_keys(found, to);
                    continue;
                }
            FM_ROLLED
            for (int j = 0; j < V && i + j < in.n; ++j) {
                Real x[1];
                load_keyed<Real, 1, Load>(in, k, i + j, x);
                to[j] = order_key(x[0]);
            }
        }
}

// ---- ranks within rows ---------------------------------------------------------------------------------

/// Keys of a thread, and bits of a digit that are sorted by at a time.
constexpr int RANK_ITEMS = 16, RANK_BITS = 8, RANK_BINS = 1 << RANK_BITS;

/// Threads of a block at most, and so the longest row that it sorts: what a thread has must fit in registers,
/// of which code for newer devices takes more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class Load>
constexpr int MOST_RANK_THREADS = 512;
#else
template <class Load>
constexpr int MOST_RANK_THREADS = Load::coded ? 512 : 1024;
#endif

/// Takes x for a new value: what is computed of it is computed where it is used. Sixteen digits that are kept
/// instead do not fit in registers.
__device__ __forceinline__ void fresh(uint32_t& x) {
    asm volatile("" : "+r"(x));
}

/// Lanes whose digit is this lane's.
__device__ __forceinline__ uint32_t peers_of(uint32_t digit) {
    uint32_t peers = ALL;
    FM_UNROLL
    for (int b = 0; b < RANK_BITS; ++b) {
        const int one = int(digit << (31 - b));  // by its sign
        peers &= __ballot_sync(ALL, one < 0) ^ ~uint32_t(one >> 31);
    }
    return peers;
}

/// Sort one row's keys in registers and shared memory, least digit first and stable, so that equal keys stay
/// in order of index. A warp has a run of the row, lane by lane; its keys of a digit go behind those of the
/// warps before it. Bits that all keys share are passed over: deltas of 16-bit types differ in half of them.
template <class Load>
__global__ void __launch_bounds__(MOST_RANK_THREADS<Load>, 1)
    rank_rows_kernel(const Job* job, uint32_t* ranks) {
    const int threads = int(blockDim.x), warps = threads / 32, t = int(threadIdx.x);
    const int lane = t % 32, warp = t / 32, slots = threads * RANK_ITEMS;
    FM_SHARED(uint32_t, places);                                      // [slots]
    uint32_t* const counts = places + slots;                          // [warps, RANK_BINS]
    uint32_t* const sums = counts + warps * RANK_BINS;                // [MOST_WARPS]
    uint32_t* const bits = sums + MOST_WARPS;                         // [2]: that any key has, that all have
    uint16_t* const columns = reinterpret_cast<uint16_t*>(bits + 2);  // [slots]
    uint32_t* const own = counts + warp * RANK_BINS;
    const Operands& in = job->in;
    const int cols = int(in.cols), begin = warp * 32 * RANK_ITEMS + lane;
    for (int64_t task = blockIdx.x; task < in.n / cols * in.n_experts; task += gridDim.x) {
        const int k = int(task % in.n_experts);
        const int64_t first = task / in.n_experts * cols;
        if (t < 2) bits[t] = t == 0 ? 0 : ALL;
        FM_ROLLED
        for (int c = t * 8; c < slots; c += threads * 8) {
            if (c + 8 <= cols) {
                uint32_t x[8];
                load_keys<float, 8, Load>(in, k, first + c, x);
                store_keys(x, places + c);
                continue;
            }
            FM_ROLLED
            for (int j = c; j < c + 8; ++j) {
                places[j] = ALL;  // behind the row: largest, and last
                if (j < cols) load_keys<float, 1, Load>(in, k, first + j, places + j);
            }
        }
        __syncthreads();
        uint32_t key[RANK_ITEMS], at[RANK_ITEMS];  // at: the column, and above it the place in the order
        uint32_t any = 0, all = ALL;
        FM_UNROLL
        for (int j = 0; j < RANK_ITEMS; ++j) {
            at[j] = uint32_t(begin + j * 32);
            key[j] = places[at[j]];
            if (int(at[j]) < cols) any |= key[j], all &= key[j];
        }
        any = __reduce_or_sync(ALL, any), all = __reduce_and_sync(ALL, all);
        if (lane == 0) atomicOr(bits, any), atomicAnd(bits + 1, all);
        __syncthreads();
        const uint32_t differ = bits[0] & ~bits[1];
        const int stop = 32 - __clz(int(differ));
        for (int shift = differ ? __ffs(int(differ)) - 1 : 0;; shift += RANK_BITS) {
            for (int b = lane; b < RANK_BINS; b += 32) own[b] = 0;
            __syncwarp();
            FM_UNROLL
            for (int j = 0; j < RANK_ITEMS; ++j) {
                fresh(key[j]);
                const uint32_t digit = key[j] >> shift & (RANK_BINS - 1), peers = peers_of(digit);
                const uint32_t place = own[digit] + uint32_t(__popc(peers & ((1u << lane) - 1)));
                __syncwarp();
                if (peers >> lane == 1) own[digit] = place + 1;  // the last of them
                __syncwarp();
                at[j] = (at[j] & 0xffffu) | place << 16;
            }
            __syncthreads();
            // Exclusive sums in order of digit, then warp: each thread takes neighbouring counts.
            const auto visit_counts = [&](auto&& f) {
                constexpr int EACH = RANK_BINS / 32;
                int digit = t * EACH / warps, w = t * EACH % warps;
                FM_ROLLED
                for (int e = 0; e < EACH; ++e) {
                    f(counts[w * RANK_BINS + digit]);
                    if (++w == warps) w = 0, ++digit;
                }
            };
            uint32_t mine = 0;
            visit_counts([&](uint32_t n) { mine += n; });
            uint32_t before = sums_of(mine, sums).before;
            visit_counts([&](uint32_t& count) {
                const uint32_t n = count;
                count = before;
                before += n;
            });
            __syncthreads();
            FM_UNROLL
            for (int j = 0; j < RANK_ITEMS; ++j) {
                fresh(key[j]);
                at[j] += own[key[j] >> shift & (RANK_BINS - 1)] << 16;
            }
            if (shift + RANK_BITS >= stop) break;
            FM_UNROLL
            for (int j = 0; j < RANK_ITEMS; ++j)
                places[at[j] >> 16] = key[j], columns[at[j] >> 16] = uint16_t(at[j]);
            __syncthreads();
            FM_UNROLL
            for (int j = 0; j < RANK_ITEMS; ++j) {
                const int place = begin + j * 32;
                key[j] = places[place], at[j] = columns[place];
            }
        }
        FM_UNROLL
        for (int j = 0; j < RANK_ITEMS; ++j) places[at[j] & 0xffffu] = at[j] >> 16;
        __syncthreads();
        for (int c = t; c < cols; c += threads) ranks[k * in.n + first + c] = places[c];
        __syncthreads();
    }
}

struct Ranked {
    uint32_t key, index;
};

constexpr int LONG_DIGIT = 4, LONG_BINS = 1 << LONG_DIGIT,
              LONG_PASSES = 8;  // 32 bits, one more than keys have

/// The same of a row that does not fit, in scratch memory: sort its keys, least digit first and stable, so
/// that equal keys stay in order of index. Each thread has a run of neighbours: counted by digit and thread,
/// the counts say where each run's keys of a digit go.
template <class Load>
__global__ void __launch_bounds__(THREADS, 1)
    rank_long_rows_kernel(const Job* job, uint32_t* ranks, Ranked* scratch) {
    FM_SHARED(int64_t, shared);  // [MOST_WARPS], then counts [LONG_BINS, THREADS]
    uint32_t* counts = reinterpret_cast<uint32_t*>(shared + MOST_WARPS);
    const Operands& in = job->in;
    const int64_t cols = in.cols, rows = in.n / cols, each = (cols + THREADS - 1) / THREADS;
    Ranked* from = scratch + int64_t(blockIdx.x) * 2 * cols;
    Ranked* to = from + cols;
    const int t = int(threadIdx.x);
    const int64_t begin = t * each < cols ? t * each : cols, end = begin + each < cols ? begin + each : cols;
    for (int64_t task = blockIdx.x; task < rows * in.n_experts; task += gridDim.x) {
        const int k = int(task % in.n_experts);
        const int64_t first = task / in.n_experts * cols;
        for (int64_t c = t; c < cols; c += THREADS) {
            uint32_t key[1];
            load_keys<float, 1, Load>(in, k, first + c, key);
            from[c] = {key[0], uint32_t(c)};
        }
        __syncthreads();
        for (int pass = 0; pass < LONG_PASSES; ++pass) {
            const int shift = pass * LONG_DIGIT;
            for (int b = 0; b < LONG_BINS; ++b) counts[b * THREADS + t] = 0;
            for (int64_t c = begin; c < end; ++c)
                ++counts[(from[c].key >> shift & (LONG_BINS - 1)) * THREADS + t];
            __syncthreads();
            // Exclusive sums in order of digit, then thread: each thread takes LONG_BINS neighbouring counts.
            int64_t mine = 0;
            for (int b = 0; b < LONG_BINS; ++b) mine += counts[t * LONG_BINS + b];
            int64_t before = sums_of(mine, shared).before;
            for (int b = 0; b < LONG_BINS; ++b) {
                const uint32_t n = counts[t * LONG_BINS + b];
                counts[t * LONG_BINS + b] = uint32_t(before);
                before += n;
            }
            __syncthreads();
            const bool last = pass == LONG_PASSES - 1;
            for (int64_t c = begin; c < end; ++c) {
                const Ranked x = from[c];
                const uint32_t place = counts[(x.key >> shift & (LONG_BINS - 1)) * THREADS + t]++;
                if (last)
                    ranks[k * in.n + first + x.index] = place;
                else
                    to[place] = x;
            }
            __syncthreads();
            Ranked* const sorted = to;
            to = from, from = sorted;
        }
    }
}

constexpr size_t LONG_SHARED = MOST_WARPS * sizeof(int64_t) + LONG_BINS * THREADS * sizeof(uint32_t);

auto rank_kernel(bool coded) {
    return coded ? rank_rows_kernel<AnyLoad> : rank_rows_kernel<DenseLoad>;
}

/// Threads of the block that sorts a row; 0 if a row is too long.
int rank_threads(const Operands& in, bool coded) {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, rank_kernel(coded)) != cudaSuccess) return 0;
    const int64_t threads = divide_up(divide_up(in.cols, RANK_ITEMS), 32) * 32;
    return threads <= attributes.maxThreadsPerBlock ? int(threads) : 0;
}

auto long_kernel(bool coded) {
    return coded ? rank_long_rows_kernel<AnyLoad> : rank_long_rows_kernel<DenseLoad>;
}

unsigned long_blocks(const Operands& in, bool coded) {
    return resident_blocks(long_kernel(coded), in.n / in.cols * in.n_experts, LONG_SHARED);
}

}  // namespace

cudaError_t open_targets(const Selection& s, const int64_t* ranks, int64_t units, int64_t n,
                         cudaStream_t stream) {
    const int64_t all = int64_t(s.n_ranks) * s.n_keys * units;
    if (all == 0) return cudaSuccess;
    const dim3 grid(resident_blocks(open_targets_kernel, divide_up(all, THREADS), 0));
    return launch(open_targets_kernel, grid, dim3(THREADS), 0, stream, s, ranks, units, n);
}

cudaError_t narrow(const Job* job, bool coded, const Selection& s, cudaStream_t stream) {
    const unsigned n_targets = unsigned(s.n_ranks * s.n_keys);
    const auto sample = coded ? sample_keys_kernel<AnyLoad> : sample_keys_kernel<DenseLoad>;
    const auto keep = coded ? keep_between_kernel<AnyLoad> : keep_between_kernel<DenseLoad>;
    const dim3 sampling(resident_blocks(sample, divide_up(int64_t(SAMPLE) / 8 * s.n_keys, THREADS), 0));
    constexpr size_t kept = sizeof(uint32_t) * (MOST_BETWEEN + 5);
    const dim3 keeping(resident_blocks(keep, s.n_pieces * s.n_keys, kept));
    constexpr size_t sums = sizeof(int64_t) * MOST_WARPS;
    cudaError_t status = launch(sample, sampling, dim3(THREADS), 0, stream, job, s);
    if (status == cudaSuccess)
        status = launch(set_brackets_kernel, dim3(n_targets), dim3(SAMPLE_THREADS),
                        sums + sizeof(uint32_t) * DIGIT_BINS, stream, s);
    if (status == cudaSuccess) status = launch(keep, keeping, dim3(THREADS), kept, stream, job, s);
    if (status == cudaSuccess)
        status = launch(check_brackets_kernel, dim3(n_targets), dim3(THREADS), sums, stream, s);
    return status;
}

cudaError_t count_digits(const Job* job, bool coded, const Selection& s, int d, cudaStream_t stream) {
    const auto kernel = FM_KERNEL(count_digits_kernel, (Kind{s.f64, coded}));
    const size_t shared = sizeof(uint32_t) * DIGIT_BINS * size_t(s.n_ranks);
    const dim3 grid(resident_blocks(kernel, s.n_pieces * s.n_keys, shared));
    return launch(kernel, grid, dim3(THREADS), shared, stream, job, s, digit_shift(s.f64, d),
                  digit_width(s.f64, d), d == 0);
}

cudaError_t choose_digits(const Selection& s, int d, cudaStream_t stream) {
    const auto kernel = s.f64 ? choose_digits_kernel<double> : choose_digits_kernel<float>;
    return launch(kernel, dim3(unsigned(s.n_ranks * s.n_keys)), dim3(THREADS), sizeof(int64_t) * MOST_WARPS,
                  stream, s, digit_width(s.f64, d), d == 0, d == n_digits(s.f64) - 1);
}

cudaError_t count_equals(const Job* job, bool coded, const Selection& s, cudaStream_t stream) {
    const auto kernel = FM_KERNEL(count_equals_kernel, (Kind{s.f64, coded}));
    const dim3 grid(resident_blocks(kernel, s.n_pieces * s.n_keys, 0));
    return launch(kernel, grid, dim3(THREADS), 0, stream, job, s);
}

cudaError_t locate_ties(const Selection& s, cudaStream_t stream) {
    return launch(locate_ties_kernel, dim3(unsigned(s.n_ranks * s.n_keys)), dim3(THREADS),
                  sizeof(int64_t) * MOST_WARPS, stream, s);
}

cudaError_t find_ties(const Job* job, bool coded, const Selection& s, int64_t offset, cudaStream_t stream) {
    const auto kernel = FM_KERNEL(find_ties_kernel, (Kind{s.f64, coded}));
    const int threads = coded ? TIE_THREADS<AnyLoad> : TIE_THREADS<DenseLoad>;
    return launch(kernel, dim3(unsigned(s.n_ranks * s.n_keys)), dim3(unsigned(threads)),
                  find_match_bytes(threads), stream, job, s, offset);
}

cudaError_t select_units(const Job* job, const Operands& in, bool coded, const Selection& s, int64_t unit,
                         int64_t units, cudaStream_t stream) {
    const auto kernel = FM_KERNEL(select_units_kernel, (Kind{s.f64, coded}));
    const int64_t keys = unit * (s.f64 ? 8 : 4);
    const bool held = keys <= HELD_BYTES;
    const size_t shared = find_match_bytes(THREADS) + sizeof(uint32_t) * DIGIT_BINS + size_t(held ? keys : 0);
    const cudaError_t status = allow_shared(kernel, shared);
    if (status != cudaSuccess) return status;
    const dim3 grid(resident_blocks(kernel, in.n / unit * s.n_keys, shared));
    return launch(kernel, grid, dim3(THREADS), shared, stream, job, s, unit, units, held);
}

cudaError_t order_keys(const Job* job, const Operands& in, Kind kind, int first, int last, void* keys,
                       cudaStream_t stream) {
    const auto run = [&](auto kernel, auto* to) {
        const dim3 grid(resident_blocks(kernel, divide_up(in.n, THREADS * (kind.f64 ? 1 : 8)), 0));
        return launch(kernel, grid, dim3(THREADS), 0, stream, job, first, last, to);
    };
    if (kind.f64)
        return run(kind.coded ? order_keys_kernel<double, AnyLoad> : order_keys_kernel<double, DenseLoad>,
                   static_cast<uint64_t*>(keys));
    return run(kind.coded ? order_keys_kernel<float, AnyLoad> : order_keys_kernel<float, DenseLoad>,
               static_cast<uint32_t*>(keys));
}

int64_t rank_scratch(const Operands& in, bool coded) {
    if (in.n == 0 || rank_threads(in, coded)) return 0;
    return int64_t(long_blocks(in, coded)) * 2 * in.cols * int64_t(sizeof(Ranked));
}

cudaError_t rank_rows(const Job* job, const Operands& in, bool coded, uint32_t* ranks, void* scratch,
                      cudaStream_t stream) {
    const int threads = rank_threads(in, coded);
    if (!threads)
        return launch(long_kernel(coded), dim3(long_blocks(in, coded)), dim3(THREADS), LONG_SHARED, stream,
                      job, ranks, static_cast<Ranked*>(scratch));
    const auto kernel = rank_kernel(coded);
    const size_t words = size_t(threads) * RANK_ITEMS + size_t(threads / 32) * RANK_BINS + MOST_WARPS + 2;
    const size_t shared = words * sizeof(uint32_t) + size_t(threads) * RANK_ITEMS * sizeof(uint16_t);
    const cudaError_t status = allow_shared(kernel, shared);
    if (status != cudaSuccess) return status;
    const dim3 grid(resident_blocks(kernel, in.n / in.cols * in.n_experts, shared, threads));
    return launch(kernel, grid, dim3(unsigned(threads)), shared, stream, job, ranks);
}

}  // namespace cuda
}  // namespace fastmerge
