// Whole coded tensors on all threads: what tests and small tensors go through; merges code tile by tile.
#pragma once
#include "core/four_bit/format.hpp"

namespace fastmerge {

/// Decode n elements of the run from its first.
void run_decode(const Coded& c, int64_t n, float* out);

/// Code rows [row, row + rows) from x [rows, cols]; `row` begins a tile, and a block of bitsandbytes.
void run_encode(const Coded& c, int64_t row, int64_t rows, const float* x);

}  // namespace fastmerge
