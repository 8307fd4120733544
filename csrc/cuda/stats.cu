// Moments, inner products and extremes of deltas: (K + 1) * itemsize bytes read per element. Sums are over 64
// lanes of segments of 4096 elements, then over segments as a binary counter, as docs/numerics.md has it:
// eight (or sixteen) neighbouring threads share a segment, each with eight (or four) lanes in registers.
#include "cuda/grid.cuh"
#include "cuda/lanes.cuh"
#include "cuda/stats.hpp"

namespace fastmerge {
namespace cuda {
namespace {

constexpr unsigned ALL = 0xffffffffu;

/// Fold 64 lanes by halving, V of them in each of 64 / V neighbouring threads; the sum is the first one's.
template <int V>
__device__ __forceinline__ double fold_lanes(double* lane) {
    constexpr int GROUP = BLOCK / V;
    FM_UNROLL
    for (int distance = GROUP / 2; distance > 0; distance /= 2) FM_UNROLL
    for (int j = 0; j < V; ++j) lane[j] += __shfl_down_sync(ALL, lane[j], distance, GROUP);
    FM_UNROLL
    for (int half = V / 2; half > 0; half /= 2) FM_UNROLL
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    return lane[0];
}

template <class Real>
__device__ __forceinline__ double moment_of(bool square, Real x) {
    const double size = double(absolute(x));
    return square ? size * size : size;
}

/// Deltas of expert k and what is kept of them, V at flat index `first`, which is a multiple of V.
template <class Real, int V, class Load>
__device__ __forceinline__ void load_kept(const Job& job, int k, int64_t i, Real* d, Real* v) {
    Real base[V], inverse[V];
    Mask<Real> kept[V];
    load_base<Real, V, Load>(job.in, i, base);
    load_deltas<Real, V, Load>(job.in, k, i, base, d);
    keep_expert<Real, V>(job.plan.keep, job.in, job.ranks, k, i, V, d, nullptr, kept, inverse);
    FM_UNROLL
    for (int j = 0; j < V; ++j) v[j] = d[j];
    zero_dropped<Real, V>(kept, v);
}

constexpr int AHEAD = 4;  // runs whose loads are under way before the first is needed

/// Whether base and expert k can be read so from element i of the chunk on.
template <class Real, int V>
__device__ __forceinline__ bool reads_ahead(const Operands& in, int k, int64_t i) {
    return sizeof(Real) == 4 && is_bf16_run<V>(in.expert[k], in.expert_type[k], i) &&
           (!in.base || is_bf16_run<V>(in.base, in.base_type, i));
}

/// Deltas of a run that was read so.
template <int V, class Real>
__device__ __forceinline__ void widen_delta(const Raw& raw, const Raw& raw_base, Real* d) {
    float x[V], base[V];
    widen_raw<V>(raw, DType::BF16, x);
    widen_raw<V>(raw_base, DType::BF16, base);
    FM_UNROLL
    for (int j = 0; j < V; ++j) d[j] = Real(x[j] - base[j]);
}

template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, Load::coded ? 1 : 2)
    moment_leaves_kernel(const Job* at, bool square, int64_t total, double* leaves, const double* carried,
                         double* carry) {
    constexpr int V = 8, GROUP = BLOCK / V, SEGMENTS = 32 / GROUP;  // of a warp
    const Job& job = *at;
    const Operands& in = job.in;
    const int K = in.n_experts, t = int(threadIdx.x) % GROUP;
    const int64_t end = in.start + in.n, first_segment = in.start / SEGMENT,
                  n = (end + SEGMENT - 1) / SEGMENT;
    const bool whole_runs = !splits_rows(job.plan.keep) || in.cols % V == 0;
    const bool keeps_all = !job.plan.keep.any() && !job.ranks.kept;
    const int64_t warp = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / 32,
                  warps = int64_t(gridDim.x) * THREADS / 32;
    for (int64_t task = warp; task < (n - first_segment + SEGMENTS - 1) / SEGMENTS * K; task += warps) {
        const int k = int(task % K);
        const int64_t s = first_segment + task / K * SEGMENTS +
                          int(threadIdx.x) % 32 / GROUP;  // may lie behind the end: then it only takes part
        const bool here = s < n, continued = here && s * SEGMENT < in.start,
                   complete = here && ((s + 1) * SEGMENT <= end || end == total);
        double all[V], kept[V];
        const int64_t place = int64_t(k) * 2 * BLOCK + t * V;
        FM_UNROLL
        for (int j = 0; j < V; ++j) {
            all[j] = continued ? carried[place + j] : 0.0;
            kept[j] = continued ? carried[place + BLOCK + j] : 0.0;
        }
        const int64_t begin = s * SEGMENT - in.start;  // in the chunk
        const bool ahead =
            here && keeps_all && begin >= 0 && begin + SEGMENT <= in.n && reads_ahead<Real, V>(in, k, begin);
        for (int r = 0; ahead && r < SEGMENT / BLOCK; r += AHEAD) {
            Raw raw[AHEAD], raw_base[AHEAD] = {};
            FM_UNROLL
            for (int u = 0; u < AHEAD; ++u) {
                const int64_t i = begin + (r + u) * BLOCK + t * V;
                raw[u] = load_raw<V>(in.expert[k], DType::BF16, i);
                if (in.base) raw_base[u] = load_raw<V>(in.base, DType::BF16, i);
            }
            FM_UNROLL
            for (int u = 0; u < AHEAD; ++u) {
                Real d[V];
                widen_delta<V>(raw[u], raw_base[u], d);
                FM_UNROLL
                for (int j = 0; j < V; ++j) all[j] += moment_of(square, d[j]);
            }
        }
        for (int r = 0; here && !ahead && r < SEGMENT / BLOCK; ++r) {
            const int64_t i = begin + r * BLOCK + t * V;
            if (i <= -V || i >= in.n) continue;
            if (whole_runs && i >= 0 && i + V <= in.n) {
                Real d[V], v[V];
                load_kept<Real, V, Load>(job, k, i, d, v);
                FM_UNROLL
                for (int j = 0; j < V; ++j)
                    all[j] += moment_of(square, d[j]), kept[j] += moment_of(square, v[j]);
            } else {
                FM_UNROLL
                for (int j = 0; j < V; ++j)
                    if (i + j >= 0 && i + j < in.n) {
                        Real d[1], v[1];
                        load_kept<Real, 1, Load>(job, k, i + j, d, v);
                        all[j] += moment_of(square, d[0]), kept[j] += moment_of(square, v[0]);
                    }
            }
        }
        if (keeps_all) FM_UNROLL
        for (int j = 0; j < V; ++j) kept[j] = all[j];
        if (here && !complete) FM_UNROLL
        for (int j = 0; j < V; ++j) carry[place + j] = all[j], carry[place + BLOCK + j] = kept[j];
        const double sum_all = fold_lanes<V>(all), sum_kept = fold_lanes<V>(kept);
        if (complete && t == 0) {
            double* leaf = leaves + (s * K + k) * 2;
            leaf[0] = sum_all, leaf[1] = sum_kept;
        }
    }
}

template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, 1) largest_kernel(const Job* at, unsigned long long* keys) {
    const Job& job = *at;
    const int64_t step = int64_t(gridDim.x) * THREADS;
    for (int k = 0; k < job.in.n_experts; ++k) {
        unsigned long long all = 0, kept = 0;
        for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < job.in.n; i += step) {
            Real d[1], v[1];
            load_kept<Real, 1, Load>(job, k, i, d, v);
            const unsigned long long a = order_key(d[0]), b = order_key(v[0]);
            all = a > all ? a : all, kept = b > kept ? b : kept;
        }
        for (int distance = 16; distance > 0; distance /= 2) {
            const unsigned long long a = __shfl_down_sync(ALL, all, distance),
                                     b = __shfl_down_sync(ALL, kept, distance);
            all = a > all ? a : all, kept = b > kept ? b : kept;
        }
        if (threadIdx.x % 32 == 0) {
            if (all) atomicMax(keys + 2 * k, all);
            if (kept) atomicMax(keys + 2 * k + 1, kept);
        }
    }
}

