"""Stages lowered to what the Triton kernels take: a table of 64-bit words, and compile-time constants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastmerge.backends import Buffer, Chunk
from fastmerge.backends.lowering import DIVIDE, ON_ZERO, VOTES, given_masks
from fastmerge.stages import F64, Axis, Cut, Drop, Keep, RankedDrop, Walk

Words = NDArray[np.int64]

#: The layout of the table: triton_kernels/fused.py.
SELECT, DIVISOR, FLOOR, LAMBDA, N_EXPERTS, SHARED = 0, 2, 3, 4, 5, 6
COEFFICIENT, VOTE_SCALE, WEIGHT, TRIM, REMOVE, DRAW_KEY, THRESHOLD, INVERSE, EXPERT = (
    0, 1, 2, 3, 5, 7, 8, 9, 10,
)  # fmt: skip

#: Arguments that a stage of a method's own may have.
MOST_ARGUMENTS = 4

#: Elements that scratch memory is made for at once; operands of this length stay in a GPU's cache.
SPAN = 1 << 23

#: Keys of infinity, by whether the compute type is float64. NaN's is one more.
INF_KEY = {False: 0x7F800000, True: 0x7FF0000000000000}


def real_words(values: Any, wide: bool) -> Words:
    """Return host scalars rounded once to Real, as their bits."""
    x = np.asarray(values, dtype=np.float64)
    if wide:
        return x.view(np.int64)
    with np.errstate(all="ignore"):
        return x.astype(np.float32).view(np.int32).astype(np.int64)


def key_words(values: Any, wide: bool) -> Words:
    """Return the keys of cut values; -1 for those that have everything above."""
    x = np.asarray(values, dtype=np.float64)
    mask = 0x7FFFFFFFFFFFFFFF if wide else 0x7FFFFFFF
    keys = np.minimum(real_words(x, wide) & mask, INF_KEY[wide] + 1)
    return np.where(x < 0, -1, keys)


def values_of_keys(keys: Any, wide: bool) -> F64:
    """Return the |x| of keys, in float64."""
    held = np.asarray(keys, np.int64)
    bits = np.minimum(held, INF_KEY[wide]).astype(np.int64 if wide else np.int32)
    values = bits.view(np.float64 if wide else np.float32).astype(np.float64)
    return np.where(held > INF_KEY[wide], math.nan, values)


@dataclass
class Plan:
    """A lowered walk or keep. words: the table; flags: the kernels' constants; extra: row-wise values."""

    words: Words
    flags: dict[str, Any]
    drop: RankedDrop | None
    masks: Sequence[Any]
    rescale: bool
    extra: list[Words] = field(default_factory=list)

    def table(self) -> Words:
        """Return the words of the table, per-unit values behind the scalars."""
        return np.concatenate([self.words, *self.extra])

    def place(self, values: Words) -> int:
        """Add the values of all units of one expert; returns their offset in the table."""
        at = len(self.words) + sum(len(e) for e in self.extra)
        self.extra.append(values)
        return at

    def set_cut(self, slot: int, k: int, stride: int, cut: Cut, wide: bool) -> None:
        keys = key_words(cut.value[k], wide)
        ties = np.asarray(cut.last_tie[k], np.int64)
        at = SHARED + k * stride + slot
        if cut.axis is Axis.TENSOR:
            self.words[at], self.words[at + 1] = keys[0], ties[0]
        else:
            self.words[at], self.words[at + 1] = self.place(keys), self.place(ties)


def _uniform(p: float, given: bool) -> tuple[bool, int, float]:
    """Return of a probability: whether its draws have 32 bits, their threshold, the rescale factor."""
    if not 0 < p < 1:  # exact: 16-bit draws are all below 65536 and none below 0
        return False, 65536 if p >= 1 else 0, 1.0
    fine = p < 0.005 or p > 0.995
    full = 2**32 if fine else 2**16
    threshold = min(max(math.floor(p * full + 0.5), 1), full - 1)
    return fine, threshold, 1 / p if given else full / threshold


