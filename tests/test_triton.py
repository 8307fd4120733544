"""The Triton backend in the interpreter: equal to the cpu backend to the bit, for every stage and statistic.

The interpreter takes some 50 us per operation of a program, whatever its size: cases are few and chosen.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import agreement
import cases
import device_merges
import families
import numpy as np
import pytest
import torch

import fastmerge
from fastmerge import ops
from fastmerge.backends import streamed_order
from fastmerge.backends import triton as backend
from fastmerge.errors import BackendError
from fastmerge.evaluate import Operands, run_walks
from fastmerge.registry import methods, unregister
from fastmerge.stages import (
    Axis,
    Combine,
    Drop,
    Elect,
    GivenMask,
    Gram,
    Keep,
    Moments,
    OrderStatistic,
    RankedDrop,
    SignBalance,
    Transform,
    Walk,
)
from fastmerge.streaming.device import HostDevice

pytestmark = pytest.mark.skipif(backend.why_not() is not None, reason=str(backend.why_not()))

#: Small enough that short tensors have whole blocks, started ones, several segments, a searched cut.
SMALL = backend.Tiles(block=64, count=64, segments=1, rows=64, direct=16)

SHAPES = [s for s in cases.SHAPES if np.prod(s) < 5000]


@pytest.fixture
def kernels() -> backend.TritonKernels:
    return backend.TritonKernels("cpu")


@pytest.fixture
def small(kernels: backend.TritonKernels) -> backend.TritonKernels:
    kernels.tiles = SMALL
    return kernels


# ---- walks and masks -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_walks_and_masks_are_bit_equal(
    shape: tuple[int, ...], kernels: backend.TritonKernels
) -> None:
    for seed in range(18):
        k = agreement.EXPERTS[seed % 6]
        with_base = seed % 5 != 4
        rng, held = agreement.draw(seed, shape, k, with_base=with_base, shift=int(seed % 4 == 3))
        walk = cases.random_walk(rng, shape, k, with_base)
        kernels.tiles = SMALL if np.prod(shape) < 400 and seed % 2 else backend.INTERPRETED
        agreement.check_walk(kernels, held, walk, cases.FLOATS[seed % 4])
        if seed % 3 == 0:
            agreement.check_masks(kernels, held, walk.keep)


@pytest.mark.parametrize("k", agreement.EXPERTS)
def test_walks_of_the_methods_are_bit_equal(k: int, small: backend.TritonKernels) -> None:
    shape = (3, 5, 11)  # two whole blocks of 64, and 37
    step = 3 if k < 10 else 7
    for seed, dtype in enumerate(cases.FLOATS[:3]):
        rng, held = agreement.draw(3 * seed, shape, k)
        for walk in list(agreement.plain_walks(rng, k, 165))[seed::step]:
            agreement.check_walk(small, held, walk, dtype)


@pytest.mark.parametrize("limit", [11, 64, 100])
def test_chunks_do_not_show(limit: int, small: backend.TritonKernels) -> None:
    for seed in range(8):
        rng, held = agreement.draw(seed, (5, 41), 2)
        walk = cases.random_walk(rng, (5, 41), 2, True)
        agreement.check_walk(small, held, walk, torch.bfloat16, limit)


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
@pytest.mark.parametrize("by", ["rank", "value"])
@pytest.mark.parametrize("axis", [Axis.ROW, Axis.TENSOR])
def test_ranked_drops(
    axis: Axis, by: str, given: bool, monkeypatch: pytest.MonkeyPatch, small: backend.TritonKernels
) -> None:
    """Row by row in spans of two rows; experts that keep everything and nothing among them."""
    monkeypatch.setitem(backend.SPAN_OF, True, 2 * 33)
    shape, k = (5, 33), 4
    rng, held = agreement.draw(1, shape, k)
    keys = [int(x) for x in rng.integers(0, 2**63, k)]
    masks = GivenMask([rng.integers(0, 2, 165).astype(np.uint8) for _ in range(k)])
    drop = RankedDrop([0.2, 1.0, -0.5, 0.4], [0.9, 1.0, 0.0, 0.4], keys, axis, by, rescale=True)  # type: ignore[arg-type]
    keep = Keep(drop=drop, given=masks if given else None)
    agreement.check_masks(small, held, keep)
    agreement.check_walk(small, held, Walk(np.ones((k, 1)), keep=keep), torch.float32)
    agreement.check_statistic(small, held, Moments("abs", keep))


def test_many_walks_share_a_table(kernels: backend.TritonKernels) -> None:
    jobs = []
    for seed, shape in enumerate([(17,), (3, 5, 11), (0,), (64, 64)]):
        rng, held = agreement.draw(seed, shape, 3)
        if seed == 1:
            held.experts[1].reshape(-1)[5] = float("inf")
        chunk = ops._chunk(held.base, held.experts)
        operands = Operands(chunk.base, chunk.experts, chunk.cols, chunk.compute)
        jobs.append((cases.random_walk(rng, shape, 3, True), operands, shape))
    outs = []
    for each in (kernels, ops.choose("cpu", "cpu")):
        out = [torch.zeros(shape) for _, _, shape in jobs]
        buffers = [ops.buffer_of(o, "out") for o in out]
        bad = run_walks(each, [(w, o, b) for (w, o, _), b in zip(jobs, buffers, strict=True)])
        assert bad == [False, True, False, False]
        outs.append(out)
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("where", [0, 70, 164])
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_nonfinite_values_are_reported_and_carried(
    dtype: torch.dtype, where: int, small: backend.TritonKernels
) -> None:
    """In whole blocks, where 16-bit types are watched in pairs, and in the masked rest."""
    for value in (float("nan"), float("inf"), -float("inf")):
        base, expert = torch.zeros(165, dtype=dtype), torch.ones(165, dtype=dtype)
        expert[where] = value
        largest = torch.full((165,), torch.finfo(dtype).max, dtype=dtype)
        for experts, bad in (
            ([expert, base], True),
            ([base, expert], True),
            ([largest, base], False),
        ):
            out = torch.empty(165, dtype=dtype)
            chunk = ops._chunk(base, experts)
            walk = Walk(np.ones((2, 1)), elect=Elect("mass"))
            assert small.walk(walk, chunk, ops.buffer_of(out, "out")) is bad
            assert bool(out.isfinite().all()) is not bad


@pytest.mark.parametrize("seed", range(4))
def test_nan_is_carried_alike(seed: int, small: backend.TritonKernels) -> None:
    rng, held = agreement.draw(3 * seed, (127,), 3)
    held.experts[0].reshape(-1)[::9] = float("nan")
    for by in ("mass", "delta", "count", "normmass", "normfrac"):
        for combine in (Combine(), Combine(by="max"), Combine(divide_by="weight")):
            walk = Walk(rng.standard_normal((3, 1)), elect=Elect(by), combine=combine)  # type: ignore[arg-type]
            agreement.check_walk(small, held, walk, torch.float32)
    agreement.check_walk(
        small, held, Walk(np.ones((3, 1)), combine=Combine(by="max")), torch.float64
    )
    ranks = [[10, 60], [1, 126], [64, 127]]
    agreement.check_statistic(small, held, OrderStatistic(ranks))
    agreement.check_statistic(small, held, Moments("max"))


def test_every_rounding_at_the_store(kernels: backend.TritonKernels) -> None:
    """All 16-bit patterns and their midpoints, from float32 and float64, into every type."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for narrow in (torch.bfloat16, torch.float16):
        exact = patterns.view(narrow).float()
        exact = exact[~exact.isnan()]
        bits = exact.view(torch.int32)
        for held in (exact, (bits + 0x8000).view(torch.float32), (bits + 0x1000).view(torch.float32),
                     exact.double() * (1 + 2.0**-30)):  # fmt: skip
            operands = cases.Operands(None, [held])
            for out in cases.FLOATS:
                agreement.check_walk(kernels, operands, Walk(np.ones((1, 1)), add_base=False), out)


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_are_equal(shape: tuple[int, ...], kernels: backend.TritonKernels) -> None:
    for seed, k in ((0, 1), (2, 2)):
        rng, held = agreement.draw(seed, shape, k, shift=int(seed == 2))
        for request in agreement.statistics(rng, shape, k):
            agreement.check_statistic(kernels, held, request)