__device__ __forceinline__ int64_t pair_of(int j, int k, int n_experts) {
    return int64_t(j) * n_experts - int64_t(j) * (j - 1) / 2 + (k - j);
}

/// Two by two experts at a time: with more, sums leave the registers; with fewer, operands are read more
/// often.
template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, Load::coded ? 1 : 2)
    gram_leaves_kernel(const Job* at, bool by_row, int64_t total, double* leaves, const double* carried,
                       double* carry) {
    constexpr int V = 4, GROUP = BLOCK / V, SEGMENTS = 32 / GROUP;
    const Operands& in = at->in;
    const int K = in.n_experts, t = int(threadIdx.x) % GROUP, halves = (K + 1) / 2;
    const int64_t pairs = int64_t(K) * (K + 1) / 2, tiles = int64_t(halves) * (halves + 1) / 2;
    const int64_t unit = by_row ? in.cols : total, end = in.start + in.n;
    const int64_t each = (unit + SEGMENT - 1) / SEGMENT;  // segments of a unit
    const int64_t first = by_row ? in.start / unit * each : in.start / SEGMENT,
                  n = by_row ? end / unit * each : (end + SEGMENT - 1) / SEGMENT;
    const int64_t warp = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / 32,
                  warps = int64_t(gridDim.x) * THREADS / 32;
    for (int64_t task = warp; task < (n - first + SEGMENTS - 1) / SEGMENTS * tiles; task += warps) {
        const int64_t s = first + task / tiles * SEGMENTS + int(threadIdx.x) % 32 / GROUP;
        int j0 = 0, k0 = int(task % tiles);
        while (k0 >= halves - j0) k0 -= halves - j0, ++j0;  // row by row of the upper triangle
        k0 += j0;
        const bool here = s < n, diagonal = j0 == k0;
        const int64_t u = by_row ? s / each : 0, begin = (by_row ? s % each : s) * SEGMENT;  // in the unit
        const bool continued = here && !by_row && begin < in.start,
                   complete = by_row || begin + SEGMENT <= end || end == total;
        double sum[2][2][V];
        FM_UNROLL
        for (int a = 0; a < 2; ++a) FM_UNROLL
        for (int b = 0; b < 2; ++b) {
            const int j = 2 * j0 + a, k = 2 * k0 + b;
            const bool wanted = k < K && j <= k;
            FM_UNROLL
            for (int v = 0; v < V; ++v)
                sum[a][b][v] = continued && wanted ? carried[pair_of(j, k, K) * BLOCK + t * V + v] : 0.0;
        }
        const auto add = [&](const Real(&x)[2][V], const Real(&y)[2][V]) {
            FM_UNROLL
            for (int a = 0; a < 2; ++a) FM_UNROLL
            for (int b = 0; b < 2; ++b) FM_UNROLL
            for (int v = 0; v < V; ++v) sum[a][b][v] += double(x[a][v]) * double(y[b][v]);
        };
        const int64_t from = u * unit + begin - in.start;  // in the chunk
        const int ks[4] = {2 * j0, 2 * j0 + 1, 2 * k0, 2 * k0 + 1};
        bool ahead = here && from >= 0 && (by_row ? unit - begin : in.n - from) >= SEGMENT;
        for (const int k : ks) ahead = ahead && k < K && reads_ahead<Real, V>(in, k, from);
        for (int r = 0; ahead && r < SEGMENT / BLOCK; r += AHEAD) {
            Raw raw[4][AHEAD], raw_base[AHEAD] = {};
            FM_UNROLL
            for (int a = 0; a < AHEAD; ++a) {
                const int64_t i = from + (r + a) * BLOCK + t * V;
                if (in.base) raw_base[a] = load_raw<V>(in.base, DType::BF16, i);
                FM_UNROLL
                for (int e = 0; e < 4; ++e)
                    if (e < 2 || !diagonal) raw[e][a] = load_raw<V>(in.expert[ks[e]], DType::BF16, i);
            }
            FM_UNROLL
            for (int a = 0; a < AHEAD; ++a) {
                Real x[2][V], y[2][V];
                FM_UNROLL
                for (int e = 0; e < 2; ++e) {
                    widen_delta<V>(raw[e][a], raw_base[a], x[e]);
                    if (!diagonal) widen_delta<V>(raw[2 + e][a], raw_base[a], y[e]);
                    FM_UNROLL
                    for (int v = 0; v < V; ++v) y[e][v] = diagonal ? x[e][v] : y[e][v];
                }
                add(x, y);
            }
        }
        for (int r = 0; here && !ahead && r < SEGMENT / BLOCK; ++r) {
            const int64_t position = begin + r * BLOCK + t * V, i = u * unit + position - in.start;
            const int64_t left = by_row ? unit - position : in.n - i;
            if (left <= 0) break;
            if (i <= -V) continue;
            Real x[2][V], y[2][V];
            FM_UNROLL
            for (int a = 0; a < 2; ++a) FM_UNROLL
            for (int v = 0; v < V; ++v) x[a][v] = y[a][v] = Real(0);
            const bool full = i >= 0 && left >= V;
            const auto load = [&](int k, Real* d) {
                if (k >= K) return;
                Real base[V];
                if (full) {
                    load_base<Real, V, Load>(in, i, base);
                    load_deltas<Real, V, Load>(in, k, i, base, d);
                } else {
                    FM_UNROLL
                    for (int v = 0; v < V; ++v)
                        if (v < left && i + v >= 0) {
                            load_base<Real, 1, Load>(in, i + v, base);
                            load_deltas<Real, 1, Load>(in, k, i + v, base, d + v);
                        }
                }
            };
            FM_UNROLL
            for (int a = 0; a < 2; ++a) load(2 * j0 + a, x[a]);
            FM_UNROLL
            for (int b = 0; b < 2; ++b) {
                if (!diagonal) load(2 * k0 + b, y[b]);
                FM_UNROLL
                for (int v = 0; v < V; ++v) y[b][v] = diagonal ? x[b][v] : y[b][v];
            }
            if (full) {
                add(x, y);
                continue;
            }
            FM_UNROLL
            for (int a = 0; a < 2; ++a) FM_UNROLL
            for (int b = 0; b < 2; ++b) FM_UNROLL
            for (int v = 0; v < V; ++v)
                if (v < left && i + v >= 0) sum[a][b][v] += double(x[a][v]) * double(y[b][v]);
        }
        FM_UNROLL
        for (int a = 0; a < 2; ++a) FM_UNROLL
        for (int b = 0; b < 2; ++b) {
            const int j = 2 * j0 + a, k = 2 * k0 + b;
            const bool wanted = here && k < K && j <= k;
            if (wanted && !complete) FM_UNROLL
            for (int v = 0; v < V; ++v) carry[pair_of(j, k, K) * BLOCK + t * V + v] = sum[a][b][v];
            const double total_sum = fold_lanes<V>(sum[a][b]);
            if (wanted && complete && t == 0) leaves[s * pairs + pair_of(j, k, K)] = total_sum;
        }
    }
}

