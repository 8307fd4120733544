"""Random draws for the oracles, apart from every backend: Philox4x32-10 of docs/numerics.md.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

U64 = NDArray[np.uint64]
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox(key: int, counter: U64) -> U64:
    """Return [m, 4] 32-bit words (as uint64) for 64-bit counters [m]."""
    x0, x1 = counter & _LOW, counter >> _WORD
    x2, x3 = np.zeros_like(counter), np.zeros_like(counter)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        left = x0 * np.uint64(0xD2511F53)
        right = x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = (
            (right >> _WORD) ^ x1 ^ np.uint64(k0),
            right & _LOW,
            (left >> _WORD) ^ x3 ^ np.uint64(k1),
            left & _LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=1)


def draws(key: int, n: int, bits: int) -> Tensor:
    """Return [n] int64 draws in [0, 2**bits) for elements 0 .. n-1; bits is 16 or 32."""
    import torch

    per_block = 128 // bits
    words = philox(key, np.arange(-(-n // per_block), dtype=np.uint64))
    if bits == 16:
        words = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=2)
    return torch.from_numpy(words.reshape(-1)[:n].astype(np.int64))


def keep_draw(key: int, n: int, probability: float) -> tuple[Tensor, float]:
    """Return ([n] bool, keep probability really used) of independent draws, 0 < probability < 1."""
    bits = 16 if 0.005 <= probability <= 0.995 else 32
    full = 1 << bits
    threshold = min(max(math.floor(probability * full + 0.5), 1), full - 1)
    return draws(key, n, bits) < threshold, threshold / full


def ranked_keep_draw(key: int, probability: Tensor) -> tuple[Tensor, Tensor]:
    """Return (bool, probability really used) for an element-wise keep probability of any shape."""
    threshold = (probability * 65536 + 0.5).floor().clamp(0, 65536)
    drawn = draws(key, probability.numel(), 16).reshape(probability.shape)
    return drawn < threshold, threshold / 65536
