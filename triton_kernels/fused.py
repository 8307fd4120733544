"""The fused walk, the keep masks and the sign balance: all that goes through the stages element by element.

docs/numerics.md, "Keep" and "Walk", is the definition; csrc/core/stages.hpp the same in C++. The walk moves
(K + 1) reads and 1 write of the stored types per element, 4 or 8 bytes more per expert under a ranked drop
and 1 per expert under given masks. A mask reads as much and writes K bytes; a sign balance writes nothing.

Scalars come in a table of 64-bit words: SHARED words, then EXPERT words of each expert, then its arguments
to a stage of the method's own. Reals are held as their bits. Where a value is over rows or columns, its word
holds the offset, in words, of one value per unit.
"""

import triton
import triton.language as tl

from .element import (
    ALARM,
    bytes_of,
    divide,
    draw16,
    draw32,
    key_of,
    load_key,
    load_real,
    load_scalar,
    load_watched,
    load_word,
    real_of_word,
    store_real,
    unit_of,
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

#: Codes of fastmerge.backends.lowering.
MASS = tl.constexpr(1)
COUNT = tl.constexpr(3)
NORMMASS = tl.constexpr(4)
NORMFRAC = tl.constexpr(5)
ZERO_PLUS = tl.constexpr(0)
ZERO_NOTHING = tl.constexpr(2)
BY_CONSTANT = tl.constexpr(1)
BY_WEIGHT = tl.constexpr(2)
UNIFORM = tl.constexpr(1)
RANKED = tl.constexpr(2)


# ---- keep ----------------------------------------------------------------------------------------


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
    stride,  # elements from one expert's thresholds and inverses to the next one's
    flag,  # int64, address of [1] int32: set if an operand is not finite
    start: tl.int64,  # flat index in the tensor of the first element
    n: tl.int64,
    cols: tl.int64,
    K: tl.constexpr,
    BASE: tl.constexpr,
    TYPES: tl.constexpr,
    OUT: tl.constexpr,
    HAS_BASE: tl.constexpr,
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
    """Merge one block: base + lambda * combine_k(coefficient_k * keep(expert_k - base))."""
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
    if HAS_BASE:
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
    stride,
    out_stride,
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
    stride,
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