/// A thread per column, pair and block of 64 rows.
template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, 1)
    gram_columns_kernel(const Job* at, int64_t total, double* leaves, const double* carried, double* carry) {
    const Operands& in = at->in;
    const int K = in.n_experts;
    const int64_t cols = in.cols, pairs = int64_t(K) * (K + 1) / 2;
    const int64_t row0 = in.start / cols, row1 = (in.start + in.n) / cols, rows = total / cols;
    const int64_t block0 = row0 / BLOCK, n_blocks = (row1 + BLOCK - 1) / BLOCK - block0;
    const int64_t step = int64_t(gridDim.x) * THREADS;
    for (int64_t at_task = int64_t(blockIdx.x) * THREADS + threadIdx.x; at_task < n_blocks * pairs * cols;
         at_task += step) {
        const int64_t c = at_task % cols, block = block0 + at_task / cols / pairs;
        int j = 0, k = int(at_task / cols % pairs);
        while (k >= K - j) k -= K - j, ++j;
        k += j;
        const int64_t p = pair_of(j, k, K);
        const int64_t a = block * BLOCK > row0 ? block * BLOCK : row0,
                      b = (block + 1) * BLOCK < row1 ? (block + 1) * BLOCK : row1;
        double sum = block * BLOCK < row0 ? carried[p * cols + c] : 0.0;
        for (int64_t r = a; r < b; ++r) {
            const int64_t i = r * cols + c - in.start;
            Real base[1], x[1], y[1];
            load_base<Real, 1, Load>(in, i, base);
            load_deltas<Real, 1, Load>(in, j, i, base, x);
            load_deltas<Real, 1, Load>(in, k, i, base, y);
            sum += double(x[0]) * double(y[0]);
        }
        if ((block + 1) * BLOCK <= row1 || row1 == rows)
            leaves[(block * pairs + p) * cols + c] = sum;
        else
            carry[p * cols + c] = sum;
    }
}

