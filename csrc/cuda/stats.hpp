// Launchers of csrc/cuda/stats.cu. Memory and stream are the caller's; nothing allocates or waits. Sums
// follow the tree of docs/numerics.md: leaves first, then the tree over them.
#pragma once
#include "cuda/job.hpp"
#include "cuda/launch.cuh"

namespace fastmerge {
namespace cuda {

/// Leaves of a unit of n elements, or of n rows of a column.
constexpr int64_t leaves_of(int64_t n, int64_t leaf) {
    return (n + leaf - 1) / leaf;
}
constexpr int64_t TREE_GROUP = 2048;

/// Add |d| or d*d of a chunk, before and after the keep stages, to leaves [segments, K, 2] of the tensor of
/// `total` elements; carry [K, 2, 64] gets a segment that ends in a later chunk, which
/// is given it as `carried`: other memory, for blocks read the one while others write the other. The keep
/// stages must not select.
cudaError_t moment_leaves(const Job* job, bool square, const Operands& in, Kind kind, int64_t total,
                          double* leaves, const double* carried, double* carry, cudaStream_t stream);
/// Raise keys [K, 2] to the largest of |d|, likewise.
cudaError_t largest(const Job* job, const Operands& in, Kind kind, unsigned long long* keys,
                    cudaStream_t stream);
/// Inner products of deltas: leaves [units * segments, pairs], of a tensor (carry [pairs, 64]) or of rows; or
/// of columns, [blocks of 64 rows, pairs, cols] (carry [pairs, cols]).
cudaError_t gram_leaves(const Job* job, Axis axis, const Operands& in, Kind kind, int64_t total,
                        double* leaves, const double* carried, double* carry, cudaStream_t stream);
/// Combine leaves [n_leaves, width] of each of n_units as a binary counter into sums [n_units, width]. nodes:
/// room for [n_units * n_leaves / TREE_GROUP, width].
cudaError_t sum_tree(const double* leaves, int64_t n_units, int64_t n_leaves, int64_t width, double* nodes,
                     double* sums, cudaStream_t stream);
/// The least and the largest |d| of each unit of `unit` elements: [K, units] each.
cudaError_t extremes(const Job* job, const Operands& in, Kind kind, int64_t unit, double* low, double* high,
                     cudaStream_t stream);

}  // namespace cuda
}  // namespace fastmerge