def lower_keep(keep: Keep, n_experts: int, wide: bool, n_arguments: int = 0) -> Plan:
    """Lower the keep stages of `n_experts` experts."""
    stride = EXPERT + n_arguments
    masks = given_masks(keep)
    drop = keep.drop
    plan = Plan(
        np.zeros(SHARED + n_experts * stride, np.int64),
        {
            "K": n_experts,
            "TRIM": int(keep.trim.keep.axis) + 1 if keep.trim else 0,
            "REMOVE": int(keep.trim.remove.axis) + 1 if keep.trim and keep.trim.remove else 0,
            "SELECT": bool(keep.select),
            "GIVEN": bool(masks),
            "DROP": 0 if drop is None else 1 if isinstance(drop, Drop) else 2,
            "WIDE": wide,
        },
        drop if isinstance(drop, RankedDrop) else None,
        masks,
        drop is not None and drop.rescale,
    )
    plan.words[N_EXPERTS] = real_words([n_experts], wide)[0]
    if keep.select:
        cut = keep.select.cut
        plan.words[SELECT] = key_words(cut.value[0], wide)[0]
        plan.words[SELECT + 1] = np.asarray(cut.last_tie[0], np.int64)[0]
    fine = [False] * n_experts
    for k in range(n_experts):
        at = SHARED + k * stride
        if keep.trim:
            plan.set_cut(TRIM, k, stride, keep.trim.keep, wide)
            if keep.trim.remove:
                plan.set_cut(REMOVE, k, stride, keep.trim.remove, wide)
        if drop is not None:
            plan.words[at + DRAW_KEY] = np.uint64(drop.key[k] & (2**64 - 1)).astype(np.int64)
        if isinstance(drop, Drop):
            fine[k], threshold, inverse = _uniform(float(drop.keep_probability[k]), bool(masks))
            plan.words[at + THRESHOLD] = threshold
            plan.words[at + INVERSE] = real_words([inverse], wide)[0]
    plan.flags["FINE"] = tuple(fine)
    return plan


def lower_walk(walk: Walk, n_experts: int, wide: bool) -> Plan:
    """Lower a walk with at least one expert."""
    stage = walk.transform
    arguments = stage.arguments if stage else ()
    plan = lower_keep(walk.keep, n_experts, wide, len(arguments))
    stride = EXPERT + len(arguments)
    elect, combine = walk.elect, walk.combine
    by_weight = elect is not None and combine.divide_by == "weight"
    plan.flags |= {
        "HAS_BASE": walk.takes_base,
        "ADD_BASE": walk.add_base,
        "OVER": int(walk.axis) + 1,
        "RESCALE": plan.rescale,
        "VOTE": VOTES[elect.by] if elect else 0,
        "ON_ZERO": ON_ZERO[elect.on_zero] if elect else 0,
        "TAKE_MAX": combine.by == "max",
        "DIVIDE": 0 if combine.divide_by == "weight" and not by_weight else DIVIDE[combine.divide_by],
        "HAS_FLOOR": bool(real_words([combine.floor], wide)[0] > 0),
        "HAS_LAMBDA": combine.lambda_ != 1,
        "STAGE": stage.function if stage else None,
        "ARGUMENTS": len(arguments),
    }  # fmt: skip
    scalars = [combine.divisor, combine.floor, combine.lambda_]
    plan.words[[DIVISOR, FLOOR, LAMBDA]] = real_words(scalars, wide)
    scale = (elect.vote_scale if elect else None) or [1.0] * n_experts
    weight = combine.divisor_weight or [1.0] * n_experts
    for k in range(n_experts):
        at = SHARED + k * stride
        plan.words[[at + VOTE_SCALE, at + WEIGHT]] = real_words([scale[k], weight[k]], wide)
        coefficient = real_words(walk.coefficient[k], wide)
        over_units = walk.axis is not Axis.TENSOR
        plan.words[at + COEFFICIENT] = plan.place(coefficient) if over_units else coefficient[0]
        for a, row in enumerate(arguments):
            plan.words[at + EXPERT + a] = real_words([row[k]], wide)[0]
    return plan


# ---- pieces of a chunk ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense(Chunk):
    """A chunk without codes: every operand is elements in memory."""

    base: Buffer | None
    experts: Sequence[Buffer]


AnyChunk = TypeVar("AnyChunk", bound=Chunk)


def sliced(chunk: AnyChunk, a: int, b: int) -> AnyChunk:
    """Return elements [a, b) of a chunk."""
    if (a, b) == (0, chunk.n):
        return chunk
    base: Any = chunk.base.slice(a, b) if chunk.base else None
    experts: Any = [x.slice(a, b) for x in chunk.experts]
    return replace(chunk, base=base, experts=experts, start=chunk.start + a, n=b - a)


def spans(
    chunk: AnyChunk, drop: RankedDrop | None, most: int = SPAN, unit: int = 1
) -> Iterator[tuple[int, AnyChunk]]:
    """Cut a chunk into parts of about `most` elements that hold whole units of a ranked drop.

    unit: elements that all but the last part are a multiple of.
    """
    if drop is not None:
        unit = math.lcm(unit, chunk.cols) if drop.axis is Axis.ROW else chunk.n
    step = max(1, most // max(1, unit)) * unit
    for a in range(0, chunk.n, max(1, step)):
        yield a, sliced(chunk, a, min(chunk.n, a + step))
