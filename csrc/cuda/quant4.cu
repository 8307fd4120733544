// Coded tensors: operands are decoded where they are read, results are merged into shared memory and coded
// from there, tile by tile. What the codes mean is csrc/core/four_bit's, what is merged csrc/core/walk.hpp's.
#include <stdexcept>

#include "cuda/grid.cuh"
#include "cuda/lanes.cuh"
#include "cuda/quant4.hpp"
// Behind FM_GPU.
#include "core/four_bit/encode.hpp"

namespace fastmerge {
namespace cuda {
namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr int WARPS = THREADS / 32;

// ---- merging a few neighbours --------------------------------------------------------------------------

/// Elements that a thread merges at a time: those of one Philox block; of a tile half as many, for coding
/// needs registers as well.
template <class Real>
constexpr int RUN = sizeof(Real) == 4 ? 8 : 1;
template <class Real>
constexpr int TILE_RUN = sizeof(Real) == 4 ? 4 : 1;

/// Whether a run may cross rows.
__device__ __forceinline__ bool joins_rows(const WalkPlan& plan, int64_t cols, int run) {
    return cols % run == 0 || !(splits_rows(plan.keep) || plan.axis == Axis::Row);
}

/// Not inlined: it is the exception, and its registers are not the rule's.
template <class Real>
static __device__ __noinline__ bool merge_one(const Job& job, int64_t i, Real* merged) {
    return walk_block<Real, 1, AnyLoad>(job.plan, job.in, job.ranks, i, 1, merged);
}

/// Merge elements [i, i + m) of the chunk, m <= N; true if an operand is not finite.
template <class Real, int N>
__device__ __forceinline__ bool merge_run(const Job& job, bool joined, int64_t i, int m, Real* merged) {
    if constexpr (N == 1) {
        return merge_one(job, i, merged);
    } else {
        if (m == N && joined && (job.in.start + i) % N == 0)
            return walk_block<Real, N, AnyLoad>(job.plan, job.in, job.ranks, i, N, merged);
        bool bad = false;
        FM_UNROLL
        for (int j = 0; j < N; ++j)
            if (j < m) {
                Real one[1];
                bad |= merge_one(job, i + j, one);
                merged[j] = one[0];
            }
        return bad;
    }
}

/// The merged value as the type that is coded, widened again.
template <class Real>
__device__ __forceinline__ float as_type(DType t, Real x) {
    if (t == DType::BF16) return bf16_to_float(float_to_bf16(for_narrow(x)));
    if (t == DType::F16) return half_to_float(float_to_half(for_narrow(x)));
    return canonical(float(x));
}

/// Where a run that begins at a multiple of N in the tensor lies within [begin, end): its first element and
/// how many; none if that is not positive. Run number q, of those from `begin` on.
struct Part {
    int64_t first;
    int n;
};

template <int N>
__device__ __forceinline__ Part part_of(int64_t start, int64_t begin, int64_t end, int64_t q) {
    const int64_t a = begin - (start + begin) % N + q * N, b = a + N;
    const int64_t first = a < begin ? begin : a, last = b < end ? b : end;
    return {first, int(last - first)};
}

/// Runs that n elements may be in.
template <int N>
__device__ __forceinline__ int64_t runs_of(int64_t n) {
    return (n + 2 * N - 2) / N;
}

// ---- results that are not coded ------------------------------------------------------------------------

template <class Real>
__device__ __forceinline__ void store_part(const Real* merged, void* out, DType t, int64_t i, int n) {
    constexpr int N = RUN<Real>;
    if constexpr (N == 8) {
        const char* at = static_cast<const char*>(out) + i * itemsize(t);
        if (n == N && t != DType::F64 && reinterpret_cast<uintptr_t>(at) % 16 == 0)
            return store_raw<N>(merged, out, t, i);
    }
    FM_UNROLL
    for (int j = 0; j < N; ++j)
        if (j < n) store_run<Real>(merged + j, out, t, i + j, 1);
}

template <class Real>
__global__ void __launch_bounds__(THREADS, 1)
    walk_any_kernel(const Job* jobs, const Piece* pieces, int n_pieces) {
    constexpr int N = RUN<Real>;
    for (int at = int(blockIdx.x); at < n_pieces; at += int(gridDim.x)) {
        const Piece piece = pieces[at];
        const Job& job = jobs[piece.job];
        const bool joined = joins_rows(job.plan, job.in.cols, N);
        for (int64_t q = threadIdx.x; q < runs_of<N>(piece.end - piece.begin); q += THREADS) {
            const Part part = part_of<N>(job.in.start, piece.begin, piece.end, q);
            if (part.n <= 0) continue;
            Real merged[N];
            if (merge_run<Real, N>(job, joined, part.first, part.n, merged)) atomicOr(job.bad, 1);
            store_part<Real>(merged, job.out, job.out_type, part.first, part.n);
        }
    }
}

template <class Real>
__global__ void __launch_bounds__(THREADS, 1) walk_peak_kernel(const Job* at, DType type, uint32_t* found) {
    constexpr int N = RUN<Real>;
    const Job& job = *at;
    const bool joined = joins_rows(job.plan, job.in.cols, N);
    const int64_t step = int64_t(gridDim.x) * THREADS;
    uint32_t peak = 0;
    bool bad = false;
    for (int64_t q = int64_t(blockIdx.x) * THREADS + threadIdx.x; q < runs_of<N>(job.in.n); q += step) {
        const Part part = part_of<N>(job.in.start, 0, job.in.n, q);
        if (part.n <= 0) continue;
        Real merged[N];
        bad |= merge_run<Real, N>(job, joined, part.first, part.n, merged);
        FM_UNROLL
        for (int j = 0; j < N; ++j)
            if (j < part.n) {
                const uint32_t key = key_of(as_type(type, merged[j]));
                peak = key > peak ? key : peak;
            }
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        const uint32_t other = __shfl_down_sync(ALL, peak, distance);
        peak = other > peak ? other : peak;
    }
    if (bad || peak >= KeyOf<float>::inf) atomicOr(found, 1u);
    if (threadIdx.x % 32 == 0 && peak) atomicMax(found + 1, peak);
}

// ---- results that are coded ----------------------------------------------------------------------------

/// A tile: rows and columns of the tensor, and where its elements are in memory, unit by unit.
struct Window {
    int64_t row, col;
    int32_t rows, cols;

