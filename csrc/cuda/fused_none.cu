#include "cuda/fused.cuh"

namespace fastmerge {
namespace cuda {

cudaError_t run_walks_none(const Batch::Launch& l, const Job* jobs, cudaStream_t stream) {
    return l.variant.narrow ? launch_walk_counted<8, Election::None>(l, jobs, stream)
                            : launch_walk_counted<4, Election::None>(l, jobs, stream);
}

}  // namespace cuda
}  // namespace fastmerge
