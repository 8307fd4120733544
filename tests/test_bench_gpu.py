"""The GPU benchmark without a GPU: its harness, that it finds wrong kernels, its rivals, its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_gpu
import gpu_cases
import gpu_device
import gpu_files
import gpu_parts
import gpu_rivals
import gpu_verify
import numpy as np
import pytest
import report
import torch
from gpu_device import Host, Meter, Subject

import fastmerge
from fastmerge import ops
from fastmerge.backends import Buffer, Chunk, Coded, Kernels, Sweep
from fastmerge.backends.memory import tensor_of
from fastmerge.backends.reference import ReferenceKernels
from fastmerge.stages import Cut, Keep, OrderStatistic, Trim, Walk

ROOT = Path(__file__).resolve().parent.parent
TINY = gpu_parts.Sizes(4096, (1 << 12, 1031), 1, 2, 1 << 16, 3, 300, False)


class Stood(Kernels):
    """The cpu backend as the one under test; what is wrong with it is for subclasses to say."""

    name = "stood"

    def __init__(self) -> None:
        self._right = ops.choose("cpu", "cpu")

    def walk(self, walk: Walk, chunk: Chunk, out: Buffer | Coded) -> bool:
        return self._right.walk(walk, chunk, out)

    def sweep(self, *request: Any) -> Sweep:
        return self._right.sweep(*request)

    def __getattribute__(self, name: str) -> Any:
        if name in ("keep_mask", "keep_probability", "refuses"):
            return getattr(object.__getattribute__(self, "_right"), name)
        return object.__getattribute__(self, name)


class FlipsAnElement(Stood):
    """Of what it writes, the last bit of one element far into the tensor is wrong."""

    def walk(self, walk: Walk, chunk: Chunk, out: Buffer | Coded) -> bool:
        bad = super().walk(walk, chunk, out)
        if out.n > 77 and isinstance(out, Buffer):
            tensor_of(out).view(torch.uint8)[77 * out.dtype.itemsize] ^= 1
        return bad


class _Shifted:
    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def result(self) -> list[Cut]:
        cuts: list[Cut] = self._sweep.result()
        return [replace(cut, last_tie=cut.last_tie + 1) for cut in cuts]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sweep, name)


class ShiftsATie(Stood):
    """The last tie of every cut is one element too far."""

    def sweep(self, *request: Any) -> Any:
        sweep = super().sweep(*request)
        return _Shifted(sweep) if isinstance(request[0], OrderStatistic) else sweep


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_verify, "SHAPES", [(5, 123), (0, 5)])
    monkeypatch.setattr(gpu_parts, "REHEARSAL", TINY)
    monkeypatch.setattr("gpu_timing.WARM_UP", 1)
    monkeypatch.setattr("gpu_timing.LEAST_RUNS", 2)
    monkeypatch.setattr("gpu_timing.MOST_RUNS", 2)


def bench_of(kernels: Kernels, out: Path | None = None, **given: Any) -> gpu_parts.Bench:
    device = Host()
    subject = Subject(kernels, device, Meter(device), "stood")
    return gpu_parts.Bench(device, [subject], TINY, seed=5, out=out, quick=True, **given)


# ---- the harness -----------------------------------------------------------------------------------


def test_rehearsal(tiny: None, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert bench_of(Stood(), out).run(list(gpu_parts.PARTS)) == 0
    data = json.loads(out.read_text())
    assert data["rehearsal"]
    (verdict,) = data["verification"]
    assert verdict["failures"] == verdict["left_out"] == []
    assert verdict["checks"] > 200
    assert [r["name"] for r in data["kernels"]] == [c.name for c in gpu_cases.all_cases()]
    row = next(r for r in data["kernels"] if r["name"] == "ties K=4")
    assert row["bytes"] == 4096 * 2 * 6
    assert row["kernel_p20_s"] <= row["kernel_s"] <= row["kernel_p80_s"]
    assert row["share_of_copy"] == pytest.approx(row["bytes_per_s"] / data["copy_bytes_per_s"])
    assert [r["name"] for r in data["small"]] == [
        "one launch", "one by one", "one launch, kernels", "eager",
    ]  # fmt: skip
    assert all(r["stood"]["wall_s"] > 0 and r["eager"]["wall_s"] > 0 for r in data["rivals"])
    assert data["left_out"] == ["torch.compile: not part of a rehearsal"]
    assert data["versions"]["torch"] == torch.__version__
    lines = report.gpu_table(data | {"rivals": []})
    assert "checks, none wrong" in lines[1]


def test_time_that_is_up_is_told(tiny: None) -> None:
    bench = bench_of(Stood(), budget=0.0)
    assert bench.run(list(gpu_parts.PARTS)) == 0
    assert bench.result["kernels"] == bench.result["rivals"] == []
    assert "stood ties K=4: time is up" in bench.result["left_out"]
    assert "time is up" in bench.result["verification"][0]["left_out"][0]


@pytest.mark.parametrize(
    ("kernels", "kernel", "case"),
    [(FlipsAnElement(), "walk", "ties K=4"), (ShiftsATie(), "order of delta", "exact select K=4")],
)
def test_a_wrong_kernel_is_told_and_not_timed(
    kernels: Kernels, kernel: str, case: str, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = bench_of(kernels)
    assert bench.run(["verify", "kernels"]) == 1
    failures = bench.result["verification"][0]["failures"]
    first = next(f for f in failures if f["kernel"] == kernel)
    if kernel == "walk":
        assert first["index"] == 77
    assert first["got"] != first["want"]
    assert f"WRONG stood {kernel}: first wrong index {first['index']}: " in capsys.readouterr().out
    assert case not in [r["name"] for r in bench.result["kernels"]]
    assert f"stood {case}: verification of {kernel} failed" in bench.result["left_out"]
    assert any(r["name"].startswith("gram") for r in bench.result["kernels"])


def test_a_wrong_kernel_is_found_without_the_verification_too(tiny: None) -> None:
    bench = bench_of(ShiftsATie())
    assert bench.run(["kernels"]) == 1
    left_out = bench.result["left_out"]
    assert any(line.startswith("stood exact select K=2: WRONG: first wrong") for line in left_out)
    assert "stood exact select K=8: verification of order of delta failed" in left_out


def test_a_broken_kernel_leaves_the_others(tiny: None) -> None:
    class Raises(Stood):
        def sweep(self, *request: Any) -> Any:
            raise RuntimeError("no such sweep\nand more")

    bench = bench_of(Raises())
    assert bench.run(["kernels"]) == 0  # nothing was found wrong: it is left out, with its reason
    assert "stood gram K=4: RuntimeError: no such sweep" in bench.result["left_out"]
    assert any(r["name"] == "ties K=4" for r in bench.result["kernels"])


def test_a_method_of_unknown_parameters_is_left_out(
    tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_verify, "VARIATIONS", {"slerp": [{}]})
    bench = bench_of(Stood())
    assert bench.run(["verify"]) == 0
    left_out = bench.result["verification"][0]["left_out"]
    assert any("method slerp" in line and "requires t" in line for line in left_out)


def test_comparing_knows_one_nan_only() -> None:
    a = torch.tensor([1.0, float("nan"), -0.0])
    b = a.clone()
    b.view(torch.int32)[1] ^= 1  # another NaN
    gpu_verify.compare(a, b)
    b[2] = 0.0
    with pytest.raises(gpu_verify.Mismatch, match=r"index 2: -0.0, should be 0.0; 1 of 3"):
        gpu_verify.compare(a, b)


def test_launches_are_metered() -> None:
    class Native:
        class Queue: ...

        def walk(self, queue: Any, n: int) -> int:
            return n + 1

        def rank(self, n: int) -> int:
            return n

    meter = Meter(Host())
    module = gpu_device.MeteredModule(Native(), meter)
    assert module.walk(module.Queue(), 1) == 2
    meter.start()
    assert (module.walk(module.Queue(), 1), module.rank(3)) == (2, 3)
    meter.stop()
    assert list(meter.by_name()) == ["walk"]


def test_command(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not torch.cuda.is_available()
    assert bench_gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().out
    assert bench_gpu.main(["--rehearse", "--backend", "cuda"]) == 2
    assert "needs --emulated" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench_gpu.main(["--only", "verify,everything"])
    with pytest.raises(SystemExit):
        bench_gpu.main(["--rehearse", "--out", str(bench_gpu.RESULTS / "gpu-x.json")])
    assert "measures nothing" in capsys.readouterr().err


def test_a_build_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "setup.py").write_text("import subprocess; subprocess.run(['sleep', '60'])")
    monkeypatch.setattr(bench_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(bench_gpu, "BUILD_SECONDS", 0.5)
    assert "not built in 0 s" in str(bench_gpu.build(gpu_parts.Progress()))


def test_a_build_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "setup.py").write_text("import sys; sys.exit('error: no compiler\\nmore')")
    monkeypatch.setattr(bench_gpu, "ROOT", tmp_path)
    assert bench_gpu.build(gpu_parts.Progress()) == "error: no compiler"


# ---- rivals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rival", gpu_rivals.RIVALS, ids=lambda rival: rival.method)
def test_rivals_compute_the_same(rival: gpu_rivals.Rival) -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(31, 257, generator=generator)
    experts = [base + 0.01 * torch.randn(31, 257, generator=generator) for _ in range(4)]
    masks = None
    if rival.is_random:
        masks = [(torch.rand(31, 257, generator=generator) < 0.5).to(torch.uint8) for _ in range(4)]
    ours = fastmerge.merge_tensors(
        base if rival.with_base else None, experts, method=rival.method, masks=masks, **rival.given
    )
    theirs = rival.eager(base, experts, masks)
    # A sum of deltas that is all but zero may elect either sign: nowhere here but in rare coordinates.
    apart = (ours - theirs).abs() > 1e-5
    assert apart.float().mean() < 1e-3
    assert theirs.dtype == base.dtype


def test_rivals_draw_as_often_as_asked() -> None:
    base = torch.zeros(64, 1024)
    out = gpu_rivals.dare_linear(base, [torch.ones(64, 1024)])
    assert set(out.unique().tolist()) == {0.0, 1.0}
    assert float(out.mean()) == pytest.approx(0.5, abs=0.01)


def test_small_walks_are_the_fused_ones() -> None:
    small = gpu_cases.Small.of(Host(), 4, 500, 3, 1)
    for i, walk in enumerate(small.walks):
        assert walk.keep.trim
        no_ties = replace(walk.keep.trim.keep, last_tie=np.full((3, 1), -1))
        small.walks[i] = replace(walk, keep=Keep(Trim(no_ties)))
    merged = small.together(ReferenceKernels())()
    eager = gpu_rivals.small_walks(small.operands, small.cuts())
    for ours, theirs in zip(merged, eager, strict=True):
        assert (ours != theirs).float().mean() < 0.01  # of another order of summing


# ---- tables ----------------------------------------------------------------------------------------


def test_modelled_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.render("<!-- table: gpu -->\n<!-- end table -->\n")
    assert "Modelled, not yet measured" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert all(line.endswith("| modelled |") for line in rows)
    ties = next(line for line in rows if line.startswith("| TIES walk K=4 "))
    assert "273 us (memory)" in ties  # 12 bytes x 64 Mi / (0.88 x 3.35 TB/s)
    assert report.render(text) == text


def test_measured_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    data = {
        "machine": "NVIDIA H100, Linux, Python 3.12.3",
        "versions": {"torch": "2.11.0"},
        "date": "2026-12-01",
        "elements": 1 << 26,
        "copy_bytes_per_s": 2.9e12,
        "verification": [{"backend": "cuda", "checks": 900, "failures": []}],
        "kernels": [
            {
                "name": "ties K=4", "backend": "cuda", "bytes": 12 * 2**26, "elements": 1 << 26,
                "kernel_s": 3e-4, "kernel_p20_s": 2.9e-4, "kernel_p80_s": 3.1e-4, "bytes_per_s": 2.68e12,
                "share_of_copy": 0.926, "sweeps": None,
            }
        ],
        "rivals": [
            {"method": "ties", "experts": 4, "cuda": {"wall_s": 2e-3}, "eager": {"wall_s": 5e-2},
             "compiled_not": "TimeoutError"},
            {"method": "sce", "experts": 4, "eager": {"wall_s": 5e-2}},
        ],
    }  # fmt: skip
    (tmp_path / "gpu-h100.json").write_text(json.dumps(data))
    text = report.render("<!-- table: gpu -->\n<!-- end table -->\n")
    assert "odelled" not in text
    assert (
        "copy moves 2900 GB/s; against the cpu backend's bits: cuda 900 checks, none wrong" in text
    )
    assert "| ties K=4 | cuda | 12.0 | 300 | 290, 310 | 2680 | 93% |" in text
    assert "| ties K=4 | 2.00 ms | 50.00 ms | 25.0x |" in text
    assert "| sce K=4 |  | 50.00 ms |  |" in text


def test_whole_merges_are_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_files, "_mergekit", lambda *_: None)
    out = tmp_path / "files.json"
    arguments = ["--end-to-end", "--rehearse", "--folder", str(tmp_path), "--out", str(out)]
    assert bench_gpu.main(arguments) == 0
    result = json.loads(out.read_text())
    assert {(r["method"], r["cached"]) for r in result["rows"]} == {
        (m, c) for m in gpu_files.METHODS for c in (True, False)
    }
    assert all(r["equal"] and r["seconds"] > 0 for r in result["rows"])
    moved = {r["method"]: r["bytes_read"] for r in result["rows"]}
    assert moved["ties"] * gpu_files.EXPERTS == moved["linear"] * (gpu_files.EXPERTS + 1)


def test_a_wrong_byte_of_a_whole_merge_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_files, "_mergekit", lambda *_: None)
    monkeypatch.setattr(gpu_files, "METHODS", {"linear": "weight: 0.5"})
    sums = iter(({"a": 1}, {"a": 2}, {"a": 1}))
    monkeypatch.setattr(gpu_files, "checksums", lambda folder: next(sums))
    out = tmp_path / "files.json"
    arguments = ["--end-to-end", "--rehearse", "--folder", str(tmp_path), "--out", str(out)]
    assert bench_gpu.main(arguments) == 1
    assert [r["equal"] for r in json.loads(out.read_text())["rows"]] == [False, True]
