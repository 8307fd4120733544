"""Rank cuts of what a device cannot hold: a sparse sample, one reading of everything, one of a single part.

A cut is a number and an index (docs/numerics.md), so a sample may say where to look for it and never what it
is. The sample brackets the key of the cut; one reading counts what is above the bracket and keeps, part by
part, which keys lie in it and how often; among those is the cut, and in which part its last tie lies, which
is read once more. A bracket that misses, or holds too much, costs time only: the keys on the side where the
cut is, or in the bracket, are counted in bins, and the bin that holds the cut is the next bracket. That
shrinks it by 2^16 a reading, to a single key at last.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.backends import Chunk, Sweep
from fastmerge.backends.triton_plan import INF_KEY, sliced, values_of_keys
from fastmerge.stages import Cut, OrderStatistic

if TYPE_CHECKING:
    from torch import Tensor

END = 2**63 - 1

#: The cuts that have everything above, and everything but zeros.
ALL_ABOVE = (-1.0, END)
ZEROS_BELOW = (0.0, -1)

#: Elements of one sampled run, and runs of a sample at most: four million elements bracket a cut to a few
#: thousandths, if neighbours are independent; how alike they are is seen in the sample.
RUN = 1024
MOST_RUNS = 4096

#: What is sampled at most, as a share of all, and the least for which that is worth a pass of its own.
SHARE = 16
SMALLEST = 1 << 22

#: Half the width of a bracket in standard deviations of the sample's rank, and the least of it in elements.
DEVIATIONS = 5.0
MARGIN = 4

#: Elements whose keys are written and looked at together, however large a chunk is: the scratch memory.
PART = 1 << 22

#: Bins of a bracket that is narrowed.
BIN_BITS = 16

#: Distinct keys that are kept of all parts and targets at most; those of a float32 model's larger brackets.
MOST_CANDIDATES = 1 << 25

Keys = Callable[[Chunk, Sequence[int]], Iterator["Tensor"]]


def most_candidates(n: int, n_targets: int) -> int:
    """Return how many distinct keys are kept of one target's bracket at most, of all parts."""
    return max(1 << 16, min(n // 64, MOST_CANDIDATES // max(1, n_targets)))


def scratch_bytes(n: int, chunk: int, n_keys: int, n_ranks: int, wide: bool) -> int:
    """Bound the device memory that the cuts of n elements take, fed at most `chunk` at a time."""
    word = 8 if wide else 4
    # Keys and masks of a part; at worst, a sort of all its keys, their counts, and what is kept of them.
    part = min(PART, chunk) * (6 * word + 28)
    # All keys of the sample, and one expert's in order.
    sample = sum(b - a for a, b in sampled_ranges(n)) if StreamedOrder.pays(n) else 0
    sampled = sample * (n_keys * word + 3 * word + 16)
    # What is kept of all targets, and of one in order.
    candidates = min(most_candidates(n, n_keys * n_ranks), n)
    kept = candidates * (n_keys * n_ranks * (word + 4) + 2 * word + 40)
    return max(part, sampled) + kept


class _Target:
    """The cut of rank `rank` of keys k: its bracket [low, high], and what a pass has counted there.

    above: how many keys exceed high. parts: of what was counted: first element, number of elements, the
    distinct keys inside, how often each comes (int32). bins: instead, counts of equal stretches of the
    bracket. key: of the cut, once it is known; its last tie is the quota-th equal element of `place`.
    """

    def __init__(self, r: int, k: int, largest: int) -> None:
        self.r, self.k, self.rank = r, k, 0
        self.value, self.last_tie = math.inf, -1
        self.key, self.quota, self.place = -1, 0, (0, 0)
        self._largest = largest
        self.open(0, largest)

    def open(self, low: int, high: int, binned: bool = False) -> None:
        """Set the bracket that the coming pass looks into."""
        self.low, self.high, self._binned = low, high, binned
        self._above: Tensor | int = 0
        self._parts: list[tuple[int, int, Tensor, Tensor]] = []
        self._kept = 0
        self._ends: Tensor | None = None
        self._bins: Tensor | None = None

    def settle(self, rank: int, m: int, all_above: tuple[float, int]) -> bool:
        """Take the rank, of m elements; true if it leaves nothing to find. all_above: the cut of rank m."""
        self.rank = rank
        if rank > 0 and rank >= m:
            self.value, self.last_tie = all_above
        return not 0 < rank < m

    def count(self, keys: Tensor, first: int, most: int) -> None:
        """Count the keys of one part, that of elements [first, first + n)."""
        self._above = self._above + (keys > self.high).sum()
        distinct, counts = self._inside(keys)
        if self._binned:
            self._bin(distinct, counts)
            return
        self._parts.append((first, len(keys), distinct, counts))
        self._kept += len(distinct) - (1 if self.low == self.high else 2)
        if self._kept > most:
            for _, _, distinct, counts in self._parts:
                self._bin(distinct, counts)
            self._parts.clear()
            self._binned = True

    def _inside(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distinct keys of the bracket, its ends first, and their counts.

        The ends are counted apart: a key that very many elements share, as zero is, is an end of every
        bracket of the sample that it is in, and need not be sorted. Waits for the device if there may be
        anything between the ends: how much that is decides how much memory it takes.
        """
        import torch

        ends = [self.low] if self.low == self.high else [self.low, self.high]
        if self._ends is None:
            self._ends = torch.tensor(ends, dtype=keys.dtype, device=keys.device)
        at_ends = torch.stack([(keys == end).sum() for end in ends])
        if self.high - self.low < 2:
            return self._ends, at_ends.int()
        between = keys[(keys > self.low) & (keys < self.high)]
        distinct, counts = torch.unique(between, return_counts=True)
        return torch.cat([self._ends, distinct]), torch.cat([at_ends, counts]).int()

    def _shift(self) -> int:
        return max(0, (self.high - self.low).bit_length() - BIN_BITS)

    def _bin(self, distinct: Tensor, counts: Tensor) -> None:
        import torch

        if self._bins is None:
            self._bins = torch.zeros(1 << BIN_BITS, dtype=torch.int64, device=distinct.device)
        self._bins.index_add_(0, (distinct.long() - self.low) >> self._shift(), counts.long())

    def conclude(self, all_ties: bool) -> bool:
        """Take what a pass counted: true if the cut is known, false if the bracket is a new one."""
        import torch

        quota = self.rank - int(self._above)
        if self._bins is not None:
            upto = self._bins.flip(0).cumsum(0)
        else:
            keys = torch.cat([distinct for _, _, distinct, _ in self._parts])
            counts = torch.cat([counts for _, _, _, counts in self._parts])
            order = keys.argsort(descending=True)
            upto = counts[order].cumsum(0)
        if quota < 1:  # the sample misled: the cut is above
            self.open(self.high + 1, self._largest, binned=True)
            return False
        if quota > int(upto[-1]):
            self.open(0, self.low - 1, binned=True)
            return False
        at = int(torch.searchsorted(upto, quota))
        if self._bins is not None:
            shift = self._shift()
            low = self.low + ((len(upto) - 1 - at) << shift)
            self.open(low, min(self.high, low + (1 << shift) - 1))
            return False
        self.key = int(keys[order[at]])
        self.value = float(values_of_keys([self.key], keys.element_size() == 8)[0])
        self.last_tie = END
        if not all_ties:
            del order, upto  # as large as all that is kept
            quota -= int(counts[keys > self.key].sum())
            self._locate(quota, torch.where(keys == self.key, counts, 0))
        self._parts.clear()
        return True

    def _locate(self, quota: int, equal: Tensor) -> None:
        """Find the part that holds the quota-th equal element. equal: [distinct keys of all parts] counts."""
        import torch

        upto = equal.cumsum(0)
        at = int(torch.searchsorted(upto, quota))
        stops = list(accumulate(len(distinct) for _, _, distinct, _ in self._parts))
        first, n, _, _ = self._parts[bisect_right(stops, at)]
        self.quota = quota - int(upto[at] - equal[at])
        self.place = (first, first + n)

    def find_tie(self, keys: Tensor, first: int) -> None:
        """Look for the last tie among the keys of elements [first, first + n), which are fed in order."""
        a, b = max(self.place[0] - first, 0), min(self.place[1] - first, len(keys))
        if a >= b or self.quota <= 0:
            return
        equal = (keys[a:b] == self.key).nonzero().view(-1)
        if self.quota <= len(equal):
            self.last_tie = first + a + int(equal[self.quota - 1])
        self.quota -= len(equal)


class StreamedOrder(Sweep):
    """`OrderStatistic` over a tensor or model in pieces.

    keys:  of a chunk, for each k of some: [n] int32 or int64 on the device, the keys of |delta_k|; for a
           statistic of the variance, those of it for k = 0.
    whole: makes the backend's own sweep, for a chunk that is everything at once.
    """

    def __init__(
        self,
        request: OrderStatistic,
        n: int,
        n_keys: int,
        wide: bool,
        keys: Keys,
        whole: Callable[[], Sweep],
    ) -> None:
        self._n, self._wide, self._n_keys = n, wide, n_keys
        self._keys, self._make = keys, whole
        self._whole: Sweep | None = None
        self._all_ties = request.all_ties
        self._fraction = request.fraction_of_nonzero
        by_rank = self._fraction is None and bool(request.ranks)
        self._n_ranks = len(request.ranks[0]) if by_rank else 1
        largest = INF_KEY[wide] + 1
        self._targets = [
            _Target(r, k, largest) for k in range(n_keys) for r in range(self._n_ranks)
        ]
        self._open = list(self._targets) if n else []  # a fraction of no elements is none
        if self._fraction is None:
            self._open = [
                t for t in self._targets if not t.settle(int(request.ranks[t.k][t.r]), n, ALL_ABOVE)
            ]
        self._ranked = self._fraction is None
        self._most = most_candidates(n, len(self._targets))
        self._began = False
        self._pass = "sample" if self.pays(n) and self._open else "count"
        self._sampled: dict[int, list[Tensor]] = {}
        self._nonzero: dict[int, Tensor | int] = {}

    @staticmethod
    def pays(n: int) -> bool:
        """Return whether a sample of n elements is worth a pass: else keys of all brackets are kept."""
        return n >= SMALLEST

    # ---- what is fed ------------------------------------------------------------------------------

    def wanted(self) -> Sequence[tuple[int, int]] | None:
        if self._whole is not None:
            return self._whole.wanted()
        if self._pass == "sample":
            return sampled_ranges(self._n)
        if self._pass == "count":
            return None if self._open else []
        return merged(t.place for t in self._targets if t.quota > 0)

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if not chunk.n:
            return
        if not self._began and chunk.n == self._n:
            self._whole = self._make()  # all of it is here
        self._began = True
        if self._whole is not None:
            self._whole.feed(chunk, offset)
            return
        for a in range(0, chunk.n, PART):
            part = sliced(chunk, a, min(chunk.n, a + PART))
            self._feed_part(part, offset + part.start)

    def _feed_part(self, part: Chunk, first: int) -> None:
        targets = self._open
        if self._pass == "tie":
            stop = first + part.n
            targets = [
                t for t in self._targets
                if t.quota > 0 and t.place[0] < stop and first < t.place[1]
            ]  # fmt: skip
        own = sorted({t.k for t in targets})
        for k, keys in zip(own, self._keys(part, own), strict=True):
            if self._pass == "sample":
                self._sampled.setdefault(k, []).append(keys)
                continue
            if not self._ranked:
                self._nonzero[k] = self._nonzero.get(k, 0) + (keys != 0).sum()
            for t in targets:
                if t.k == k and self._pass == "count":
                    t.count(keys, first, self._most)
                elif t.k == k:
                    t.find_tie(keys, first)

    def next_pass(self) -> bool:
        if self._whole is not None:
            return self._whole.next_pass()
        self._began = True
        if self._pass == "sample":
            self._bracket()
            self._pass = "count"
            return True
        if self._pass == "tie" or not self._open:
            return False
        if not self._ranked:
            self._rank_fractions()
        self._open = [t for t in self._open if not t.conclude(self._all_ties)]
        if self._open:
            return True
        self._pass = "tie"
        return any(t.quota > 0 for t in self._targets)

    def result(self) -> list[Cut]:
        if self._whole is not None:
            cuts: list[Cut] = self._whole.result()
            return cuts
        value = np.full((self._n_ranks, self._n_keys, 1), math.inf)
        tie = np.full((self._n_ranks, self._n_keys, 1), -1, np.int64)
        for t in self._targets:
            value[t.r, t.k], tie[t.r, t.k] = t.value, t.last_tie
        return [Cut(v, i) for v, i in zip(value, tie, strict=True)]

    # ---- ranks and brackets -----------------------------------------------------------------------

    def _rank_fractions(self) -> None:
        assert self._fraction is not None
        self._ranked = True
        left = []
        for t in self._open:
            nonzero = int(self._nonzero[t.k])
            if not t.settle(int(self._fraction * nonzero), nonzero, ZEROS_BELOW):
                left.append(t)
        self._open = left

    def _bracket(self) -> None:
        """Set each target's bracket from the sample."""
        import torch

        for k, parts in self._sampled.items():
            keys = torch.cat(parts)
            parts.clear()
            ordered = keys.sort(descending=True).values
            for t in self._open:
                if t.k == k:
                    share = t.rank / self._n if self._fraction is None else self._fraction
                    of_nonzero = self._fraction is not None
                    t.open(*bracket(keys.view(-1, RUN), ordered, share, of_nonzero))
        self._sampled.clear()


def bracket(sample: Tensor, ordered: Tensor, share: float, of_nonzero: bool) -> tuple[int, int]:
    """Return two keys between which, both included, a cut almost surely lies.

    sample: [runs, RUN] keys; ordered: the same, [runs * RUN], the largest first. share: of all elements, or
    of the nonzero ones, that are above the cut. How far the sample's rank may be off is seen run by run:
    neighbours resemble each other, and count for fewer than they are.
    """
    m = len(ordered)
    nonzero = (sample != 0).sum(1).double()
    rank = share * (float(nonzero.sum()) if of_nonzero else m)
    about = ordered[min(max(int(rank), 0), m - 1)]
    variance = 0.0
    # On either side of the key's equals, which may be many.
    for above in (sample > about, sample >= about):
        excess = above.sum(1).double() - (share * nonzero if of_nonzero else 0)
        variance = max(variance, len(sample) * float(excess.var(correction=0)))
    margin = DEVIATIONS * math.sqrt(variance) + MARGIN
    first, last = math.floor(rank - margin), math.ceil(rank + margin)
    low = int(ordered[last - 1]) if last <= m else 0
    high = int(ordered[first - 1]) if 1 <= first <= m else INF_KEY[ordered.element_size() == 8] + 1
    return low, high


def sampled_ranges(n: int) -> list[tuple[int, int]]:
    """Return runs of RUN elements all over [0, n), at places that are uneven and always the same."""
    runs = max(1, min(MOST_RUNS, n // (SHARE * RUN)))
    stride = n // runs
    ranges = []
    for j in range(runs):
        # A low-discrepancy sequence: no period of a tensor's rows coincides with it.
        shift = int((j * 0.6180339887498949) % 1.0 * (stride - RUN))
        ranges.append((j * stride + shift, j * stride + shift + RUN))
    return ranges


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges in order, those that overlap as one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(set(ranges)):
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


__all__ = ["StreamedOrder", "most_candidates", "sampled_ranges", "scratch_bytes"]
