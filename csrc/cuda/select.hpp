// Launchers of csrc/cuda/select.cu: exact rank cuts by radix selection, and ranks within rows. Memory and
// stream are the caller's; nothing allocates or waits. coded: whether an operand of the job may be.
#pragma once
#include "cuda/job.hpp"
#include "cuda/launch.cuh"

namespace fastmerge {
namespace cuda {

constexpr int DIGIT_BINS = 2048;

/// Digits of a key, most significant first.
FM_HD constexpr int n_digits(bool f64) {
    return f64 ? 6 : 3;
}
FM_HD constexpr int digit_width(bool f64, int d) {
    return d < (f64 ? 3 : 1) ? 11 : 10;
}
FM_HD constexpr int digit_shift(bool f64, int d) {
    int shift = f64 ? 63 : 31;
    for (int e = 0; e <= d; ++e) shift -= digit_width(f64, e);
    return shift;
}

/// Keys of each expert that are sampled, and those between the ends of a bracket that are kept of a piece.
constexpr int SAMPLE = 1 << 15;
constexpr int64_t MOST_BETWEEN = PIECE_ELEMENTS / 16;

/// Where the key of a target's cut is looked for: [low, high]. holds: 1 once that is known to be right.
struct Bracket {
    uint32_t low, high;
    int32_t holds;
};
/// Keys of a piece above a bracket, at its ends (at the high one if they are one), and between.
struct Inside {
    uint32_t above, at_high, at_low, between;
};

/// What is being selected: targets [n_ranks, n_keys] of each expert's |delta|.
struct Selection {
    int n_keys = 1, n_ranks = 1;
    bool all_ties = false, f64 = false;
    double fraction = -1;  // of the nonzero elements, when >= 0
    Target* targets = nullptr;
    unsigned long long* bins = nullptr;     // [n_ranks, n_keys, DIGIT_BINS], zeros
    unsigned long long* nonzero = nullptr;  // [n_keys], zeros
    uint32_t* equal = nullptr;              // [n_ranks, n_keys, n_pieces], zeros
    int64_t n = 0, n_pieces = 0;            // elements, and pieces of the chunk that holds them all
    // Of float32:
    uint32_t* sample = nullptr;   // [n_keys, SAMPLE]
    Bracket* brackets = nullptr;  // [n_ranks, n_keys], zeros
    Inside* inside = nullptr;     // [n_ranks, n_keys, n_pieces]
    uint32_t* between = nullptr;  // [n_ranks, n_keys, n_pieces, MOST_BETWEEN] keys
};

/// Begin: ranks [n_ranks, n_keys] of n elements, for each of the units.
cudaError_t open_targets(const Selection& s, const int64_t* ranks, int64_t units, int64_t n,
                         cudaStream_t stream);
/// Of float32: bracket the cuts, and keep what is in the brackets.
cudaError_t narrow(const Job* job, bool coded, const Selection& s, cudaStream_t stream);
/// Count digit d of the keys; then choose it.
cudaError_t count_digits(const Job* job, bool coded, const Selection& s, int d, cudaStream_t stream);
cudaError_t choose_digits(const Selection& s, int d, cudaStream_t stream);
/// Count keys equal to the cuts piece by piece; then find each cut's piece; then its last tie. The chunk
/// begins at `offset` + in.start of the flattened order.
cudaError_t count_equals(const Job* job, bool coded, const Selection& s, cudaStream_t stream);
cudaError_t locate_ties(const Selection& s, cudaStream_t stream);
cudaError_t find_ties(const Job* job, bool coded, const Selection& s, int64_t offset, cudaStream_t stream);
/// Everything for units of `unit` elements in one launch, a block each: targets [n_ranks, n_keys, units] of
/// the whole tensor; the chunk holds those from in.start / unit on.
cudaError_t select_units(const Job* job, const Operands& in, bool coded, const Selection& s, int64_t unit,
                         int64_t units, cudaStream_t stream);

/// Write the keys of |delta| of experts [first, last), or of the variance for first = -1, last = 0:
/// [last - first, n] of 4 bytes, or of 8 for float64.
cudaError_t order_keys(const Job* job, const Operands& in, Kind kind, int first, int last, void* keys,
                       cudaStream_t stream);
/// Ranks of |delta| within rows of float32 deltas, [K, n]. scratch: bytes of rank_scratch.
int64_t rank_scratch(const Operands& in, bool coded);
cudaError_t rank_rows(const Job* job, const Operands& in, bool coded, uint32_t* ranks, void* scratch,
                      cudaStream_t stream);

}  // namespace cuda
}  // namespace fastmerge
