// Choosing a scale by least squared error: candidates in a fixed order, of which a strictly better one is
// kept.
#pragma once
#include "core/four_bit/scalars.hpp"

namespace fastmerge {
namespace FM_ISA {

/// Sum of difference(x[j])^2: 16 running sums, then a tree, whatever the instruction set.
#if defined(FM_GPU)
template <class F>
FM_EACH_TEAM float squared_error(const float* x, int64_t n, const F& difference) {
    float sum = 0;  // each lane has one
    for (int64_t j = team_lane(); j < n; j += TEAM) {
        const float d = difference(x[j]);
        sum += d * d;
    }
    for (int width = TEAM / 2; width > 0; width /= 2) sum += __shfl_down_sync(team_mask(), sum, width, TEAM);
    return __shfl_sync(team_mask(), sum, 0, TEAM);
}
#else
template <class F>
FM_EACH float squared_error(const float* x, int64_t n, const F& difference) {
    float sum[16] = {};
    int64_t j = 0;
#if defined(FM_LANES)
    Floats sums[16 / LANES] = {};
    for (; j + 16 <= n; j += 16)
        for (int v = 0; v < 16 / LANES; ++v) {
            const Floats d = difference(read<Floats>(x + j + v * LANES));
            sums[v] += d * d;
        }
    memcpy(sum, sums, sizeof sum);
#endif
    for (int64_t l = j; l < n; ++l) {
        const float d = difference(x[l]);
        sum[l % 16] += d * d;
    }
    for (int width = 8; width > 0; width /= 2)
        for (int l = 0; l < width; ++l) sum[l] += sum[l + width];
    return sum[0];
}
#endif

/// The factor with the least error(factor): 1, or one of from / parts, (from + 1) / parts .. to / parts.
template <class F>
FM_TEAM inline float best_clip(int from, int to, int parts, const F& error) {
    float best = 1.f, least = error(best);
    for (int k = from; k <= to; ++k) {
        const float clip = float(k) / float(parts), e = error(clip);
        best = e < least ? clip : best, least = e < least ? e : least;
    }
    return best;
}

/// 13 clips, 0.70 to 1.00.
template <class F>
FM_TEAM inline float best_integer_clip(const F& error) {
    return best_clip(28, 40, 40, error);
}

}  // namespace FM_ISA
}  // namespace fastmerge
