"""The case list: shapes, contents, dtypes and walks that every backend must agree on, bit for bit.

Tests and benchmarks draw from here, so that what is timed is what is verified.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator

from fastmerge.stages import (
    Axis,
    Combine,
    Cut,
    Drop,
    Elect,
    GivenMask,
    Keep,
    RankedDrop,
    Select,
    Trim,
    Walk,
)

#: Odd lengths around a block (64), a segment (4096) and a task (32768), scalars, rows of one, no elements.
SHAPES: list[tuple[int, ...]] = [
    (), (1,), (17,), (127,), (4097,), (70001,), (1, 1), (7, 1), (5, 123), (64, 64), (3, 5, 11), (33, 4099),
    (0,), (0, 5),
]  # fmt: skip

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

#: What a tensor holds. `grid` gives exact ties and zeros, as bf16 checkpoints do; `wide` 60 binades.
CONTENTS = ["normal", "grid", "equal", "wide", "tiny"]


def tensor(
    rng: Generator, shape: tuple[int, ...], content: str, dtype: torch.dtype
) -> torch.Tensor:
    if content == "normal":
        x = rng.standard_normal(shape)
    elif content == "grid":
        x = rng.integers(-3, 4, shape) / 4.0
    elif content == "equal":
        x = np.full(shape, 0.375)
    elif content == "wide":
        x = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, shape)
    else:  # around the least normal numbers of float16 and float32
        x = rng.standard_normal(shape) * (6e-5 if dtype is torch.float16 else 1e-38)
    return torch.from_numpy(np.asarray(x, dtype=np.float64)).to(dtype)


@dataclass(frozen=True)
class Operands:
    base: torch.Tensor | None
    experts: list[torch.Tensor]


def operands(
    rng: Generator, shape: tuple[int, ...], n_experts: int, content: str, with_base: bool = True
) -> Operands:
    """Draw a base and experts near it, each of a random float type."""

    def near(origin: torch.Tensor) -> torch.Tensor:
        dtype = FLOATS[rng.integers(3)]
        if content == "normal":
            return (origin.double() + 0.01 * tensor(rng, shape, content, torch.float64)).to(dtype)
        return tensor(rng, shape, content, dtype)

    origin = tensor(rng, shape, content, FLOATS[rng.integers(3)])
    return Operands(origin if with_base else None, [near(origin) for _ in range(n_experts)])


def random_cut(rng: Generator, shape: tuple[int, ...], k: int, row: bool) -> Cut:
    n = int(np.prod(shape)) if shape else 1
    cols = shape[-1] if shape else 1
    units = n // cols if row and cols else 1
    value = rng.choice([-1.0, 0.0, 0.005, 0.25, 0.5, np.inf], (k, units))
    last = rng.integers(-1, max(1, n), (k, units))
    return Cut(value, last, Axis.ROW if row else Axis.TENSOR)


def random_keep(rng: Generator, shape: tuple[int, ...], k: int) -> Keep:
    n = int(np.prod(shape)) if shape else 1
    trim = select = drop = given = None
    if rng.random() < 0.5:
        row = rng.random() < 0.3
        remove = random_cut(rng, shape, k, row) if rng.random() < 0.3 else None
        trim = Trim(random_cut(rng, shape, k, row), remove)
    if rng.random() < 0.2:
        select = Select(random_cut(rng, shape, 1, False))
    keys = [int(x) for x in rng.integers(0, 2**63, k)]
    kind = rng.random()
    if kind < 0.3:
        p = rng.choice([0.0, 0.003, 0.1, 0.5, 0.9, 0.999, 1.0], k).tolist()
        drop = Drop(p, keys, rescale=bool(rng.random() < 0.5))
    elif kind < 0.6:
        low = rng.choice([0.1, 0.4, 1.0], k)
        drop = RankedDrop(
            low.tolist(),
            np.minimum(low + 0.3, 1.0).tolist(),
            keys,
            axis=Axis.ROW if rng.random() < 0.7 else Axis.TENSOR,
            by="rank" if rng.random() < 0.7 else "value",
            rescale=bool(rng.random() < 0.5),
        )
    if rng.random() < 0.2:
        given = GivenMask([rng.integers(0, 2, n).astype(np.uint8) for _ in range(k)])
    return Keep(trim, select, drop, given)


def random_walk(rng: Generator, shape: tuple[int, ...], k: int, with_base: bool) -> Walk:
    """Draw any combination of stages that a recipe could ask for."""
    n = int(np.prod(shape)) if shape else 1
    cols = shape[-1] if shape else 1
    axis = Axis(int(rng.choice([0, 0, 1, 2])))
    units = 1 if axis is Axis.TENSOR else (n // cols if cols else 0) if axis is Axis.ROW else cols
    elect = None
    if rng.random() < 0.6:
        by = str(rng.choice(["mass", "delta", "count", "normmass", "normfrac"]))
        scale = (0.5 + rng.random(k)).tolist() if by.startswith("norm") else None
        elect = Elect(by, str(rng.choice(["plus", "minus", "none"])), scale)  # type: ignore[arg-type]
    divide = "none"
    if rng.random() < 0.6:
        divide = "weight" if elect else "constant"
    combine = Combine(
        by=str(rng.choice(["sum", "sum", "max"])),  # type: ignore[arg-type]
        divide_by=divide,  # type: ignore[arg-type]
        divisor=float(1 + rng.random()),
        divisor_weight=rng.standard_normal(k).tolist() if divide == "weight" else None,
        floor=float(rng.choice([0.0, 1e-6, 0.5])),
        lambda_=float(rng.choice([1.0, 0.3, 1.7])),
    )
    keep = random_keep(rng, shape, k)
    only_delta = with_base and bool(rng.random() < 0.2)
    return Walk(
        rng.standard_normal((k, units)),
        axis,
        keep,
        elect,
        combine,
        add_base=with_base and not only_delta,
        only_delta=only_delta,
    )
