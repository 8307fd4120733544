"""What the reference backend computes on plain tensors: rounding, keys, cuts, draws, sums.

docs/numerics.md is the definition. One eager operation stands for each IEEE-754 operation: nothing
here may fuse or reorder (no addcmul, einsum or sum, whose order depends on shape and threads), and
divisors are tensors, because a kernel may turn division by a Python number into multiplication by
its reciprocal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

SEGMENT = 4096
LANES = 64
END = 2**63 - 1  # a last_tie behind every element

BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
_QUIET_NAN = {
    torch.float64: 0x7FF8 << 48,
    torch.float32: 0x7FC0 << 16,
    torch.float16: 0x7E00,
    torch.bfloat16: 0x7FC0,
}


# ---- values --------------------------------------------------------------------------------------


def _odd_float(x: Tensor) -> Tensor:
    """Round float64 to float32 by round-to-odd: rounding that to 16 bits rounds x itself."""
    nearest = x.to(torch.float32)
    back = nearest.to(torch.float64)
    bits = nearest.view(torch.int32)
    # Sign and magnitude: one less is one step nearer to zero, also from infinity.
    toward_zero = torch.where(back.abs() > x.abs(), bits - 1, bits)
    odd = torch.where((back == x) | x.isnan(), bits, toward_zero | 1)
    return odd.view(torch.float32)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 or float64 values in a stored type: one rounding, NaN without payload."""
    narrow = x.dtype == torch.float64 and dtype in (torch.float16, torch.bfloat16)
    y = (_odd_float(x) if narrow else x).to(dtype)
    bits = BITS[dtype]
    quiet = torch.tensor(_QUIET_NAN[dtype], dtype=bits)
    quiet = torch.where(x.signbit(), quiet | torch.iinfo(bits).min, quiet)
    return torch.where(x.isnan(), quiet, y.view(bits)).view(dtype)


def real_of(values: Any, real: torch.dtype) -> Tensor:
    """Round host scalars (float64) to the compile type, once."""
    return torch.tensor(np.asarray(values, dtype=np.float64)).to(real)


# ---- keys and cuts -------------------------------------------------------------------------------


def key_of(x: Tensor) -> Tensor:
    """Return the bits of |x| as int64: monotone, all NaNs equal and above infinity.

    Conversions and operations leave payloads that differ between machines, and even between the
    vector body and the tail of one torch kernel.
    """
    bits = BITS[x.dtype]
    key = (x.contiguous().view(bits) & torch.iinfo(bits).max).to(torch.int64)
    return key.masked_fill(x.isnan(), _QUIET_NAN[x.dtype])


def value_of(key: Tensor, real: torch.dtype) -> float:
    """Return |x| of a key (0-d int64) of the compute type."""
    return float(key.to(BITS[real]).view(real).to(torch.float64))


def rank_cut(
    keys: Tensor, index: Tensor, rank: int, real: torch.dtype, all_ties: bool
) -> tuple[float, int]:
    """Return (value, last_tie) of the cut above which exactly `rank` elements lie.

    Args:
        keys:     [m] int64 of the compute type `real`.
        index:    [m] int64, the flat index of each, ascending.
        rank:     any integer; 0 and less mean none, m and more mean all.
        all_ties: let everything equal to the value be above.
    """
    m = len(keys)
    if rank <= 0:
        return math.inf, -1
    if rank >= m:
        return -1.0, END
    at = torch.sort(keys, descending=True).values[rank - 1]
    value = value_of(at, real)
    if all_ties:
        return value, END
    quota = rank - int(torch.count_nonzero(keys > at))
    return value, int(index[keys == at][quota - 1])


def nonzero_cut(
    keys: Tensor, index: Tensor, fraction: float, real: torch.dtype, all_ties: bool
) -> tuple[float, int]:
    """Return, as `rank_cut`, the cut above which `fraction` of the nonzero elements lie."""
    n_nonzero = int(torch.count_nonzero(keys))
    rank = int(fraction * n_nonzero)
    if rank > 0 and rank >= n_nonzero:
        return 0.0, -1  # the nonzero ones and no zero, however many zeros there are
    return rank_cut(keys, index, rank, real, all_ties)


