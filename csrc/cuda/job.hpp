// What a kernel is told of one tensor: the plans of core/plan.hpp with every pointer into device memory.
#pragma once
#include "core/four_bit/format.hpp"
#include "core/plan.hpp"

namespace fastmerge {

struct Job {
    WalkPlan plan;  // statistics look at plan.keep alone
    Operands in;
    Ranks ranks;
    void* out = nullptr;  // [n]; of a result that is coded, its CodedResult
    DType out_type = DType::F32;
    int32_t* bad = nullptr;  // set to 1 if an operand is not finite
};

/// A result that is coded: it is merged to `values`, as the type that is coded, and coded from there. What
/// one call codes is a unit; units side by side and below each other, as many as a block takes at a time, are
/// a tile. bitsandbytes has one row, of all elements.
struct CodedResult {
    Coded coded;
    int64_t row = 0, col = 0, rows = 0, cols = 0;  // the chunk's place in the tensor
    int32_t unit_rows = 1, unit_cols = 1;
    int32_t units = 1, down = 1;                // of a tile: side by side, below each other
    int64_t across = 1, tiles = 0;              // tiles of a row, and in all
    int32_t shared_bytes = 0, most_blocks = 0;  // most_blocks: where tiles are in scratch, else 0
    DType type = DType::F32;                    // of `values`
    void* values = nullptr;                     // [rows * cols]
    float* scratch = nullptr;                   // [most_blocks, tile]
    double* residual = nullptr;                 // [tiles, 2] sums of squared errors and of squares, or null

    FM_HD int64_t tile() const { return int64_t(units) * unit_cols * down * unit_rows; }
};

/// Elements [begin, end) of one job, or tiles if its result is coded: what a block works on at a time.
/// Results never depend on how a job is cut.
struct Piece {
    int64_t begin, end;
    int32_t job;
};

constexpr int64_t PIECE_ELEMENTS = 1 << 16;
/// What is computed in, and whether an operand may be coded: each a kernel of its own.
struct Kind {
    bool f64 = false, coded = false;
};

constexpr int THREADS = 256;       // of a block, in every kernel
constexpr int MOST_EXACT = 8;      // kernels of up to as many experts are for that number alone
constexpr int MOST_UNROLLED = 16;  // experts that the fused walk keeps in registers at once

inline bool has_coded(const Operands& in) {
    bool coded = in.base && in.base_type == DType::Coded;
    for (int k = 0; k < in.n_experts; ++k) coded |= in.expert_type[k] == DType::Coded;
    return coded;
}

/// How the fused walk votes; each is a kernel of its own.
enum class Election : int32_t { None = 0, Mass = 1, Other = 2 };

/// What keeps an element, in kernels of bfloat16 alone (lean.cuh); Any: whatever is asked for, of any types.
enum class Stage : int32_t { Any = 0, All = 1, Cut = 2, Draw = 3 };

/// A kernel of the fused walk, or the one that codes results; f64 and whatever `unrolled` < 0 means go
/// element by element, coded operands by whatever is asked for.
struct Variant {
    int unrolled = -1;    // experts in registers; 0: looped over; -1: element by element
    bool narrow = false;  // all operands have 16 bits: 8 elements a thread, else 4
    Election election = Election::None;
    Stage stage = Stage::Any;
    bool f64 = false;
    bool coded = false;             // an operand is
    int32_t shared_bytes = 0;       // of a block, where the result is coded
    int32_t most_blocks = 0;        // as CodedResult's
    Format format = Format::Dense;  // of a coded result
    bool operator==(const Variant& o) const {
        return unrolled == o.unrolled && narrow == o.narrow && election == o.election && stage == o.stage &&
               f64 == o.f64 && coded == o.coded && shared_bytes == o.shared_bytes &&
               most_blocks == o.most_blocks && format == o.format;
    }
};

/// Rank cuts of a tensor, a row or a model in the making.
struct Target {
    int64_t rank;     // how many are above; while digits are counted: of those with `prefix`
    uint64_t prefix;  // leading digits of the cut's key
    int64_t piece;  // where the last tie lies: index of PIECE_ELEMENTS in flattened order, -1: not known yet
    int32_t open;   // 1: digits are counted; 2: the key is known, its last tie is looked for; 0: settled
    int32_t pad;
    double value;
    int64_t last_tie;
};

}  // namespace fastmerge
