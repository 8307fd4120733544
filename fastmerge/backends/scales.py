"""Scales that follow from a whole tensor: of its largest magnitude, and codes of scales."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastmerge.backends import Buffer, Coded
from fastmerge.backends.lowering import lower_coded
from fastmerge.backends.memory import bytes_of, to_host
from fastmerge.coding import Coding


def tensor_scale(coding: Coding, peak: float) -> float:
    """Return the scale of a tensor whose largest magnitude is `peak`."""
    from fastmerge import _cpu

    return float(_cpu.tensor_scale(lower_coded(_cpu, Coded(coding, 1, 1, 0, 0, 0, {})), peak))


def code_scales(
    coding: Coding, absmax: Buffer
) -> tuple[float, NDArray[np.uint8], NDArray[np.float32]]:
    """Code the scales of a tensor, 8 bits each: (the mean taken from them first, codes, their scales).

    The mean is torch's, for bitsandbytes' is: its order of summation decides the last bit.
    """
    import torch

    from fastmerge import _cpu

    held = to_host(absmax)
    values = bytes_of(held).view(np.float32)
    offset = float(torch.from_numpy(values).mean())
    codes = np.empty(held.n, np.uint8)
    nested = np.empty(-(-held.n // 256), np.float32)
    _cpu.encode_nested(
        held.address,
        held.n,
        offset,
        not coding.other_rule,
        codes.ctypes.data,
        nested.ctypes.data,
    )
    return offset, codes, nested
