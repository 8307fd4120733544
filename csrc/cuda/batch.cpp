#include "cuda/batch.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace fastmerge {
namespace {

/// Elements of a piece of a walk: small enough that a tensor of some million keeps every block busy.
constexpr int64_t WALK_PIECE = 1 << 14;

/// Arrays one behind another; written when there is memory to write to, else only measured.
class Image {
  public:
    Image(void* host, uintptr_t device) : host_(static_cast<char*>(host)), device_(device) {}

    template <class T>
    const T* put(const T* from, size_t n) {
        if (!from) return nullptr;
        used_ = (used_ + 15) / 16 * 16;
        if (host_) std::memcpy(host_ + used_, from, n * sizeof(T));
        const T* at = reinterpret_cast<const T*>(device_ + used_);
        used_ += n * sizeof(T);
        return at;
    }
    size_t used() const { return used_; }

  private:
    char* host_;
    uintptr_t device_;
    size_t used_ = 0;
};

Cut placed(const Cut& cut, size_t n_experts, Image& image) {
    Cut at = cut;
    at.value = image.put(cut.value, n_experts * size_t(cut.units));
    at.last_tie = image.put(cut.last_tie, n_experts * size_t(cut.units));
    return at;
}

/// The operand, or how it is coded in the image.
const void* placed(const void* operand, DType type, Image& image) {
    return type == DType::Coded ? image.put(static_cast<const Coded*>(operand), 1) : operand;
}

/// The job with its arrays in the image.
Job placed(const Job& job, Image& image) {
    Job at = job;
    const size_t k = size_t(job.in.n_experts);
    std::vector<const void*> experts(k);
    for (size_t e = 0; e < k; ++e) experts[e] = placed(job.in.expert[e], job.in.expert_type[e], image);
    if (job.in.base) at.in.base = placed(job.in.base, job.in.base_type, image);
    if (job.out_type == DType::Coded)
        at.out = const_cast<CodedResult*>(image.put(static_cast<const CodedResult*>(job.out), 1));
    at.in.expert = image.put(experts.data(), k);
    at.in.expert_type = image.put(job.in.expert_type, k);
    const Keep& keep = job.plan.keep;
    Keep& kept = at.plan.keep;
    kept.trim = placed(keep.trim, k, image), kept.remove = placed(keep.remove, k, image);
    kept.select = placed(keep.select, 1, image);
    kept.p_low = image.put(keep.p_low, k), kept.p_high = image.put(keep.p_high, k);
    kept.key = image.put(keep.key, k);
    kept.given = image.put(keep.given, k);
    at.plan.coefficient = image.put(job.plan.coefficient, k * size_t(job.plan.units));
    at.plan.vote_scale = image.put(job.plan.vote_scale, k);
    at.plan.divisor_weight = image.put(job.plan.divisor_weight, k);
    return at;
}

bool is_narrow(DType t) {
    return t == DType::F16 || t == DType::BF16;
}

bool is_aligned(const void* p, DType t, int64_t first, int width) {
    // A vector load takes `width` elements, at most 16 bytes at once.
    const int64_t bytes = std::min<int64_t>(16, int64_t(width) * itemsize(t));
    return (reinterpret_cast<uintptr_t>(p) + uintptr_t(first * itemsize(t))) % uintptr_t(bytes) == 0;
}

bool is_by_tensor(const Cut& cut) {
    return !cut.value || cut.axis == Axis::Tensor;
}

/// What keeps an element, if a kernel of bfloat16 alone can take the job.
Stage stage_of(const Job& job, Election election) {
    const WalkPlan& plan = job.plan;
    const Operands& in = job.in;
    const Keep& keep = plan.keep;
    bool fits = in.n_experts <= MOST_EXACT && election != Election::Other && job.out_type == DType::BF16;
    fits &= !keep.select.value && !job.ranks.kept && is_by_tensor(keep.trim) && is_by_tensor(keep.remove);
    fits &= !in.base || in.base_type == DType::BF16;
    for (int e = 0; e < in.n_experts; ++e)  // finite values stay so, or become infinite
        fits &= in.expert_type[e] == DType::BF16 && std::isfinite(float(plan.coefficient[e * plan.units]));
    const bool cuts = keep.trim.value || keep.remove.value, draws = keep.drop == DropKind::Uniform;
    if (!fits || (cuts && draws)) return Stage::Any;
    return cuts ? Stage::Cut : draws ? Stage::Draw : Stage::All;
}

/// The kernel that can take whole runs of the job.
Variant variant_of(const Job& job, bool f64) {
    Variant v;
    v.f64 = f64;
    const WalkPlan& plan = job.plan;
    const Operands& in = job.in;
    const Keep& keep = plan.keep;
    const int k = in.n_experts;
    bool plain = !f64 && k >= 1 && plan.axis == Axis::Tensor && !keep.given && job.out_type != DType::F64;
    plain &= keep.drop != DropKind::Ranked;
    bool narrow = !in.base || is_narrow(in.base_type);
    for (int e = 0; e < k; ++e) {
        narrow &= is_narrow(in.expert_type[e]);
        if (keep.drop == DropKind::Uniform && keep.p_low[e] > 0 && keep.p_low[e] < 1)
            plain &= keep.p_low[e] >= 0.005 && keep.p_low[e] <= 0.995;  // 16-bit draws
    }
    if (plan.vote == Vote::None) plain &= !plan.take_max;
    if (!plain) return v;
    v.narrow = narrow;
    constexpr int counts[] = {1, 2, 3, 4, 5, 6, 7, 8, 12, 16};
    v.unrolled = 0;
    if (k <= MOST_UNROLLED) v.unrolled = *std::lower_bound(counts, counts + 10, k);
    v.election = plan.vote == Vote::None                     ? Election::None
                 : plan.vote == Vote::Mass && !plan.take_max ? Election::Mass
                                                             : Election::Other;
    // Only some kernels of experts in registers look at the variance.
    if (keep.select.value && v.election != Election::Other) v.unrolled = 0;
    v.stage = stage_of(job, v.election);
    return v;
}

/// Add to `found` where, in [first, end), ties of a cut end: equal keys before it are above, behind it not.
void find_ends(const Cut& cut, int n_experts, int64_t first, int64_t end, std::vector<int64_t>& found) {
    if (!cut.value) return;
    for (int k = 0; k < n_experts; ++k) {
        const int64_t behind = cut.last_tie[k * cut.units] + 1;
        if (cut.value[k * cut.units] >= 0 && behind > first && behind < end) found.push_back(behind);
    }
}

/// Elements to leave out at the beginning so that runs of `width` are aligned everywhere; -1 if there is
/// none.
int64_t head_of(const Job& job, int width) {
    const Operands& in = job.in;
    const auto by_row = [&](const Cut& cut) { return cut.value && cut.axis == Axis::Row; };
    if ((by_row(job.plan.keep.trim) || by_row(job.plan.keep.remove)) && in.cols % width) return -1;
    const int64_t head = (width - in.start % width) % width;
    if (job.ranks.kept && head) return -1;
    bool fits = is_aligned(job.out, job.out_type, head, width);
    if (in.base) fits &= is_aligned(in.base, in.base_type, head, width);
    for (int k = 0; k < in.n_experts; ++k) fits &= is_aligned(in.expert[k], in.expert_type[k], head, width);
    return fits ? head : -1;
}

}  // namespace

