"""Order statistics of |delta|: keys, counts above thresholds, the place of a tie, and cuts of whole rows.

docs/numerics.md, "Keys and cuts", is the definition. Keys are written once, 4 bytes per element (8 in
float64) for 2 or 3 stored reads; every count reads them again. A tensor's cut is bracketed by THRESHOLDS
counts per pass, 8 passes for the 31 bits of a float32; no histogram, for the keys of a fine-tuned model fall
into a handful of bins. Counts are integers: their order does not matter.
"""

import triton
import triton.language as tl

from .element import key_of, load_real, real_of_word
from .keep import variance_key

THRESHOLDS = tl.constexpr(16)


@triton.jit
def store_keys(
    key, keys, first, lane, left, WIDE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr
):
    """Store a block of keys. keys: int64, address of [n] int32, or int64 if WIDE."""
    pointer = key_pointer(keys, WIDE, ALIGNED) + first + lane
    if MASKED:
        tl.store(pointer, key, mask=lane < left)
    else:
        tl.store(pointer, key)


@triton.jit
def key_pointer(keys, WIDE: tl.constexpr, ALIGNED: tl.constexpr):
    if WIDE:
        pointer = keys.to(tl.pointer_type(tl.int64))
    else:
        pointer = keys.to(tl.pointer_type(tl.int32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["n"])
def write_keys_kernel(
    base,  # int64, address of [n] BASE; not read without HAS_BASE
    x,  # int64, address of [n] X
    keys,  # int64, address of [n] int32, or int64 if WIDE
    n: tl.int64,
    BASE: tl.constexpr,
    X: tl.constexpr,
    HAS_BASE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write the keys of one expert's deltas."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    d = load_real(x, first, lane, n - first, X, BLOCK, WIDE, ALIGNED, MASKED)
    if HAS_BASE:
        d = d - load_real(base, first, lane, n - first, BASE, BLOCK, WIDE, ALIGNED, MASKED)
    store_keys(key_of(d, WIDE), keys, first, lane, n - first, WIDE, ALIGNED, MASKED)


@triton.jit(do_not_specialize=["n", "n_experts"])
def write_variance_keys_kernel(
    base,  # int64, address of [n] BASE; not read without HAS_BASE
    experts,  # K x int64, addresses of [n] TYPES[k]
    keys,  # int64, address of [n] int32, or int64 if WIDE
    n_experts: tl.int64,  # the bits of Real K
    n: tl.int64,
    K: tl.constexpr,
    BASE: tl.constexpr,
    TYPES: tl.constexpr,
    HAS_BASE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write the keys of the variance over experts."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    b = tl.zeros([BLOCK], tl.float64 if WIDE else tl.float32)
    if HAS_BASE:
        b = load_real(base, first, lane, n - first, BASE, BLOCK, WIDE, ALIGNED, MASKED)
    count = real_of_word(n_experts.to(tl.int64), WIDE)
    key = variance_key(
        b, experts, first, lane, n - first, count, TYPES, K, HAS_BASE, BLOCK, WIDE, ALIGNED, MASKED
    )
    store_keys(key, keys, first, lane, n - first, WIDE, ALIGNED, MASKED)


@triton.jit(do_not_specialize=["n"])
def count_above_kernel(
    keys,  # int64, address of [n] int32, or int64 if WIDE
    thresholds,  # int64, address of [THRESHOLDS] int64
    counts,  # int64, address of [THRESHOLDS] int64, added to
    n: tl.int64,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Count a block's keys above each of several thresholds."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    pointer = key_pointer(keys, WIDE, True) + first + lane
    if MASKED:
        key = tl.load(pointer, mask=lane < n - first, other=-1)
    else:
        key = tl.load(pointer)
    for t in tl.static_range(THRESHOLDS):
        threshold = tl.load(thresholds.to(tl.pointer_type(tl.int64)) + t)
        if not WIDE:
            threshold = threshold.to(tl.int32)
        above = tl.sum((key > threshold).to(tl.int32), 0).to(tl.int64)
        tl.atomic_add(counts.to(tl.pointer_type(tl.int64)) + t, above, sem="relaxed")


@triton.jit(do_not_specialize=["n"])
def count_equal_kernel(
    keys,  # int64, address of [n] int32, or int64 if WIDE
    value,  # int64, address of [1] int64
    counts,  # int64, address of [blocks] int64
    n: tl.int64,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Count the keys of each block that equal `value`."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    key = tl.load(key_pointer(keys, WIDE, True) + first + lane, mask=lane < n - first, other=-1)
    sought = tl.load(value.to(tl.pointer_type(tl.int64)))
    if not WIDE:
        sought = sought.to(tl.int32)
    equal = tl.sum((key == sought).to(tl.int32), 0).to(tl.int64)
    tl.store(counts.to(tl.pointer_type(tl.int64)) + tl.program_id(0), equal)


@triton.jit
def count_row_keys(keys, row, cols, rows, bound, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Return [ROWS] int64: how many keys of each row are at least `bound`."""
    column = tl.arange(0, BLOCK)
    found = row * 0
    for begin in range(0, cols, BLOCK):
        there = (row < rows)[:, None] & (begin + column < cols)[None, :]
        pointer = key_pointer(keys, WIDE, False) + (row * cols)[:, None] + (begin + column)[None, :]
        key = tl.load(pointer, mask=there, other=-1)
        found = found + tl.sum((key >= bound[:, None]).to(tl.int32), 1).to(tl.int64)
    return found


@triton.jit(do_not_specialize=["rows", "cols"])
def select_rows_kernel(
    keys,  # int64, address of [rows, cols] int32, or int64 if WIDE
    ranks,  # int64, address of [rows] int64, 1 .. cols
    values,  # int64, address of [rows] int64: the rank-th largest key
    ties,  # int64, address of [rows] int64: column of the last of its equals that is above
    rows: tl.int64,
    cols: tl.int64,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Find the cut of each of ROWS rows, bit by bit; the rows stay in the cache."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rank = tl.load(ranks.to(tl.pointer_type(tl.int64)) + row, mask=row < rows, other=1)
    value = row * 0
    for i in range(BITS):
        bit = row * 0 + 1
        higher = value | (bit << (BITS - 1 - i))
        found = count_row_keys(keys, row, cols, rows, higher, BLOCK, WIDE)
        value = tl.where(found >= rank, higher, value)
    quota = rank - count_row_keys(keys, row, cols, rows, value + 1, BLOCK, WIDE)
    column = tl.arange(0, BLOCK)
    seen = row * 0
    tie = row * 0 - 1
    for begin in range(0, cols, BLOCK):
        there = (row < rows)[:, None] & (begin + column < cols)[None, :]
        pointer = key_pointer(keys, WIDE, False) + (row * cols)[:, None] + (begin + column)[None, :]
        key = tl.load(pointer, mask=there, other=-1)
        equal = (key == value[:, None]).to(tl.int32)
        order = seen[:, None] + tl.cumsum(equal, 1)
        hit = (equal != 0) & (order == quota[:, None])
        place = tl.where(hit, (begin + column + 1)[None, :], 0)
        tie = tie + tl.sum(place.to(tl.int64), 1)
        seen = seen + tl.sum(equal, 1).to(tl.int64)
    tl.store(values.to(tl.pointer_type(tl.int64)) + row, value, mask=row < rows)
    tl.store(ties.to(tl.pointer_type(tl.int64)) + row, tie, mask=row < rows)
