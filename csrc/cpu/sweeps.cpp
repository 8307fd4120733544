#include "cpu/sweeps.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/pool.hpp"

namespace fastmerge {
namespace {

constexpr int64_t SPAN =
    32768;  // elements of one task: long enough to hide a hand-over, short enough to balance
constexpr int64_t COLLECT_BELOW = int64_t(1) << 17;  // up to here keys are kept and selected directly
constexpr int64_t END = std::numeric_limits<int64_t>::max();

template <class F>
void parallel(int64_t n_tasks, F f) {
    run_tasks(n_tasks, [](void* c, int64_t t) { (*static_cast<F*>(c))(t); }, &f);
}

/// f(a, b) over [0, n) in spans.
template <class F>
void parallel_spans(int64_t n, F f) {
    parallel((n + SPAN - 1) / SPAN, [&](int64_t t) { f(t * SPAN, std::min(n, (t + 1) * SPAN)); });
}

/// Fold 64 lanes by halving: 32, 16, 8, 4, 2, 1.
double fold_lanes(const double* lanes) {
    double x[BLOCK];
    std::memcpy(x, lanes, sizeof x);
    for (int half = BLOCK / 2; half >= 1; half /= 2)
        for (int j = 0; j < half; ++j) x[j] = x[j] + x[j + half];
    return x[0];
}

}  // namespace

void CounterTree::push(const double* leaf) {
    std::vector<double> carry(leaf, leaf + width_);
    size_t level = 0;
    for (; level < levels_.size() && full_[level]; ++level) {
        for (size_t j = 0; j < width_; ++j) carry[j] = levels_[level][j] + carry[j];
        full_[level] = false;
    }
    if (level == levels_.size()) levels_.emplace_back(), full_.push_back(false);
    levels_[level].swap(carry);
    full_[level] = true;
}

std::vector<double> CounterTree::total() const {
    std::vector<double> acc(width_, 0.0);
    bool any = false;
    for (size_t level = 0; level < levels_.size(); ++level) {
        if (!full_[level]) continue;
        for (size_t j = 0; j < width_; ++j) acc[j] = any ? levels_[level][j] + acc[j] : levels_[level][j];
        any = true;
    }
    return acc;
}

RankData::RankData(const Keep& keep, const Operands& in, bool f64, bool undrawn) {
    if (keep.drop != DropKind::Ranked || in.n == 0) return;
    const int64_t unit = keep.drop_axis == Axis::Row ? in.cols : in.n;
    const int64_t units = in.n / unit, tasks = units * in.n_experts;
    view.unit = unit;
    if (keep.by_value) {
        low_.resize(tasks), high_.resize(tasks);
        parallel(tasks, [&](int64_t t) {
            const int k = int(t / units);
            const int64_t u = t % units;
            uint64_t lo = ~uint64_t(0), hi = 0, keys[1024];
            for (int64_t a = u * unit; a < (u + 1) * unit; a += 1024) {
                const int64_t b = std::min(a + 1024, (u + 1) * unit);
                kernels().keys(in, k, f64, a, b, keys);
                for (int64_t j = 0; j < b - a; ++j) lo = std::min(lo, keys[j]), hi = std::max(hi, keys[j]);
            }
            const auto value = [&](uint64_t key) {
                return f64 ? generic::bit_cast<double>(key) : double(generic::bit_cast<float>(uint32_t(key)));
            };
            low_[t] = value(lo), high_[t] = value(hi);
        });
        view.low = low_.data(), view.high = high_.data();
        return;
    }
    rank_.resize(size_t(in.n_experts) * in.n);
    parallel(tasks, [&](int64_t t) {
        const int k = int(t / units);
        const int64_t a = (t % units) * unit;
        const bool drawn = keep.p_low[k] < 1.0 && keep.p_high[k] > 0.0;
        if (!drawn && !undrawn) return;  // no draw, no rank
        kernels().rank_unit(in, k, f64, a, unit, rank_.data() + size_t(k) * in.n + a);
    });
    view.rank = rank_.data();
}

void run_walk(const WalkPlan& plan, const Operands& in, bool f64, void* out, DType out_type, bool* bad) {
    const RankData ranks(plan.keep, in, f64);
    std::atomic<bool> seen{false};
    parallel_spans(in.n, [&](int64_t a, int64_t b) {
        if (kernels().walk(plan, in, ranks.view, f64, a, b, out, out_type)) seen = true;
    });
    *bad = seen;
}

void run_keep_mask(const Keep& keep, const Operands& in, bool f64, uint8_t* out) {
    const RankData ranks(keep, in, f64);
    parallel_spans(in.n,
                   [&](int64_t a, int64_t b) { kernels().keep_mask(keep, in, ranks.view, f64, a, b, out); });
}

void run_keep_probability(const Keep& keep, const Operands& in, bool f64, double* p) {
    const RankData ranks(keep, in, f64, true);
    const int64_t units = in.n / ranks.view.unit;
    std::vector<uint64_t> keys(in.n);
    for (int k = 0; k < in.n_experts; ++k) {
        kernels().keys(in, k, f64, 0, in.n, keys.data());
        for (int64_t i = 0; i < in.n; ++i) {
            double q = 0.5;
            if (keep.by_value) {
                const int64_t u = i / ranks.view.unit;
                const double lo = ranks.view.low[k * units + u], width = ranks.view.high[k * units + u] - lo;
                const double d = f64 ? generic::bit_cast<double>(keys[i])
                                     : double(generic::bit_cast<float>(uint32_t(keys[i])));
                q = (d - lo) / (width + 1e-7);
            } else if (ranks.view.unit > 1) {
                q = double(ranks.view.rank[size_t(k) * in.n + i]) / double(ranks.view.unit - 1);
            }
            const double rise = (keep.p_high[k] - keep.p_low[k]) * q;
            p[size_t(k) * in.n + i] = keep.p_low[k] + rise;
        }
    }
}

int64_t run_sign_balance(const WalkPlan& plan, const Operands& in, bool f64) {
    const RankData ranks(plan.keep, in, f64);
    std::atomic<int64_t> balance{0};
    parallel_spans(in.n, [&](int64_t a, int64_t b) {
        balance += kernels().sign_balance(plan, in, ranks.view, f64, a, b);
    });
    return balance;
}

// ---- order statistics ------------------------------------------------------------------------------

OrderSweep::OrderSweep(OrderRequest request) : request_(std::move(request)) {
    const OrderRequest& q = request_;
    n_ranks_ = q.fraction >= 0 ? 1 : int(q.ranks.empty() ? 1 : q.ranks[0].size());
    units_ = q.by_row && q.cols > 0 ? q.n / q.cols : 1;
    targets_.resize(size_t(n_ranks_) * q.n_keys * units_);
    nonzero_.assign(q.n_keys, 0);
    widths_ = q.f64 ? std::vector<int>{16, 16, 16, 15} : std::vector<int>{16, 15};
    mode_ = q.by_row ? Mode::Rows : q.n <= COLLECT_BELOW ? Mode::Collect : Mode::Digits;
    if (mode_ == Mode::Collect) collected_.assign(q.n_keys, std::vector<uint64_t>(q.n));
    if (mode_ == Mode::Digits) {
        bins_.assign(size_t(n_ranks_) * q.n_keys, std::vector<uint64_t>(size_t(1) << widths_[0]));
        if (q.fraction < 0)
            for (int k = 0; k < q.n_keys; ++k)
                for (int r = 0; r < n_ranks_; ++r) settle(target(k, r, 0), ranks(k)[r], q.n);
    }
}

double OrderSweep::from_key(uint64_t key) const {
    return request_.f64 ? generic::bit_cast<double>(key) : double(generic::bit_cast<float>(uint32_t(key)));
}

void OrderSweep::settle(Target& t, int64_t rank, int64_t n) const {
    t.rank = rank;
    t.open = rank > 0 && rank < n;
    if (rank <= 0)
        t.value = std::numeric_limits<double>::infinity(), t.last_tie = -1;
    else if (rank >= n)
        t.value = -1, t.last_tie = END;
}

void OrderSweep::select(const uint64_t* keys, int64_t n, int64_t first, Target& t) const {
    if (!t.open) return;
    std::vector<uint64_t> order(keys, keys + n);
    std::nth_element(order.begin(), order.begin() + (t.rank - 1), order.end(), std::greater<uint64_t>());
    const uint64_t cut = order[t.rank - 1];
    int64_t quota = t.rank;
    for (int64_t i = 0; i < n; ++i) quota -= keys[i] > cut;
    t.value = from_key(cut), t.last_tie = END;
    if (request_.all_ties) return;
    for (int64_t i = 0; i < n; ++i)
        if (keys[i] == cut && --quota == 0) {
            t.last_tie = first + i;
            return;
        }
}

void OrderSweep::feed(const Operands& in, int64_t offset) {
    const OrderRequest& q = request_;
    if (mode_ == Mode::Rows) {
        const int64_t first_row = in.start / q.cols, rows = in.n / q.cols;
        parallel(rows * q.n_keys, [&](int64_t t) {
            const int k = int(t / rows);
            const int64_t a = (t % rows) * q.cols;
            std::vector<uint64_t> keys(q.cols);
            kernels().keys(in, q.variance ? -1 : k, q.f64, a, a + q.cols, keys.data());
            for (int r = 0; r < n_ranks_; ++r) {
                Target& x = target(k, r, first_row + t % rows);
                settle(x, ranks(k)[r], q.cols);
                select(keys.data(), q.cols, in.start + a, x);
            }
        });
    } else if (mode_ == Mode::Collect) {
        for (int k = 0; k < q.n_keys; ++k)
            parallel_spans(in.n, [&](int64_t a, int64_t b) {
                kernels().keys(in, q.variance ? -1 : k, q.f64, a, b,
                               collected_[k].data() + offset + in.start + a);
            });
    } else if (mode_ == Mode::Digits) {
        feed_histogram(in);
    } else if (mode_ == Mode::Ties) {
        feed_ties(in, offset);
    }
}

void OrderSweep::feed_histogram(const Operands& in) {
    const OrderRequest& q = request_;
    int shift = 0;
    for (size_t d = digit_ + 1; d < widths_.size(); ++d) shift += widths_[d];
    const int width = widths_[digit_];
    const size_t n_bins = size_t(1) << width;
    const int64_t tasks = std::min<int64_t>(thread_count(), (in.n + SPAN - 1) / SPAN);
    scratch_.resize(tasks);
    for (int k = 0; k < q.n_keys; ++k) {
        for (int r = 0; r < n_ranks_; ++r) {
            const Target& t = target(k, r, 0);
            std::vector<uint64_t>& bins = bins_[size_t(r) * q.n_keys + k];
            if (!t.open && q.fraction < 0) continue;
            if (digit_ == 0 && r > 0 && target(k, 0, 0).open) {
                continue;  // the first digit has no prefix: next_pass copies the first rank's bins
            }
            parallel(tasks, [&](int64_t task) {
                scratch_[task].assign(n_bins, 0);
                kernels().histogram(in, q.variance ? -1 : k, q.f64, in.n * task / tasks,
                                    in.n * (task + 1) / tasks, shift, width, t.prefix, scratch_[task].data());
            });
            for (const auto& part : scratch_)
                for (size_t j = 0; j < n_bins; ++j) bins[j] += part[j];
        }
        if (digit_ == 0 && q.fraction >= 0) {
            std::atomic<int64_t> zeros{0};
            parallel_spans(in.n, [&](int64_t a, int64_t b) {
                zeros += kernels().count_equal(in, q.variance ? -1 : k, q.f64, a, b, 0);
            });
            nonzero_[k] += in.n - zeros;
        }
    }
}

void OrderSweep::feed_ties(const Operands& in, int64_t offset) {
    const OrderRequest& q = request_;
    const int64_t spans = (in.n + SPAN - 1) / SPAN;
    std::vector<int64_t> counts(spans);
    for (int k = 0; k < q.n_keys; ++k)
        for (int r = 0; r < n_ranks_; ++r) {
            Target& t = target(k, r, 0);
            if (!t.open || t.rank <= 0) continue;
            const int key = q.variance ? -1 : k;
            parallel_spans(in.n, [&](int64_t a, int64_t b) {
                counts[a / SPAN] = kernels().count_equal(in, key, q.f64, a, b, t.prefix);
            });
            for (int64_t s = 0; s < spans; ++s) {
                if (t.rank > counts[s]) {
                    t.rank -= counts[s];
                    continue;
                }
                const int64_t a = s * SPAN, b = std::min(in.n, a + SPAN);
                t.last_tie = offset + in.start + kernels().find_equal(in, key, q.f64, a, b, t.prefix, t.rank);
                t.rank = 0;
                break;
            }
        }
}

bool OrderSweep::next_pass() {
    const OrderRequest& q = request_;
    const auto settle_fraction = [&](int k, int64_t nonzero) {
        Target& t = target(k, 0, 0);
        const int64_t rank = int64_t(q.fraction * double(nonzero));
        settle(t, rank, q.n);
        if (rank >= nonzero && nonzero > 0) t.open = false, t.value = 0, t.last_tie = -1;
    };
    if (mode_ == Mode::Collect) {
        for (int k = 0; k < q.n_keys; ++k) {
            const std::vector<uint64_t>& keys = collected_[k];
            if (q.fraction >= 0) settle_fraction(k, q.n - std::count(keys.begin(), keys.end(), uint64_t(0)));
            for (int r = 0; r < n_ranks_; ++r) {
                if (q.fraction < 0) settle(target(k, r, 0), ranks(k)[r], q.n);
                select(keys.data(), q.n, 0, target(k, r, 0));
            }
        }
        mode_ = Mode::Done;
    } else if (mode_ == Mode::Digits) {
        for (int k = 0; k < q.n_keys; ++k) {
            if (digit_ == 0 && q.fraction >= 0) settle_fraction(k, nonzero_[k]);
            for (int r = 0; r < n_ranks_; ++r) {
                Target& t = target(k, r, 0);
                if (!t.open) continue;
                const bool shared = digit_ == 0 && target(k, 0, 0).open;
                const auto& bins = bins_[size_t(shared ? 0 : r) * q.n_keys + k];
                size_t bin = bins.size();
                int64_t above = 0;
                while (above + int64_t(bins[--bin]) < t.rank) above += int64_t(bins[bin]);
                t.rank -= above;
                t.prefix = (t.prefix << widths_[digit_]) | bin;
            }
        }
        if (++digit_ < widths_.size()) {
            for (auto& b : bins_) b.assign(size_t(1) << widths_[digit_], 0);
        } else {
            bool ties = false;
            for (Target& t : targets_)
                if (t.open) t.value = from_key(t.prefix), t.last_tie = END, ties = true;
            mode_ = ties && !q.all_ties ? Mode::Ties : Mode::Done;
            bins_.clear(), scratch_.clear();
        }
        bool open = false;
        for (const Target& t : targets_) open |= t.open;
        if (!open) mode_ = Mode::Done;
    } else {
        mode_ = Mode::Done;
    }
    return mode_ != Mode::Done;
}

void OrderSweep::result(std::vector<std::vector<double>>& value,
                        std::vector<std::vector<int64_t>>& last_tie) const {
    const size_t per_rank = size_t(request_.n_keys) * units_;
    value.assign(n_ranks_, {}), last_tie.assign(n_ranks_, {});
    for (size_t j = 0; j < targets_.size(); ++j) {
        value[j / per_rank].push_back(targets_[j].value);
        last_tie[j / per_rank].push_back(targets_[j].last_tie);
    }
}

// ---- sums --------------------------------------------------------------------------------------------

namespace {

/// Walk [0, n) of a chunk that starts at `position` of its unit: whole segments in parallel, partial ones in
/// order. partial(a, b) adds to the carried lanes; close() folds them; whole(first, count) folds complete
/// segments.
template <class Partial, class Close, class Whole>
void over_segments(int64_t position, int64_t n, Partial partial, Close close, Whole whole) {
    int64_t a = 0;
    if (position % SEGMENT) {
        const int64_t b = std::min(n, SEGMENT - position % SEGMENT);
        partial(a, b);
        if ((position + b) % SEGMENT == 0) close();
        a = b;
    }
    const int64_t count = (n - a) / SEGMENT;
    if (count > 0) whole(a, count);
    a += count * SEGMENT;
    if (a < n) partial(a, n);
}

}  // namespace

MomentSweep::MomentSweep(int n_experts, bool f64)
    : n_experts_(n_experts),
      f64_(f64),
      lanes_(size_t(n_experts) * N_SUMS * BLOCK),
      maxima_(size_t(n_experts) * 2),
      tree_(size_t(n_experts) * N_SUMS) {}

void MomentSweep::feed(const Keep& keep, const Operands& in) {
    const RankData ranks(keep, in, f64_);
    const auto close = [&] {
        std::vector<double> sums(width());
        for (size_t j = 0; j < width(); ++j) sums[j] = fold_lanes(lanes_.data() + j * BLOCK);
        tree_.push(sums.data());
        std::fill(lanes_.begin(), lanes_.end(), 0.0);
    };
    const auto whole = [&](int64_t first, int64_t count) {
        std::vector<double> sums(width() * count), maxima(maxima_.size() * count);
        parallel(count, [&](int64_t s) {
            std::vector<double> lanes(lanes_.size());
            const int64_t a = first + s * SEGMENT;
            kernels().moments(keep, in, ranks.view, f64_, a, a + SEGMENT, lanes.data(),
                              maxima.data() + s * maxima_.size());
            for (size_t j = 0; j < width(); ++j) sums[s * width() + j] = fold_lanes(lanes.data() + j * BLOCK);
        });
        for (int64_t s = 0; s < count; ++s) {
            tree_.push(sums.data() + s * width());
            for (size_t j = 0; j < maxima_.size(); ++j) {
                const double x = maxima[s * maxima_.size() + j];
                if (x > maxima_[j] || x != x) maxima_[j] = x;
            }
        }
    };
    over_segments(
        position_, in.n,
        [&](int64_t a, int64_t b) {
            kernels().moments(keep, in, ranks.view, f64_, a, b, lanes_.data(), maxima_.data());
        },
        close, whole);
    position_ += in.n;
}

void MomentSweep::result(std::vector<double>& sums, std::vector<double>& maxima) {
    if (position_ % SEGMENT) {
        std::vector<double> last(width());
        for (size_t j = 0; j < width(); ++j) last[j] = fold_lanes(lanes_.data() + j * BLOCK);
        tree_.push(last.data());
        position_ = 0;
    }
    sums = tree_.total(), maxima = maxima_;
}

GramSweep::GramSweep(int n_experts, Axis axis, int64_t n, int64_t cols, bool f64)
    : n_experts_(n_experts),
      axis_(axis),
      cols_(cols),
      units_(axis == Axis::Tensor ? 1
             : axis == Axis::Row  ? (cols ? n / cols : 0)
                                  : cols),
      f64_(f64),
      tree_(pairs() * (axis == Axis::Column ? size_t(cols) : 1)) {
    if (axis == Axis::Tensor) lanes_.resize(pairs() * BLOCK);
    if (axis == Axis::Row) rows_.resize(pairs() * units_);
    if (axis == Axis::Column) lanes_.resize(pairs() * cols);
}

void GramSweep::feed(const Operands& in) {
    const size_t P = pairs();
    const auto fold = [&](const double* lanes, double* sums) {
        for (size_t p = 0; p < P; ++p) sums[p] = fold_lanes(lanes + p * BLOCK);
    };
    if (axis_ == Axis::Tensor) {
        over_segments(
            position_, in.n,
            [&](int64_t a, int64_t b) { kernels().gram(in, f64_, a, b, position_, lanes_.data()); },
            [&] {
                std::vector<double> sums(P);
                fold(lanes_.data(), sums.data());
                tree_.push(sums.data());
                std::fill(lanes_.begin(), lanes_.end(), 0.0);
            },
            [&](int64_t first, int64_t count) {
                std::vector<double> sums(P * count);
                parallel(count, [&](int64_t s) {
                    std::vector<double> lanes(P * BLOCK);
                    const int64_t a = first + s * SEGMENT;
                    kernels().gram(in, f64_, a, a + SEGMENT, position_, lanes.data());
                    fold(lanes.data(), sums.data() + s * P);
                });
                for (int64_t s = 0; s < count; ++s) tree_.push(sums.data() + s * P);
            });
        position_ += in.n;
    } else if (axis_ == Axis::Row) {
        const int64_t first = in.start / cols_;
        parallel(in.n / cols_, [&](int64_t r) {
            CounterTree tree(P);
            std::vector<double> sums(P);
            for (int64_t c = 0; c < cols_; c += SEGMENT) {
                std::vector<double> lanes(P * BLOCK);
                const int64_t a = r * cols_ + c;
                kernels().gram(in, f64_, a, r * cols_ + std::min(cols_, c + SEGMENT), -r * cols_,
                               lanes.data());
                fold(lanes.data(), sums.data());
                tree.push(sums.data());
            }
            const std::vector<double> total = tree.total();
            for (size_t p = 0; p < P; ++p) rows_[p * units_ + first + r] = total[p];
        });
    } else {
        // position_ counts rows; a leaf of the tree is 64 of them.
        const int64_t rows = in.n / cols_;
        for (int64_t r = 0; r < rows;) {
            const int64_t end = std::min(rows, r + BLOCK - position_ % BLOCK);
            parallel((cols_ + 255) / 256, [&](int64_t t) {
                kernels().gram_columns(in, f64_, r, end, t * 256, std::min(cols_, (t + 1) * 256),
                                       lanes_.data());
            });
            position_ += end - r, r = end;
            if (position_ % BLOCK == 0) {
                tree_.push(lanes_.data());
                std::fill(lanes_.begin(), lanes_.end(), 0.0);
            }
        }
    }
}

std::vector<double> GramSweep::result() {
    if (axis_ == Axis::Row) return rows_;
    const int64_t leaf = axis_ == Axis::Tensor ? SEGMENT : BLOCK;
    if (position_ % leaf) {
        if (axis_ == Axis::Tensor) {
            std::vector<double> sums(pairs());
            for (size_t p = 0; p < pairs(); ++p) sums[p] = fold_lanes(lanes_.data() + p * BLOCK);
            tree_.push(sums.data());
        } else {
            tree_.push(lanes_.data());
        }
        position_ = 0;
    }
    return tree_.total();
}

}  // namespace fastmerge
