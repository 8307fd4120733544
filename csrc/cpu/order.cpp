// Rank cuts. Small units are selected directly; large ones by sample, bracket and count: a sample tells
// between which two keys the cut must lie, one reading of the operands counts what is above and keeps the few
// keys between, and the cut is among those. A bracket that misses costs time only: digits are counted then.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "cpu/spans.hpp"
#include "cpu/sweeps.hpp"

namespace fastmerge {
namespace {

constexpr int64_t COLLECT_BELOW = int64_t(1) << 17;  // up to here keys are kept and selected directly
constexpr int64_t END = std::numeric_limits<int64_t>::max();

/// The r-th largest (from 1) of n keys that all lie in [low, high]; r becomes its number among those equal to
/// it. Counting leading bits of what the range leaves open beats nth_element many times over: keys of deltas
/// near a base are few and close together.
uint64_t nth_largest(const uint64_t* keys, int64_t n, uint64_t low, uint64_t high, int64_t& r) {
    std::vector<uint64_t> rest, next;
    while (low < high) {
        if (n < 64) {
            rest.assign(keys, keys + n);
            std::nth_element(rest.begin(), rest.begin() + (r - 1), rest.end(), std::greater<uint64_t>());
            low = rest[r - 1];
            r -= std::count_if(rest.begin(), rest.end(), [&](uint64_t key) { return key > low; });
            return low;
        }
        constexpr int WIDTH = 10;
        const int shift = std::max(0, 64 - __builtin_clzll(high - low) - WIDTH);
        uint32_t bins[1 << WIDTH] = {};
        for (int64_t i = 0; i < n; ++i) ++bins[(keys[i] - low) >> shift];
        int64_t bin = int64_t((high - low) >> shift);
        for (; r > int64_t(bins[bin]); --bin) r -= bins[bin];
        const uint64_t first = low + (uint64_t(bin) << shift), last = first + ((uint64_t(1) << shift) - 1);
        if (shift > 0) {
            // One more than are kept: every key is written, and the next one over it if it is not kept.
            next.resize(bins[bin] + 1);
            size_t kept = 0;
            for (int64_t i = 0; i < n; ++i) {
                next[kept] = keys[i];
                kept += keys[i] - first <= last - first;
            }
            rest.swap(next);
            keys = rest.data(), n = int64_t(kept);
        }
        low = first, high = last;
    }
    return low;
}

}  // namespace

// ---- order statistics ------------------------------------------------------------------------------

OrderSweep::OrderSweep(OrderRequest request) : request_(std::move(request)) {
    const OrderRequest& q = request_;
    n_ranks_ = q.fraction >= 0 ? 1 : int(q.ranks.empty() ? 1 : q.ranks[0].size());
    units_ = q.by_row && q.cols > 0 ? q.n / q.cols : 1;
    targets_.resize(size_t(n_ranks_) * q.n_keys * units_);
    nonzero_.assign(q.n_keys, 0);
    widths_ = q.f64 ? std::vector<int>{16, 16, 16, 15} : std::vector<int>{16, 15};
    mode_ = q.by_row ? Mode::Rows : q.n <= COLLECT_BELOW ? Mode::Collect : Mode::Sample;
    if (mode_ == Mode::Collect) collected_.assign(q.n_keys, std::vector<uint64_t>(q.n));
    if (mode_ == Mode::Sample) {
        sample_size_ = std::clamp<int64_t>(q.n / 256, 8192, int64_t(1) << 20);
        collected_.resize(q.n_keys);
        brackets_.resize(size_t(q.n_keys) * n_ranks_), candidates_.resize(brackets_.size());
        if (q.fraction < 0)
            for (int k = 0; k < q.n_keys; ++k)
                for (int r = 0; r < n_ranks_; ++r) settle(target(k, r, 0), ranks(k)[r], q.n);
    }
}

/// The key of NaN.
uint64_t OrderSweep::largest_key() const {
    return request_.f64 ? generic::KeyOf<double>::inf + 1 : generic::KeyOf<float>::inf + 1;
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
    int64_t quota = t.rank;
    const uint64_t cut = nth_largest(keys, n, 0, largest_key(), quota);
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
    } else if (mode_ == Mode::Sample) {
        feed_sample(in, offset + in.start);
        if (in.n == q.n) {  // all there is: no need to be fed it twice
            set_brackets();
            feed_bracket(in, offset + in.start);
        }
    } else if (mode_ == Mode::Bracket) {
        feed_bracket(in, offset + in.start);
    } else if (mode_ == Mode::Digits) {
        feed_histogram(in);
    } else if (mode_ == Mode::Ties) {
        feed_ties(in, offset);
    }
}

