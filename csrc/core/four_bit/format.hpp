// Elements stored as codes: a few bits each, with scales for groups of them. One description serves operands
// that are read and results that are written; what each format's bytes mean is docs/formats.md.
#pragma once
#include <cstdint>

#include "core/types.hpp"

namespace fastmerge {

/// How codes, scales and zeros lie in memory. Values are fastmerge/coding.py's.
enum class Format : int32_t {
    Dense = 0,   // elements of `type`, whose rows may be stored in another order
    BnbNf4 = 1,  // bitsandbytes: blocks of `group` over the flattened tensor, high nibble first
    BnbFp4 = 2,
    Int4 = 3,   // compressed-tensors pack-quantized: 8 codes an int32, low first; zeros packed over rows
    Nvfp4 = 4,  // E2M1 low nibble first, E4M3 scale of `group` (16), a divisor over the tensor
    Mxfp4 = 5,  // E2M1 low nibble first, E8M0 scale of `group` (32)
    Gptq = 6,   // qweight [cols / 8, rows], qzeros [groups, rows / 8], scales [groups, rows] float16
    Awq = 7,    // qweight [cols, rows / 8] interleaved, qzeros [groups, rows / 8], scales [groups, rows]
    Q4_0 = 8,   // GGUF blocks: everything is in `codes`
    Q4_1 = 9,
    Q8_0 = 10,
    Q4_K = 11,
    GgufMxfp4 = 12,
    GgufNvfp4 = 13,
    Fp8 = 14,   // E4M3, scale per tensor, row (`group` 0) or block of group_rows x group
    Int8 = 15,  // bitsandbytes LLM.int8: scale of a row over 127
    Q6_K = 16,
};

/// The type of a scale in memory.
enum class ScaleType : int32_t { F32 = 0, F16 = 1, BF16 = 2, E4M3 = 3, E8M0 = 4, U8 = 5 };

/// Elements [first, first + n) of one tensor [rows, cols], row-major, as codes. `codes`, `scales` and `zeros`
/// begin with what belongs to flat index `origin`, a multiple of the format's unit; parts that are not cut
/// (scales of a tensor, nested scales, low-rank factors, all of Gptq and Awq) are whole.
struct Coded {
    Format format = Format::Dense;
    DType type = DType::F32;  // of Dense elements; else what a value is rounded to before it is coded
    ScaleType scale_type = ScaleType::F32;
    int32_t group = 0;        // elements along a row that share a scale; 0: all of the row
    int32_t group_rows = 1;   // rows that share one; 0: all (a scale of the tensor)
    bool symmetric = true;    // no zeros
    bool v1 = false;          // Gptq: zeros are stored less one
    bool other_rule = false;  // the rule of the library's other backend: coding.py
    bool search = false;      // choose scales by least squared error, not by the largest magnitude
    int32_t rotary = 0;       // rows of a head whose halves are stored interleaved (GGUF's q and k); 0: none
    int64_t rows = 1, cols = 1;
    int64_t origin = 0, first = 0;
    uint8_t* codes = nullptr;
    uint8_t* scales = nullptr;
    uint8_t* zeros = nullptr;
    const float* nested = nullptr;  // scales of 256 scales each: `scales` are then codes of the dynamic map
    float nested_offset = 0;
    float tensor_scale = 1;             // Nvfp4: the divisor, by its other rule a factor; GgufNvfp4: a factor
    const int32_t* group_of = nullptr;  // Gptq with act-order: [cols] group of each column
    // Added to what is decoded: low_scale * (B A), B [rows, rank], A [rank, cols], both of low_type; the sum
    // over the rank is in order, in float32, one rounding per operation.
    const void *low_a = nullptr, *low_b = nullptr;
    DType low_type = DType::F32;
    int32_t rank = 0;
    float low_scale = 0;
};

}  // namespace fastmerge
