"""Where arithmetic runs: the table's order, each backend's reason, one device a call, own stages."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import fastmerge
from fastmerge import ops
from fastmerge.backends import Buffer, Chunk, Kernels
from fastmerge.backends.memory import tensor_of, to_host
from fastmerge.dtypes import DType
from fastmerge.errors import BackendError, ConflictError
from fastmerge.stages import Transform, Walk


class _Recorder(Kernels):
    """Stands for a backend; notes how many walks came at a time."""

    name = "recorder"

    def __init__(self) -> None:
        self._inner = ops.choose("cpu", "cpu")
        self.batches: list[int] = []

    def sweep(self, *arguments):  # type: ignore[no-untyped-def]
        return self._inner.sweep(*arguments)

    def walk(self, walk: Walk, chunk: Chunk, out: Buffer) -> bool:
        return self._inner.walk(walk, chunk, out)

    def walks(self, jobs: Sequence[tuple[Walk, Chunk, Buffer]]) -> list[bool]:
        self.batches.append(len(jobs))
        return super().walks(jobs)

    def keep_mask(self, keep, chunk):  # type: ignore[no-untyped-def]
        return self._inner.keep_mask(keep, chunk)

    def keep_probability(self, drop, chunk):  # type: ignore[no-untyped-def]
        return self._inner.keep_probability(drop, chunk)


def entry(name: str, devices: tuple[str, ...], reason: str | None, kernels: Kernels) -> ops.Entry:
    return ops.Entry(name, devices, "a test's", lambda: reason, lambda device: kernels)


def test_a_gpu_is_served_by_cuda_then_triton_then_the_reference() -> None:
    order = [e.name for e in ops.BACKENDS if "cuda" in e.devices]
    assert order == ["cuda", "triton", "reference"]


def test_the_first_that_can_run_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _Recorder(), _Recorder()
    table = [entry("a", ("cuda",), None, first), entry("b", ("cuda", "cpu"), None, second)]
    monkeypatch.setattr(ops, "BACKENDS", tuple(table))
    assert ops.choose("cuda:1") is first
    assert ops.choose("cpu") is second
    table[0] = entry("a", ("cuda",), "no driver", first)
    monkeypatch.setattr(ops, "BACKENDS", tuple(table))
    assert ops.choose("cuda:1") is second
    with pytest.raises(BackendError, match="no backend can run on cuda:1: a: no driver"):
        ops.choose("cuda:1", "a")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_says_why_it_cannot_run() -> None:
    with pytest.raises(BackendError, match=r"cuda: (built for .*, no driver|not built)"):
        ops.choose("cuda:0", "cuda")


def test_the_cuda_module_needs_no_driver_and_no_shared_runtime() -> None:
    module = pytest.importorskip("fastmerge._cuda", reason="nvcc was not found at install")
    count, reason = module.device_count()
    assert count > 0 or reason
    linked = subprocess.run(["ldd", module.__file__], capture_output=True, text=True).stdout
    assert "libcudart" not in linked and "libcuda.so" not in linked and "torch" not in linked


def test_many_tensors_come_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = _Recorder()
    monkeypatch.setattr(ops, "BACKENDS", (entry("r", ("cpu",), None, recorder),))
    base = {f"t{i}": torch.randn(5 + i) for i in range(40)}
    experts = [{k: v + 1 for k, v in base.items()} for _ in range(2)]
    merged = fastmerge.merge_state_dicts(base, experts, method="task_arithmetic", weight=0.5)
    assert recorder.batches == [40]
    torch.testing.assert_close(merged["t7"], base["t7"] + 1)


def _shrink(v, base, index, by):  # type: ignore[no-untyped-def]
    return torch.sign(v) * torch.clamp(v.abs() - by, min=0)


def test_a_stage_of_a_methods_own_goes_to_who_can_run_it() -> None:
    transform = Transform("shrink", object(), [[0.25, 0.5]], _shrink)
    walk = Walk(np.ones((2, 1)), transform=transform)
    base, experts = torch.zeros(3), [torch.tensor([1.0, -0.2, 0.3]), torch.tensor([-1.0, 0.7, 0.1])]
    with pytest.raises(
        BackendError, match="'shrink' is written in Triton; backend 'triton' runs it"
    ):
        ops.fused_walk(base, experts, walk, backend="cpu")
    merged = ops.fused_walk(base, experts, walk, backend="reference")
    torch.testing.assert_close(merged, torch.tensor([0.25, 0.2, 0.05]))
    alone = dataclasses.replace(walk, transform=dataclasses.replace(transform, reference=None))
    with pytest.raises(BackendError, match="reference: the stage 'shrink' is written in Triton"):
        ops.fused_walk(base, experts, alone, backend="reference")


def test_operands_of_several_devices_are_refused_in_one_line() -> None:
    here, there = Buffer(0, DType.F32, 1), Buffer(0, DType.F32, 1, None, "cuda:0")
    with pytest.raises(
        ConflictError, match=r"^base is on cpu but x on cuda:0; move them to one device$"
    ):
        ops.one_device([here, there], ["base", "x"])
    with pytest.raises(ConflictError, match="x is on meta; move it to the CPU or to a CUDA device"):
        ops.buffer_of(torch.empty(3, device="meta"), "x")


def test_strided_operands_are_merged_as_their_copies() -> None:
    base = torch.randn(6, 8).t()
    experts = [torch.randn(16, 6)[::2], torch.randn(8, 12)[:, ::2]]
    plain = [e.contiguous() for e in experts]
    merged = fastmerge.merge_tensors(base, experts, method="ties", weight=1.0, density=0.5)
    same = fastmerge.merge_tensors(base.contiguous(), plain, method="ties", weight=1.0, density=0.5)
    assert torch.equal(merged, same)


def test_a_buffer_and_its_slices_are_views_of_their_tensor(tmp_path: Path) -> None:
    x = torch.arange(10, dtype=torch.float32)
    part = ops.buffer_of(x, "x").slice(3, 7)
    assert torch.equal(tensor_of(part), x[3:7])
    elsewhere = Buffer(part.address, part.dtype, part.n, x, "cuda:0")  # as a device's: by its owner
    assert tensor_of(elsewhere).data_ptr() == part.address
    assert elsewhere.slice(1, 2).device == "cuda:0"
    copy = to_host(elsewhere)
    assert copy.device == "cpu" and torch.equal(tensor_of(copy), x[3:7])
