// What a kernel is told of one tensor: the plans of core/plan.hpp with every pointer into device memory.
#pragma once
#include "core/plan.hpp"

namespace fastmerge {

struct Job {
    WalkPlan plan;  // statistics look at plan.keep alone
    Operands in;
    Ranks ranks;
    void* out = nullptr;  // [n]
    DType out_type = DType::F32;
    int32_t* bad = nullptr;  // set to 1 if an operand is not finite
};

/// Elements [begin, end) of one job: what a block works on at a time. Results never depend on how a job is
/// cut.
struct Piece {
    int64_t begin, end;
    int32_t job;
};

constexpr int64_t PIECE = 1 << 16;
constexpr int THREADS = 256;       // of a block, in every kernel
constexpr int MOST_UNROLLED = 16;  // experts that the fused walk keeps in registers at once

/// How the fused walk votes; each is a kernel of its own.
enum class Election : int32_t { None = 0, Mass = 1, Other = 2 };

/// A kernel of the fused walk. f64 and whatever `unrolled` < 0 means go element by element.
struct Variant {
    int unrolled = -1;    // experts in registers; 0: looped over; -1: element by element
    bool narrow = false;  // all operands have 16 bits: 8 elements a thread, else 4
    Election election = Election::None;
    bool f64 = false;
    bool operator==(const Variant& o) const {
        return unrolled == o.unrolled && narrow == o.narrow && election == o.election && f64 == o.f64;
    }
};

/// Rank cuts of a tensor, a row or a model in the making.
struct Target {
    int64_t rank;     // how many are above; while digits are counted: of those with `prefix`
    uint64_t prefix;  // leading digits of the cut's key
    int64_t piece;  // where the last tie lies: index of PIECE elements in flattened order, -1: not known yet
    int32_t open;   // 1: digits are counted; 2: the key is known, its last tie is looked for; 0: settled
    int32_t pad;
    double value;
    int64_t last_tie;
};

}  // namespace fastmerge
