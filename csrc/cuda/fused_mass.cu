#include "cuda/fused.cuh"

namespace fastmerge {
namespace cuda {

cudaError_t run_walks_mass(const Batch::Launch& l, const Job* jobs, cudaStream_t stream) {
    return l.variant.narrow ? launch_walk_counted<8, Election::Mass>(l, jobs, stream)
                            : launch_walk_counted<4, Election::Mass>(l, jobs, stream);
}

}  // namespace cuda
}  // namespace fastmerge
