// Statistics over a tensor or model, fed chunk by chunk in ascending order of index. How a unit is cut into
// chunks, and how many threads work, never shows in a result: sums follow the tree of docs/numerics.md.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "core/four_bit/format.hpp"
#include "core/plan.hpp"
#include "cpu/kernels.hpp"

namespace fastmerge {

/// Sums combined as a binary counter: the tree depends on how many leaves there are, not on who adds them.
class CounterTree {
  public:
    explicit CounterTree(size_t width) : width_(width) {}
    void push(const double* leaf);
    std::vector<double> total() const;

  private:
    size_t width_;
    std::vector<std::vector<double>> levels_;
    std::vector<bool> full_;
};

/// What a drop leaves of one whole tensor, a bit each: decided for a statistic, read by the walk.
class Decided {
  public:
    Decided(int n_experts, int64_t n) : words_((n + 63) / 64), bits_(size_t(n_experts) * size_t(words_)) {}
    uint64_t* at(int64_t start) { return bits_.data() + start / 64; }
    int64_t stride() const { return words_; }
    int64_t n_known = 0;  // elements; the tensor's are decided in order

  private:
    int64_t words_;
    std::vector<uint64_t> bits_;
};

/// What a ranked drop leaves of one chunk, or the ranks or extremes it goes by; empty for other plans.
class RankData {
  public:
    enum Need { Kept, Rank, AllRanks };
    /// need: what the drop leaves is enough; or the ranks; or those of experts that keep everything, too.
    /// known: of the tensor, read where it goes as far, else continued.
    RankData(const Keep& keep, const Operands& in, bool f64, Need need, Decided* known = nullptr);
    Ranks view;

  private:
    void draw(const Keep& keep, const Operands& in, uint64_t* kept);
    void decide_rows(const Keep& keep, const Operands& in, uint64_t* kept);
    std::vector<uint64_t> kept_;
    std::vector<uint32_t> rank_;
    std::vector<double> low_, high_;
};

void run_walk(const WalkPlan& plan, const Operands& in, bool f64, Decided* known, void* out, DType out_type,
              bool* bad);
/// As run_walk, coded as `out` describes: the chunk is a whole number of the format's rows. residual: the
/// sums of squared errors and of squares.
void run_walk_coded(const WalkPlan& plan, const Operands& in, bool f64, Decided* known, const Coded& out,
                    bool* bad, double* residual);
/// The largest magnitude of what run_walk would write as `type`.
float run_walk_peak(const WalkPlan& plan, const Operands& in, bool f64, Decided* known, DType type,
                    bool* bad);
void run_keep_mask(const Keep& keep, const Operands& in, bool f64, uint8_t* out);
/// p: [K, n], the exact keep probabilities of a ranked drop.
void run_keep_probability(const Keep& keep, const Operands& in, bool f64, double* p);

struct OrderRequest {
    int n_keys = 1;  // experts, or 1 for the variance
    bool variance = false;
    std::vector<std::vector<int64_t>> ranks;  // [n_keys][R]
    double fraction = -1;                     // of the nonzero elements, instead of ranks, when >= 0
    bool all_ties = false;
    bool by_row = false;
    int64_t n = 0, cols = 1;
    bool f64 = false;
};

class OrderSweep {
  public:
    explicit OrderSweep(OrderRequest request);
    void feed(const Operands& in, int64_t offset);
    bool next_pass();
    /// value and last_tie, [R][n_keys * units] each.
    void result(std::vector<std::vector<double>>& value, std::vector<std::vector<int64_t>>& last_tie) const;
    int64_t units() const { return units_; }
    int n_keys() const { return request_.n_keys; }

  private:
    struct Target {
        int64_t rank = 0;  // still to find among keys with `prefix`
        uint64_t prefix = 0;
        bool open = true;    // false: nothing left to look for
        bool found = false;  // the value is known (`prefix`), of its ties number `rank` is still to be found
        int64_t from = 0, to = 0;  // flat indices between which that tie lies, where known
        double value = 0;
        int64_t last_tie = -1;
    };
    Target& target(int k, int r, int64_t unit) {
        return targets_[(size_t(r) * request_.n_keys + k) * units_ + unit];
    }
    const std::vector<int64_t>& ranks(int k) const { return request_.ranks[k]; }
    void settle(Target& t, int64_t rank, int64_t n) const;
    bool counted(const Target& t) const { return t.open && !t.found; }
    void select(const uint64_t* keys, int64_t n, int64_t first, Target& t) const;
    double from_key(uint64_t key) const;
    uint64_t largest_key() const;
    void feed_sample(const Operands& in, int64_t first);
    void set_brackets();
    void feed_bracket(const Operands& in, int64_t first);
    void settle_fraction(int k, int64_t nonzero);
    bool settle_bracket(int k, int r);
    uint64_t nth_candidate(size_t j, int64_t& r) const;
    void feed_histogram(const Operands& in);
    bool next_digit();
    bool finish_brackets();
    void feed_ties(const Operands& in, int64_t offset);

    OrderRequest request_;
    int n_ranks_ = 1;
    int64_t units_ = 1;
    enum class Mode { Rows, Collect, Sample, Bracket, Digits, Ties, Done } mode_;
    std::vector<Target> targets_;
    std::vector<std::vector<uint64_t>> collected_;  // [n_keys][n], or of the sample

    /// What a span of elements holds of every bracket: counts, and the keys inside, in order.
    struct Span {
        int64_t first = 0;             // flat index
        std::vector<Bracketed> found;  // [n_keys][R]; they point into:
        std::unique_ptr<uint64_t[]> key;
        std::unique_ptr<uint16_t[]> position;
    };
    struct Total {
        int64_t above = 0, n = 0, held = 0;
    };
    int64_t n_runs_ = 0, next_sample_ = 0;
    std::vector<Bracket> brackets_;  // [n_keys][R]
    std::vector<Total> totals_;      // [n_keys][R], over all spans
    std::vector<Span> spans_;
    std::vector<int> widths_;
    size_t digit_ = 0;
    bool counting_ = false;
    std::vector<std::vector<uint64_t>> bins_;     // [R * n_keys][2^width]
    std::vector<std::vector<uint64_t>> scratch_;  // [tasks][2^width]
    std::vector<int64_t> nonzero_;
};

class MomentSweep {
  public:
    MomentSweep(Moment of, int n_experts, bool f64);
    void feed(const Keep& keep, const Operands& in, Decided* known);
    /// [K, 2]: of all elements, of those kept.
    std::vector<double> result();

  private:
    size_t width() const { return size_t(n_experts_) * 2; }
    std::vector<double> fold(const double* lanes) const;
    void push(const double* values);
    Moment of_;
    int n_experts_;
    bool f64_;
    int64_t position_ = 0;
    std::vector<double> lanes_, maxima_;
    CounterTree tree_;
};

class GramSweep {
  public:
    GramSweep(int n_experts, Axis axis, int64_t n, int64_t cols, bool f64);
    void feed(const Operands& in);
    /// [pairs, units]
    std::vector<double> result();
    int64_t units() const { return units_; }
    size_t pairs() const { return size_t(n_experts_) * (n_experts_ + 1) / 2; }

  private:
    int n_experts_;
    Axis axis_;
    int64_t cols_, units_;
    bool f64_;
    int64_t position_ = 0;
    std::vector<double> lanes_, rows_;
    CounterTree tree_;
};

int64_t run_sign_balance(const WalkPlan& plan, const Operands& in, bool f64);

}  // namespace fastmerge
