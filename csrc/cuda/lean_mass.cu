#include "cuda/lean.cuh"

namespace fastmerge {
namespace cuda {

cudaError_t run_lean_mass(const Batch::Launch& l, const Job* jobs, cudaStream_t stream) {
    return launch_lean<Election::Mass>(l, jobs, stream);
}

}  // namespace cuda
}  // namespace fastmerge
