"""Stages lowered to the structs of csrc/core/plan.hpp, for whichever compiled module takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmerge.backends import Chunk
from fastmerge.stages import Axis, Cut, Drop, Keep, RankedDrop, Walk

MOMENTS = {"abs": 0, "square": 1, "max": 2}
VOTES = {"mass": 1, "delta": 2, "count": 3, "normmass": 4, "normfrac": 5}
ON_ZERO = {"plus": 0, "minus": 1, "none": 2}
DIVIDE = {"none": 0, "constant": 1, "weight": 2}


def lower_operands(native: Any, chunk: Chunk, with_base: bool = True) -> Any:
    """Return `native.Operands` of a chunk."""
    base = chunk.base if with_base else None
    return native.Operands(
        base.address if base else 0,
        base.dtype.code if base else 1,
        [x.address for x in chunk.experts],
        [x.dtype.code for x in chunk.experts],
        chunk.start,
        chunk.n,
        chunk.cols,
    )


def given_masks(keep: Keep) -> Sequence[Any]:
    """Return the masks from outside, one per expert, or none."""
    return keep.given.masks if keep.given else ()


def lower_keep(native: Any, keep: Keep, masks: Sequence[int]) -> Any:
    """Return `native.Keep`. masks: addresses of [n] uint8, where the kernels can read them."""
    plan = native.Keep()
    if keep.trim:
        _add_cut(plan, "trim", keep.trim.keep)
        if keep.trim.remove:
            _add_cut(plan, "remove", keep.trim.remove)
    if keep.select:
        _add_cut(plan, "select", keep.select.cut)
    drop = keep.drop
    if isinstance(drop, Drop):
        p = list(drop.keep_probability)
        plan.drop(1, p, p, list(drop.key), int(Axis.TENSOR), False, drop.rescale)
    elif isinstance(drop, RankedDrop):
        plan.drop(
            2,
            list(drop.low),
            list(drop.high),
            list(drop.key),
            int(drop.axis),
            drop.by == "value",
            drop.rescale,
        )
    if masks:
        plan.masks(list(masks))
    return plan


def _add_cut(plan: Any, which: str, cut: Cut) -> None:
    plan.cut(which, cut.value, cut.last_tie, int(cut.axis))


def lower_walk(native: Any, walk: Walk, keep: Any) -> Any:
    """Return `native.Walk` of a walk and its lowered keep stages."""
    elect, combine = walk.elect, walk.combine
    return native.Walk(
        keep,
        walk.coefficient,
        int(walk.axis),
        VOTES[elect.by] if elect else 0,
        ON_ZERO[elect.on_zero] if elect else 0,
        list(elect.vote_scale or ()) if elect else [],
        combine.by == "max",
        DIVIDE[combine.divide_by],
        combine.divisor,
        list(combine.divisor_weight or ()),
        combine.floor,
        combine.lambda_,
        walk.add_base,
    )