/// Take the sampled ones of a chunk's keys. Positions are spread evenly with a jitter against periods.
void OrderSweep::feed_sample(const Operands& in, int64_t first) {
    const OrderRequest& q = request_;
    const int64_t stride = q.n / sample_size_;
    std::vector<int64_t> at;
    for (; next_sample_ < sample_size_; ++next_sample_) {
        const int64_t jitter = int64_t(uint64_t(next_sample_) * 2654435761u >> 8) % stride;
        const int64_t i = next_sample_ * q.n / sample_size_ + jitter - first;
        if (i >= in.n) break;
        at.push_back(i);
    }
    if (at.empty()) return;
    // Gather the raw elements: kernels then see an ordinary, short tensor.
    std::vector<std::vector<char>> held;
    const auto gather = [&](const void* p, DType type) -> const void* {
        const size_t size = size_t(itemsize(type));
        std::vector<char>& out = held.emplace_back(at.size() * size);
        for (size_t j = 0; j < at.size(); ++j)
            std::memcpy(out.data() + j * size, static_cast<const char*>(p) + size_t(at[j]) * size, size);
        return out.data();
    };
    Operands sample = in;
    std::vector<const void*> experts;
    if (in.base) sample.base = gather(in.base, in.base_type);
    for (int k = 0; k < in.n_experts; ++k) experts.push_back(gather(in.expert[k], in.expert_type[k]));
    sample.expert = experts.data(), sample.start = 0, sample.n = int64_t(at.size()), sample.cols = 1;
    parallel(q.n_keys, [&](int64_t k) {
        std::vector<uint64_t>& keys = collected_[k];
        keys.resize(keys.size() + at.size());
        kernels().keys(sample, q.variance ? -1 : int(k), q.f64, 0, sample.n,
                       keys.data() + keys.size() - at.size());
    });
}

/// Bracket each cut by the sample's order: four standard deviations of the sample's rank on either
/// side miss one cut in ten thousand.
void OrderSweep::set_brackets() {
    const OrderRequest& q = request_;
    const double s = double(sample_size_);
    parallel(int64_t(brackets_.size()), [&](int64_t j) {
        const int k = int(j / n_ranks_), r = int(j % n_ranks_);
        Bracket& bracket = brackets_[j];
        const std::vector<uint64_t>& keys = collected_[k];
        const int64_t size = int64_t(keys.size());
        bracket.open = target(k, r, 0).open;
        if (!bracket.open) return;
        double p = double(target(k, r, 0).rank) / double(q.n);
        if (q.fraction >= 0)
            p = q.fraction * (1 - double(std::count(keys.begin(), keys.end(), uint64_t(0))) / s);
        p = std::min(std::max(p, 0.0), 1.0);
        const double reach = 2 + 4 * (q.fraction >= 0 ? std::sqrt(s) / 2 : std::sqrt(s * p * (1 - p)));
        const int64_t from = int64_t(p * s - reach), to = int64_t(p * s + reach) + 1;
        const uint64_t largest = largest_key();
        int64_t above = from, reached = to;
        bracket.high = from < 1 ? largest : nth_largest(keys.data(), size, 0, largest, above);
        bracket.low = to > size ? 0 : nth_largest(keys.data(), size, 0, largest, reached);
    });
    collected_.clear();
    mode_ = Mode::Bracket;
}

void OrderSweep::feed_bracket(const Operands& in, int64_t first) {
    const OrderRequest& q = request_;
    struct Part {
        std::vector<Bracketed> found;
        std::vector<std::vector<uint64_t>> key;
        std::vector<std::vector<uint16_t>> position;
    };
    const size_t n_brackets = brackets_.size();
    std::vector<Part> parts((in.n + SPAN - 1) / SPAN);
    parallel_spans(in.n, [&](int64_t a, int64_t b) {
        // Room for all of a span, kept by each thread: only what is filled costs memory traffic.
        thread_local std::vector<uint64_t> key;
        thread_local std::vector<uint16_t> position;
        key.resize(n_brackets * SPAN), position.resize(n_brackets * SPAN);
        Part& part = parts[a / SPAN];
        part.found.resize(n_brackets), part.key.resize(n_brackets), part.position.resize(n_brackets);
        for (size_t j = 0; j < n_brackets; ++j)
            if (brackets_[j].low < brackets_[j].high)  // of equal keys the number is all there is to know
                part.found[j].key = key.data() + j * SPAN,
                part.found[j].position = position.data() + j * SPAN;
        kernels().bracket(in, q.variance, q.fraction >= 0, n_ranks_, q.f64, a, b, brackets_.data(),
                          part.found.data());
        for (size_t j = 0; j < n_brackets; ++j)
            if (const Bracketed& found = part.found[j]; found.key) {
                part.key[j].assign(found.key, found.key + found.n);
                part.position[j].assign(found.position, found.position + found.n);
            }
    });
    for (size_t s = 0; s < parts.size(); ++s) span_first_.push_back(first + int64_t(s) * SPAN);
    for (size_t j = 0; j < n_brackets; ++j) {
        if (!brackets_[j].open) continue;
        Candidates& c = candidates_[j];
        for (const Part& part : parts) {
            c.above += part.found[j].above, c.n += part.found[j].n;
            if (j % n_ranks_ == 0) nonzero_[j / n_ranks_] += part.found[j].nonzero;
            c.key.insert(c.key.end(), part.key[j].begin(), part.key[j].end());
            c.position.insert(c.position.end(), part.position[j].begin(), part.position[j].end());
            c.span_end.push_back(int64_t(c.key.size()));
        }
        // A bracket this full is no help (a great many equal keys beside others): count digits instead.
        if (int64_t(c.key.size()) > q.n / 4 && q.fraction < 0) brackets_[j].open = false, c = Candidates();
    }
}