std::vector<Piece>& Batch::pieces_of(const Variant& variant, int n_experts) {
    for (Group& g : groups_)
        if (g.variant == variant) {
            g.most_experts = std::max(g.most_experts, n_experts);
            return g.pieces;
        }
    const auto last = std::find_if(groups_.begin(), groups_.end(),
                                   [](const Group& g) { return g.variant.shared_bytes > 0; });
    return groups_.insert(variant.shared_bytes > 0 ? groups_.end() : last, {variant, n_experts, {}})->pieces;
}

void Batch::cut(const Variant& variant, int n_experts, int64_t begin, int64_t end, int job) {
    const Operands& in = jobs_[size_t(job)].in;
    const Keep& keep = jobs_[size_t(job)].plan.keep;
    const auto pieces = [&](const Variant& v, int64_t a, int64_t b) {
        for (; a < b; a += WALK_PIECE)
            pieces_of(v, n_experts).push_back({a, std::min(a + WALK_PIECE, b), job});
    };
    if (variant.unrolled <= 0) return pieces(variant, begin, end);
    if (!is_by_tensor(keep.trim) || !is_by_tensor(keep.remove) || !is_by_tensor(keep.select)) {
        Variant by_run = variant;  // cuts may differ from run to run
        by_run.unrolled = 0, by_run.stage = Stage::Any;
        return pieces(by_run, begin, end);
    }
    // Each piece has one bound of each cut: a run in which ties end is one of its own.
    std::vector<int64_t> ends;
    find_ends(keep.trim, n_experts, in.start + begin, in.start + end, ends);
    find_ends(keep.remove, n_experts, in.start + begin, in.start + end, ends);
    find_ends(keep.select, 1, in.start + begin, in.start + end, ends);
    std::sort(ends.begin(), ends.end());
    const int64_t width = variant.narrow ? 8 : 4;
    int64_t done = begin;
    for (const int64_t place : ends) {
        const int64_t at = place - in.start, run = begin + (at - begin) / width * width;
        if (run < done) continue;  // the same run again
        pieces(variant, done, run);
        done = run;
        if (run < at) pieces(Variant(), run, run + width), done = run + width;
    }
    pieces(variant, done, end);
}

