// Rank cuts. Small units are selected directly; large ones by sample, bracket and count: a sample tells
// between which two keys the cut must lie, one reading of the operands counts what is above and keeps the few
// keys between, and the cut is among those. A bracket that misses costs time only: digits are counted then.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "core/clones.hpp"
#include "cpu/spans.hpp"
#include "cpu/sweeps.hpp"

namespace fastmerge {
namespace {

constexpr int64_t COLLECT_BELOW = int64_t(1) << 17;  // up to here keys are kept and selected directly
constexpr int64_t RUN = 16;                          // sampled elements that lie side by side
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

/// Standard deviation of how many of a sample's keys are above `about`, run by run; of a fraction of the
/// nonzero ones (fraction >= 0), of what is above less the fraction of those.
FM_CLONES double rank_deviation(const uint64_t* keys, int64_t n, uint64_t about, double p, double fraction) {
    double sum = 0, square = 0;
    for (int64_t j = 0; j < n; j += RUN) {
        int64_t above = 0, nonzero = 0;  // keys are below 2^63: a difference's sign compares them
        for (int64_t i = j; i < j + RUN; ++i)
            above -= int64_t(about - keys[i]) >> 63, nonzero += keys[i] != 0;
        const double excess = double(above) - (fraction >= 0 ? fraction * double(nonzero) : p * RUN);
        sum += excess, square += excess * excess;
    }
    const double runs = double(n / RUN), mean = sum / runs;
    return std::sqrt(std::max(square - runs * mean * mean, 0.0));
}

/// The keys of a sample, counted by their leading bits: finds any of them by its rank in a reading of one
/// bin.
class SampleBins {
  public:
    SampleBins(const std::vector<uint64_t>& keys, uint64_t largest)
        : keys_(keys),
          shift_(std::max(0, 64 - __builtin_clzll(largest) - WIDTH)),
          reached_((size_t(1) << WIDTH) + 1) {
        for (const uint64_t key : keys) ++reached_[key >> shift_], nonzero_ += key > 0;
        for (size_t bin = reached_.size() - 1; bin-- > 0;) reached_[bin] += reached_[bin + 1];
    }
    int64_t nonzero() const { return nonzero_; }
    /// A key near the r-th largest, r from 1: the least of its bin.
    uint64_t about(int64_t r) const { return uint64_t(bin_of(r)) << shift_; }
    /// The `from`-th and the `to`-th largest key, from <= to.
    std::pair<uint64_t, uint64_t> largest(int64_t from, int64_t to) const {
        const size_t top = bin_of(from), bottom = bin_of(to);
        const int64_t above = int64_t(reached_[top + 1]);
        const size_t inside = reached_[bottom] - size_t(above);
        std::vector<uint64_t> held(inside + 1);
        size_t n = 0;
        for (const uint64_t key :
             keys_) {  // written whether it is kept or not: branches would be guessed wrong
            held[n] = key;
            n += (key >> shift_) - bottom <= top - bottom;
        }
        const auto nth = [&](int64_t r) {
            const auto at = held.begin() + (r - 1 - above);
            std::nth_element(held.begin(), at, held.begin() + int64_t(n), std::greater<uint64_t>());
            return *at;
        };
        const uint64_t high = nth(from);
        return {high, nth(to)};
    }

  private:
    static constexpr int WIDTH = 14;
    size_t bin_of(int64_t r) const {
        const auto less = [](uint32_t count, int64_t rank) { return int64_t(count) >= rank; };
        return size_t(std::lower_bound(reached_.begin(), reached_.end(), r, less) - reached_.begin()) - 1;
    }
    const std::vector<uint64_t>& keys_;
    int shift_;
    int64_t nonzero_ = 0;
    std::vector<uint32_t> reached_;  // by bin: keys in it or above
};

}  // namespace

// ---- order statistics ----------------------------------------------------------------------------------

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
        n_runs_ = std::clamp<int64_t>(q.n / 2048, 1024, int64_t(1) << 16);
        collected_.resize(q.n_keys);
        brackets_.resize(size_t(q.n_keys) * n_ranks_), totals_.resize(brackets_.size());
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
            finish_brackets();
            if (mode_ == Mode::Ties) feed_ties(in, offset), mode_ = Mode::Done;
        }
    } else if (mode_ == Mode::Bracket) {
        feed_bracket(in, offset + in.start);
    } else if (mode_ == Mode::Digits) {
        counting_ = true;
        feed_histogram(in);
    } else if (mode_ == Mode::Ties) {
        feed_ties(in, offset);
    }
}