/// Add neighbours level by level; `odd(x)` is called with what stands alone at each level, lowest first.
template <class Odd>
__device__ __forceinline__ void add_levels(double* x, int64_t n, Odd&& odd) {
    constexpr int MOST = int(TREE_GROUP) / 2 / THREADS;  // pairs of a thread
    const int t = int(threadIdx.x);
    __syncthreads();
    while (n > 0) {
        if (n & 1) odd(x[n - 1]);
        n /= 2;
        // Read by all before any is overwritten; at most TREE_GROUP / 2 pairs.
        double sum[MOST];
        FM_UNROLL
        for (int m = 0; m < MOST; ++m)
            if (const int64_t j = t + m * THREADS; j < n) sum[m] = x[2 * j] + x[2 * j + 1];
        __syncthreads();
        FM_UNROLL
        for (int m = 0; m < MOST; ++m)
            if (const int64_t j = t + m * THREADS; j < n) x[j] = sum[m];
        __syncthreads();
    }
}

/// Sum whole groups of TREE_GROUP leaves: nodes of the counter's level 11.
__global__ void __launch_bounds__(THREADS, 1)
    sum_groups_kernel(const double* leaves, int64_t n_leaves, int64_t width, double* nodes) {
    FM_SHARED(double, x);
    const int64_t groups = n_leaves / TREE_GROUP;  // of a unit
    const int64_t w = blockIdx.x % width, group = blockIdx.x / width % groups,
                  u = blockIdx.x / width / groups;
    const double* from = leaves + (u * n_leaves + group * TREE_GROUP) * width + w;
    for (int j = int(threadIdx.x); j < TREE_GROUP; j += THREADS) x[j] = from[int64_t(j) * width];
    double total = 0.0;
    add_levels(x, TREE_GROUP, [&](double odd) { total = odd; });
    if (threadIdx.x == 0) nodes[(u * groups + group) * width + w] = total;
}

