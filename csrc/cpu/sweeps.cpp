#include "cpu/sweeps.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/four_bit/encode.hpp"
#include "cpu/spans.hpp"

namespace fastmerge {
namespace {

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

RankData::RankData(const Keep& keep, const Operands& in, bool f64, Need need, Decided* known) {
    if (in.n == 0) return;
    if (keep.drop == DropKind::Uniform && known && kernels().draws(keep, in, f64)) {
        view.stride = known->stride(), view.kept = known->at(in.start);
        if (in.start + in.n > known->n_known) draw(keep, in, known->at(in.start));
        known->n_known = std::max(known->n_known, in.start + in.n);
    }
    if (keep.drop != DropKind::Ranked) return;
    if (need == Kept && kernels().ranks_rows(keep, in, f64)) {
        uint64_t* kept = nullptr;
        if (known) {
            view.stride = known->stride(), kept = known->at(in.start);
        } else {
            view.stride = in.n / 64, kept_.resize(size_t(in.n_experts * view.stride)), kept = kept_.data();
        }
        view.unit = in.cols, view.kept = kept;
        if (!known || in.start + in.n > known->n_known) decide_rows(keep, in, kept);
        if (known) known->n_known = std::max(known->n_known, in.start + in.n);
        return;
    }
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
        if (!drawn && need != AllRanks) return;  // no draw, no rank
        kernels().rank_unit(in, k, f64, a, unit, rank_.data() + size_t(k) * in.n + a);
    });
    view.rank = rank_.data();
}

void RankData::draw(const Keep& keep, const Operands& in, uint64_t* kept) {
    parallel_spans(in.n, [&](int64_t a, int64_t b) {
        for (int k = 0; k < in.n_experts; ++k)
            kernels().draw(keep, k, in.start + a, b - a, kept + k * view.stride + a / 64);
    });
}

/// Decide the ranked drop row by row; what is kept takes a bit of an element.
void RankData::decide_rows(const Keep& keep, const Operands& in, uint64_t* kept) {
    const int64_t rows = in.n / in.cols, row_words = in.cols / 64;
    std::vector<std::vector<uint32_t>> threshold(static_cast<size_t>(in.n_experts));
    for (int k = 0; k < in.n_experts; ++k) {
        const double low = keep.p_low[k], span = keep.p_high[k] - low;
        if (low >= 1.0) {  // everything is kept
            std::fill_n(kept + k * view.stride, in.n / 64, ~uint64_t(0));
            continue;
        }
        threshold[k].resize(size_t(in.cols));
        for (int64_t r = 0; r < in.cols && keep.p_high[k] > 0.0; ++r) {
            // As rank_probability and keep_block: the same roundings in the same order.
            const double q = in.cols > 1 ? double(r) / double(in.cols - 1) : 0.5;
            const double rise = span * q, p = low + rise;
            const double t = p * 65536.0 + 0.5;
            threshold[k][r] = uint32_t(!(t >= 0) ? 0 : t > 65536.0 ? 65536.0 : t);
        }
    }
    parallel(rows * in.n_experts, [&](int64_t t) {
        const int k = int(t / rows);
        const int64_t row = t % rows;
        if (threshold[k].empty()) return;
        thread_local std::vector<uint32_t> scratch;
        scratch.resize(size_t(RANK_SCRATCH(in.cols)));
        kernels().rank_row(in, k, row * in.cols, threshold[k].data(), keep.key[k], scratch.data(),
                           kept + k * view.stride + row * row_words);
    });
}

void run_walk(const WalkPlan& plan, const Operands& in, bool f64, Decided* known, void* out, DType out_type,
              bool* bad) {
    const RankData ranks(plan.keep, in, f64, RankData::Kept, known);
    std::atomic<bool> seen{false};
    parallel_spans(in.n, [&](int64_t a, int64_t b) {
        if (kernels().walk(plan, in, ranks.view, f64, a, b, out, out_type)) seen = true;
    });
    *bad = seen;
}

namespace {

/// Elements that are merged before they are coded: few enough to be in the first cache then.
constexpr int64_t CODED_TILE = 2048;

/// Columns of a tile: a whole number of the format's, as many as fit.
int64_t tile_width(const generic::Tile& unit, int64_t cols) {
    if (unit.cols == 0) return cols;
    const int64_t fit = CODED_TILE / (unit.rows * unit.cols);
    return std::min(cols, unit.cols * std::max<int64_t>(1, fit));
}

}  // namespace