    __device__ __forceinline__ Window(const CodedResult& to, int64_t tile) {
        const int64_t high = int64_t(to.unit_rows) * to.down, wide = int64_t(to.unit_cols) * to.units;
        const int64_t r = tile / to.across * high, c = tile % to.across * wide;
        row = to.row + r, col = to.col + c;
        rows = int32_t(to.rows - r < high ? to.rows - r : high);
        cols = int32_t(to.cols - c < wide ? to.cols - c : wide);
    }
};

__device__ __forceinline__ int32_t place_of(const CodedResult& to, int32_t r, int32_t c) {
    return (r / to.unit_rows * to.units + c / to.unit_cols) * to.pitch + r % to.unit_rows * to.unit_cols +
           c % to.unit_cols;
}

/// The runs of a tile, each by one thread: f(row of the tile, column of the tile, index of the chunk, n).
template <int N, class F>
__device__ __forceinline__ void visit_tile(const Job& job, const CodedResult& to, const Window& w, F&& f) {
    const int per_row = int(runs_of<N>(w.cols));
    for (int q = int(threadIdx.x); q < w.rows * per_row; q += THREADS) {
        const int r = q / per_row;
        const int64_t begin = (w.row + r) * to.coded.cols + w.col - job.in.start;
        const Part part = part_of<N>(job.in.start, begin, begin + w.cols, q % per_row);
        if (part.n > 0) f(r, int32_t(part.first - begin), part.first, part.n);
    }
}

/// Merge a tile into memory, as the type that is coded; true if there is anything that is not finite.
template <class Real>
__device__ __forceinline__ bool merge_tile(const Job& job, const CodedResult& to, const Window& w, float* x) {
    constexpr int N = TILE_RUN<Real>;
    const bool joined = joins_rows(job.plan, job.in.cols, N);
    bool bad = false;
    visit_tile<N>(job, to, w, [&](int32_t r, int32_t c, int64_t i, int n) {
        Real merged[N];
        bad |= merge_run<Real, N>(job, joined, i, n, merged);
        FM_UNROLL
        for (int j = 0; j < N; ++j)
            if (j < n) {
                const float value = as_type(to.coded.type, merged[j]);
                bad |= key_of(value) >= KeyOf<float>::inf;
                x[place_of(to, r, c + j)] = value;
            }
    });
    return bad;
}

/// DEEP: for the format that searches more than registers hold, and for that alone.
template <bool DEEP>
static __device__ __noinline__ void encode_unit(const Coded& coded, int64_t row, int rows, int64_t col,
                                                int64_t cols, const float* x, int64_t stride) {
    if (DEEP)
        encode_blocks<BlockQ4_K>(coded, row, rows, col, cols, x, stride);
    else
        encode_small_tile(coded, row, rows, col, cols, x, stride);
}

template <bool DEEP>
__device__ __forceinline__ void encode_units(const CodedResult& to, const Window& w, const float* x) {
    const int wide = (w.cols + to.unit_cols - 1) / to.unit_cols,
              high = (w.rows + to.unit_rows - 1) / to.unit_rows;
    for (int u = int(threadIdx.x); u < wide * high; u += THREADS) {
        const int32_t r = u / wide * to.unit_rows, c = u % wide * to.unit_cols;
        encode_unit<DEEP>(to.coded, w.row + r, w.rows - r < to.unit_rows ? w.rows - r : to.unit_rows,
                          w.col + c, w.cols - c < to.unit_cols ? w.cols - c : to.unit_cols,
                          x + place_of(to, r, c), to.unit_cols);
    }
}

/// Sums over the block, each thread's first; the sums are the first thread's. shared: [2 * WARPS].
__device__ __forceinline__ void sum_block(double& a, double& b, double* shared) {
    for (int distance = 16; distance > 0; distance /= 2) {
        a += __shfl_down_sync(ALL, a, distance);
        b += __shfl_down_sync(ALL, b, distance);
    }
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = a, shared[WARPS + threadIdx.x / 32] = b;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int w = 1; w < WARPS; ++w) a += shared[w], b += shared[WARPS + w];
}

/// What coding has cost a tile: squared errors, and squares. Always in the same order.
__device__ __forceinline__ void measure_tile(const Job& job, const CodedResult& to, const Window& w,
                                             const float* x, double* shared, double* residual) {
    constexpr int N = TILE_RUN<float>;
    double errors = 0, squares = 0;
    visit_tile<N>(job, to, w, [&](int32_t r, int32_t c, int64_t i, int n) {
        float decoded[N];
        decode_elements(to.coded, i, n, decoded);
        FM_UNROLL
        for (int j = 0; j < N; ++j)
            if (j < n) {
                const double value = x[place_of(to, r, c + j)], e = double(decoded[j]) - value;
                errors += e * e, squares += value * value;
            }
    });
    sum_block(errors, squares, shared);
    if (threadIdx.x == 0) residual[0] = errors, residual[1] = squares;
}

template <bool DEEP>
__global__ void __launch_bounds__(THREADS, 1)
    walk_coded_kernel(const Job* jobs, const Piece* pieces, int n_pieces, bool f64) {
    FM_SHARED(double, sums);  // [2 * WARPS], then the tile if it fits
    for (int at = int(blockIdx.x); at < n_pieces; at += int(gridDim.x)) {
        const Piece piece = pieces[at];
        const Job& job = jobs[piece.job];
        const CodedResult& to = *static_cast<const CodedResult*>(job.out);
        const int64_t floats = int64_t(to.units) * to.down * to.pitch;
        float* x = to.scratch ? to.scratch + blockIdx.x * floats : reinterpret_cast<float*>(sums + 2 * WARPS);
        for (int64_t tile = piece.begin; tile < piece.end; ++tile) {
            const Window w(to, tile);
            const bool bad = f64 ? merge_tile<double>(job, to, w, x) : merge_tile<float>(job, to, w, x);
            if (__syncthreads_or(bad)) {
                if (threadIdx.x == 0) atomicOr(job.bad, 1);
                continue;
            }
            encode_units<DEEP>(to, w, x);
            __syncthreads();  // codes are read, or the tile overwritten, by others
            if (to.residual) {
                measure_tile(job, to, w, x, sums, to.residual + 2 * tile);
                __syncthreads();
            }
        }
    }
}

// ---- how results are cut -------------------------------------------------------------------------------

constexpr int64_t SUMS_BYTES = 2 * WARPS * int64_t(sizeof(double));
constexpr int64_t MOST_SHARED = 96 << 10;     // what every device has
constexpr int64_t MOST_SCRATCH = 64ll << 20;  // of one result
constexpr int64_t LEAST_UNIT = 32;            // elements that are worth a thread

/// The smallest unit that is worth a thread, as rows and columns.
Tile unit_of(const Coded& coded, int64_t rows, int64_t cols) {
    Tile unit = tile_of(coded);
    if (unit.cols == 0) unit.cols = cols;
    const int64_t n = unit.rows * unit.cols;
    if (n < LEAST_UNIT) unit.cols *= divide_up(LEAST_UNIT, n);
    return {std::min(unit.rows, rows), std::min(unit.cols, cols)};
}

}  // namespace

