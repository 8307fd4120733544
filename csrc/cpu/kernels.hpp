// The kernels of one instruction set, as a table of function pointers; csrc/cpu/dispatch.cpp picks a table.
#pragma once
#include "core/four_bit/format.hpp"
#include "core/plan.hpp"

namespace fastmerge {

enum class Moment : int32_t { Abs = 0, Square = 1, Max = 2 };

constexpr int RANK_BINS = 512;
constexpr int64_t RANK_SCRATCH(int64_t cols) {
    return 3 * cols + 3 * RANK_BINS + 64;
}

/// Keys that may be a cut: low <= key <= high.
struct Bracket {
    bool open = false;  // false: nothing to look for
    uint64_t low = 0, high = 0;
};

/// What one span of elements holds of a bracket.
struct Bracketed {
    int64_t above = 0, nonzero = 0;  // keys above the bracket, and keys that are not zero
    int64_t n = 0;                   // keys in it
    uint64_t* key =
        nullptr;  // these, in order, room for the whole span and a block; null: they are only counted
    uint16_t* position = nullptr;  // where they are, relative to the span's first element
};

/// What an order statistic is over: expert `k`'s |delta|, or with k = -1 the variance over experts.
struct KernelTable {
    const char* isa;

    /// Merge elements [a, b) of the chunk into out; true if an operand is not finite.
    bool (*walk)(const WalkPlan&, const Operands&, const Ranks&, bool f64, int64_t a, int64_t b, void* out,
                 DType out_type);
    /// Merge rows [row, row + rows), columns [col, col + cols) of the tensor and code them: a whole number of
    /// the format's tiles, all in the chunk. scratch: 8 bytes for each element. True if an operand, or a
    /// value as the type that is coded, is not finite; nothing is coded then. residual: gets the sums of
    /// squared errors and of squares added.
    bool (*walk_coded)(const WalkPlan&, const Operands&, const Ranks&, bool f64, const Coded& out,
                       int64_t row, int rows, int64_t col, int64_t cols, void* scratch, double* residual);
    /// Raise `peak`, a key, to the largest magnitude of merged elements [a, b) as `type`; as `walk`
    /// otherwise.
    bool (*walk_peak)(const WalkPlan&, const Operands&, const Ranks&, bool f64, DType type, int64_t a,
                      int64_t b, uint32_t* peak);
    /// Write [K, n] uint8 for elements [a, b).
    void (*keep_mask)(const Keep&, const Operands&, const Ranks&, bool f64, int64_t a, int64_t b,
                      uint8_t* out);
    /// Add elements [a, b), or raise to the largest of them, to lanes [K, 2 (all, kept), BLOCK]; lane = flat
    /// index mod BLOCK.
    void (*moments)(Moment, const Keep&, const Operands&, const Ranks&, bool f64, int64_t a, int64_t b,
                    double* lanes);
    /// Add elements [a, b) to lanes [pairs, BLOCK]; lane = (position + a) mod BLOCK; pairs (j, k), j <= k.
    void (*gram)(const Operands&, bool f64, int64_t a, int64_t b, int64_t position, double* lanes);
    /// Add rows [r0, r1) of columns [c0, c1) to sums [pairs, cols].
    void (*gram_columns)(const Operands&, bool f64, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                         double* sums);
    /// Coordinates of [a, b) that elect plus, less those that elect minus.
    int64_t (*sign_balance)(const WalkPlan&, const Operands&, const Ranks&, bool f64, int64_t a, int64_t b);

    /// Write the keys of elements [a, b) to out[0 .. b-a).
    void (*keys)(const Operands&, int k, bool f64, int64_t a, int64_t b, uint64_t* out);
    /// Count the digit (key >> shift) & (2^width - 1) of the keys whose higher bits are `prefix`.
    void (*histogram)(const Operands&, int k, bool f64, int64_t a, int64_t b, int shift, int width,
                      uint64_t prefix, uint64_t* bins);
    /// Compare the keys of [a, b) of n_keys experts (or the variance, k = -1) with n_ranks brackets each, in
    /// one reading of the operands; brackets and counts are [n_keys, n_ranks]. nonzero: count these, too.
    void (*bracket)(const Operands&, bool variance, bool nonzero, int n_ranks, bool f64, int64_t a, int64_t b,
                    const Bracket* brackets, Bracketed* counts);
    /// Count keys equal to `key` in [a, b).
    int64_t (*count_equal)(const Operands&, int k, bool f64, int64_t a, int64_t b, uint64_t key);
    /// Chunk-relative index of the q-th (from 1) key equal to `key` in [a, b), or -1.
    int64_t (*find_equal)(const Operands&, int k, bool f64, int64_t a, int64_t b, uint64_t key, int64_t q);
    /// Ranks (ascending |delta|, lower index first) of the m elements from `a`.
    void (*rank_unit)(const Operands&, int k, bool f64, int64_t a, int64_t m, uint32_t* rank);
    /// Whether `rank_row` can do what a ranked drop asks.
    bool (*ranks_rows)(const Keep&, const Operands&, bool f64);
    /// Whether `draw` can do what a uniform drop asks.
    bool (*draws)(const Keep&, const Operands&, bool f64);
    /// Decide the uniform drop of n elements of expert k from flat index `first`, a multiple of 64, a bit
    /// each.
    void (*draw)(const Keep&, int k, int64_t first, int64_t n, uint64_t* kept);
    /// Decide the ranked drop of the row that begins at `a`: bit j is set iff its draw is below
    /// threshold[rank of element j]. threshold: [cols], ascending; scratch: RANK_SCRATCH(cols) words.
    void (*rank_row)(const Operands&, int k, int64_t a, const uint32_t* threshold, uint64_t key,
                     uint32_t* scratch, uint64_t* kept);

    /// core/four_bit/decode.hpp: decode_run.
    void (*decode)(const Coded&, int64_t i, int m, float* out);
    /// core/four_bit/encode.hpp.
    void (*encode_tile)(const Coded&, int64_t row, int rows, int64_t col, int64_t cols, const float* x,
                        int64_t stride);
};

/// The table in use: the best level this machine has, or the one FASTMERGE_CPU_ISA or set_isa names.
const KernelTable& kernels();
const char* best_isa();
/// Space-separated levels that this machine can run, lowest first.
const char* available_isas();
/// False if the machine cannot run that level or it is unknown.
bool set_isa(const char* name);

}  // namespace fastmerge
