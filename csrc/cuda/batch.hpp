// Many tensors' jobs as one image for device memory, and the launches that serve them.
#pragma once
#include <cstddef>
#include <vector>

#include "cuda/job.hpp"

namespace fastmerge {

class Batch {
  public:
    /// Take a job: what its plan and operands point to is read by `fill`, but operands, given masks, ranks,
    /// out and bad, which are device addresses. What says how an operand or result is coded is read, too.
    void add(const Job& job, bool f64);
    /// Bytes of the image.
    size_t size() const;
    /// Write the image that is to lie at the device address `device`.
    void fill(void* host, uintptr_t device);

    struct Launch {
        Variant variant;
        const Piece* pieces;  // device
        int n_pieces;
        int most_experts;
    };
    /// Known after `fill`.
    const std::vector<Launch>& launches() const { return launches_; }
    const Job* jobs() const { return device_jobs_; }
    const Job& job(size_t j) const { return jobs_[j]; }
    size_t n_jobs() const { return jobs_.size(); }

  private:
    struct Group {
        Variant variant;
        int most_experts = 0;
        std::vector<Piece> pieces;
    };
    std::vector<Piece>& pieces_of(const Variant& variant, int n_experts);
    void cut(const Variant& variant, int n_experts, int64_t begin, int64_t end, int job);
    void cut_walk(const Job& job, bool f64);
    void cut_tiles(const Job& job);

    std::vector<Job> jobs_;
    std::vector<Group> groups_;  // what codes results comes last: it reads what others merge
    std::vector<Launch> launches_;
    const Job* device_jobs_ = nullptr;
};

}  // namespace fastmerge