CodedResult plan_result(const Coded& coded, const Operands& in) {
    CodedResult to;
    to.coded = coded;
    const bool flat = coded.format == Format::BnbNf4 || coded.format == Format::BnbFp4;
    const Tile least = tile_of(coded);
    const int64_t end = in.start + in.n, unit = flat ? least.cols : least.rows * coded.cols;
    if (!encodes(coded)) throw std::invalid_argument("walk: the result's format can only be read");
    if (in.start != coded.first || in.start % unit || (end % unit && end != coded.rows * coded.cols))
        throw std::invalid_argument("walk: the chunk cuts through what is coded at once");
    if (in.n == 0) return to;
    to.cols = flat ? in.n : coded.cols, to.rows = in.n / to.cols;
    to.row = flat ? 0 : in.start / to.cols, to.col = flat ? in.start : 0;
    const Tile each = unit_of(coded, to.rows, to.cols);
    to.unit_rows = int32_t(each.rows), to.unit_cols = int32_t(each.cols);
    const int64_t pitch = each.rows * each.cols | 1;  // odd: neighbouring threads read from different banks
    const int64_t fit = (int64_t(default_shared_bytes) - SUMS_BYTES) / 4 / pitch;  // units
    const int64_t most = std::max<int64_t>(1, std::min<int64_t>(fit, THREADS));
    to.pitch = int32_t(pitch);
    to.units = int32_t(std::min(most, divide_up(to.cols, each.cols)));
    to.down = int32_t(std::min(most / to.units, divide_up(to.rows, each.rows)));
    to.across = divide_up(to.cols, each.cols * to.units);
    to.tiles = to.across * divide_up(to.rows, each.rows * to.down);
    const int64_t tile_bytes = pitch * to.units * to.down * 4;
    const bool fits = SUMS_BYTES + tile_bytes <= MOST_SHARED;
    to.shared_bytes = int32_t(SUMS_BYTES + (fits ? tile_bytes : 0));
    if (!fits) to.most_blocks = int32_t(std::max<int64_t>(1, std::min(to.tiles, MOST_SCRATCH / tile_bytes)));
    return to;
}

