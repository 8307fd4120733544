"""Coded tensors, operands and results, through any kernels against the cpu backend's bytes.

Run by tests/emulation.py in a process that the sanitizers watch; see tests/test_cuda_coded.py.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import agreement
import cases
import coded_tensors
import device_merges
import numpy as np
import torch

import fastmerge
from fastmerge import _cpu, ops
from fastmerge.backends import Buffer, Coded, Kernels, Residual
from fastmerge.coding import Coding, Format, ScaleType, is_atomic, parts_of, result_rows
from fastmerge.dtypes import DType
from fastmerge.evaluate import Operands, peak, resolve, run_walk, sweep_statistic
from fastmerge.recipe import keyword_params
from fastmerge.registry import Scope, TensorContext
from fastmerge.stages import Axis, Combine, Drop, Elect, GivenMask, Keep, RankedDrop, Trim, Walk
from fastmerge.streaming.device import HostDevice

F, S = Format, ScaleType
BF16, F16, F32 = DType.BF16, DType.F16, DType.F32

#: What can be written, by name: [rows, cols] and how.
WRITTEN: dict[str, tuple[tuple[int, int], Coding]] = {
    "nf4": ((20, 200), Coding(F.BNB_NF4, BF16, group=64)),
    "nf4 by the other rule": ((33, 65), Coding(F.BNB_NF4, F16, group=128, other_rule=True)),
    "nf4, searched": ((8, 96), Coding(F.BNB_NF4, BF16, group=64, search=True)),
    "nf4, nested": ((70, 64), Coding(F.BNB_NF4, BF16, S.U8, group=64, nested=True)),
    "fp4": ((7, 129), Coding(F.BNB_FP4, F32, group=64)),
    "fp4 by the other rule": ((16, 256), Coding(F.BNB_FP4, BF16, group=256, other_rule=True)),
    "int4": ((37, 256), Coding(F.INT4, BF16, S.BF16, group=128)),
    "int4 of odd rows": ((5, 100), Coding(F.INT4, F16, S.F16, group=0)),
    "int4 of odd groups": ((9, 90), Coding(F.INT4, BF16, S.BF16, group=12)),
    "int4 with zeros": ((21, 160), Coding(F.INT4, BF16, S.BF16, group=32, symmetric=False)),
    "int4 with zeros of rows": ((16, 77), Coding(F.INT4, F32, S.F32, group=0, symmetric=False)),
    "int4 by the other rule": (
        (8, 128), Coding(F.INT4, BF16, S.BF16, group=64, other_rule=True)),
    "nvfp4": ((9, 256), Coding(F.NVFP4, BF16, S.E4M3, group=16)),
    "nvfp4, searched": ((5, 64), Coding(F.NVFP4, F16, S.E4M3, group=16, search=True)),
    "mxfp4": ((13, 96), Coding(F.MXFP4, BF16, S.E8M0, group=32)),
    "mxfp4 by the other rule": ((3, 64), Coding(F.MXFP4, F32, S.E8M0, group=32, other_rule=True)),
    "gptq": ((24, 128), Coding(F.GPTQ, F16, S.F16, group=32)),
    "gptq with zeros": ((16, 64), Coding(F.GPTQ, F16, S.F16, group=64, symmetric=False, v1=True)),
    "gptq of rows": ((8, 2048), Coding(F.GPTQ, F16, S.F16, group=0)),
    "awq": ((40, 128), Coding(F.AWQ, F16, S.F16, group=64, symmetric=False)),
    "q4_0": ((11, 96), Coding(F.Q4_0)),
    "q4_0 of rotary rows": ((16, 64), Coding(F.Q4_0, rotary=8)),
    "q4_1": ((5, 64), Coding(F.Q4_1)),
    "q8_0": ((9, 160), Coding(F.Q8_0, BF16)),
    "q4_k": ((3, 512), Coding(F.Q4_K)),
    "gguf mxfp4": ((6, 64), Coding(F.GGUF_MXFP4)),
    "fp8 of tensors": ((10, 100), Coding(F.FP8, BF16, group_rows=0)),
    "fp8 of rows": ((11, 1000), Coding(F.FP8, BF16, S.BF16, group=0)),
    "fp8 of long rows": ((3, 26_000), Coding(F.FP8, BF16, group=0)),
    "fp8 of blocks": ((70, 300), Coding(F.FP8, BF16, group=128, group_rows=32)),
    "dense": ((9, 50), Coding(F.DENSE, F16)),
    "dense of rotary rows": ((16, 24), Coding(F.DENSE, BF16, rotary=16)),
}  # fmt: skip

#: What is only read.
READ: dict[str, tuple[tuple[int, int], Coding]] = {
    "nvfp4 by the other rule": ((4, 64), Coding(F.NVFP4, BF16, S.E4M3, group=16, other_rule=True)),
    "q6_k": ((3, 512), Coding(F.Q6_K)),
    "gguf nvfp4": ((5, 128), Coding(F.GGUF_NVFP4)),
    "int8": ((7, 90), Coding(F.INT8)),
}


def values_of(rng: np.random.Generator, shape: tuple[int, int], content: str) -> np.ndarray:
    return cases.tensor(rng, shape, content, torch.float32).numpy()


def _buffers(
    coding: Coding, shape: tuple[int, int], slots: dict[str, np.ndarray]
) -> dict[str, Buffer]:
    found = {}
    for spec in parts_of(coding, *shape):
        array = slots[spec.slot]
        found[spec.slot] = Buffer(
            array.ctypes.data, spec.dtype, array.size // spec.dtype.itemsize, array
        )
    return found


def _random_bytes(
    rng: np.random.Generator, coding: Coding, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Return slots of a format that is not written here; every scale is finite."""
    slots = {
        spec.slot: rng.integers(0, 256, spec.n_bytes).astype(np.uint8)
        for spec in parts_of(coding, *shape)
    }
    if coding.format is F.Q6_K:
        scales = rng.standard_normal(slots["codes"].size // 210).astype(np.float16)
        slots["codes"].reshape(-1, 210)[:, 208:] = scales.view(np.uint8).reshape(-1, 2)
    if "scales" in slots:
        slots["scales"][:] = rng.random(slots["scales"].size // 4).astype(np.float32).view(np.uint8)
    return slots


def operand(
    rng: np.random.Generator,
    coding: Coding,
    x: np.ndarray,
    *,
    low_rank: int = 0,
    first_row: int = 0,
) -> Coded:
    """Return x as codes. low_rank: of an addition; first_row: rows before it are not there."""
    shape = x.shape
    rows, cols = shape
    offset, scale = 0.0, 1.0
    if coding.format in (F.Q6_K, F.GGUF_NVFP4, F.INT8):
        slots, scale = _random_bytes(rng, coding, shape), 0.5
    else:
        held = coded_tensors.Coded(coding, rows, cols)
        held.encode(coded_tensors.rounded(x, coding.dtype))
        slots = dict(held.slots)
        offset = float(held.fields.get("nested_offset", 0.0))
        scale = float(held.fields.get("tensor_scale", 1.0))
    start = first_row * cols
    for spec in parts_of(coding, rows, cols):
        a, b = spec.span(start, rows * cols)
        slots[spec.slot] = slots[spec.slot][a:b].copy()
    buffers = _buffers(coding, shape, slots)
    if low_rank:
        dtype = (F32, F16, BF16)[low_rank % 3]
        for slot, n in (("low_a", low_rank * cols), ("low_b", rows * low_rank)):
            held_low = torch.from_numpy(rng.standard_normal(n)).to(getattr(torch, dtype.torch))
            buffers[slot] = Buffer(held_low.data_ptr(), dtype, n, held_low)
    if coding.format is F.GPTQ and not coding.symmetric:  # in the order of activations
        groups = cols // (coding.group or cols)
        group_of = rng.permutation(np.arange(cols, dtype=np.int32) % groups)
        buffers["group_of"] = Buffer(group_of.ctypes.data, DType.I32, cols, group_of)
    n = (rows - first_row) * cols
    return Coded(coding, rows, cols, start, start, n, buffers, offset, scale, 0.25 * bool(low_rank))


def dense(x: np.ndarray, dtype: torch.dtype) -> Buffer:
    return ops.buffer_of(torch.from_numpy(x).to(dtype), "operand")


def result(coding: Coding, shape: tuple[int, int], largest: float) -> Coded:
    """Return memory for a result, each part at its exact size, full of what no part of it is."""
    rows, cols = shape
    plain = replace(coding, nested=False, scale=S.F32) if coding.nested else coding
    slots = {
        spec.slot: np.full(spec.n_bytes, 0xA5, np.uint8) for spec in parts_of(plain, rows, cols)
    }
    made = Coded(
        plain, rows, cols, 0, 0, rows * cols, _buffers(plain, shape, slots), residual=Residual()
    )
    scale = coded_tensors.Coded(plain, rows, cols)
    tensor_scale = float(_cpu.tensor_scale(scale.view(), largest))
    if coding.format is F.FP8 and coding.group_rows == 0:
        slots["scales"][:] = np.frombuffer(np.float32(tensor_scale).tobytes(), np.uint8)
    return replace(made, tensor_scale=tensor_scale if coding.format is F.NVFP4 else 1.0)


def check(kernels: Kernels, held: Operands, walk: Walk, out: str, limit: int = 1 << 30) -> None:
    """The same peak, codes, scales and zeros, the same report, and what coding costs, nearly."""
    cpu = ops.choose("cpu", "cpu")
    shape, coding = WRITTEN[out]
    peaks = [peak(each, walk, held, coding.dtype, limit) for each in (kernels, cpu)]
    assert peaks[0] == peaks[1], (out, peaks)
    results, bad = [], []
    for each in (kernels, cpu):
        made = result(coding, shape, peaks[1][1])
        bad.append(run_walk(each, walk, held, made, limit))
        results.append(made)
    assert bad[0] == bad[1] == peaks[0][0], (out, bad, peaks)
    if bad[0]:
        return
    for slot, buffer in results[0].slots.items():
        got, want = buffer.owner, results[1].slots[slot].owner
        differs = np.flatnonzero(got != want)
        assert not differs.size, f"{out}: byte {differs[0]} of {slot} of {got.size}; {walk}"
    got, want = results[0].residual, results[1].residual
    assert got is not None and want is not None
    for a, b in ((got.errors, want.errors), (got.squares, want.squares)):
        assert math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-30), (out, got, want)


def walks(rng: np.random.Generator, shape: tuple[int, int], k: int) -> Iterator[tuple[str, Walk]]:
    """Yield one walk of each family."""
    one = rng.choice([0.5, 1.0, -0.3], (k, 1))
    keys = [int(x) for x in rng.integers(0, 2**63, k)]
    elect, mean = Elect("mass"), Combine(divide_by="weight", divisor_weight=[1.0] * k)
    cut = cases.random_cut(rng, shape, k, bool(rng.random() < 0.3))
    p = rng.choice([0.1, 0.5, 0.9], k).tolist()
    low, high = [0.3] * k, [0.8] * k
    yield "linear", Walk(one / k, combine=Combine(divide_by="constant", divisor=1.5))
    yield "no base", Walk(np.full((k, 1), 1 / k), add_base=False)
    yield "ties", Walk(one, keep=Keep(Trim(cut)), elect=elect, combine=mean)
    yield "dare", Walk(one, keep=Keep(drop=Drop(p, keys, rescale=True)), elect=elect)
    yield "della", Walk(one, keep=Keep(drop=RankedDrop(low, high, keys, Axis.ROW, "rank", True)))
    yield "della, kept", Walk(one, keep=Keep(drop=RankedDrop(low, high, keys, Axis.ROW, "rank")))
    rows = rng.standard_normal((k, shape[0]))
    yield "slerp", Walk(rows, axis=Axis.ROW)
    given = GivenMask([rng.integers(0, 2, math.prod(shape)).astype("u1") for _ in range(k)])
    yield "given", Walk(one, keep=Keep(given=given))


def operands(
    rng: np.random.Generator, shape: tuple[int, int], k: int, names: list[str], low_rank: int
) -> Operands:
    """Return operands of `shape`: the base and every second expert as codes, if any are so in `names`."""
    content = str(rng.choice(cases.CONTENTS[:3]))
    base = values_of(rng, shape, content)
    experts = [base + 0.02 * values_of(rng, shape, "normal") for _ in range(k)]
    of_coding = [coding_of(name, shape) for name in names]
    held: list[Buffer | Coded] = []
    for j, x in enumerate([base, *experts]):
        coding = of_coding[j % len(of_coding)] if of_coding else None
        x = x.astype(np.float32)
        if coding is None:
            held.append(dense(x, (torch.bfloat16, torch.float16, torch.float32)[j % 3]))
        else:
            held.append(operand(rng, coding, x, low_rank=low_rank if j % 2 else 0))
    return Operands(held[0], held[1:], shape[1], F32)


def coding_of(name: str, shape: tuple[int, int]) -> Coding | None:
    """Return how an operand of `shape` may be coded; None where the format cannot hold it, or of ""."""
    if not name:
        return None
    coding = {**WRITTEN, **READ}[name][1]
    rows, cols = shape
    flat = coding.format in coded_tensors.FLAT
    blocks = {F.Q4_K: 256, F.Q6_K: 256, F.GGUF_NVFP4: 64, F.NVFP4: 16}.get(coding.format, 32)
    if coding.format in (F.GPTQ, F.AWQ):
        return coding if rows % 8 == 0 and cols % 8 == 0 else None
    if coding.format in (F.INT4, F.FP8, F.INT8, F.DENSE) or flat:
        return coding if not coding.rotary or rows % coding.rotary == 0 else None
    return (
        coding if cols % blocks == 0 and (not coding.rotary or rows % coding.rotary == 0) else None
    )


def results(kernels: Kernels, name: str) -> None:
    """One written format: every family over two codes and a plain tensor; some over plain ones, in chunks."""
    shape, coding = WRITTEN[name]
    rng = agreement.rng_of("coded", name)
    slow = coding.search or coding.format is F.Q4_K or shape[1] > 5000
    some = ("linear", "ties", "dare") if slow else ("linear", "ties", "slerp")
    for k, names, taken in ((2, [name, "", "nf4"], some if slow else ()), (3, [], some)):
        held = operands(rng, shape, k, names, low_rank=3 if names else 0)
        for family, walk in walks(rng, shape, k):
            if not taken or family in taken:
                limit = 1 << 30 if is_atomic(coding) or k == 2 else 1000
                check(kernels, held, walk, name, limit)


def operands_of(kernels: Kernels, name: str) -> None:
    """One format that is read: plain results, statistics, masks; in pieces that begin anywhere."""
    shape, coding = {**WRITTEN, **READ}[name]
    rng = agreement.rng_of("operand", name)
    cpu = ops.choose("cpu", "cpu")
    first = (
        0
        if is_atomic(coding) and coding.format in (F.GPTQ, F.AWQ)
        else result_rows(coding, shape[1])
    )
    first = first if first < shape[0] else 0
    x = values_of(rng, shape, "normal")
    coded = operand(rng, coding, x, low_rank=5, first_row=first)
    n, start = coded.n, coded.start
    whole = (n // shape[1], shape[1])
    other = x.reshape(-1)[start:] + 0.1 * values_of(rng, whole, "normal").reshape(-1)
    mixed = Operands(coded, [dense(other, torch.float32), coded], shape[1], F32, start)
    wide = Operands(dense(other, torch.float64), [coded], shape[1], DType.F64, start)
    for held, limit in itertools.product((mixed, wide), (1 << 30, 777)):
        k = len(held.experts)
        for _ in range(3):
            walk = cases.random_walk(rng, shape, k, True)
            outs, bad = [], []
            for each in (kernels, cpu):
                out = torch.zeros(n, dtype=torch.bfloat16)
                bad.append(run_walk(each, walk, held, ops.buffer_of(out, "out"), limit))
                outs.append(out)
            assert bad[0] == bad[1]
            assert torch.equal(outs[0].view(torch.int16), outs[1].view(torch.int16)), (name, walk)
    _statistics(kernels, rng, replace(mixed, start=0), whole)


def _statistics(
    kernels: Kernels, rng: np.random.Generator, held: Operands, shape: tuple[int, int]
) -> None:
    cpu = ops.choose("cpu", "cpu")
    for limit in (1 << 30, 777):
        for request in agreement.statistics(rng, shape, len(held.experts)):
            if limit == 777 and rng.random() < 0.6:
                continue
            answers = [
                sweep_statistic(each, request, held, limit)  # type: ignore[arg-type]
                for each in (kernels, cpu)
            ]
            got, want = (
                [
                    vars(x) if hasattr(x, "__dict__") else x
                    for x in (y if isinstance(y, list) else [y])
                ]
                for y in answers
            )
            np.testing.assert_equal(got, want, err_msg=str(request))
    ((_, chunk),) = held.chunks(agreement.Grain.TENSOR, 1)
    for _ in range(4):
        keep = cases.random_keep(rng, shape, len(held.experts))
        np.testing.assert_array_equal(kernels.keep_mask(keep, chunk), cpu.keep_mask(keep, chunk))
        if isinstance(keep.drop, RankedDrop):
            np.testing.assert_array_equal(
                kernels.keep_probability(keep.drop, chunk), cpu.keep_probability(keep.drop, chunk)
            )


def long_ties(kernels: Kernels) -> None:
    """Cuts of coded tensors longer than a piece: digit by digit, ties piece by piece; many tiles."""
    rng = agreement.rng_of("long")
    shape = (300, 500)
    WRITTEN["long"] = (shape, Coding(F.BNB_NF4, BF16, group=64))
    held = operands(rng, shape, 2, ["nf4"], low_rank=0)
    request = agreement.OrderStatistic([[60_000], [100_001]])
    got, want = (
        sweep_statistic(each, request, held) for each in (kernels, ops.choose("cpu", "cpu"))
    )
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x.value, y.value)
        np.testing.assert_array_equal(x.last_tie, y.last_tie)
    walk = Walk(np.ones((2, 1)), keep=Keep(Trim(got[0])), elect=Elect("mass"))
    check(kernels, held, walk, "long")
    check(kernels, held, walk, "long", 70_000)


def methods(kernels: Kernels) -> None:
    """Every registered method over codes, statistics and all, into codes."""
    rng = agreement.rng_of("methods")
    for j, (name, spec) in enumerate(fastmerge.list_methods().items()):
        out = list(WRITTEN)[j % 6]
        shape, _ = WRITTEN[out]
        held = operands(rng, shape, 2, ["nf4", "fp8 of blocks", ""], low_rank=2)
        base, experts = held.base, list(held.experts)
        if spec.base == "ignored" or spec.base_is_operand:
            base, experts = None, [base, *experts[:1]] if spec.base_is_operand else experts
        given = {p.name: 0.3 for p in spec.params if p.name in ("t", "weight", "density")}
        params = keyword_params(spec, len(experts), base is not None, given)
        n = math.prod(shape)
        context = TensorContext("w", shape, len(experts), base is not None, 0, n, None)
        if spec.scope_for(params, context) in (Scope.MODEL, Scope.MATRIX):
            continue
        held = replace(held, base=base, experts=experts)
        walks_of = [
            resolve(each, spec, params, context, held)[0]
            for each in (kernels, ops.choose("cpu", "cpu"))
        ]
        assert str(walks_of[0]) == str(walks_of[1]), name
        if isinstance(walks_of[1], Walk):
            check(kernels, held, walks_of[1], out)


def not_finite(kernels: Kernels) -> None:
    """NaN or infinity in an operand, coded or not, or a result that its type cannot hold."""
    rng = agreement.rng_of("not finite")
    for name in ("nf4", "q8_0", "fp8 of blocks"):
        shape, coding = WRITTEN[name]
        x = values_of(rng, shape, "normal")
        walk = Walk(np.ones((1, 1)))
        for value in (np.nan, np.inf, -np.inf):
            wrong = x.copy()
            wrong[shape[0] // 2, -1] = value
            for base, expert in ((wrong, x), (x, wrong)):
                held = Operands(
                    dense(base, torch.float32), [dense(expert, torch.bfloat16)], shape[1], F32
                )
                assert run_walk(kernels, walk, held, result(coding, shape, 1.0))
                assert peak(kernels, walk, held, coding.dtype)[0]
        broken = operand(rng, Coding(F.Q8_0), np.ones((4, 32), np.float32))
        broken.slots["codes"].owner[:2] = (0, 0x7C)
        held = Operands(None, [broken], 32, F32)
        free = Walk(np.ones((1, 1)), add_base=False)
        assert run_walk(kernels, free, held, ops.buffer_of(torch.zeros(128), "out"))
    shape, coding = WRITTEN["int4 of odd rows"]  # of float16
    held = Operands(None, [dense(np.full(shape, 60_000, np.float32), torch.float32)], shape[1], F32)
    for factor, want in ((1.0, False), (1.2, True)):
        walk = Walk(np.full((1, 1), factor), add_base=False)
        assert run_walk(kernels, walk, held, result(coding, shape, 1.0)) is want
        assert peak(kernels, walk, held, coding.dtype)[0] is want


def together(kernels: Kernels) -> None:
    """Coded and plain results of several tensors in one launch each; a format that is only read."""
    rng = agreement.rng_of("together")
    cpu = ops.choose("cpu", "cpu")
    names = ["nf4", "fp8 of blocks", "fp8 of long rows", "int4 with zeros", "nf4", "q4_k"]
    jobs = []
    for name in names:
        shape, coding = WRITTEN[name]
        held = operands(rng, shape, 2, ["nf4", ""], low_rank=0)
        ((_, chunk),) = held.chunks(agreement.Grain.TENSOR, 1)
        jobs.append((Walk(rng.standard_normal((2, 1))), chunk, coding, shape))
    made = []
    for each in (kernels, cpu):
        outs: list[Any] = [result(coding, shape, 1.0) for _, _, coding, shape in jobs]
        plain = torch.zeros(jobs[0][1].n, dtype=torch.bfloat16)
        bad = each.walks(
            [
                *((walk, chunk, out) for (walk, chunk, _, _), out in zip(jobs, outs, strict=True)),
                (jobs[0][0], jobs[0][1], ops.buffer_of(plain, "out")),
            ]
        )
        assert bad == [False] * (len(jobs) + 1)
        made.append(
            [
                *(s.owner for out in outs for s in out.slots.values()),
                plain.view(torch.int16).numpy(),
            ]
        )
    for got, want in zip(*made, strict=True):
        np.testing.assert_array_equal(got, want)
    shape, coding = READ["q6_k"]
    held = operands(rng, shape, 1, [], low_rank=0)
    try:
        run_walk(kernels, Walk(np.ones((1, 1))), held, result(coding, shape, 1.0))
    except ValueError as error:
        assert "can only be read" in str(error)
    else:
        raise AssertionError("written")


def files(kernels: Kernels) -> None:
    """Whole merges through the device pipeline, into formats of folders."""
    with tempfile.TemporaryDirectory() as name:
        device_merges.write_quantised_family(Path(name))
        for quantize in ("nf4-dq", "int4-asym", "nvfp4", "fp8-tensor", "gptq", "awq"):
            device_merges.check_quantised_merge(Path(name), quantize, kernels, HostDevice())


#: What is tested in one process, by how the names begin.
GROUPS = {
    "bitsandbytes": ("nf4", "fp4"),
    "integers": ("int4", "gptq", "awq"),
    "floats": ("nvfp4", "mxfp4", "fp8", "int8", "dense"),
    "blocks": ("q4", "q6", "q8", "gguf"),
}


def _each(check_one: Callable[[Kernels, str], None], names: list[str]) -> Callable[[Kernels], None]:
    def part(kernels: Kernels) -> None:
        for name in names:
            check_one(kernels, name)

    return part


PARTS: dict[str, Callable[[Kernels], None]] = {
    **{
        f"to {group}": _each(results, [n for n in WRITTEN if n.startswith(begin)])
        for group, begin in GROUPS.items()
    },
    **{
        f"from {group}": _each(operands_of, [n for n in [*WRITTEN, *READ] if n.startswith(begin)])
        for group, begin in GROUPS.items()
    },
    "files": files,
    "long ties": long_ties,
    "methods": methods,
    "not finite": not_finite,
    "together": together,
}
