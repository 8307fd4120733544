"""Hold kernels to the cpu backend's bits, over the shared case list: what every other backend's tests call.

`kernels` are those under test; operands are host tensors, whose memory an emulated device shares.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import cases
import numpy as np
import torch

from fastmerge import ops
from fastmerge.backends import Chunk, Kernels
from fastmerge.evaluate import Operands, _within, run_walk, sweep_statistic
from fastmerge.stages import (
    Axis,
    Combine,
    Drop,
    Elect,
    Grain,
    Gram,
    Keep,
    Moments,
    OrderStatistic,
    RankedDrop,
    Select,
    SignBalance,
    Trim,
    Walk,
)

#: Numbers of experts: one, unrolled, the last unrolled, looped.
EXPERTS = (1, 2, 3, 8, 16, 20)


#: Random123's kat_vectors of philox4x32-10: four words of counter and two of key, and the four words drawn.
PHILOX_ANSWERS = [
    ((0, 0, 0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def rng_of(*parts: object) -> np.random.Generator:
    """Seed from the case's own name, so that a case does not change when others are added."""
    return np.random.default_rng(zlib.crc32(repr(parts).encode()))


def view(x: torch.Tensor, shift: int) -> torch.Tensor:
    """Return `x` at an address that is `shift` elements off a 64-byte boundary, exactly as long."""
    room = torch.empty(x.numel() + 64 + shift, dtype=x.dtype)
    first = (-room.data_ptr() // x.element_size()) % (64 // x.element_size()) + shift
    held = room[first : first + x.numel()].view(x.shape)
    held.copy_(x)
    return held


def draw(
    seed: int, shape: tuple[int, ...], k: int, *, with_base: bool = True, shift: int = 0
) -> tuple[np.random.Generator, cases.Operands]:
    """Return random operands of `shape`: any mix of types, contents by seed, float64 among some."""
    rng = rng_of(seed, shape, k)
    content = cases.CONTENTS[seed % len(cases.CONTENTS)]
    held = cases.operands(rng, shape, k, content, with_base=with_base)
    if seed % 3 == 0:  # one type, as real models have
        dtype = cases.FLOATS[seed // 3 % 3]
        base = None if held.base is None else held.base.to(dtype)
        held = cases.Operands(base, [e.to(dtype) for e in held.experts])
    if seed % 11 == 10:
        held.experts[0] = held.experts[0].double()
    base = None if held.base is None else view(held.base, shift)
    return rng, cases.Operands(base, [view(e, shift) for e in held.experts])


def _whole(held: cases.Operands) -> Operands:
    chunk = ops._chunk(held.base, held.experts)
    return Operands(chunk.base, chunk.experts, chunk.cols, chunk.compute)


def _bits(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy()


def check_walk(
    kernels: Kernels, held: cases.Operands, walk: Walk, dtype: torch.dtype, limit: int = 1 << 30
) -> None:
    """The same output bytes (NaN: of any sign) and the same report of values that are not finite."""
    like = held.experts[0]
    outs, bad = [], []
    for each in (kernels, ops.choose("cpu", "cpu")):
        out = view(torch.zeros(like.shape, dtype=dtype), 0)
        bad.append(run_walk(each, walk, _whole(held), ops.buffer_of(out, "out"), limit))
        outs.append(out)
    assert bad[0] == bad[1], f"not finite: {bad[0]}, cpu {bad[1]}; {walk}"
    same = _bits(outs[0]) == _bits(outs[1])
    if not same.all():
        element = int(np.flatnonzero(~same)[0]) // outs[0].element_size()
        both_nan = outs[0].isnan() & outs[1].isnan()
        both_nan |= outs[0].view_as(outs[0]) == outs[1]
        if bool(both_nan.all()) and bool(outs[0].isnan().any()):
            return
        raise AssertionError(
            f"first wrong element {element} of {outs[0].numel()}: "
            f"{kernels.name} {outs[0].reshape(-1)[element]!r}, cpu {outs[1].reshape(-1)[element]!r}; "
            f"{[e.dtype for e in held.experts]} {walk}"
        )


def check_statistic(
    kernels: Kernels, held: cases.Operands, request: object, limit: int = 1 << 30
) -> None:
    """The same numbers, to the last bit, whole and in chunks of `limit` elements."""
    got, want = (
        sweep_statistic(each, request, _whole(held), limit)  # type: ignore[arg-type]
        for each in (kernels, ops.choose("cpu", "cpu"))
    )
    if isinstance(request, OrderStatistic):
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(x.value, y.value, err_msg=str(request))
            np.testing.assert_array_equal(x.last_tie, y.last_tie, err_msg=str(request))
            assert x.axis == y.axis
    elif isinstance(request, Moments):
        np.testing.assert_array_equal(got.all, want.all, err_msg=str(request))
        np.testing.assert_array_equal(got.kept, want.kept, err_msg=str(request))
    else:
        np.testing.assert_array_equal(got, want, err_msg=str(request))


def check_model_cuts(
    kernels: Kernels, tensors: Sequence[cases.Operands], request: OrderStatistic, limit: int
) -> None:
    """The same cuts over a model, fed what is wanted of each tensor, in chunks of `limit` elements."""
    parts = [_whole(held) for held in tensors]
    sizes = [part.n for part in parts]
    offsets = {t: sum(sizes[:t]) for t in range(len(sizes))}
    answers = []
    for each in (kernels, ops.choose("cpu", "cpu")):
        sweep = each.sweep(request, sum(sizes), 1, len(parts[0].experts), parts[0].compute)
        again = True
        while again:
            wanted = _within(sweep.wanted(), offsets, dict(enumerate(sizes)))
            for t, ranges in wanted.items():
                for a, b in ((0, sizes[t]),) if ranges is None else ranges:
                    for _, chunk in parts[t].slice(a, b).chunks(Grain.ELEMENT, limit):
                        sweep.feed(chunk, offsets[t])
            again = sweep.next_pass()
        answers.append(sweep.result())
    for x, y in zip(*answers, strict=True):
        np.testing.assert_array_equal(x.value, y.value, err_msg=str(request))
        np.testing.assert_array_equal(x.last_tie, y.last_tie, err_msg=str(request))


def statistics(rng: np.random.Generator, shape: tuple[int, ...], k: int) -> Iterator[object]:
    """Draw one request of each kind for operands of `shape`."""
    n = int(np.prod(shape)) if shape else 1
    cols = shape[-1] if shape else 1
    scope = "row" if rng.random() < 0.4 else "tensor"
    unit = cols if scope == "row" else n
    n_ranks = int(rng.integers(1, 3))
    ranks = [[int(rng.integers(-1, unit + 2)) for _ in range(n_ranks)] for _ in range(k)]
    yield OrderStatistic(ranks, scope=scope, all_ties=bool(rng.random() < 0.3))  # type: ignore[arg-type]
    yield OrderStatistic(of="variance", fraction_of_nonzero=float(rng.random()))
    yield OrderStatistic([[int(rng.integers(0, n + 1))]], of="variance")
    keep = cases.random_keep(rng, shape, k)
    for of in ("abs", "square", "max"):
        yield Moments(of, keep)  # type: ignore[arg-type]
    for axis in Axis:
        yield Gram(axis=axis)
    yield Gram(delta=False)
    by = str(rng.choice(["mass", "delta", "count", "normmass", "normfrac"]))
    scale = (0.5 + rng.random(k)).tolist() if by.startswith("norm") else None
    yield SignBalance(keep, rng.standard_normal((k, 1)), Elect(by, vote_scale=scale))  # type: ignore[arg-type]


def check_masks(kernels: Kernels, held: cases.Operands, keep: Keep) -> None:
    """The same mask, and for a ranked drop the same probabilities."""
    chunk: Chunk = ops._chunk(held.base, held.experts)
    cpu = ops.choose("cpu", "cpu")
    got = np.asarray(kernels.keep_mask(keep, chunk))
    np.testing.assert_array_equal(got, cpu.keep_mask(keep, chunk), err_msg=str(keep))
    if isinstance(keep.drop, RankedDrop):
        got = np.asarray(kernels.keep_probability(keep.drop, chunk))
        np.testing.assert_array_equal(got, cpu.keep_probability(keep.drop, chunk))


def plain_walks(rng: np.random.Generator, k: int, n: int) -> Iterator[Walk]:
    """Yield the walks of the registered methods: what the fast kernels are for."""
    one = rng.choice([0.5, 1.0, -0.3], (k, 1))
    shape = (n,)
    cut, remove = (cases.random_cut(rng, shape, k, False) for _ in range(2))
    keys = [int(x) for x in rng.integers(0, 2**63, k)]
    p = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0], k).tolist()
    weights = rng.standard_normal(k).tolist()
    mean = Combine(divide_by="weight", divisor_weight=weights)
    trims = [Keep(), Keep(Trim(cut)), Keep(Trim(cut, remove)), Keep(drop=Drop(p, keys))]
    trims += [
        Keep(drop=Drop(p, keys, rescale=True)),
        Keep(select=Select(cases.random_cut(rng, shape, 1, False))),
    ]
    for keep in trims:
        yield Walk(one, keep=keep)
        yield Walk(one, keep=keep, elect=Elect("mass"), combine=mean)
        yield Walk(
            one,
            keep=keep,
            elect=Elect("delta", "none"),
            combine=replace(mean, floor=1e-6, lambda_=0.7),
        )
    yield Walk(one, elect=Elect("count", "minus"), combine=Combine(by="max"))
    yield Walk(one, combine=Combine(divide_by="constant", divisor=3.0), add_base=False)
