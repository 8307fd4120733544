// Exact rank cuts: the key of the r-th largest |delta| (or variance) digit by digit, 11, 10 and 10 bits, then
// the flat index of its last tie that is above. Four readings of the operands, (K + 1) * itemsize bytes per
// element each; everything is integer, so that no order of work shows in a result.
#include "cuda/grid.cuh"
#include "cuda/lanes.cuh"
#include "cuda/select.hpp"

namespace fastmerge {
namespace cuda {
namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr int64_t END = 0x7fffffffffffffffll;
constexpr int WARPS = THREADS / 32;

template <class Real>
__device__ __forceinline__ double value_of(uint64_t key) {
    return double(bit_cast<Real>(Key<Real>(key)));
}

__device__ __forceinline__ bool has_prefix(uint64_t key, const Target& t, int shift, int width, bool first) {
    return first || key >> (shift + width) == t.prefix;
}

/// Keys of [begin, end) of the chunk, several at a time per thread, in no particular order: f(key).
template <class Real, class Load, class F>
__device__ __forceinline__ void visit_keys(const Operands& in, int k, int64_t begin, int64_t end, F&& f) {
    constexpr int V = sizeof(Real) == 4 ? 8 : 1;
    // Aligned as the chunk's first element is: what loads are aligned is the operands' own.
    const int64_t whole = begin + (end - begin) / V * V;
    for (int64_t i = begin + int64_t(threadIdx.x) * V; i < whole; i += THREADS * V) {
        Real x[V];
        load_keyed<Real, V, Load>(in, k, i, x);
        FM_UNROLL
        for (int j = 0; j < V; ++j) f(order_key(x[j]));
    }
    for (int64_t i = whole + threadIdx.x; i < end; i += THREADS) {
        Real x[1];
        load_keyed<Real, 1, Load>(in, k, i, x);
        f(order_key(x[0]));
    }
}

/// Adds of one bin after another, equal neighbours at once: deltas share few bins, and zeros one.
struct BinRun {
    uint32_t* bins;
    int bin = -1;
    uint32_t n = 0;
    __device__ explicit BinRun(uint32_t* b) : bins(b) {}
    __device__ __forceinline__ void add(int b) {
        if (b != bin) flush(), bin = b, n = 0;
        ++n;
    }
    __device__ __forceinline__ void flush() {
        if (n) atomicAdd(bins + bin, n);
    }
};

template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, 1)
    count_digits_kernel(const Job* job, Selection s, int shift, int width, bool first, int64_t n_pieces) {
    FM_SHARED(uint32_t, bins);  // [n_ranks, DIGIT_BINS]
    const Operands& in = job->in;
    const int n_bins = s.n_ranks * DIGIT_BINS;
    // Keys vary fastest: neighbouring blocks read the same piece of the base.
    for (int64_t task = blockIdx.x; task < n_pieces * s.n_keys; task += gridDim.x) {
        const int k = int(task % s.n_keys);
        const int64_t begin = task / s.n_keys * PIECE_ELEMENTS,
                      end = begin + PIECE_ELEMENTS < in.n ? begin + PIECE_ELEMENTS : in.n;
        for (int b = int(threadIdx.x); b < n_bins; b += THREADS) bins[b] = 0;
        __syncthreads();
        uint32_t nonzero = 0;
        for (int r = 0; r < s.n_ranks; ++r) {
            const Target t = s.targets[r * s.n_keys + k];
            if (t.open != 1) continue;
            BinRun run(bins + r * DIGIT_BINS);
            visit_keys<Real, Load>(in, s.variance ? -1 : k, begin, end, [&](uint64_t key) {
                if (r == 0) nonzero += key != 0;
                if (has_prefix(key, t, shift, width, first)) run.add(int(key >> shift & ((1u << width) - 1)));
            });
            run.flush();
        }
        if (s.fraction >= 0 && first && nonzero)
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

/// Sum of what threads before this one hold; all threads take part. shared: [THREADS].
__device__ __forceinline__ int64_t sum_before(int64_t mine, int64_t* shared) {
    const int t = int(threadIdx.x);
    shared[t] = mine;
    __syncthreads();
    for (int distance = 1; distance < THREADS; distance *= 2) {
        const int64_t other = t >= distance ? shared[t - distance] : 0;
        __syncthreads();
        shared[t] += other;
        __syncthreads();
    }
    const int64_t before = shared[t] - mine;
    __syncthreads();
    return before;
}

/// The digit at which `rank` keys from the largest down are reached; rank becomes that within the digit's
/// bin.
template <class Count>
__device__ __forceinline__ int choose_digit(const Count* bins, int64_t& rank, int64_t* shared) {
    constexpr int EACH = DIGIT_BINS / THREADS;
    const int top = DIGIT_BINS - 1 - int(threadIdx.x) * EACH;  // this thread's bins, downwards
    int64_t mine = 0;
    for (int j = 0; j < EACH; ++j) mine += int64_t(bins[top - j]);
    int64_t before = sum_before(mine, shared);
    if (before < rank && rank <= before + mine)
        for (int j = 0; j < EACH; ++j) {
            const int64_t n = int64_t(bins[top - j]);
            if (rank <= before + n) {
                shared[0] = top - j, shared[1] = rank - before;
                break;
            }
            before += n;
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

template <class Real>
__global__ void __launch_bounds__(THREADS, 1)
    choose_digits_kernel(Selection s, int width, bool first, bool last) {
    FM_SHARED(int64_t, shared);  // [THREADS]
    Target& at = s.targets[blockIdx.x];
    unsigned long long* bins = s.bins + int64_t(blockIdx.x) * DIGIT_BINS;
    Target t = at;
    if (t.open == 1 && first && s.fraction >= 0) open_fraction(t, s.fraction, int64_t(s.nonzero[blockIdx.x]));
    if (t.open == 1) {  // the same for all threads
        const int digit = choose_digit(bins, t.rank, shared);
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
__global__ void __launch_bounds__(THREADS, 1)
    count_equals_kernel(const Job* job, Selection s, int64_t offset) {
    const Operands& in = job->in;
    const int64_t flat = offset + in.start;
    const int64_t first = flat / PIECE_ELEMENTS, n = (flat + in.n - 1) / PIECE_ELEMENTS - first + 1;
    for (int64_t task = blockIdx.x; task < n * s.n_keys; task += gridDim.x) {
        const int k = int(task % s.n_keys);
        const int64_t piece = first + task / s.n_keys;
        const int64_t begin = piece * PIECE_ELEMENTS - flat > 0 ? piece * PIECE_ELEMENTS - flat : 0,
                      end = (piece + 1) * PIECE_ELEMENTS - flat < in.n ? (piece + 1) * PIECE_ELEMENTS - flat
                                                                       : in.n;
        for (int r = 0; r < s.n_ranks; ++r) {
            const int64_t t = int64_t(r) * s.n_keys + k;
            if (s.targets[t].open != 2) continue;
            const uint64_t cut = s.targets[t].prefix;
            uint32_t equal = 0;
            visit_keys<Real, Load>(in, s.variance ? -1 : k, begin, end,
                                   [&](uint64_t key) { equal += key == cut; });
            for (int distance = 16; distance > 0; distance /= 2)
                equal += __shfl_down_sync(ALL, equal, distance);
            if (threadIdx.x % 32 == 0 && equal) atomicAdd(s.equal + t * s.n_pieces + piece, equal);
        }
    }
}

__global__ void __launch_bounds__(THREADS, 1) locate_ties_kernel(Selection s) {
    FM_SHARED(int64_t, shared);  // [THREADS]
    Target& t = s.targets[blockIdx.x];
    if (t.open != 2) return;
    const int64_t rank = t.rank;
    const uint32_t* equal = s.equal + int64_t(blockIdx.x) * s.n_pieces;
    __syncthreads();  // all have read the target before one writes it
    int64_t passed = 0;
    for (int64_t first = 0; first < s.n_pieces; first += THREADS) {
        const int64_t p = first + threadIdx.x, mine = p < s.n_pieces ? equal[p] : 0;
        const int64_t before = passed + sum_before(mine, shared);
        if (before < rank && rank <= before + mine) t.piece = p, t.rank = rank - before;
        if (threadIdx.x == THREADS - 1) shared[0] = before + mine;
        __syncthreads();
        passed = shared[0];
        __syncthreads();
        if (passed >= rank) return;
    }
}

/// Find the q-th key of [begin, end) that equals `cut`: its index, or -1; q becomes what is left of it.
/// shared: [WARPS + 2].
template <class Real, class Load>
__device__ __forceinline__ int64_t find_equal(const Operands& in, int k, int64_t begin, int64_t end,
                                              uint64_t cut, int64_t& q, int64_t* shared) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    if (threadIdx.x == 0) shared[WARPS] = -1;
    for (int64_t first = begin; first < end; first += THREADS) {
        const int64_t i = first + threadIdx.x;
        bool equal = false;
        if (i < end) {
            Real x[1];
            load_keyed<Real, 1, Load>(in, k, i, x);
            equal = order_key(x[0]) == cut;
        }
        const uint32_t votes = __ballot_sync(ALL, equal);
        if (lane == 0) shared[warp] = __popc(votes);
        __syncthreads();
        int64_t before = 0, all = 0;
        for (int w = 0; w < WARPS; ++w) {
            if (w < warp) before += shared[w];
            all += shared[w];
        }
        const int64_t mine = before + __popc(votes & ((2u << lane) - 1));  // with this one
        if (equal && mine == q) shared[WARPS] = i;
        __syncthreads();
        const int64_t found = shared[WARPS];
        __syncthreads();
        if (found >= 0) return found;
        q -= all;
    }
    return -1;
}

template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, 1) find_ties_kernel(const Job* job, Selection s, int64_t offset) {
    FM_SHARED(int64_t, shared);  // [WARPS + 2]
    const Operands& in = job->in;
    Target& at = s.targets[blockIdx.x];
    Target t = at;
    if (t.open != 2 || t.piece < 0) return;
    __syncthreads();
    const int64_t flat = offset + in.start;
    const int64_t begin = t.piece * PIECE_ELEMENTS - flat > 0 ? t.piece * PIECE_ELEMENTS - flat : 0,
                  end = (t.piece + 1) * PIECE_ELEMENTS - flat < in.n ? (t.piece + 1) * PIECE_ELEMENTS - flat
                                                                     : in.n;
    if (begin >= end) return;
    const int k = s.variance ? -1 : int(blockIdx.x) % s.n_keys;
    const int64_t found = find_equal<Real, Load>(in, k, begin, end, t.prefix, t.rank, shared);
    if (found >= 0) t.last_tie = flat + found, t.open = 0;
    if (threadIdx.x == 0) at = t;
}

/// A block selects all cuts of one unit and key.
template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, 1)
    select_units_kernel(const Job* job, Selection s, int64_t unit, int64_t units) {
    FM_SHARED(int64_t, shared);  // [THREADS], then the bins
    uint32_t* bins = reinterpret_cast<uint32_t*>(shared + THREADS);
    const Operands& in = job->in;
    const int64_t here = in.n / unit, first_unit = in.start / unit;
    constexpr bool F64 = sizeof(Real) == 8;
    for (int64_t task = blockIdx.x; task < here * s.n_keys; task += gridDim.x) {
        const int key = int(task % s.n_keys), k = s.variance ? -1 : key;
        const int64_t u = task / s.n_keys, begin = u * unit, end = begin + unit;
        int64_t nonzero = 0;
        if (s.fraction >= 0) {
            visit_keys<Real, Load>(in, k, begin, end, [&](uint64_t x) { nonzero += x != 0; });
            const int64_t before = sum_before(nonzero, shared);
            if (threadIdx.x == THREADS - 1) shared[0] = before + nonzero;
            __syncthreads();
            nonzero = shared[0];
            __syncthreads();
        }
        for (int r = 0; r < s.n_ranks; ++r) {
            Target& at = s.targets[(int64_t(r) * s.n_keys + key) * units + first_unit + u];
            Target t = at;
            __syncthreads();
            if (t.open == 1 && s.fraction >= 0) open_fraction(t, s.fraction, nonzero);
            if (t.open == 1) {
                for (int d = 0; d < n_digits(F64); ++d) {
                    const int shift = digit_shift(F64, d), width = digit_width(F64, d);
                    for (int b = int(threadIdx.x); b < DIGIT_BINS; b += THREADS) bins[b] = 0;
                    __syncthreads();
                    BinRun run(bins);
                    visit_keys<Real, Load>(in, k, begin, end, [&](uint64_t x) {
                        if (has_prefix(x, t, shift, width, d == 0))
                            run.add(int(x >> shift & ((1u << width) - 1)));
                    });
                    run.flush();
                    __syncthreads();
                    const int digit = choose_digit(bins, t.rank, shared);
                    t.prefix = t.prefix << width | uint64_t(digit);
                }
                t.value = value_of<Real>(t.prefix), t.last_tie = END;
                if (!s.all_ties)
                    t.last_tie =
                        in.start + find_equal<Real, Load>(in, k, begin, end, t.prefix, t.rank, shared);
            }
            if (threadIdx.x == 0) t.open = 0, at = t;
            __syncthreads();
        }
    }
}

template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, 1)
    order_keys_kernel(const Job* job, int first, int last, Key<Real>* keys) {
    const Operands& in = job->in;
    const int64_t step = int64_t(gridDim.x) * THREADS;
    for (int k = first; k < last; ++k)
        for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < in.n; i += step) {
            Real x[1];
            load_keyed<Real, 1, Load>(in, k, i, x);
            keys[(k - first) * in.n + i] = order_key(x[0]);
        }
}

// ---- ranks within rows ---------------------------------------------------------------------------------

struct Ranked {
    uint32_t key, index;
};

constexpr int RANK_DIGIT = 4, RANK_BINS = 1 << RANK_DIGIT,
              RANK_PASSES = 8;  // 32 bits, one more than keys have

/// Sort one row's keys, least digit first and stable, so that equal keys stay in order of index. Each thread
/// has a run of neighbours: counted by digit and thread, the counts say where each run's keys of a digit go.
template <class Load>
__global__ void __launch_bounds__(THREADS, 1)
    rank_rows_kernel(const Job* job, uint32_t* ranks, Ranked* scratch) {
    FM_SHARED(int64_t, shared);  // [THREADS], then counts [RANK_BINS, THREADS]
    uint32_t* counts = reinterpret_cast<uint32_t*>(shared + THREADS);
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
            float x[1];
            load_keyed<float, 1, Load>(in, k, first + c, x);
            from[c] = {order_key(x[0]), uint32_t(c)};
        }
        __syncthreads();
        for (int pass = 0; pass < RANK_PASSES; ++pass) {
            const int shift = pass * RANK_DIGIT;
            for (int b = 0; b < RANK_BINS; ++b) counts[b * THREADS + t] = 0;
            for (int64_t c = begin; c < end; ++c)
                ++counts[(from[c].key >> shift & (RANK_BINS - 1)) * THREADS + t];
            __syncthreads();
            // Exclusive sums in order of digit, then thread: each thread takes RANK_BINS neighbouring counts.
            int64_t mine = 0;
            for (int b = 0; b < RANK_BINS; ++b) mine += counts[t * RANK_BINS + b];
            int64_t before = sum_before(mine, shared);
            for (int b = 0; b < RANK_BINS; ++b) {
                const uint32_t n = counts[t * RANK_BINS + b];
                counts[t * RANK_BINS + b] = uint32_t(before);
                before += n;
            }
            __syncthreads();
            const bool last = pass == RANK_PASSES - 1;
            for (int64_t c = begin; c < end; ++c) {
                const Ranked x = from[c];
                const uint32_t place = counts[(x.key >> shift & (RANK_BINS - 1)) * THREADS + t]++;
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

constexpr size_t RANK_SHARED = THREADS * sizeof(int64_t) + RANK_BINS * THREADS * sizeof(uint32_t);

auto rank_kernel(bool coded) {
    return coded ? rank_rows_kernel<AnyLoad> : rank_rows_kernel<DenseLoad>;
}

unsigned rank_blocks(const Operands& in, bool coded) {
    return resident_blocks(rank_kernel(coded), in.n / in.cols * in.n_experts, RANK_SHARED);
}

}  // namespace

cudaError_t open_targets(const Selection& s, const int64_t* ranks, int64_t units, int64_t n,
                         cudaStream_t stream) {
    const int64_t all = int64_t(s.n_ranks) * s.n_keys * units;
    if (all == 0) return cudaSuccess;
    const dim3 grid(resident_blocks(open_targets_kernel, divide_up(all, THREADS), 0));
    return launch(open_targets_kernel, grid, dim3(THREADS), 0, stream, s, ranks, units, n);
}

cudaError_t count_digits(const Job* job, const Operands& in, bool coded, const Selection& s, int d,
                         cudaStream_t stream) {
    const auto kernel = FM_KERNEL(count_digits_kernel, (Kind{s.f64, coded}));
    const size_t shared = sizeof(uint32_t) * DIGIT_BINS * size_t(s.n_ranks);
    const int64_t n_pieces = divide_up(in.n, PIECE_ELEMENTS);
    const dim3 grid(resident_blocks(kernel, n_pieces * s.n_keys, shared));
    return launch(kernel, grid, dim3(THREADS), shared, stream, job, s, digit_shift(s.f64, d),
                  digit_width(s.f64, d), d == 0, n_pieces);
}

cudaError_t choose_digits(const Selection& s, int d, cudaStream_t stream) {
    const auto kernel = s.f64 ? choose_digits_kernel<double> : choose_digits_kernel<float>;
    return launch(kernel, dim3(unsigned(s.n_ranks * s.n_keys)), dim3(THREADS), sizeof(int64_t) * THREADS,
                  stream, s, digit_width(s.f64, d), d == 0, d == n_digits(s.f64) - 1);
}

cudaError_t count_equals(const Job* job, const Operands& in, bool coded, const Selection& s, int64_t offset,
                         cudaStream_t stream) {
    const auto kernel = FM_KERNEL(count_equals_kernel, (Kind{s.f64, coded}));
    const dim3 grid(resident_blocks(kernel, (divide_up(in.n, PIECE_ELEMENTS) + 1) * s.n_keys, 0));
    return launch(kernel, grid, dim3(THREADS), 0, stream, job, s, offset);
}

cudaError_t locate_ties(const Selection& s, cudaStream_t stream) {
    return launch(locate_ties_kernel, dim3(unsigned(s.n_ranks * s.n_keys)), dim3(THREADS),
                  sizeof(int64_t) * THREADS, stream, s);
}

cudaError_t find_ties(const Job* job, bool coded, const Selection& s, int64_t offset, cudaStream_t stream) {
    const auto kernel = FM_KERNEL(find_ties_kernel, (Kind{s.f64, coded}));
    return launch(kernel, dim3(unsigned(s.n_ranks * s.n_keys)), dim3(THREADS), sizeof(int64_t) * (WARPS + 2),
                  stream, job, s, offset);
}

cudaError_t select_units(const Job* job, const Operands& in, bool coded, const Selection& s, int64_t unit,
                         int64_t units, cudaStream_t stream) {
    const auto kernel = FM_KERNEL(select_units_kernel, (Kind{s.f64, coded}));
    const size_t shared = sizeof(int64_t) * THREADS + sizeof(uint32_t) * DIGIT_BINS;
    const dim3 grid(resident_blocks(kernel, in.n / unit * s.n_keys, shared));
    return launch(kernel, grid, dim3(THREADS), shared, stream, job, s, unit, units);
}

cudaError_t order_keys(const Job* job, const Operands& in, Kind kind, int first, int last, void* keys,
                       cudaStream_t stream) {
    const auto run = [&](auto kernel, auto* to) {
        const dim3 grid(resident_blocks(kernel, divide_up(in.n, THREADS), 0));
        return launch(kernel, grid, dim3(THREADS), 0, stream, job, first, last, to);
    };
    if (kind.f64)
        return run(kind.coded ? order_keys_kernel<double, AnyLoad> : order_keys_kernel<double, DenseLoad>,
                   static_cast<uint64_t*>(keys));
    return run(kind.coded ? order_keys_kernel<float, AnyLoad> : order_keys_kernel<float, DenseLoad>,
               static_cast<uint32_t*>(keys));
}

int64_t rank_scratch(const Operands& in, bool coded) {
    return in.n == 0 ? 0 : int64_t(rank_blocks(in, coded)) * 2 * in.cols * int64_t(sizeof(Ranked));
}

cudaError_t rank_rows(const Job* job, const Operands& in, bool coded, uint32_t* ranks, void* scratch,
                      cudaStream_t stream) {
    return launch(rank_kernel(coded), dim3(rank_blocks(in, coded)), dim3(THREADS), RANK_SHARED, stream, job,
                  ranks, static_cast<Ranked*>(scratch));
}

}  // namespace cuda
}  // namespace fastmerge