@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_statistics_of_many_experts(k: int, small: backend.TritonKernels) -> None:
    rng, held = agreement.draw(k, (3, 40), k)
    for request in agreement.statistics(rng, (3, 40), k):
        if not isinstance(request, Gram) or k < 8:
            agreement.check_statistic(small, held, request)


@pytest.mark.parametrize("limit", [50, 119])
def test_statistics_in_chunks(limit: int, small: backend.TritonKernels) -> None:
    """Chunks that start inside a segment, a block of rows and a bracket of thresholds."""
    rng, held = agreement.draw(limit, (7, 33), 2)
    for request in agreement.statistics(rng, (7, 33), 2):
        agreement.check_statistic(small, held, request, limit)


@pytest.mark.parametrize("n", [4096, 4096 * 3 + 70])
def test_sums_of_several_segments(n: int, small: backend.TritonKernels) -> None:
    _, held = agreement.draw(9, (n,), 1)
    for limit in (n, 5000):
        agreement.check_statistic(small, held, Moments("square"), limit)
    _, held = agreement.draw(9, (2, n), 1)
    agreement.check_statistic(small, held, Gram(axis=Axis.ROW))


@pytest.mark.parametrize(
    ("content", "dtype"),
    [
        ("near", torch.bfloat16),
        ("near", torch.float64),  # twice the passes
        ("grid", torch.bfloat16),
        ("equal", torch.float16),
        ("wide", torch.float32),
        ("nan", torch.bfloat16),
    ],
    ids=str,
)
def test_rank_cuts_are_exact(
    content: str, dtype: torch.dtype, kernels: backend.TritonKernels
) -> None:
    """By counting above thresholds, whole and chunk by chunk, and by one program."""
    n = 9_003
    rng = agreement.rng_of("cuts", content, dtype)
    kind = content if content in cases.CONTENTS else "normal"
    base, expert = (cases.tensor(rng, (n,), kind, dtype) for _ in range(2))
    if content == "near":
        expert = (base.double() + 0.01 * expert.double()).to(dtype)
    if content == "nan":
        expert[::7] = float("nan")
    held = cases.Operands(base, [expert])
    for direct, limit in ((16, n), (16, 4001), (1 << 16, n)):
        kernels.tiles = backend.Tiles(block=1 << 13, count=1 << 11, rows=1 << 14, direct=direct)
        agreement.check_statistic(kernels, held, OrderStatistic([[1, 4000, n - 1, n, 0]]), limit)
        agreement.check_statistic(
            kernels, held, OrderStatistic(of="variance", fraction_of_nonzero=0.3), limit
        )
    agreement.check_statistic(kernels, held, OrderStatistic([[100]], all_ties=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_rank_cuts_in_pieces_are_exact(dtype: torch.dtype, kernels: backend.TritonKernels) -> None:
    """With a sample and without; keys of |delta| and of the variance; also over a model."""
    n = 9_003
    rng = agreement.rng_of("pieces", dtype)
    base, one, two = (cases.tensor(rng, (n,), "grid", dtype) for _ in range(3))
    held = cases.Operands(base, [one, two])
    requests = [
        OrderStatistic([[1, 4000, n - 1], [0, 2000, n]]),
        OrderStatistic([[3000], [8000]], all_ties=True),
        OrderStatistic(fraction_of_nonzero=0.4),
        OrderStatistic(of="variance", fraction_of_nonzero=0.3),
        OrderStatistic([[4000]], of="variance"),
    ]
    compute = ops._chunk(base, [one]).compute
    for smallest in (1, 1 << 20):
        with patch.multiple(streamed_order, SMALLEST=smallest, RUN=16, PART=2500):
            for request in requests:
                sampled = kernels.sweep(request, n, n, 2, compute).wanted() is not None
                assert sampled == (smallest == 1)
                agreement.check_statistic(kernels, held, request, 4001)
            model = [
                cases.Operands(base[a:b], [one[a:b], two[a:b]])
                for a, b in pairwise((0, 2005, 2008, n))
            ]
            request = OrderStatistic([[3000], [8000]], scope="model")
            agreement.check_model_cuts(kernels, model, request, 4001)


def test_cuts_over_a_whole_model() -> None:
    """Tensors fed one by one, each at its offset, pass after pass."""
    rng = agreement.rng_of("model")
    shapes = {"b": (40,), "a": (3, 20), "c": (7,)}
    base = {n: cases.tensor(rng, s, "grid", torch.bfloat16) for n, s in shapes.items()}
    experts = [
        {n: cases.tensor(rng, s, "grid", torch.bfloat16) for n, s in shapes.items()}
        for _ in range(2)
    ]
    merged = [
        fastmerge.merge_state_dicts(
            base, experts, method="ties", scope="model", weight=0.5, density=0.4, backend=name
        )
        for name in ("triton", "cpu")
    ]
    for name in shapes:
        assert torch.equal(merged[0][name], merged[1][name])


def test_sign_balance_of_a_rescaled_drop(small: backend.TritonKernels) -> None:
    rng, held = agreement.draw(3, (130,), 3)
    keep = Keep(drop=Drop([0.5, 0.002, 1.0], [1, 2, 3], rescale=True))
    agreement.check_statistic(
        small, held, SignBalance(keep, rng.standard_normal((3, 1)), Elect("mass"))
    )


# ---- draws ---------------------------------------------------------------------------------------


def test_known_answers_of_philox() -> None:
    """Random123's kat_vectors, philox4x32-10."""
    import triton_probes

    for (*counter, low, high), drawn in agreement.PHILOX_ANSWERS:
        assert triton_probes.words(tuple(counter), low | high << 32) == drawn


# ---- methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(methods()))
def test_methods_are_bit_equal(name: str) -> None:
    rng = agreement.rng_of("method", name)
    n_experts = families.N_EXPERTS.get(name, 3)
    held = cases.operands(rng, (12, 33), n_experts, "normal")
    base = None if methods()[name].base == "ignored" and name == "passthrough" else held.base
    given = {"weight": [0.3, 0.6, 0.2][:n_experts], "density": 0.4}
    given = {p: value for p, value in given.items() if methods()[name].param(p)}
    if name in ("linear", "nuslerp"):  # their base is one of the inputs
        base = None
    extra = {"slerp": {"t": 0.3}, "sce": {"select_topk": 0.6}, "della": {"epsilon": 0.2}}
    parameters = {**given, **extra.get(name.split("_")[0], {})}
    merged = [
        fastmerge.merge_tensors(base, held.experts, method=name, backend=which, **parameters)
        for which in ("triton", "cpu")
    ]
    np.testing.assert_array_equal(*(m.view(torch.uint8).numpy() for m in merged))


def test_the_environment_chooses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMERGE_BACKEND", "triton")
    assert ops.choose("cpu").name == "triton"


# ---- a stage of one's own ------------------------------------------------------------------------


def _example() -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / "triton_stage.py"
    spec = importlib.util.spec_from_file_location("triton_stage", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_stage_of_a_methods_own(capsys: pytest.CaptureFixture[str]) -> None:
    example = _example()
    try:
        example.main()
        assert "agree to the bit" in capsys.readouterr().out
        base, expert = torch.zeros(5), torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])
        merged = fastmerge.merge_tensors(
            base, [expert], method="soft_threshold", threshold=1.0, backend="triton"
        )
        assert merged.tolist() == [-1.0, 0.0, 0.0, 0.0, 1.0]
        with pytest.raises(BackendError, match="backend 'triton' runs it"):
            fastmerge.merge_tensors(base, [expert], method="soft_threshold", backend="cpu")
    finally:
        unregister("soft_threshold")


def test_a_stage_of_too_many_arguments_is_refused(kernels: backend.TritonKernels) -> None:
    stage = Transform("greedy", None, [[1.0]] * 5)
    reason = kernels.refuses(Walk(np.ones((1, 1)), transform=stage))
    assert reason == "the stage 'greedy' has 5 arguments; give it at most 4"


# ---- where it runs -------------------------------------------------------------------------------


def _python(code: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    code = "from fastmerge.backends.triton import why_not; print(why_not())"
    assert _python(code).startswith("no CUDA or ROCm device; TRITON_INTERPRET=1")
    assert _python(code, TRITON_INTERPRET="1") == "None"


def test_the_package_does_not_import_triton() -> None:
    code = "import sys, fastmerge.ops, fastmerge.backends.triton; print('triton' in sys.modules)"
    assert _python(code, TRITON_INTERPRET="1") == "False"


@pytest.fixture(scope="module")
def sharded_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    device_merges.write_sharded_family(folder)
    return folder


@pytest.mark.parametrize("method", device_merges.METHODS)
def test_files_merge_to_the_cpu_backends_bytes(sharded_family: Path, method: str) -> None:
    device_merges.check_merge(sharded_family, method, "triton", HostDevice())
