// Choosing a scale by least squared error: candidates in a fixed order, of which a strictly better one is
// kept.
#pragma once
#include "core/four_bit/scalars.hpp"

namespace fastmerge {
namespace FM_ISA {

/// Sum of difference(j)^2 over j < n: 16 running sums, then a tree, whatever the instruction set.
template <class F>
FM_EACH float squared_error(int64_t n, F difference) {
    float sum[16] = {};
    int64_t j = 0;
    for (; j + 16 <= n; j += 16)
        for (int l = 0; l < 16; ++l) {
            const float d = difference(j + l);
            sum[l] += d * d;
        }
    for (int l = 0; j + l < n; ++l) {
        const float d = difference(j + l);
        sum[l] += d * d;
    }
    for (int width = 8; width > 0; width /= 2)
        for (int l = 0; l < width; ++l) sum[l] += sum[l + width];
    return sum[0];
}

/// The factor of the largest magnitude with the least error(factor): 1, or `from` to `to` in steps of
/// 1 / `parts`, both in parts.
template <class F>
FM_HD inline float best_clip(int from, int to, int step, int parts, F error) {
    float best = 1.f, least = error(best);
    for (int k = from; k <= to; k += step) {
        const float clip = float(k) / float(parts), e = error(clip);
        best = e < least ? clip : best, least = e < least ? e : least;
    }
    return best;
}

/// 13 clips, 0.70 to 1.00.
template <class F>
FM_HD inline float best_integer_clip(F error) {
    return best_clip(28, 40, 1, 40, error);
}

}  // namespace FM_ISA
}  // namespace fastmerge