cudaError_t run_walks_any(const Batch::Launch& l, const Job* jobs, cudaStream_t stream) {
    const auto kernel = l.variant.f64 ? walk_any_kernel<double> : walk_any_kernel<float>;
    return launch(kernel, dim3(resident_blocks(kernel, l.n_pieces, 0)), dim3(THREADS), 0, stream, jobs,
                  l.pieces, l.n_pieces);
}

cudaError_t run_walks_coded(const Batch::Launch& l, const Job* jobs, cudaStream_t stream) {
    const Variant& v = l.variant;
    const auto kernel = v.deep ? walk_coded_kernel<true> : walk_coded_kernel<false>;
    const int64_t wanted = v.most_blocks ? std::min(v.most_blocks, l.n_pieces) : l.n_pieces;
    const size_t shared = size_t(v.shared_bytes);
    const cudaError_t status = allow_shared(kernel, shared);
    if (status != cudaSuccess) return status;
    return launch(kernel, dim3(resident_blocks(kernel, wanted, shared)), dim3(THREADS), shared, stream, jobs,
                  l.pieces, l.n_pieces, v.f64);
}

cudaError_t walk_peak(const Job* job, const Operands& in, bool f64, DType type, uint32_t* found,
                      cudaStream_t stream) {
    const auto kernel = f64 ? walk_peak_kernel<double> : walk_peak_kernel<float>;
    const dim3 grid(resident_blocks(kernel, divide_up(in.n, THREADS * RUN<float>), 0));
    return launch(kernel, grid, dim3(THREADS), 0, stream, job, type, found);
}

}  // namespace cuda
}  // namespace fastmerge