void Batch::cut_tiles(const Job& job) {
    const CodedResult& result = *static_cast<const CodedResult*>(job.out);
    const int j = int(jobs_.size());
    jobs_.emplace_back();
    Job& coding = jobs_.back();
    coding.in.start = job.in.start, coding.in.n = job.in.n;
    coding.out = job.out, coding.out_type = job.out_type, coding.bad = job.bad;
    Variant v;
    v.shared_bytes = result.shared_bytes, v.most_blocks = result.most_blocks;
    v.format = result.coded.format;
    const int64_t together = std::max<int64_t>(1, PIECE_ELEMENTS / 2 / result.tile());
    for (int64_t a = 0; a < result.tiles; a += together)
        pieces_of(v, 0).push_back({a, std::min(a + together, result.tiles), j});
}

void Batch::add(const Job& job, bool f64) {
    if (job.out_type != DType::Coded || job.in.n == 0) return cut_walk(job, f64);
    const CodedResult& result = *static_cast<const CodedResult*>(job.out);
    Job walk = job;
    walk.out = result.values, walk.out_type = result.type;
    cut_walk(walk, f64);
    cut_tiles(job);
}

void Batch::cut_walk(const Job& job, bool f64) {
    const int j = int(jobs_.size()), k = job.in.n_experts;
    jobs_.push_back(job);
    if (!job.out || job.in.n == 0) return;
    if (has_coded(job.in)) {
        Variant any;
        any.f64 = f64, any.coded = true;
        return cut(any, k, 0, job.in.n, j);
    }
    const Variant fast = variant_of(job, f64);
    Variant rest;
    rest.f64 = f64;
    const int width = fast.narrow ? 8 : 4;
    const int64_t head = fast.unrolled >= 0 ? head_of(job, width) : -1;
    if (head < 0 || head >= job.in.n) return cut(rest, k, 0, job.in.n, j);
    const int64_t tail = head + (job.in.n - head) / width * width;
    if (head > 0) cut(rest, k, 0, head, j);
    if (head < tail) cut(fast, k, head, tail, j);
    if (tail < job.in.n) cut(rest, k, tail, job.in.n, j);
}

size_t Batch::size() const {
    Image image(nullptr, 0);
    for (const Job& job : jobs_) placed(job, image);
    image.put(jobs_.data(), jobs_.size());
    for (const Group& g : groups_) image.put(g.pieces.data(), g.pieces.size());
    return image.used();
}

void Batch::fill(void* host, uintptr_t device) {
    Image image(host, device);
    std::vector<Job> at;
    for (const Job& job : jobs_) at.push_back(placed(job, image));
    device_jobs_ = image.put(at.data(), at.size());
    launches_.clear();
    for (const Group& g : groups_)
        launches_.push_back(
            {g.variant, image.put(g.pieces.data(), g.pieces.size()), int(g.pieces.size()), g.most_experts});
}

}  // namespace fastmerge