void run_walk_coded(const WalkPlan& plan, const Operands& in, bool f64, Decided* known, const Coded& out,
                    bool* bad, double* residual) {
    const RankData ranks(plan.keep, in, f64, RankData::Kept, known);
    const generic::Tile unit = generic::tile_of(out);
    const bool flat = out.format == Format::BnbNf4 || out.format == Format::BnbFp4;
    const int64_t cols = flat ? in.n : out.cols, rows = in.n / cols, first = flat ? 0 : in.start / cols;
    const int64_t width = tile_width(unit, cols), widths = (cols + width - 1) / width;
    const int64_t tiles = (rows + unit.rows - 1) / unit.rows * widths;
    const int64_t together = std::max<int64_t>(1, SPAN / (unit.rows * width));  // tiles of one task
    std::atomic<bool> seen{false};
    const int64_t n_tasks = (tiles + together - 1) / together;
    std::vector<double> sums(size_t(n_tasks) * 2);
    parallel(n_tasks, [&](int64_t task) {
        thread_local std::vector<double> scratch;
        scratch.resize(size_t(unit.rows * width));
        for (int64_t t = task * together; t < std::min(tiles, (task + 1) * together); ++t) {
            const int64_t row = t / widths * unit.rows, col = t % widths * width;
            const int n_rows = int(std::min(unit.rows, rows - row));
            if (kernels().walk_coded(plan, in, ranks.view, f64, out, first + row, n_rows,
                                     col + (flat ? in.start : 0), std::min(width, cols - col), scratch.data(),
                                     sums.data() + 2 * task))
                seen = true;
        }
    });
    residual[0] = residual[1] = 0;
    for (int64_t t = 0; t < n_tasks; ++t) residual[0] += sums[2 * t], residual[1] += sums[2 * t + 1];
    *bad = seen;
}

float run_walk_peak(const WalkPlan& plan, const Operands& in, bool f64, Decided* known, DType type,
                    bool* bad) {
    const RankData ranks(plan.keep, in, f64, RankData::Kept, known);
    std::atomic<bool> seen{false};
    std::atomic<uint32_t> largest{0};
    parallel_spans(in.n, [&](int64_t a, int64_t b) {
        uint32_t peak = 0;
        if (kernels().walk_peak(plan, in, ranks.view, f64, type, a, b, &peak)) seen = true;
        uint32_t before = largest;
        while (before < peak && !largest.compare_exchange_weak(before, peak)) {
        }
    });
    *bad = seen;
    return generic::bit_cast<float>(uint32_t(largest));
}

void run_keep_mask(const Keep& keep, const Operands& in, bool f64, uint8_t* out) {
    const RankData ranks(keep, in, f64, RankData::Kept);
    parallel_spans(in.n,
                   [&](int64_t a, int64_t b) { kernels().keep_mask(keep, in, ranks.view, f64, a, b, out); });
}

void run_keep_probability(const Keep& keep, const Operands& in, bool f64, double* p) {
    const RankData ranks(keep, in, f64, RankData::AllRanks);
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
    const RankData ranks(plan.keep, in, f64, RankData::Kept);
    std::atomic<int64_t> balance{0};
    parallel_spans(in.n, [&](int64_t a, int64_t b) {
        balance += kernels().sign_balance(plan, in, ranks.view, f64, a, b);
    });
    return balance;
}

// ---- sums ----------------------------------------------------------------------------------------------

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

MomentSweep::MomentSweep(Moment of, int n_experts, bool f64)
    : of_(of),
      n_experts_(n_experts),
      f64_(f64),
      lanes_(size_t(n_experts) * 2 * BLOCK),
      maxima_(size_t(n_experts) * 2),
      tree_(size_t(n_experts) * 2) {}

std::vector<double> MomentSweep::fold(const double* lanes) const {
    std::vector<double> values(width());
    for (size_t j = 0; j < width(); ++j) {
        const double* x = lanes + j * BLOCK;
        if (of_ != Moment::Max) {
            values[j] = fold_lanes(x);
        } else {
            for (int l = 0; l < BLOCK; ++l)
                if (x[l] > values[j] || x[l] != x[l]) values[j] = x[l];  // NaN is largest and stays
        }
    }
    return values;
}

void MomentSweep::push(const double* values) {
    if (of_ != Moment::Max) return tree_.push(values);
    for (size_t j = 0; j < width(); ++j)
        if (values[j] > maxima_[j] || values[j] != values[j]) maxima_[j] = values[j];
}

void MomentSweep::feed(const Keep& keep, const Operands& in, Decided* known) {
    const RankData ranks(keep, in, f64_, RankData::Kept, known);
    over_segments(
        position_, in.n,
        [&](int64_t a, int64_t b) {
            kernels().moments(of_, keep, in, ranks.view, f64_, a, b, lanes_.data());
        },
        [&] {
            push(fold(lanes_.data()).data());
            std::fill(lanes_.begin(), lanes_.end(), 0.0);
        },
        [&](int64_t first, int64_t count) {
            std::vector<double> values(width() * size_t(count));
            parallel(count, [&](int64_t s) {
                std::vector<double> lanes(lanes_.size());
                const int64_t a = first + s * SEGMENT;
                kernels().moments(of_, keep, in, ranks.view, f64_, a, a + SEGMENT, lanes.data());
                const std::vector<double> folded = fold(lanes.data());
                std::copy(folded.begin(), folded.end(), values.begin() + s * int64_t(width()));
            });
            for (int64_t s = 0; s < count; ++s) push(values.data() + s * int64_t(width()));
        });
    position_ += in.n;
}

std::vector<double> MomentSweep::result() {
    if (position_ % SEGMENT) push(fold(lanes_.data()).data());
    position_ = 0;
    return of_ == Moment::Max ? maxima_ : tree_.total();
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