/// Combine one unit's column: leaves behind the last whole group, then the groups.
__global__ void __launch_bounds__(THREADS, 1) sum_tree_kernel(const double* leaves, const double* nodes,
                                                              int64_t n_leaves, int64_t width, double* sums) {
    FM_SHARED(double, x);
    const int64_t groups = n_leaves / TREE_GROUP, rest = n_leaves % TREE_GROUP;
    const int64_t w = blockIdx.x % width, u = blockIdx.x / width;
    double total = 0.0;
    bool any = false;
    const auto add = [&](double odd) {
        total = any ? odd + total : odd;
        any = true;
    };
    const double* from = leaves + (u * n_leaves + groups * TREE_GROUP) * width + w;
    for (int64_t j = threadIdx.x; j < rest; j += THREADS) x[j] = from[j * width];
    add_levels(x, rest, add);
    from = nodes + u * groups * width + w;
    for (int64_t j = threadIdx.x; j < groups; j += THREADS) x[j] = from[j * width];
    add_levels(x, groups, add);
    if (threadIdx.x == 0) sums[u * width + w] = total;
}

constexpr int SHORT_LEVELS = 8;  // of units with fewer than 2^8 leaves: rows, columns, small tensors

/// As sum_tree_kernel, a thread for each unit's column.
__global__ void __launch_bounds__(THREADS, 1)
    sum_short_kernel(const double* leaves, int64_t n_units, int64_t n_leaves, int64_t width, double* sums) {
    const int64_t step = int64_t(gridDim.x) * THREADS;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < n_units * width; i += step) {
        const double* from = leaves + i / width * n_leaves * width + i % width;
        double level[SHORT_LEVELS], total = 0.0;
        for (int64_t leaf = 0; leaf < n_leaves; ++leaf) {
            double carry = from[leaf * width];
            bool placed = false;
            FM_UNROLL
            for (int l = 0; l < SHORT_LEVELS; ++l) {
                if (placed) continue;
                if (leaf >> l & 1)
                    carry = level[l] + carry;
                else
                    level[l] = carry, placed = true;
            }
        }
        bool any = false;
        FM_UNROLL
        for (int l = 0; l < SHORT_LEVELS; ++l)
            if (n_leaves >> l & 1) total = any ? level[l] + total : level[l], any = true;
        sums[i] = total;
    }
}

template <class Real, class Load>
__global__ void __launch_bounds__(THREADS, 1)
    extremes_kernel(const Job* at, int64_t unit, double* low, double* high) {
    FM_SHARED(unsigned long long, shared);
    const Operands& in = at->in;
    const int64_t units = in.n / unit;
    for (int64_t task = blockIdx.x; task < units * in.n_experts; task += gridDim.x) {
        const int k = int(task / units);
        const int64_t begin = task % units * unit;
        if (threadIdx.x == 0) shared[0] = ~0ull, shared[1] = 0;
        __syncthreads();
        unsigned long long least = ~0ull, most = 0;
        for (int64_t i = threadIdx.x; i < unit; i += THREADS) {
            Real x[1];
            load_keyed<Real, 1, Load>(in, k, begin + i, x);
            const unsigned long long key = order_key(x[0]);
            least = key < least ? key : least, most = key > most ? key : most;
        }
        atomicMin(shared, least), atomicMax(shared + 1, most);
        __syncthreads();
        if (threadIdx.x == 0) {
            low[task] = double(bit_cast<Real>(Key<Real>(shared[0])));
            high[task] = double(bit_cast<Real>(Key<Real>(shared[1])));
        }
        __syncthreads();
    }
}

}  // namespace

