// Double quantisation of bitsandbytes: scales of 256 blocks as codes of the dynamic map.
#pragma once
#include "core/four_bit/dynamic_map.hpp"
#include "core/four_bit/scalars.hpp"

namespace fastmerge {
namespace FM_ISA {

constexpr int NESTED_BLOCK = 256;

/// The nearest value's code: midpoints strictly below s are counted, so a tie takes the lower one.
FM_HD inline int dynamic_code(float s) {
    int low = 0, high = 255;
    while (low < high) {
        const int middle = (low + high) / 2;
        const bool beyond = s > (dynamic_value(middle) + dynamic_value(middle + 1)) / 2;
        low = beyond ? middle + 1 : low, high = beyond ? high : middle;
    }
    return low;
}

/// As the library's CPU backend: s is first brought to the centre of one of 65,536 bins.
FM_HD inline int dynamic_code_of_bin(float s) {
    const int bin = int((s + 1.f) * 0.5f * 65535.f + 0.5f);
    return dynamic_code(-1.f + 2.f * float(bin) / 65535.f);
}

/// Code the scales of `blocks` blocks, less `offset`. codes: [blocks]; nested: [ceil(blocks / 256)].
FM_HD inline void encode_nested(const float* absmax, int64_t blocks, float offset, bool cpu_table_rule,
                                uint8_t* codes, float* nested) {
    for (int64_t first = 0; first < blocks; first += NESTED_BLOCK) {
        const int n = int(blocks - first < NESTED_BLOCK ? blocks - first : NESTED_BLOCK);
        float peak = 0;
        for (int j = 0; j < n; ++j) {
            const float d = absolute(absmax[first + j] - offset);
            peak = d > peak ? d : peak;
        }
        nested[first / NESTED_BLOCK] = peak;
        for (int j = 0; j < n; ++j) {
            const float s = peak > 0 ? (absmax[first + j] - offset) * (1.f / peak) : 0.f;
            const float inside = clamped(s, -1.f, 1.f);
            codes[first + j] = uint8_t(!cpu_table_rule ? dynamic_code(inside)
                                       : peak > 0      ? dynamic_code_of_bin(inside)
                                                       : 0);
        }
    }
}

}  // namespace FM_ISA
}  // namespace fastmerge