void OrderSweep::settle_fraction(int k, int64_t nonzero) {
    Target& t = target(k, 0, 0);
    const int64_t rank = int64_t(request_.fraction * double(nonzero));
    settle(t, rank, request_.n);
    if (rank >= nonzero && nonzero > 0) t.open = false, t.value = 0, t.last_tie = -1;
}

/// Find a cut among its bracket's candidates; false if it is not there.
bool OrderSweep::settle_bracket(int k, int r) {
    Target& t = target(k, r, 0);
    const size_t j = size_t(k) * n_ranks_ + r;
    const Candidates& c = candidates_[j];
    int64_t quota = t.rank - c.above;
    if (!brackets_[j].open || quota < 1 || quota > c.n) return false;
    const bool equal = brackets_[j].low == brackets_[j].high;
    const uint64_t low = brackets_[j].low, high = brackets_[j].high;
    const uint64_t cut = nth_largest(c.key.data(), c.n, low, high, quota);
    t.value = from_key(cut), t.last_tie = END;
    t.open = equal && !request_.all_ties;
    if (t.open) t.found = true, t.prefix = cut, t.rank = quota;
    if (equal || request_.all_ties) return true;
    int64_t at = 0;
    for (;; ++at)
        if (c.key[at] == cut && --quota == 0) break;
    const auto span = std::upper_bound(c.span_end.begin(), c.span_end.end(), at) - c.span_end.begin();
    t.last_tie = span_first_[span] + c.position[at];
    return true;
}

bool OrderSweep::finish_brackets() {
    const OrderRequest& q = request_;
    if (q.fraction >= 0)
        for (int k = 0; k < q.n_keys; ++k) settle_fraction(k, nonzero_[k]);
    parallel(int64_t(brackets_.size()), [&](int64_t j) {
        const int k = int(j / n_ranks_), r = int(j % n_ranks_);
        if (target(k, r, 0).open) settle_bracket(k, r);
    });
    bool missed = false, ties = false;
    for (const Target& t : targets_) missed |= counted(t), ties |= t.found;
    candidates_.clear(), span_first_.clear();
    if (missed) bins_.assign(brackets_.size(), std::vector<uint64_t>(size_t(1) << widths_[0]));
    mode_ = missed ? Mode::Digits : ties ? Mode::Ties : Mode::Done;
    return mode_ != Mode::Done;
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
            if (!counted(t)) continue;
            if (digit_ == 0 && r > 0 && counted(target(k, 0, 0))) {
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
    switch (mode_) {
        case Mode::Sample:
            set_brackets();
            return true;
        case Mode::Bracket:
            return finish_brackets();
        case Mode::Digits:
            return next_digit();
        case Mode::Collect:
            for (int k = 0; k < q.n_keys; ++k) {
                const std::vector<uint64_t>& keys = collected_[k];
                if (q.fraction >= 0)
                    settle_fraction(k, q.n - std::count(keys.begin(), keys.end(), uint64_t(0)));
                for (int r = 0; r < n_ranks_; ++r) {
                    if (q.fraction < 0) settle(target(k, r, 0), ranks(k)[r], q.n);
                    select(keys.data(), q.n, 0, target(k, r, 0));
                }
            }
            break;
        default:
            break;
    }
    mode_ = Mode::Done;
    return false;
}

/// Narrow each cut that is counted by one digit of its key.
bool OrderSweep::next_digit() {
    const OrderRequest& q = request_;
    for (int k = 0; k < q.n_keys; ++k) {
        const bool shared = digit_ == 0 && counted(target(k, 0, 0));
        for (int r = 0; r < n_ranks_; ++r) {
            Target& t = target(k, r, 0);
            if (!counted(t)) continue;
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
        return true;
    }
    bins_.clear(), scratch_.clear();
    mode_ = Mode::Done;
    for (Target& t : targets_) {
        if (!t.open) continue;
        t.value = from_key(t.prefix), t.last_tie = END;
        if (!q.all_ties) mode_ = Mode::Ties;
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

}  // namespace fastmerge