cudaError_t moment_leaves(const Job* job, bool square, const Operands& in, Kind kind, int64_t total,
                          double* leaves, const double* carried, double* carry, cudaStream_t stream) {
    const auto kernel = FM_KERNEL(moment_leaves_kernel, kind);
    const int64_t segments = (in.start + in.n + SEGMENT - 1) / SEGMENT - in.start / SEGMENT;
    const int64_t warps = divide_up(segments, 4) * in.n_experts;
    const dim3 grid(resident_blocks(kernel, divide_up(warps, THREADS / 32), 0));
    return launch(kernel, grid, dim3(THREADS), 0, stream, job, square, total, leaves, carried, carry);
}

cudaError_t largest(const Job* job, const Operands& in, Kind kind, unsigned long long* keys,
                    cudaStream_t stream) {
    const auto kernel = FM_KERNEL(largest_kernel, kind);
    const dim3 grid(resident_blocks(kernel, divide_up(in.n, THREADS), 0));
    return launch(kernel, grid, dim3(THREADS), 0, stream, job, keys);
}

cudaError_t gram_leaves(const Job* job, Axis axis, const Operands& in, Kind kind, int64_t total,
                        double* leaves, const double* carried, double* carry, cudaStream_t stream) {
    if (axis == Axis::Column) {
        const auto kernel = FM_KERNEL(gram_columns_kernel, kind);
        const int64_t pairs = int64_t(in.n_experts) * (in.n_experts + 1) / 2;
        const int64_t tasks = divide_up(in.n, BLOCK * in.cols) * pairs * in.cols;
        const dim3 grid(resident_blocks(kernel, divide_up(tasks, THREADS), 0));
        return launch(kernel, grid, dim3(THREADS), 0, stream, job, total, leaves, carried, carry);
    }
    const auto kernel = FM_KERNEL(gram_leaves_kernel, kind);
    const int halves = (in.n_experts + 1) / 2;
    const int64_t segments =
        axis == Axis::Row ? in.n / in.cols * divide_up(in.cols, SEGMENT) : divide_up(in.n, SEGMENT) + 1;
    const int64_t warps = divide_up(segments, 2) * halves * (halves + 1) / 2;
    const dim3 grid(resident_blocks(kernel, divide_up(warps, THREADS / 32), 0));
    return launch(kernel, grid, dim3(THREADS), 0, stream, job, axis == Axis::Row, total, leaves, carried,
                  carry);
}

cudaError_t sum_tree(const double* leaves, int64_t n_units, int64_t n_leaves, int64_t width, double* nodes,
                     double* sums, cudaStream_t stream) {
    if (n_leaves < int64_t(1) << SHORT_LEVELS) {
        const dim3 grid(resident_blocks(sum_short_kernel, divide_up(n_units * width, THREADS), 0));
        return launch(sum_short_kernel, grid, dim3(THREADS), 0, stream, leaves, n_units, n_leaves, width,
                      sums);
    }
    const int64_t groups = n_leaves / TREE_GROUP;
    if (groups > TREE_GROUP) return cudaErrorInvalidValue;  // of more than 17e9 elements
    if (groups > 0) {
        const cudaError_t status =
            launch(sum_groups_kernel, dim3(unsigned(n_units * groups * width)), dim3(THREADS),
                   sizeof(double) * TREE_GROUP, stream, leaves, n_leaves, width, nodes);
        if (status != cudaSuccess) return status;
    }
    return launch(sum_tree_kernel, dim3(unsigned(n_units * width)), dim3(THREADS),
                  sizeof(double) * size_t(n_leaves < TREE_GROUP ? n_leaves : TREE_GROUP), stream, leaves,
                  nodes, n_leaves, width, sums);
}

cudaError_t extremes(const Job* job, const Operands& in, Kind kind, int64_t unit, double* low, double* high,
                     cudaStream_t stream) {
    const auto kernel = FM_KERNEL(extremes_kernel, kind);
    const size_t shared = 2 * sizeof(unsigned long long);
    const dim3 grid(resident_blocks(kernel, in.n / unit * in.n_experts, shared));
    return launch(kernel, grid, dim3(THREADS), shared, stream, job, unit, low, high);
}

}  // namespace cuda
}  // namespace fastmerge
