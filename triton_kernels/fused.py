"""The fused walk, the keep masks and the sign balance: all that goes through the stages element by element.

docs/numerics.md, "Keep" and "Walk", is the definition; csrc/core/stages.hpp the same in C++. The walk moves
(K + 1) reads and 1 write of the stored types per element, 4 or 8 bytes more per expert under a ranked drop
and 1 per expert under given masks. A mask reads as much and writes K bytes; a sign balance writes nothing.

Scalars come in a table whose layout is in keep.py.
"""

import triton
import triton.language as tl

from .element import (
    ALARM,
    bytes_of,
    divide,
    key_of,
    load_real,
    load_scalar,
    load_watched,
    real_of_word,
    store_real,
    unit_of,
)
from .keep import (
    COEFFICIENT,
    DIVISOR,
    EXPERT,
    FLOOR,
    LAMBDA,
    N_EXPERTS,
    ROW,
    SELECT_KEY,
    SHARED,
    TENSOR,
    VOTE_SCALE,
    WEIGHT,
    is_above,
    keep_block,
    load_unit_words,
    variance_key,
)

#: Codes of fastmerge.backends.lowering.
MASS = tl.constexpr(1)
COUNT = tl.constexpr(3)
NORMMASS = tl.constexpr(4)
NORMFRAC = tl.constexpr(5)
ZERO_PLUS = tl.constexpr(0)
ZERO_NOTHING = tl.constexpr(2)
BY_CONSTANT = tl.constexpr(1)
BY_WEIGHT = tl.constexpr(2)


# ---- elect ---------------------------------------------------------------------------------------


@triton.jit
def vote_of(v, value, table, at, VOTE: tl.constexpr, WIDE: tl.constexpr):
    """Return [BLOCK] Real: what expert k adds to the vote; for normfrac, whose sign is its camp."""
    if VOTE == MASS:
        vote = value
    elif VOTE == COUNT:
        vote = tl.where(v > 0, 1.0, tl.where(v < 0, -1.0, v))
    elif VOTE == NORMMASS:
        scale = load_scalar(table, at + VOTE_SCALE, WIDE)
        vote = (v * tl.abs(v)) * scale
    else:
        vote = v
    return vote


@triton.jit
def larger(x, best, WIDE: tl.constexpr):
    """Return [BLOCK] bool: whether x is of strictly larger key."""
    return key_of(x, WIDE) > key_of(best, WIDE)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["start", "n", "cols"])