/// Take the sampled ones of a chunk's keys: short runs, spread evenly with a jitter against periods. Memory
/// hands out whole cache lines; a run costs no more than one of its elements would.
void OrderSweep::feed_sample(const Operands& in, int64_t first) {
    const OrderRequest& q = request_;
    const int64_t size = n_runs_ * RUN, stride = q.n / n_runs_ - RUN;
    std::vector<std::pair<int64_t, int64_t>> runs;  // first element in the chunk, length
    int64_t taken = 0;
    while (next_sample_ < size) {
        const int64_t run = next_sample_ / RUN, done = next_sample_ % RUN;
        const int64_t jitter = int64_t(uint64_t(run) * 2654435761u >> 8) % stride;
        const int64_t i = run * (q.n / n_runs_) + jitter + done - first;
        if (i >= in.n) break;
        runs.push_back({i, std::min(RUN - done, in.n - i)});
        taken += runs.back().second, next_sample_ += runs.back().second;
    }
    if (runs.empty()) return;
    // Gather the raw elements: kernels then see an ordinary, short tensor.
    const int n_operands = in.n_experts + (in.base != nullptr);
    std::vector<std::vector<char>> held(static_cast<size_t>(n_operands));
    parallel(n_operands, [&](int64_t o) {
        const bool is_base = o == in.n_experts;
        const char* from = static_cast<const char*>(is_base ? in.base : in.expert[o]);
        const DType type = is_base ? in.base_type : in.expert_type[o];
        if (type == DType::Coded) {
            held[o].resize(size_t(taken) * sizeof(float));
            float* to = reinterpret_cast<float*>(held[o].data());
            for (const auto& [i, n] : runs)
                kernels().decode(*reinterpret_cast<const Coded*>(from), i, int(n), to), to += n;
            return;
        }
        const size_t bytes = size_t(itemsize(type));
        held[o].resize(size_t(taken) * bytes);
        char* to = held[o].data();
        for (const auto& [i, n] : runs)
            std::memcpy(to, from + size_t(i) * bytes, size_t(n) * bytes), to += size_t(n) * bytes;
    });
    Operands sample = in;
    std::vector<const void*> experts;
    std::vector<DType> types;
    const auto held_type = [](DType type) { return type == DType::Coded ? DType::F32 : type; };
    for (int k = 0; k < in.n_experts; ++k)
        experts.push_back(held[k].data()), types.push_back(held_type(in.expert_type[k]));
    if (in.base) sample.base = held[in.n_experts].data(), sample.base_type = held_type(in.base_type);
    sample.expert = experts.data(), sample.expert_type = types.data(), sample.start = 0, sample.n = taken,
    sample.cols = 1;
    parallel(q.n_keys, [&](int64_t k) {
        std::vector<uint64_t>& keys = collected_[k];
        keys.resize(keys.size() + size_t(taken));
        kernels().keys(sample, q.variance ? -1 : int(k), q.f64, 0, taken, keys.data() + keys.size() - taken);
    });
}

