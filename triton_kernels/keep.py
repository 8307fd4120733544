"""Which elements of an expert survive: cuts, selection by variance, draws and masks from outside.

docs/numerics.md, "Keep", is the definition; csrc/core/stages.hpp the same in C++. The kernels of fused.py
call these on a block; the only memory moved here is 4 or 8 bytes per element and expert under a ranked drop,
and 1 per expert under given masks.

Scalars come in a table of 64-bit words: SHARED words, then EXPERT words of each expert, then its arguments
to a stage of the method's own. Reals are held as their bits. Where a value is over rows or columns, its word
holds the offset, in words, of one value per unit.
"""

import triton
import triton.language as tl

from .element import (
    bytes_of,
    divide,
    draw16,
    draw32,
    key_of,
    load_key,
    load_real,
    load_scalar,
    load_word,
)

#: Words before those of the experts.
SELECT_KEY = tl.constexpr(0)
SELECT_TIE = tl.constexpr(1)
DIVISOR = tl.constexpr(2)
FLOOR = tl.constexpr(3)
LAMBDA = tl.constexpr(4)
N_EXPERTS = tl.constexpr(5)
SHARED = tl.constexpr(6)

#: Words of one expert, before its arguments.
COEFFICIENT = tl.constexpr(0)
VOTE_SCALE = tl.constexpr(1)
WEIGHT = tl.constexpr(2)
TRIM_KEY = tl.constexpr(3)
TRIM_TIE = tl.constexpr(4)
REMOVE_KEY = tl.constexpr(5)
REMOVE_TIE = tl.constexpr(6)
DRAW_KEY = tl.constexpr(7)
THRESHOLD = tl.constexpr(8)
INVERSE = tl.constexpr(9)
EXPERT = tl.constexpr(10)

#: Over what a value is: absent, or the axis plus one.
TENSOR = tl.constexpr(1)
ROW = tl.constexpr(2)

#: Kinds of drop.
UNIFORM = tl.constexpr(1)
RANKED = tl.constexpr(2)


@triton.jit
def load_unit_words(table, at, unit, lane, left, MASKED: tl.constexpr):
    """Load [BLOCK] words of the table: the one at `at` says where, `unit` which."""
    place = load_word(table, at) + unit
    pointer = table.to(tl.pointer_type(tl.int64)) + place
    if MASKED:
        words = tl.load(pointer, mask=lane < left, other=0)
    else:
        words = tl.load(pointer)
    return words


@triton.jit
def is_above(
    key,  # [BLOCK], keys of the values
    table,
    at,  # word of the cut's key; that of its last tie follows
    row,  # [BLOCK] int64, only OVER rows
    flat,  # int64, flat index of the block's first element
    lane,
    left,
    OVER: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return [BLOCK] bool: which values lie above their unit's cut. The key -1 has all above it."""
    if OVER == ROW:
        cut = load_unit_words(table, at, row, lane, left, MASKED)
        if not WIDE:
            cut = cut.to(tl.int32)
        tie = load_unit_words(table, at + 1, row, lane, left, MASKED) >= flat + lane
    else:
        cut = load_key(table, at, WIDE)
        # Ties up to this place of the block are above: one 64-bit comparison for all of it.
        quota = tl.minimum(tl.maximum(load_word(table, at + 1) - flat, -1), BLOCK)
        tie = lane <= quota.to(tl.int32)
    return (key > cut) | ((key == cut) & tie)


@triton.jit
def variance_key(
    b,
    experts,
    first,
    lane,
    left,
    n_experts,  # Real scalar, K
    TYPES: tl.constexpr,
    K: tl.constexpr,
    HAS_BASE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return [BLOCK] keys of the population variance over experts."""
    mean = b
    for k in tl.static_range(K):
        d = load_real(experts[k], first, lane, left, TYPES[k], BLOCK, WIDE, ALIGNED, MASKED)
        if HAS_BASE:
            d = d - b
        if k == 0:
            mean = d
        else:
            mean = mean + d
    count = tl.zeros_like(mean) + n_experts
    mean = divide(mean, count, WIDE)
    total = mean
    for k in tl.static_range(K):
        d = load_real(experts[k], first, lane, left, TYPES[k], BLOCK, WIDE, ALIGNED, MASKED)
        if HAS_BASE:
            d = d - b
        e = d - mean
        if k == 0:
            total = e * e
        else:
            total = total + e * e
    return key_of(divide(total, count, WIDE), WIDE)


@triton.jit
def keep_block(
    d,  # [BLOCK] Real, deltas of expert k
    chosen,  # [BLOCK] bool, only under SELECT
    table,
    at,  # word where expert k's begin
    mask_of,  # int64, address of [n] uint8; only if GIVEN
    thresholds,  # int64, address of expert k's [n] uint32; only under a ranked drop
    inverses,  # int64, address of expert k's [n] Real; only if that rescales
    first,
    flat,
    row,
    lane,
    left,
    TRIM: tl.constexpr,
    REMOVE: tl.constexpr,
    SELECT: tl.constexpr,
    GIVEN: tl.constexpr,
    DROP: tl.constexpr,
    FINE: tl.constexpr,
    RESCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DRAWS_ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return [BLOCK] bool, what survives of expert k, and [BLOCK] Real: that, rescaled, and +0 elsewhere."""
    keep = lane < BLOCK
    if TRIM or REMOVE:
        key = key_of(d, WIDE)
        if TRIM:
            keep = keep & is_above(
                key, table, at + TRIM_KEY, row, flat, lane, left, TRIM, BLOCK, WIDE, MASKED
            )
        if REMOVE:
            keep = keep & (
                is_above(
                    key, table, at + REMOVE_KEY, row, flat, lane, left, REMOVE, BLOCK, WIDE, MASKED
                )
                == 0
            )
    if SELECT:
        keep = keep & chosen
    if GIVEN:
        pointer = bytes_of(mask_of, ALIGNED) + first + lane
        if MASKED:
            keep = keep & (tl.load(pointer, mask=lane < left, other=0) != 0)
        else:
            keep = keep & (tl.load(pointer) != 0)
    elif DROP == UNIFORM:
        seed = load_word(table, at + DRAW_KEY)
        if FINE:
            draw = draw32(seed, flat, BLOCK, DRAWS_ALIGNED)
        else:
            draw = draw16(seed, flat, BLOCK, DRAWS_ALIGNED)
        keep = keep & (draw < load_word(table, at + THRESHOLD).to(tl.uint32))
    elif DROP == RANKED:
        draw = draw16(load_word(table, at + DRAW_KEY), flat, BLOCK, DRAWS_ALIGNED)
        pointer = thresholds.to(tl.pointer_type(tl.uint32))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        pointer = pointer + first + lane
        if MASKED:
            keep = keep & (draw < tl.load(pointer, mask=lane < left, other=0))
        else:
            keep = keep & (draw < tl.load(pointer))
    v = d
    if RESCALE:
        if DROP == RANKED:
            v = d * load_real(
                inverses, first, lane, left, 0 if WIDE else 1, BLOCK, WIDE, ALIGNED, MASKED
            )
        else:
            v = d * load_scalar(table, at + INVERSE, WIDE)
    return keep, tl.where(keep, v, 0.0)
