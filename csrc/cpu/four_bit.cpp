#include "cpu/four_bit.hpp"

#include "core/four_bit/encode.hpp"
#include "cpu/kernels.hpp"
#include "cpu/spans.hpp"

namespace fastmerge {

void run_decode(const Coded& c, int64_t n, float* out) {
    parallel_spans(n, [&](int64_t a, int64_t b) { kernels().decode(c, a, int(b - a), out + a); });
}

void run_encode(const Coded& c, int64_t row, int64_t rows, const float* x) {
    const bool flat = c.format == Format::BnbNf4 || c.format == Format::BnbFp4;
    const generic::Tile tile = generic::tile_of(c);
    // Flat formats are one row of all elements.
    const int64_t unit = flat ? tile.cols : tile.rows, cols = flat ? 1 : c.cols;
    const int64_t first = flat ? row * c.cols : row, n = flat ? rows * c.cols : rows;
    const int64_t step = std::max<int64_t>(1, SPAN / (unit * cols)) * unit;
    parallel((n + step - 1) / step, [&](int64_t t) {
        const int64_t a = t * step, m = std::min(step, n - a);
        if (flat) return kernels().encode_tile(c, 0, 1, first + a, m, x + a, m);
        for (int64_t r = a; r < a + m; r += unit)
            kernels().encode_tile(c, first + r, int(std::min(unit, a + m - r)), 0, cols, x + r * cols, cols);
    });
}

}  // namespace fastmerge