/// Bracket each cut by the sample's order: four standard deviations of a rank on either side miss one cut in
/// ten thousand. The deviation is measured run by run, so that neighbours that resemble each other widen it.
void OrderSweep::set_brackets() {
    const OrderRequest& q = request_;
    parallel(q.n_keys, [&](int64_t k) {
        const std::vector<uint64_t>& keys = collected_[k];
        const SampleBins bins(keys, largest_key());
        const int64_t size = int64_t(keys.size());
        for (int r = 0; r < n_ranks_; ++r) {
            Bracket& bracket = brackets_[k * n_ranks_ + r];
            bracket.open = target(int(k), r, 0).open;
            if (!bracket.open) continue;
            const double p = double(target(int(k), r, 0).rank) / double(q.n);
            const double rank = q.fraction >= 0 ? q.fraction * double(bins.nonzero()) : p * double(size);
            const uint64_t about = bins.about(std::clamp<int64_t>(int64_t(rank), 1, size));
            const double reach = 2 + 4 * rank_deviation(keys.data(), size, about, p, q.fraction);
            const int64_t from = int64_t(rank - reach), to = int64_t(rank + reach) + 1;
            const auto [high, low] = bins.largest(std::max<int64_t>(from, 1), std::min(to, size));
            bracket.high = from < 1 ? largest_key() : high, bracket.low = to > size ? 0 : low;
        }
    });
    collected_.clear();
    mode_ = Mode::Bracket;
}

