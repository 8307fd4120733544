"""Sums of the moments and inner products, up to the leaves of their reduction tree.

docs/numerics.md, "Sums", is the definition. A launch is over one expert (moments) or one pair of experts
(Gram) and moves 2 reads of the stored types per element and expert, the base's mostly from the cache: callers
go through a tensor in spans that fit there. 64 lanes of float64 per 4096 elements are written, and with them
the tree's upper part costs an eighth of a byte per element.
"""

import triton
import triton.language as tl

from .element import bytes_of, load_real, pointer_of, widen

LANES = tl.constexpr(64)
SEGMENT = tl.constexpr(4096)
UNROLLED = tl.constexpr(4)

#: What is summed.
ABS = tl.constexpr(0)
SQUARE = tl.constexpr(1)
PRODUCT = tl.constexpr(2)


@triton.jit
def load_steps(
    address,
    offset,
    mask,
    TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load a [SEGMENTS, LANES] tile of one operand as Real."""
    pointer = pointer_of(address, TYPE, ALIGNED) + offset
    if MASKED:
        raw = tl.load(pointer, mask=mask, other=0)
    else:
        raw = tl.load(pointer)
    return widen(raw, TYPE, WIDE)


@triton.jit(do_not_specialize=["unit", "rounds", "first_segment", "n_segments"])
def sum_lanes_kernel(
    base,  # int64, address of [n] BASE; not read without HAS_BASE
    x,  # int64, address of [n] X
    y,  # int64, address of [n] Y; only for products
    mask,  # int64, address of [n] uint8: what is kept; only if HAS_MASK
    carry,  # int64, address of [2, LANES] float64: where the first segment goes on; only if HAS_CARRY
    lanes,  # int64, address of [2, n_segments, LANES] float64: sums of all, and of what is kept
    skew,  # place in its segment of the chunk's first element; 0 over rows
    pitch,  # elements from one unit to the next: cols over rows, else 0
    unit: tl.int64,  # elements of a unit: cols over rows, else skew + n
    unit_segments,
    rounds,  # UNROLLED steps of 64 elements that the longest segment takes
    first_segment: tl.int64,
    n_segments: tl.int64,
    BASE: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    HAS_BASE: tl.constexpr,
    TERM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Sum SEGMENTS segments, each in 64 lanes that add their elements in ascending order."""
    place = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    segment = (first_segment + place)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    row = segment // unit_segments
    begin = (segment - row * unit_segments) * SEGMENT
    origin = row * pitch - skew
    total = tl.zeros([SEGMENTS, LANES], tl.float64)
    left = tl.zeros([SEGMENTS, LANES], tl.float64)
    if HAS_CARRY:
        went = carry.to(tl.pointer_type(tl.float64)) + lane + place[:, None] * 0
        total = tl.load(went, mask=segment == 0, other=0.0)
        left = tl.load(went + LANES, mask=segment == 0, other=0.0)
    for outer in range(rounds):
        for inner in tl.static_range(UNROLLED):
            step = begin + (outer * UNROLLED + inner) * LANES
            within = step + lane
            # Over whole steps all lanes are alike, which keeps the loads wide.
            test = step if WHOLE_STEPS else within
            there = (test >= skew) & (test < unit) & (place[:, None] < n_segments)
            offset = origin + within
            d = load_steps(x, offset, there, X, WIDE, ALIGNED, MASKED)
            if HAS_BASE:
                b = load_steps(base, offset, there, BASE, WIDE, ALIGNED, MASKED)
                d = d - b
            term = d.to(tl.float64)
            if TERM == ABS:
                term = tl.abs(term)
            elif TERM == SQUARE:
                term = term * term
            else:
                e = load_steps(y, offset, there, Y, WIDE, ALIGNED, MASKED)
                if HAS_BASE:
                    e = e - b
                term = term * e.to(tl.float64)
            total = total + term
            if HAS_MASK:
                pointer = bytes_of(mask, ALIGNED) + offset
                if MASKED:
                    kept = tl.load(pointer, mask=there, other=0)
                else:
                    kept = tl.load(pointer)
                left = left + tl.where(kept != 0, term, 0.0)
    to = lanes.to(tl.pointer_type(tl.float64)) + place[:, None] * LANES + lane
    exists = place[:, None] < n_segments
    tl.store(to, total, mask=exists)
    if HAS_MASK:
        tl.store(to + n_segments * LANES, left, mask=exists)


@triton.jit(do_not_specialize=["skew", "rows"])
def sum_columns_kernel(
    base,  # int64, address of [rows, cols] BASE; not read without HAS_BASE
    x,  # int64, address of [rows, cols] X
    y,  # int64, address of [rows, cols] Y
    carry,  # int64, address of [cols] float64: where the first block of rows goes on; only if HAS_CARRY
    sums,  # int64, address of [blocks, cols] float64
    skew: tl.int64,  # place of the chunk's first row in its block of 64 rows
    rows: tl.int64,
    cols,
    BASE: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Sum the products of 64 rows of BLOCK columns, rows in ascending order."""
    block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    left = cols - column
    total = tl.zeros([BLOCK], tl.float64)
    if HAS_CARRY:
        went = carry.to(tl.pointer_type(tl.float64)) + column + lane
        total = tl.load(went, mask=(lane < left) & (block == 0), other=0.0)
    begin = tl.maximum(block * LANES - skew, 0)
    end = tl.minimum((block + 1) * LANES - skew, rows)
    for row in range(begin, end):
        first = row * cols + column
        d = load_real(x, first, lane, left, X, BLOCK, WIDE, ALIGNED, True)
        e = load_real(y, first, lane, left, Y, BLOCK, WIDE, ALIGNED, True)
        if HAS_BASE:
            b = load_real(base, first, lane, left, BASE, BLOCK, WIDE, ALIGNED, True)
            d = d - b
            e = e - b
        total = total + d.to(tl.float64) * e.to(tl.float64)
    to = sums.to(tl.pointer_type(tl.float64)) + block * cols + column + lane
    tl.store(to, total, mask=lane < left)
