"""Stages lowered to the structs of csrc/core/plan.hpp, for whichever compiled module takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmerge.backends import Chunk, Coded
from fastmerge.stages import Axis, Cut, Drop, Keep, RankedDrop, Walk

MOMENTS = {"abs": 0, "square": 1, "max": 2}
VOTES = {"mass": 1, "delta": 2, "count": 3, "normmass": 4, "normfrac": 5}
ON_ZERO = {"plus": 0, "minus": 1, "none": 2}
DIVIDE = {"none": 0, "constant": 1, "weight": 2}


#: csrc/core/types.hpp's DType::Coded.
CODED = 4


def lower_operands(native: Any, chunk: Chunk, with_base: bool = True) -> Any:
    """Return `native.Operands` of a chunk."""
    base = chunk.base if with_base else None
    operands = [*chunk.experts, *([base] if base else [])]
    coded = {id(x): lower_coded(native, x) for x in operands if isinstance(x, Coded)}
    places = [
        (coded[id(x)].address, CODED) if isinstance(x, Coded) else (x.address, x.dtype.code)
        for x in operands
    ]
    base_place = places.pop() if base else (0, 1)
    return native.Operands(
        *base_place,
        [address for address, _ in places],
        [code for _, code in places],
        chunk.start,
        chunk.n,
        chunk.cols,
        list(coded.values()),
    )


def lower_coded(native: Any, coded: Coded) -> Any:
    """Return `native.Coded`; the memory is the caller's."""
    c, slots = coded.coding, coded.slots
    fields: dict[str, Any] = {name: slots[name].address for name in slots}
    if "low_a" in slots:
        fields["low_type"] = slots["low_a"].dtype.code
        fields["rank"] = slots["low_a"].n // coded.cols
    return native.Coded(
        format=int(c.format),
        type=c.dtype.code,
        scale_type=int(c.scale),
        group=c.group,
        group_rows=c.group_rows,
        symmetric=c.symmetric,
        v1=c.v1,
        other_rule=c.other_rule,
        search=c.search,
        rotary=c.rotary,
        rows=coded.rows,
        cols=coded.cols,
        origin=coded.origin,
        first=coded.start,
        nested_offset=coded.nested_offset,
        tensor_scale=coded.tensor_scale,
        low_scale=coded.low_scale,
        **fields,
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