def ranks_of(keys: Tensor) -> Tensor:
    """Return [..., m] int64: how many of the m keys are smaller, or equal at a lower index."""
    order = torch.sort(keys, dim=-1, stable=True).indices
    places = torch.arange(keys.shape[-1]).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


# ---- draws ---------------------------------------------------------------------------------------


def philox(counter: Sequence[Tensor], key: int) -> list[Tensor]:
    """Return the four words of Philox4x32-10, as int64 tensors of values below 2^32.

    Args:
        counter: four int64 tensors of values below 2^32, lowest word first.
        key:     64 bits, the low word being the first key word.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return both words of a 32 x 32 bit product, by halves so that int64 never overflows."""
    low = factor * (x & 0xFFFF)
    middle = factor * (x >> 16) + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def draws(key: int, index: Tensor, bits: int) -> Tensor:
    """Return the 16- or 32-bit draw of each flat index, as int64."""
    per_word = 32 // bits
    block = index // (4 * per_word)
    zero = torch.zeros_like(block)
    words = torch.stack(philox([block & 0xFFFFFFFF, block >> 32, zero, zero], key))
    word = words.gather(0, (index // per_word % 4)[None])[0]
    draw: Tensor = (word >> (index % per_word) * bits) & (2**bits - 1)
    return draw


# ---- sums ----------------------------------------------------------------------------------------


def ordered_sum(x: Tensor) -> Tensor:
    """Return ((x[0] + x[1]) + x[2]) + ..."""
    total = x[0]
    for row in x[1:]:
        total = total + row
    return total


def variance(delta: Tensor) -> Tensor:
    """Return [1, n]: the population variance over the experts of [K, n] deltas."""
    n_experts = torch.full_like(delta[0], len(delta))
    mean = ordered_sum(delta) / n_experts
    deviation = delta - mean
    return (ordered_sum(deviation * deviation) / n_experts)[None]


def _combine(parts: Iterable[Tensor], n: int) -> Tensor:
    """Add [n] partial sums as a binary counter: equal levels at once, the rest from below."""
    levels: list[Tensor | None] = []
    for part in parts:
        carry, level = part, 0
        while level < len(levels) and (earlier := levels[level]) is not None:
            carry = earlier + carry
            levels[level] = None
            level += 1
        if level == len(levels):
            levels.append(carry)
        else:
            levels[level] = carry
    total: Tensor | None = None
    for value in levels:
        if value is not None:
            total = value if total is None else value + total
    return torch.zeros(n, dtype=torch.float64) if total is None else total


def sum_units(terms: Tensor) -> Tensor:
    """Return [U] sums of [U, m] float64 terms, position in the unit being the last dimension."""
    n_units, m = terms.shape
    n_segments = -(-m // SEGMENT)
    # +0 behind the end changes nothing: a sum that starts from +0 is never -0.
    padded = torch.zeros((n_units, n_segments * SEGMENT), dtype=torch.float64)
    padded[:, :m] = terms
    by_lane = padded.view(n_units, n_segments, SEGMENT // LANES, LANES)
    lanes = torch.zeros((n_units, n_segments, LANES), dtype=torch.float64)
    for step in range(SEGMENT // LANES):
        lanes = lanes + by_lane[:, :, step]
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half:]
        half //= 2
    return _combine((lanes[:, s, 0] for s in range(n_segments)), n_units)


def sum_columns(terms: Tensor) -> Tensor:
    """Return [cols] sums of [rows, cols] float64 terms, down the rows in blocks of LANES rows."""
    rows, cols = terms.shape

    def block(first: int) -> Tensor:
        total = torch.zeros(cols, dtype=torch.float64)
        for row in terms[first : first + LANES]:
            total = total + row
        return total

    return _combine((block(r) for r in range(0, rows, LANES)), cols)
