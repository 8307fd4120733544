// Launchers of csrc/cuda/fused*.cu. Nothing allocates or waits; memory and stream are the caller's.
#pragma once
#include "cuda/batch.hpp"
#include "cuda/launch.cuh"

namespace fastmerge {
namespace cuda {

/// Run the walks of a batch whose image lies where it was filled for.
cudaError_t run_walks(const Batch& batch, cudaStream_t stream);
cudaError_t run_walks_none(const Batch::Launch& l, const Job* jobs, cudaStream_t stream);
cudaError_t run_walks_mass(const Batch::Launch& l, const Job* jobs, cudaStream_t stream);
cudaError_t run_lean_none(const Batch::Launch& l, const Job* jobs, cudaStream_t stream);
cudaError_t run_lean_mass(const Batch::Launch& l, const Job* jobs, cudaStream_t stream);
cudaError_t run_walks_other(const Batch::Launch& l, const Job* jobs, cudaStream_t stream);

/// Write what the keep stages leave of one job: mask, [K, n] uint8; or bits, [K, words] of 64.
cudaError_t keep_mask(const Job* job, int64_t n, Kind kind, uint8_t* mask, cudaStream_t stream);
cudaError_t keep_bits(const Job* job, int64_t n, Kind kind, uint64_t* bits, int64_t words,
                      cudaStream_t stream);
/// Write [K, n] keep probabilities of a ranked drop.
cudaError_t keep_probability(const Job* job, int64_t n, Kind kind, double* p, cudaStream_t stream);
/// Replace six words, a Philox counter and key, by the four words drawn (in the first four).
cudaError_t philox_words(uint32_t* words, cudaStream_t stream);
/// Add to *balance how many coordinates elect plus, less those that elect minus.
cudaError_t sign_balance(const Job* job, int64_t n, Kind kind, unsigned long long* balance,
                         cudaStream_t stream);

}  // namespace cuda
}  // namespace fastmerge