void OrderSweep::feed_bracket(const Operands& in, int64_t first) {
    const OrderRequest& q = request_;
    const size_t n_brackets = brackets_.size(), n_spans = size_t((in.n + SPAN - 1) / SPAN),
                 before = spans_.size();
    spans_.resize(before + n_spans);
    parallel_spans(in.n, [&](int64_t a, int64_t b) {
        // Room for all of a span, kept by each thread: only what is filled costs memory traffic.
        constexpr int64_t ROOM = SPAN + BLOCK;
        thread_local std::vector<uint64_t> key;
        thread_local std::vector<uint16_t> position;
        key.resize(n_brackets * ROOM), position.resize(n_brackets * ROOM);
        Span& span = spans_[before + size_t(a / SPAN)];
        span.first = first + a;
        span.found.resize(n_brackets);
        for (size_t j = 0; j < n_brackets; ++j)
            if (brackets_[j].low < brackets_[j].high)  // of equal keys the number is all there is to know
                span.found[j].key = key.data() + j * ROOM,
                span.found[j].position = position.data() + j * ROOM;
        kernels().bracket(in, q.variance, q.fraction >= 0, n_ranks_, q.f64, a, b, brackets_.data(),
                          span.found.data());
        int64_t held = 0;
        for (const Bracketed& found : span.found) held += found.key ? found.n : 0;
        span.key.reset(new uint64_t[held]), span.position.reset(new uint16_t[held]);
        held = 0;
        for (Bracketed& found : span.found)
            if (found.key) {
                std::copy_n(found.key, found.n, span.key.get() + held);
                std::copy_n(found.position, found.n, span.position.get() + held);
                found.key = span.key.get() + held, found.position = span.position.get() + held;
                held += found.n;
            }
    });
    for (size_t j = 0; j < n_brackets; ++j) {
        if (!brackets_[j].open) continue;
        int64_t held = 0;
        for (size_t s = before; s < spans_.size(); ++s) {
            const Bracketed& found = spans_[s].found[j];
            totals_[j].above += found.above, totals_[j].n += found.n;
            if (j % n_ranks_ == 0) nonzero_[j / n_ranks_] += found.nonzero;
            held += found.key ? found.n : 0;
        }
        totals_[j].held += held;
        // A bracket this full is no help (a great many equal keys beside others): count digits instead.
        if (totals_[j].held > q.n / 4 && q.fraction < 0) brackets_[j].open = false;
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
    int64_t quota = t.rank - totals_[j].above;
    if (!brackets_[j].open || quota < 1 || quota > totals_[j].n) return false;
    const uint64_t low = brackets_[j].low, high = brackets_[j].high;
    const bool equal = low == high;
    const uint64_t cut = equal ? low : nth_candidate(j, quota);
    t.value = from_key(cut), t.last_tie = END;
    t.open = equal && !request_.all_ties;
    if (t.open) t.found = true, t.prefix = cut, t.rank = quota;
    if (request_.all_ties) return true;
    for (const Span& span : spans_) {
        const Bracketed& found = span.found[j];
        const int64_t ties = equal ? found.n : std::count(found.key, found.key + found.n, cut);
        if (ties < quota) {
            quota -= ties;
            continue;
        }
        if (equal) {
            t.rank = quota, t.from = span.first, t.to = span.first + SPAN;
            return true;
        }
        for (int64_t i = 0;; ++i)
            if (found.key[i] == cut && --quota == 0) {
                t.last_tie = span.first + found.position[i];
                return true;
            }
    }
    return false;
}

/// The r-th largest candidate of a bracket; r becomes its number among those equal to it. One reading of all
/// candidates tells in which part of the bracket it lies, a second takes that part's.
uint64_t OrderSweep::nth_candidate(size_t j, int64_t& r) const {
    constexpr int WIDTH = 11;
    const uint64_t low = brackets_[j].low, high = brackets_[j].high;
    const int shift = std::max(0, 64 - __builtin_clzll(high - low) - WIDTH);
    std::vector<uint32_t> bins(size_t(2) << WIDTH);  // two of each: equal keys in a row wait for one another
    for (const Span& span : spans_) {
        const Bracketed& found = span.found[j];
        for (int64_t i = 0; i < found.n; ++i) ++bins[(found.key[i] - low) >> shift << 1 | (i & 1)];
    }
    for (size_t b = 0; b < bins.size() / 2; ++b) bins[b] = bins[2 * b] + bins[2 * b + 1];
    int64_t bin = int64_t((high - low) >> shift);
    for (; r > int64_t(bins[bin]); --bin) r -= bins[bin];
    const uint64_t first = low + (uint64_t(bin) << shift), width = (uint64_t(1) << shift) - 1;
    if (shift == 0) return first;
    std::vector<uint64_t> rest(size_t(bins[bin]) +
                               1);  // every key is written, and the next over it if not kept
    size_t kept = 0;
    for (const Span& span : spans_) {
        const Bracketed& found = span.found[j];
        for (int64_t i = 0; i < found.n; ++i) {
            rest[kept] = found.key[i];
            kept += found.key[i] - first <= width;
        }
    }
    return nth_largest(rest.data(), int64_t(kept), first, first + width, r);
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
    spans_.clear();
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
    const int64_t spans = (in.n + SPAN - 1) / SPAN, first = offset + in.start;
    std::vector<int64_t> counts(spans);
    for (int k = 0; k < q.n_keys; ++k)
        for (int r = 0; r < n_ranks_; ++r) {
            Target& t = target(k, r, 0);
            if (!t.open || t.rank <= 0) continue;
            const int key = q.variance ? -1 : k;
            if (t.to > t.from) {
                const int64_t a = std::max(t.from - first, int64_t(0)), b = std::min(t.to - first, in.n);
                if (a >= b) continue;
                const int64_t at = kernels().find_equal(in, key, q.f64, a, b, t.prefix, t.rank);
                if (at < 0)
                    t.rank -= kernels().count_equal(in, key, q.f64, a, b, t.prefix);
                else
                    t.last_tie = first + at, t.rank = 0;
                continue;
            }
            parallel_spans(in.n, [&](int64_t a, int64_t b) {
                counts[a / SPAN] = kernels().count_equal(in, key, q.f64, a, b, t.prefix);
            });
            for (int64_t s = 0; s < spans; ++s) {
                if (t.rank > counts[s]) {
                    t.rank -= counts[s];
                    continue;
                }
                const int64_t a = s * SPAN, b = std::min(in.n, a + SPAN);
                t.last_tie = first + kernels().find_equal(in, key, q.f64, a, b, t.prefix, t.rank);
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
            if (!counting_)
                return true;  // brackets missed: the elements are yet to be fed for the first digit
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
