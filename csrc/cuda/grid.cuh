// How many blocks a launch gets: no more than fit at once, each of which takes one piece after another.
#pragma once
#include <algorithm>

#include "cuda/launch.cuh"

namespace fastmerge {
namespace cuda {

template <class... P>
unsigned resident_blocks(void (*kernel)(P...), int64_t wanted, size_t shared_bytes, int threads = 256) {
    int device = 0, processors = 1, each = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes);
    const int64_t most = int64_t(processors) * std::max(each, 1);
    const int64_t rounds = (wanted + most - 1) / most;  // as many for every block, or the last is one of few
    return unsigned(rounds > 0 ? (wanted + rounds - 1) / rounds : 1);
}

/// The instance of a kernel of operands, name<Real, Load>, for a Kind.
#define FM_KERNEL(name, kind)                                                   \
    ((kind).coded ? ((kind).f64 ? name<double, AnyLoad> : name<float, AnyLoad>) \
                  : ((kind).f64 ? name<double, DenseLoad> : name<float, DenseLoad>))

inline int64_t divide_up(int64_t n, int64_t by) {
    return (n + by - 1) / by;
}

}  // namespace cuda
}  // namespace fastmerge