def merge_elements_kernel(
    base,  # int64, address of [n] BASE; not read without HAS_BASE
    experts,  # K x int64, addresses of [n] TYPES[k]
    out,  # int64, address of [n] OUT
    table,  # int64, address of [words] int64
    given,  # K x int64, addresses of [n] uint8
    thresholds,  # int64, address of [K, stride] uint32
    inverses,  # int64, address of [K, stride] Real
    stride: tl.int64,  # elements from one expert's thresholds and inverses to the next one's
    flag,  # int64, address of [1] int32: set if an operand is not finite
    start: tl.int64,  # flat index in the tensor of the first element
    n: tl.int64,
    cols: tl.int64,
    K: tl.constexpr,
    BASE: tl.constexpr,
    TYPES: tl.constexpr,
    OUT: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ADD_BASE: tl.constexpr,
    OVER: tl.constexpr,
    TRIM: tl.constexpr,
    REMOVE: tl.constexpr,
    SELECT: tl.constexpr,
    GIVEN: tl.constexpr,
    DROP: tl.constexpr,
    FINE: tl.constexpr,
    RESCALE: tl.constexpr,
    VOTE: tl.constexpr,
    ON_ZERO: tl.constexpr,
    TAKE_MAX: tl.constexpr,
    DIVIDE: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_LAMBDA: tl.constexpr,
    STAGE: tl.constexpr,
    ARGUMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DRAWS_ALIGNED: tl.constexpr,
    LONG: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Merge one block: base + lambda * combine_k(coefficient_k * keep(expert_k - base)).

    Without ADD_BASE nothing is added; without HAS_BASE nothing is subtracted either.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    flat = start + first
    lane = tl.arange(0, BLOCK)
    left = n - first
    zero = tl.zeros([BLOCK], tl.float64 if WIDE else tl.float32)
    b = zero
    seen = tl.zeros([BLOCK], tl.uint32)
    if HAS_BASE:
        b, seen = load_watched(base, first, lane, left, BASE, BLOCK, WIDE, ALIGNED, MASKED)
    row = lane
    if TRIM == ROW or REMOVE == ROW:
        row = unit_of(flat, cols, lane, 1, BLOCK, LONG)
    unit = lane
    if OVER > TENSOR:
        unit = unit_of(flat, cols, lane, OVER - 1, BLOCK, LONG)
    chosen = lane
    if SELECT:
        n_experts = load_scalar(table, N_EXPERTS, WIDE)
        key = variance_key(
            b, experts, first, lane, left, n_experts,
            TYPES, K, HAS_BASE, BLOCK, WIDE, ALIGNED, MASKED,
        )  # fmt: skip
        chosen = is_above(
            key, table, SELECT_KEY, row, flat, lane, left, TENSOR, BLOCK, WIDE, MASKED
        )

    total = zero
    plus_votes = zero
    minus_votes = zero
    plus_value = zero
    minus_value = zero
    plus_weight = zero
    minus_weight = zero
    best_score = zero
    for k in tl.static_range(K):
        at = SHARED + k * (EXPERT + ARGUMENTS)
        x, alarm = load_watched(
            experts[k], first, lane, left, TYPES[k], BLOCK, WIDE, ALIGNED, MASKED
        )
        seen = seen | alarm
        d = x
        if HAS_BASE:
            d = x - b
        mask_of = given
        if GIVEN:
            mask_of = given[k]
        _keep, v = keep_block(
            d, chosen, table, at, mask_of, thresholds + k * stride * 4,
            inverses + k * stride * (8 if WIDE else 4), first, flat, row, lane, left,
            TRIM, REMOVE, SELECT, GIVEN, DROP, FINE[k], RESCALE, BLOCK, WIDE, ALIGNED,
            DRAWS_ALIGNED, MASKED,
        )  # fmt: skip
        if STAGE is not None:
            v = apply_stage(v, b, flat + lane, table, at, STAGE, ARGUMENTS, WIDE)
        if OVER > TENSOR:
            word = load_unit_words(table, at + COEFFICIENT, unit, lane, left, MASKED)
            value = v * real_of_word(word, WIDE)
        else:
            value = v * load_scalar(table, at + COEFFICIENT, WIDE)
        if VOTE:
            vote = vote_of(v, value, table, at, VOTE, WIDE)
            plus = vote > 0
            minus = (vote >= 0) == 0  # NaN is carried by the minus camp
            if VOTE == NORMFRAC:
                score = (v * v) * load_scalar(table, at + VOTE_SCALE, WIDE)
                better = score > best_score
                best_score = tl.where(better, score, best_score)
                total = tl.where(better, v, total)
            else:
                plus_votes = plus_votes + tl.where(plus, vote, 0.0)
                minus_votes = minus_votes + tl.where(minus, vote, 0.0)
            if TAKE_MAX:
                plus_value = tl.where(plus & larger(value, plus_value, WIDE), value, plus_value)
                minus_value = tl.where(minus & larger(value, minus_value, WIDE), value, minus_value)
            else:
                plus_value = plus_value + tl.where(plus, value, 0.0)
                minus_value = minus_value + tl.where(minus, value, 0.0)
            if DIVIDE == BY_WEIGHT:
                weight = load_scalar(table, at + WEIGHT, WIDE)
                plus_weight = plus_weight + tl.where(plus, weight, 0.0)
                minus_weight = minus_weight + tl.where(minus, weight, 0.0)
        elif k == 0:
            total = value
        elif TAKE_MAX:
            total = tl.where(larger(value, total, WIDE), value, total)
        else:
            total = total + value

    merged = total
    if VOTE:
        if VOTE != NORMFRAC:
            total = plus_votes + minus_votes
        if ON_ZERO == ZERO_PLUS:
            elect_plus = total >= 0
        else:
            elect_plus = total > 0
        merged = tl.where(elect_plus, plus_value, minus_value)
        if DIVIDE == BY_WEIGHT:
            weight = tl.where(elect_plus, plus_weight, minus_weight)
            if HAS_FLOOR:
                floor = load_scalar(table, FLOOR, WIDE)
                weight = tl.where(weight < floor, floor, weight)
            else:
                weight = tl.where(weight == 0, 1.0, weight)
            merged = divide(merged, weight, WIDE)
    if DIVIDE == BY_CONSTANT:
        merged = divide(merged, zero + load_scalar(table, DIVISOR, WIDE), WIDE)
    if VOTE and ON_ZERO == ZERO_NOTHING:
        merged = tl.where(total == 0, 0.0, merged)
    if HAS_LAMBDA:
        merged = merged * load_scalar(table, LAMBDA, WIDE)
    if ADD_BASE:
        merged = b + merged
    store_real(merged, out, first, lane, left, OUT, WIDE, ALIGNED, MASKED)
    raised = tl.max(((seen & ALARM) != 0).to(tl.int32), 0)
    tl.atomic_or(flag.to(tl.pointer_type(tl.int32)), 1, mask=raised != 0, sem="relaxed")


@triton.jit
def apply_stage(
    v, b, index, table, at, STAGE: tl.constexpr, ARGUMENTS: tl.constexpr, WIDE: tl.constexpr
):
    """Return what a method's own stage makes of [BLOCK] kept values; up to four arguments."""
    word = at + EXPERT
    if ARGUMENTS == 0:
        made = STAGE(v, b, index)
    elif ARGUMENTS == 1:
        made = STAGE(v, b, index, load_scalar(table, word, WIDE))
    elif ARGUMENTS == 2:
        made = STAGE(
            v, b, index, load_scalar(table, word, WIDE), load_scalar(table, word + 1, WIDE)
        )
    elif ARGUMENTS == 3:
        made = STAGE(
            v,
            b,
            index,
            load_scalar(table, word, WIDE),
            load_scalar(table, word + 1, WIDE),
            load_scalar(table, word + 2, WIDE),
        )
    else:
        made = STAGE(
            v,
            b,
            index,
            load_scalar(table, word, WIDE),
            load_scalar(table, word + 1, WIDE),
            load_scalar(table, word + 2, WIDE),
            load_scalar(table, word + 3, WIDE),
        )
    return made


@triton.jit(do_not_specialize=["start", "n", "cols"])
def keep_elements_kernel(
    base,  # int64, address of [n] BASE; not read without HAS_BASE
    experts,  # K x int64, addresses of [n] TYPES[k]
    out,  # int64, address of [K, out_stride] uint8
    table,  # int64, address of [words] int64
    given,  # K x int64, addresses of [n] uint8
    thresholds,  # int64, address of [K, stride] uint32
    stride: tl.int64,
    out_stride: tl.int64,
    start: tl.int64,
    n: tl.int64,
    cols: tl.int64,
    K: tl.constexpr,
    BASE: tl.constexpr,
    TYPES: tl.constexpr,
    HAS_BASE: tl.constexpr,
    TRIM: tl.constexpr,
    REMOVE: tl.constexpr,
    SELECT: tl.constexpr,
    GIVEN: tl.constexpr,
    DROP: tl.constexpr,
    FINE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DRAWS_ALIGNED: tl.constexpr,
    LONG: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write 1 where the keep stages leave an element of an expert, else 0."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    flat = start + first
    lane = tl.arange(0, BLOCK)
    left = n - first
    b = tl.zeros([BLOCK], tl.float64 if WIDE else tl.float32)
    if HAS_BASE:
        b = load_real(base, first, lane, left, BASE, BLOCK, WIDE, ALIGNED, MASKED)
    row = lane
    if TRIM == ROW or REMOVE == ROW:
        row = unit_of(flat, cols, lane, 1, BLOCK, LONG)
    chosen = lane
    if SELECT:
        n_experts = load_scalar(table, N_EXPERTS, WIDE)
        key = variance_key(
            b, experts, first, lane, left, n_experts,
            TYPES, K, HAS_BASE, BLOCK, WIDE, ALIGNED, MASKED,
        )  # fmt: skip
        chosen = is_above(
            key, table, SELECT_KEY, row, flat, lane, left, TENSOR, BLOCK, WIDE, MASKED
        )
    for k in tl.static_range(K):
        d = load_real(experts[k], first, lane, left, TYPES[k], BLOCK, WIDE, ALIGNED, MASKED)
        if HAS_BASE:
            d = d - b
        mask_of = given
        if GIVEN:
            mask_of = given[k]
        keep, _v = keep_block(
            d, chosen, table, SHARED + k * EXPERT, mask_of, thresholds + k * stride * 4,
            thresholds, first, flat, row, lane, left,
            TRIM, REMOVE, SELECT, GIVEN, DROP, FINE[k], False, BLOCK, WIDE, ALIGNED,
            DRAWS_ALIGNED, MASKED,
        )  # fmt: skip
        pointer = bytes_of(out + k * out_stride, ALIGNED) + first + lane
        if MASKED:
            tl.store(pointer, keep.to(tl.uint8), mask=lane < left)
        else:
            tl.store(pointer, keep.to(tl.uint8))


@triton.jit(do_not_specialize=["start", "n", "cols"])
def tally_votes_kernel(
    base,  # int64, address of [n] BASE; not read without HAS_BASE
    experts,  # K x int64, addresses of [n] TYPES[k]
    table,  # int64, address of [words] int64
    given,  # K x int64, addresses of [n] uint8
    thresholds,  # int64, address of [K, stride] uint32
    inverses,  # int64, address of [K, stride] Real
    stride: tl.int64,
    balance,  # int64, address of [1] int64
    start: tl.int64,
    n: tl.int64,
    cols: tl.int64,
    K: tl.constexpr,
    BASE: tl.constexpr,
    TYPES: tl.constexpr,
    HAS_BASE: tl.constexpr,
    TRIM: tl.constexpr,
    REMOVE: tl.constexpr,
    SELECT: tl.constexpr,
    GIVEN: tl.constexpr,
    DROP: tl.constexpr,
    FINE: tl.constexpr,
    RESCALE: tl.constexpr,
    VOTE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DRAWS_ALIGNED: tl.constexpr,
    LONG: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add to `balance` how many coordinates of a block vote plus, less how many vote minus."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    flat = start + first
    lane = tl.arange(0, BLOCK)
    left = n - first
    zero = tl.zeros([BLOCK], tl.float64 if WIDE else tl.float32)
    b = zero
    if HAS_BASE:
        b = load_real(base, first, lane, left, BASE, BLOCK, WIDE, ALIGNED, MASKED)
    row = lane
    if TRIM == ROW or REMOVE == ROW:
        row = unit_of(flat, cols, lane, 1, BLOCK, LONG)
    chosen = lane
    if SELECT:
        n_experts = load_scalar(table, N_EXPERTS, WIDE)
        key = variance_key(
            b, experts, first, lane, left, n_experts,
            TYPES, K, HAS_BASE, BLOCK, WIDE, ALIGNED, MASKED,
        )  # fmt: skip
        chosen = is_above(
            key, table, SELECT_KEY, row, flat, lane, left, TENSOR, BLOCK, WIDE, MASKED
        )
    total = zero
    plus_votes = zero
    minus_votes = zero
    best_score = zero
    for k in tl.static_range(K):
        at = SHARED + k * EXPERT
        d = load_real(experts[k], first, lane, left, TYPES[k], BLOCK, WIDE, ALIGNED, MASKED)
        if HAS_BASE:
            d = d - b
        mask_of = given
        if GIVEN:
            mask_of = given[k]
        _keep, v = keep_block(
            d, chosen, table, at, mask_of, thresholds + k * stride * 4,
            inverses + k * stride * (8 if WIDE else 4), first, flat, row, lane, left,
            TRIM, REMOVE, SELECT, GIVEN, DROP, FINE[k], RESCALE, BLOCK, WIDE, ALIGNED,
            DRAWS_ALIGNED, MASKED,
        )  # fmt: skip
        value = v * load_scalar(table, at + COEFFICIENT, WIDE)
        vote = vote_of(v, value, table, at, VOTE, WIDE)
        if VOTE == NORMFRAC:
            score = (v * v) * load_scalar(table, at + VOTE_SCALE, WIDE)
            better = score > best_score
            best_score = tl.where(better, score, best_score)
            total = tl.where(better, v, total)
        else:
            plus_votes = plus_votes + tl.where(vote > 0, vote, 0.0)
            minus_votes = minus_votes + tl.where((vote >= 0) == 0, vote, 0.0)
    if VOTE != NORMFRAC:
        total = plus_votes + minus_votes
    tally = tl.where(total > 0, 1, tl.where(total == 0, 0, -1))  # NaN votes minus
    if MASKED:
        tally = tl.where(lane < left, tally, 0)
    tl.atomic_add(
        balance.to(tl.pointer_type(tl.int64)), tl.sum(tally, 0).to(tl.int64), sem="relaxed"
    )
