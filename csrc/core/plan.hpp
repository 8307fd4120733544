// The plain structs that the kernels take: fastmerge/stages.py, lowered. Pointers are borrowed for the call.
#pragma once
#include <cstdint>

#include "core/types.hpp"

namespace fastmerge {

enum class Axis : int32_t { Tensor = 0, Row = 1, Column = 2 };

/// The operands of elements [start, start + n) of one tensor; `cols` is the tensor's last dimension.
struct Operands {
    const void* base = nullptr;  // [n] or null: deltas are then the experts themselves
    DType base_type = DType::F32;
    const void* const* expert = nullptr;  // [K] pointers to [n]
    const DType* expert_type = nullptr;   // [K]
    int n_experts = 0;
    int64_t start = 0, n = 0, cols = 1;
};

/// A rank cut per expert and unit; absent when `value` is null.
struct Cut {
    const double* value = nullptr;      // [K, units]
    const int64_t* last_tie = nullptr;  // [K, units]
    int64_t units = 1;
    Axis axis = Axis::Tensor;
};

enum class DropKind : int32_t { None = 0, Uniform = 1, Ranked = 2 };

/// Which coordinates of each delta survive; the reasons combine by AND.
struct Keep {
    Cut trim, remove, select;
    DropKind drop = DropKind::None;
    const double* p_low = nullptr;   // [K] keep probability (Uniform), or that of the lowest rank
    const double* p_high = nullptr;  // [K] that of the highest rank
    const uint64_t* key = nullptr;   // [K] Philox keys
    Axis drop_axis = Axis::Row;      // what a rank is over: Row or Tensor
    bool by_value = false;           // rank by |delta| itself, not by order
    bool rescale = false;
    const uint8_t* const* given = nullptr;  // [K] pointers to [n], or null

    FM_HD bool any() const {
        return trim.value || remove.value || select.value || drop != DropKind::None || given;
    }
};

/// Ranks of |delta| within rows (or the tensor) for a ranked drop, over one chunk.
struct Ranks {
    const uint32_t* rank = nullptr;  // [K, n], unused when by_value
    const double* low = nullptr;     // [K, units] least |delta|, when by_value
    const double* high = nullptr;    // [K, units] largest |delta|, when by_value
    int64_t unit = 1;                // elements of a unit
    // What the ranked drop leaves instead of ranks, a bit each: of expert k and chunk index i, bit i % 64 of
    // kept[k * stride + i / 64].
    const uint64_t* kept = nullptr;
    int64_t stride = 0;
};

enum class Vote : int32_t { None = 0, Mass = 1, Delta = 2, Count = 3, NormMass = 4, NormFrac = 5 };
enum class OnZero : int32_t { Plus = 0, Minus = 1, Nothing = 2 };
enum class Divide : int32_t { None = 0, Constant = 1, Weight = 2 };

struct WalkPlan {
    Keep keep;
    const double* coefficient = nullptr;  // [K, units]
    int64_t units = 1;
    Axis axis = Axis::Tensor;
    Vote vote = Vote::None;
    OnZero on_zero = OnZero::Plus;
    const double* vote_scale = nullptr;  // [K]
    bool take_max = false;
    Divide divide = Divide::None;
    double divisor = 1, floor = 0, lambda = 1;
    const double* divisor_weight = nullptr;  // [K]
    bool add_base = true;
};

constexpr int BLOCK = 64;      // elements that one step of a kernel works on; also the lanes of a sum
constexpr int SEGMENT = 4096;  // elements of one leaf of a sum's reduction tree

}  // namespace fastmerge
