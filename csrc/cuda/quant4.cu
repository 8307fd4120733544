// Coded tensors: operands are decoded where they are read; results are merged by whatever walk suits their
// operands, and coded from there tile by tile. What the codes mean is csrc/core/four_bit's, what is merged
// csrc/core/walk.hpp's. Coding reads what was merged and writes the codes; to tell what it costs, it reads
// them once more.
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

/// Elements that a thread merges at a time: those of one Philox block.
template <class Real>
constexpr int RUN = sizeof(Real) == 4 ? 8 : 1;

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
__global__ void __launch_bounds__(THREADS, 2)
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
__global__ void __launch_bounds__(THREADS, 2) walk_peak_kernel(const Job* at, DType type, uint32_t* found) {
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

/// A tile: rows and columns of the tensor. In memory its rows are `cols` apart.
struct Window {
    int64_t row, col;
    int32_t rows, cols;

    __device__ __forceinline__ Window(const CodedResult& to, int64_t tile) {
        const int64_t high = int64_t(to.unit_rows) * to.down, wide = int64_t(to.unit_cols) * to.units;
        const int64_t q = quotient(tile, to.across), r = q * high, c = (tile - q * to.across) * wide;
        row = to.row + r, col = to.col + c;
        rows = int32_t(to.rows - r < high ? to.rows - r : high);
        cols = int32_t(to.cols - c < wide ? to.cols - c : wide);
    }
};

/// The runs of a tile, each by one thread: f(row of the tile, column of the tile, index of the chunk, n).
template <int N, class F>
__device__ __forceinline__ void visit_tile(const Job& job, const CodedResult& to, const Window& w, F&& f) {
    const uint32_t per_row = uint32_t(runs_of<N>(w.cols));
    for (uint32_t q = threadIdx.x; q < uint32_t(w.rows) * per_row; q += THREADS) {
        const int r = int(q / per_row);
        const int64_t begin = (w.row + r) * to.coded.cols + w.col - job.in.start;
        const Part part = part_of<N>(0, begin, begin + w.cols, q % per_row);
        if (part.n > 0) f(r, int32_t(part.first - begin), part.first, part.n);
    }
}

/// Elements of a tile that a thread takes at a time.
constexpr int TAKEN = 8;

/// Read a tile of what was merged; true if there is anything that is not finite.
__device__ __forceinline__ bool load_tile(const Job& job, const CodedResult& to, const Window& w, float* x) {
    bool bad = false;
    visit_tile<TAKEN>(job, to, w, [&](int32_t r, int32_t c, int64_t i, int n) {
        float* at = x + r * w.cols + c;
        float value[TAKEN];
        if (n == TAKEN) {
            load_elements<float, TAKEN>(to.values, to.type, i, value);
        } else {
            FM_UNROLL
            for (int j = 0; j < TAKEN; ++j)
                if (j < n) load_run<float>(to.values, to.type, i + j, 1, value + j);
        }
        FM_UNROLL
        for (int j = 0; j < TAKEN; ++j) bad |= j < n && key_of(value[j]) >= KeyOf<float>::inf;
        if (n == TAKEN && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
            FM_UNROLL
            for (int j = 0; j < TAKEN; j += 4)
                *reinterpret_cast<float4*>(at + j) =
                    make_float4(value[j], value[j + 1], value[j + 2], value[j + 3]);
        } else {
            FM_UNROLL
            for (int j = 0; j < TAKEN; ++j)
                if (j < n) at[j] = value[j];
        }
    });
    return bad;
}

/// Units by teams; those of Q4_K have eight lanes, a sub-block for each.
template <Format FORMAT>
__device__ __forceinline__ void encode_units(const CodedResult& to, const Window& w, const float* x) {
    constexpr int LANES_OF_UNIT = FORMAT == Format::Q4_K ? BlockQ4_K::subs : TEAM;
    const int wide = (w.cols + to.unit_cols - 1) / to.unit_cols,
              high = (w.rows + to.unit_rows - 1) / to.unit_rows;
    for (int u = int(threadIdx.x) / LANES_OF_UNIT; u < wide * high; u += THREADS / LANES_OF_UNIT) {
        const int32_t r = u / wide * to.unit_rows, c = u % wide * to.unit_cols;
        const int rows = w.rows - r < to.unit_rows ? w.rows - r : to.unit_rows;
        const int32_t cols = w.cols - c < to.unit_cols ? w.cols - c : to.unit_cols;
        encode_tile(FORMAT, to.coded, w.row + r, rows, w.col + c, cols, x + r * w.cols + c, w.cols);
    }
}

/// FP8, whose units may be of any size: all threads look for their largest magnitudes, then all code.
/// scale: [THREADS], of the tile's units.
__device__ __forceinline__ void encode_fp8_units(const Job& job, const CodedResult& to, const Window& w,
                                                 const float* x, uint32_t* scale) {
    const Coded& coded = to.coded;
    const int wide = (w.cols + to.unit_cols - 1) / to.unit_cols,
              high = (w.rows + to.unit_rows - 1) / to.unit_rows;
    const auto unit_at = [&](int32_t r, int32_t c) { return r / to.unit_rows * wide + c / to.unit_cols; };
    const bool given = coded.group_rows == 0;
    if (!given) {
        scale[threadIdx.x] = 0;
        __syncthreads();
        visit_tile<TAKEN>(job, to, w, [&](int32_t r, int32_t c, int64_t, int n) {
            for (int j = 0; j < n;) {  // what of a run is in one unit
                const int left = to.unit_cols - (c + j) % to.unit_cols, end = left < n - j ? j + left : n;
                uint32_t* const found = scale + unit_at(r, c + j);
                uint32_t peak = 0;
                for (; j < end; ++j) {
                    const uint32_t key = key_of(x[r * w.cols + c + j]);
                    peak = key > peak ? key : peak;
                }
                atomicMax(found, peak);
            }
        });
        __syncthreads();
        for (int u = int(threadIdx.x); u < wide * high; u += THREADS) {
            const int64_t row = stored_row(coded, w.row + u / wide * to.unit_rows);
            const int64_t at = fp8_scale_at(coded, row, w.col + u % wide * to.unit_cols);
            const float peak = bit_cast<float>(scale[u]);
            scale[u] =
                bit_cast<uint32_t>(store_scale(coded.scales, coded.scale_type, at, fp8_scale_of(peak)));
        }
        __syncthreads();
    }
    const float of_all = given ? load_scale(coded.scales, coded.scale_type, 0) : 0.f;
    visit_tile<TAKEN>(job, to, w, [&](int32_t r, int32_t c, int64_t, int n) {
        uint8_t* codes = coded.codes + stored_row(coded, w.row + r) * coded.cols + w.col + c;
        const bool same = given || c % to.unit_cols + n <= to.unit_cols;
        float s = given ? of_all : bit_cast<float>(scale[unit_at(r, c)]);
        FM_UNROLL
        for (int j = 0; j < TAKEN; ++j)
            if (j < n) {
                if (!same) s = bit_cast<float>(scale[unit_at(r, c + j)]);
                codes[j] = uint8_t(float_to_e4m3(x[r * w.cols + c + j] / s));
            }
    });
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
template <Format FORMAT>
__device__ __forceinline__ void measure_tile(const Job& job, const CodedResult& to, const Window& w,
                                             const float* x, double* shared, double* residual) {
    double errors = 0, squares = 0;
    visit_tile<TAKEN>(job, to, w, [&](int32_t r, int32_t c, int64_t i, int n) {
        float decoded[TAKEN];
        decode_few(FORMAT, to.coded, i, n, decoded);
        FM_UNROLL
        for (int j = 0; j < TAKEN; ++j)
            if (j < n) {
                const double value = x[r * w.cols + c + j], e = double(decoded[j]) - value;
                errors += e * e, squares += value * value;
            }
    });
    sum_block(errors, squares, shared);
    if (threadIdx.x == 0) residual[0] = errors, residual[1] = squares;
}

/// A block's shared memory, before the tile if that fits.
struct Shared {
    double sums[2 * WARPS];
    uint32_t scale[THREADS];
};

/// Each format has a kernel of its own, with no more registers than it needs.
template <Format FORMAT>
__global__ void __launch_bounds__(THREADS, FORMAT == Format::Q4_K ? 2 : 3)
    walk_coded_kernel(const Job* jobs, const Piece* pieces, int n_pieces) {
    FM_SHARED(Shared, shared);
    for (int at = int(blockIdx.x); at < n_pieces; at += int(gridDim.x)) {
        const Piece piece = pieces[at];
        const Job& job = jobs[piece.job];
        const CodedResult& to = *static_cast<const CodedResult*>(job.out);
        float* x =
            to.most_blocks ? to.scratch + blockIdx.x * to.tile() : reinterpret_cast<float*>(shared + 1);
        for (int64_t tile = piece.begin; tile < piece.end; ++tile) {
            const Window w(to, tile);
            if (__syncthreads_or(load_tile(job, to, w, x))) {
                if (threadIdx.x == 0) atomicOr(job.bad, 1);
                continue;
            }
            if (FORMAT == Format::Fp8)
                encode_fp8_units(job, to, w, x, shared->scale);
            else
                encode_units<FORMAT>(to, w, x);
            __syncthreads();  // codes are read, or the tile overwritten, by others
            if (to.residual) {
                measure_tile<FORMAT>(job, to, w, x, shared->sums, to.residual + 2 * tile);
                __syncthreads();
            }
        }
    }
}

using CodingKernel = void (*)(const Job*, const Piece*, int);

CodingKernel coding_kernel(Format format) {
    switch (format) {
#define FM_CODING(FORMAT) \
    case Format::FORMAT:  \
        return walk_coded_kernel<Format::FORMAT>;
        FM_CODING(Dense)
        FM_CODING(BnbNf4)
        FM_CODING(BnbFp4)
        FM_CODING(Int4)
        FM_CODING(Nvfp4)
        FM_CODING(Mxfp4)
        FM_CODING(Gptq)
        FM_CODING(Awq)
        FM_CODING(Q4_0)
        FM_CODING(Q4_1)
        FM_CODING(Q8_0)
        FM_CODING(Q4_K)
        FM_CODING(GgufMxfp4)
        FM_CODING(Fp8)
#undef FM_CODING
        default:
            return nullptr;
    }
}

// ---- how results are cut -------------------------------------------------------------------------------

constexpr int64_t HEAD_BYTES = sizeof(Shared);
constexpr int64_t MOST_SHARED = 96 << 10;     // what every device has
constexpr int64_t MOST_SCRATCH = 64ll << 20;  // of one result
constexpr int64_t LEAST_UNIT = 32;            // elements that are worth a team
constexpr int64_t ENOUGH = 8192;              // elements of a tile: it need not be larger,
constexpr int64_t TEAMS = 16;                 // but to have a unit for each

/// The smallest unit that is worth a team, as rows and columns.
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
    const int64_t floats = each.rows * each.cols, fit = (int64_t(default_shared_bytes) - HEAD_BYTES) / 4;
    const int64_t wanted = std::min<int64_t>(std::max(TEAMS, ENOUGH / floats), THREADS);
    const int64_t most = std::max<int64_t>(1, std::min(wanted, fit / floats));
    const int64_t of_row = divide_up(to.cols, each.cols);
    to.across = divide_up(of_row, most);
    to.units = int32_t(divide_up(of_row, to.across));
    to.across = divide_up(of_row, to.units);
    to.down = int32_t(std::min(most / to.units, divide_up(to.rows, each.rows)));
    to.tiles = to.across * divide_up(to.rows, each.rows * to.down);
    to.type = coded.type == DType::F16 || coded.type == DType::BF16 ? coded.type : DType::F32;
    const int64_t tile_bytes = to.tile() * 4;
    const bool fits = HEAD_BYTES + tile_bytes <= MOST_SHARED;
    to.shared_bytes = int32_t(HEAD_BYTES + (fits ? tile_bytes : 0));
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
    const auto kernel = coding_kernel(v.format);
    if (!kernel) return cudaErrorInvalidValue;
    const int64_t wanted = v.most_blocks ? std::min(v.most_blocks, l.n_pieces) : l.n_pieces;
    const size_t shared = size_t(v.shared_bytes);
    const cudaError_t status = allow_shared(kernel, shared);
    if (status != cudaSuccess) return status;
    return launch(kernel, dim3(resident_blocks(kernel, wanted, shared)), dim3(THREADS), shared, stream, jobs,
                  l.pieces, l.n_pieces);
}

cudaError_t walk_peak(const Job* job, const Operands& in, bool f64, DType type, uint32_t* found,
                      cudaStream_t stream) {
    const auto kernel = f64 ? walk_peak_kernel<double> : walk_peak_kernel<float>;
    const dim3 grid(resident_blocks(kernel, divide_up(in.n, THREADS * RUN<float>), 0));
    return launch(kernel, grid, dim3(THREADS), 0, stream, job, type, found);
}

}  // namespace cuda
}  // namespace fastmerge
