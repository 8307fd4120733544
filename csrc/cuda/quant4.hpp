// Launchers of csrc/cuda/quant4.cu: walks over coded operands, and walks whose results are coded. Memory and
// stream are the caller's; nothing allocates or waits.
#pragma once
#include "cuda/batch.hpp"
#include "cuda/launch.cuh"

namespace fastmerge {
namespace cuda {

/// How a chunk's result is cut into tiles; scratch and residual are the caller's to add.
/// @throws std::invalid_argument where the format cannot be written, or the chunk cuts through a unit
CodedResult plan_result(const Coded& coded, const Operands& in);

cudaError_t run_walks_any(const Batch::Launch& l, const Job* jobs, cudaStream_t stream);
cudaError_t run_walks_coded(const Batch::Launch& l, const Job* jobs, cudaStream_t stream);

/// Raise found[1] to the largest magnitude of a job's result as `type`, as a key; set found[0] if an operand
/// or the result is not finite.
cudaError_t walk_peak(const Job* job, const Operands& in, bool f64, DType type, uint32_t* found,
                      cudaStream_t stream);

}  // namespace cuda
}  // namespace fastmerge
