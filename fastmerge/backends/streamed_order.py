"""Rank cuts of what a device cannot hold: a sparse sample, one reading of everything, one of a single chunk.

A cut is a number and an index (docs/numerics.md), so a sample may say where to look for it and never what it
is. The sample brackets the key of the cut; one reading counts what is above the bracket and keeps, chunk by
chunk, which keys lie in it and how often; among those is the cut, and in which chunk its last tie lies, which
is read once more. A bracket that misses, or holds too much, costs time only: the backend's own passes follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.backends import Chunk, Sweep
from fastmerge.backends.triton_plan import INF_KEY, values_of_keys
from fastmerge.stages import Cut, OrderStatistic

if TYPE_CHECKING:
    from torch import Tensor

END = 2**63 - 1

#: Elements of one sampled run, and runs of a sample at most: four million elements bracket a cut to a few
#: thousandths, if neighbours are independent; how alike they are is seen in the sample.
RUN = 1024
MOST_RUNS = 4096

#: What is sampled at most, as a share of all, and the least for which that is worth a pass of its own.
SHARE = 16
SMALLEST = 1 << 22

#: Half the width of a bracket in standard deviations of the sample's rank.
DEVIATIONS = 5.0


def most_candidates(n: int, n_targets: int) -> int:
    """Return how many distinct keys of all chunks are kept at most; 16 bytes each."""
    return max(1 << 16, n // 64 * n_targets)


@dataclass
class _Target:
    """One cut: rank r of keys k. low, high: its bracket, both inside. above: how many keys exceed high."""

    r: int
    k: int
    rank: int = 0
    low: int = 0
    high: int = 0
    above: int = 0
    candidates: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of each chunk
    value: float = math.inf
    key: int = -1  # of the cut, once it is known
    quota: int = (
        0  # how many of its equals are above, from the range on that holds the last of them
    )
    found_in: int = -1  # that chunk
    last_tie: int = -1


class StreamedOrder(Sweep):
    """`OrderStatistic` over a tensor or model in pieces.

    keys:     of a chunk: [n_keys, n] int32 or int64, the keys of |delta| or of the variance, on the device.
    fallback: makes the backend's own sweep, which takes all passes, and a chunk that is everything at once.
    """

    def __init__(
        self,
        request: OrderStatistic,
        n: int,
        n_keys: int,
        wide: bool,
        keys: Callable[[Chunk], Tensor],
        fallback: Callable[[], Sweep],
    ) -> None:
        self._request, self._n, self._wide = request, n, wide
        self._keys, self._make = keys, fallback
        self._fallback: Sweep | None = None
        fraction = request.fraction_of_nonzero
        n_ranks = 1 if fraction is not None else len(request.ranks[0])
        self._n_ranks, self._n_keys = n_ranks, n_keys
        self._targets = [_Target(r, k) for r in range(n_ranks) for k in range(n_keys)]
        self._nonzero = [0] * n_keys
        if fraction is None:
            for target in self._targets:
                target.rank = int(request.ranks[target.k][target.r])
        self._pass = "sample"
        self._sampled: list[Tensor] = []
        self._chunks: list[tuple[int, int]] = []  # that were counted: first element, elements
        self._kept = 0

    @staticmethod
    def pays(n: int) -> bool:
        """Return whether n elements, in pieces, are better read once and a bit than once per digit."""
        return n >= SMALLEST

    # ---- what is fed ------------------------------------------------------------------------------

    def wanted(self) -> Sequence[tuple[int, int]] | None:
        if self._fallback is not None:
            return self._fallback.wanted()
        if self._pass == "sample":
            return sampled_ranges(self._n)
        if self._pass == "tie":
            held = {t.found_in for t in self._targets if t.found_in >= 0}
            return [(a, a + n) for a, n in (self._chunks[c] for c in sorted(held))]
        return None

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if self._fallback is None and chunk.n == self._n and self._pass == "sample":
            self._fallback = self._make()  # all of it is here
        if self._fallback is not None:
            self._fallback.feed(chunk, offset)
        elif chunk.n and self._pass == "sample":
            self._sampled.append(self._keys(chunk))
        elif chunk.n and self._pass == "count":
            self._count(self._keys(chunk), offset + chunk.start)
        elif chunk.n:
            self._find_ties(self._keys(chunk), offset + chunk.start)

    def next_pass(self) -> bool:
        if self._fallback is not None:
            return self._fallback.next_pass()
        if self._pass == "sample":
            self._bracket()
            self._pass = "count"
            return True
        if self._pass == "count":
            if not self._settle():
                self._fallback = self._make()
                return True
            self._pass = "tie"
            return any(t.found_in >= 0 for t in self._targets)
        return False

    def result(self) -> list[Cut]:
        if self._fallback is not None:
            cuts: list[Cut] = self._fallback.result()
            return cuts
        value = np.full((self._n_ranks, self._n_keys, 1), math.inf)
        tie = np.full((self._n_ranks, self._n_keys, 1), -1, np.int64)
        for t in self._targets:
            value[t.r, t.k], tie[t.r, t.k] = t.value, t.last_tie
        return [Cut(v, i) for v, i in zip(value, tie, strict=True)]

    # ---- the sample -------------------------------------------------------------------------------

    def _bracket(self) -> None:
        """Set each target's bracket from the sample, its ranks' spread seen run by run."""
        import torch

        sample = torch.cat(self._sampled, dim=1)
        self._sampled.clear()
        ordered = torch.sort(sample, dim=1, descending=True).values
        m = sample.shape[1]
        fraction = self._request.fraction_of_nonzero
        for t in self._targets:
            keys = sample[t.k].view(-1, RUN)
            nonzero = (keys != 0).sum(1).double()
            share = t.rank / self._n if fraction is None else fraction * float(nonzero.sum()) / m
            at = share * m
            about = ordered[t.k, min(max(int(at), 0), m - 1)]
            above = (keys > about).sum(1).double()
            excess = above - (share * RUN if fraction is None else fraction * nonzero)
            deviation = math.sqrt(len(keys) * float(excess.var(correction=0)))
            margin = DEVIATIONS * deviation + 4
            first, last = math.floor(at - margin), math.ceil(at + margin)
            t.high = int(ordered[t.k, first - 1]) if first >= 1 else INF_KEY[self._wide] + 1
            t.low = int(ordered[t.k, last - 1]) if last <= m else 0

    # ---- the reading ------------------------------------------------------------------------------

    def _count(self, keys: Tensor, first: int) -> None:
        """Count one chunk. Waits for the device once per target: how much lies inside decides memory."""
        import torch

        self._chunks.append((first, keys.shape[1]))
        if self._request.fraction_of_nonzero is not None:
            for k, n in enumerate((keys != 0).sum(1).tolist()):
                self._nonzero[k] += n
        for t in self._targets:
            own = keys[t.k]
            t.above += int((own > t.high).sum())
            if self._kept > most_candidates(self._n, len(self._targets)):
                continue  # too much already: it will be done another way
            inside = own[(own >= t.low) & (own <= t.high)]
            found, counts = torch.unique(inside, return_counts=True)
            t.candidates.append((found, counts))
            self._kept += len(found)

    def _settle(self) -> bool:
        """Find each cut among the candidates; False if one is not there."""
        if self._kept > most_candidates(self._n, len(self._targets)):
            return False
        for t in self._targets:
            if self._is_trivial(t):
                continue
            if not self._find(t):
                return False
        return True

    def _is_trivial(self, t: _Target) -> bool:
        """Set the cut of a rank that leaves nothing to find."""
        fraction = self._request.fraction_of_nonzero
        if fraction is not None:
            t.rank = int(fraction * self._nonzero[t.k])
        if t.rank <= 0:
            return True
        if fraction is not None and t.rank >= self._nonzero[t.k]:
            t.value = 0.0
            return True
        if t.rank >= self._n:
            t.value, t.last_tie = -1.0, END
            return True
        return False

    def _find(self, t: _Target) -> bool:
        import torch

        keys = torch.cat([found for found, _ in t.candidates])
        counts = torch.cat([counts for _, counts in t.candidates])
        distinct, place = torch.unique(keys, return_inverse=True)
        total = torch.zeros(len(distinct), dtype=torch.int64, device=keys.device)
        total = total.index_add_(0, place, counts).flip(0)  # the largest key first
        upto = torch.cumsum(total, 0)
        wanted = t.rank - t.above
        if wanted < 1 or not len(upto) or wanted > int(upto[-1]):
            return False
        i = int(torch.searchsorted(upto, wanted))
        t.key = int(distinct[len(distinct) - 1 - i])
        t.value = float(values_of_keys([t.key], self._wide)[0])
        t.quota = wanted - int(upto[i] - total[i])
        t.last_tie = END
        if not self._request.all_ties:
            self._find_chunk(t)
        t.candidates.clear()
        return True

    def _find_chunk(self, t: _Target) -> None:
        """Find the chunk that holds the last equal element above the cut."""
        for c, (found, counts) in enumerate(t.candidates):
            equal = int(counts[found == t.key].sum())
            if t.quota <= equal:
                t.found_in = c
                return
            t.quota -= equal

    def _find_ties(self, keys: Tensor, first: int) -> None:
        n = keys.shape[1]
        for t in self._targets:
            if t.found_in < 0 or t.quota <= 0:
                continue
            start, length = self._chunks[t.found_in]
            if not (start <= first and first + n <= start + length):
                continue
            equal = (keys[t.k] == t.key).nonzero().view(-1)
            if t.quota <= len(equal):
                t.last_tie = first + int(equal[t.quota - 1])
            t.quota -= len(equal)


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


__all__ = ["StreamedOrder", "most_candidates", "sampled_ranges"]
