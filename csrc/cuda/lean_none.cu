#include "cuda/lean.cuh"

namespace fastmerge {
namespace cuda {

cudaError_t run_lean_none(const Batch::Launch& l, const Job* jobs, cudaStream_t stream) {
    return launch_lean<Election::None>(l, jobs, stream);
}

}  // namespace cuda
}  // namespace fastmerge
