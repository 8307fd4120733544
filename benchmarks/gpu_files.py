"""Whole merges of files on a GPU, from the page cache and from the disk, beside what link and disk could do.

Used by `bench_gpu.py --end-to-end`. The family is as large as memory and disk allow, its output is held to
the cpu backend's bytes, and mergekit runs on the same files where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage import drop_pages, make_resident, read_bandwidth
from synthetic import make_family

import fastmerge
from fastmerge import budget, forecast, ops
from fastmerge.backends import Kernels
from fastmerge.checkpoint import file_checksum
from fastmerge.streaming.device import Device

EXPERTS = 3
METHODS = {"linear": "weight: 0.5", "ties": "weight: 0.5, density: 0.3",
           "dare_ties": "weight: 0.5, density: 0.3"}  # fmt: skip
#: Models that lie there at once: base, experts, the cpu backend's output and the GPU's.
MODELS = EXPERTS + 3
REPEATS = 3

Say = Callable[[str], None]


def family_parameters(folder: Path, most: float) -> float:
    """Return the parameters of a model of which MODELS fit half the memory and 70 % of the free disk."""
    memory = budget.available_memory() / 2
    disk = shutil.disk_usage(folder).free * 0.7
    return min(most, min(memory, disk) / MODELS / 2)


def recipe(method: str, folder: Path) -> str:
    lines = [f"merge_method: {method}", "dtype: bfloat16"]
    lines += [f"base_model: {folder / 'base'}"] if method != "linear" else []
    lines.append("models:")
    for k in range(1, EXPERTS + 1):
        lines += [f"- model: {folder / f'expert{k}'}", f"  parameters: {{{METHODS[method]}}}"]
    return "\n".join(lines) + "\n"


def checksums(folder: Path) -> dict[str, int]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            found[file.name] = file_checksum(f.fileno(), file, 0, file.stat().st_size, 1)
    return found


def measure(
    device: Device,
    kernels: Kernels,
    say: Say,
    *,
    parameters: float = 8e9,
    seconds: float = 420.0,
    folder: Path | None = None,
    copied: int = 1 << 28,
) -> dict[str, Any]:
    """Return rows of merges on `device`, and the rates that they are measured against.

    parameters: of one model, at most. seconds: no merge is begun after them.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        wanted = family_parameters(work, parameters)
        say(f"writing a family of {wanted / 1e9:.2f} B parameters x {EXPERTS + 1}")
        n = make_family(work, wanted, EXPERTS)
        copy_in, copy_out, memory = forecast.copy_rates(device, copied)
        result: dict[str, Any] = {
            "parameters": n,
            "experts": EXPERTS,
            "pinned_in": copy_in,
            "pinned_out": copy_out,
            "device_copy": memory,
            "disk_read": read_bandwidth(work / "base" / "model.safetensors"),
            "rows": [],
            "left_out": [],
        }
        say(
            f"pinned copies: {copy_in / 1e9:.1f} GB/s in, {copy_out / 1e9:.1f} out; "
            f"disk {result['disk_read'] / 1e9:.1f} GB/s"
        )
        for method in METHODS:
            if time.monotonic() - started > seconds:
                result["left_out"].append(f"{method}: no time was left")
                continue
            for row in _merges(method, work, device, kernels, result, say):
                result["rows"].append(row)
    return result


def _merges(
    method: str, work: Path, device: Device, kernels: Kernels, rates: dict[str, Any], say: Say
) -> list[dict[str, Any]]:
    config = work / f"{method}.yaml"
    config.write_text(recipe(method, work))
    inputs = sorted(f for m in work.iterdir() if m.is_dir() for f in m.glob("*.safetensors"))
    inputs = [f for f in inputs if f.parent.name.startswith(("base", "expert"))]
    make_resident(inputs)
    start = time.perf_counter()
    fastmerge.merge(config, work / "cpu", force=True)
    cpu_seconds = time.perf_counter() - start
    want = checksums(work / "cpu")
    shutil.rmtree(work / "cpu")
    rows = []
    for cached in (True, False):
        runs = []
        for _ in range(REPEATS):
            (make_resident if cached else drop_pages)(inputs)
            shutil.rmtree(work / "out", ignore_errors=True)
            start = time.perf_counter()
            report = fastmerge.merge(
                config, work / "out", device=device, backend=kernels, fsync=not cached
            )
            runs.append((report.seconds, time.perf_counter() - start, report))
        equal = checksums(work / "out") == want
        seconds, whole, report = sorted(runs, key=lambda r: r[0])[len(runs) // 2]
        rate = report.bytes_read / seconds
        limit = rates["pinned_in"] if cached else min(rates["pinned_in"], rates["disk_read"])
        rows.append(
            {
                "method": method, "backend": kernels.name, "cached": cached, "seconds": seconds,
                "whole_seconds": whole, "cpu_seconds": cpu_seconds, "bytes_read": report.bytes_read,
                "bytes_written": report.bytes_written, "read_rate": rate, "share": rate / limit,
                "equal": equal, "stages": [vars(s) for s in report.stages],
            }
        )  # fmt: skip
        say(
            f"{method}, {'page cache' if cached else 'disk'}: {seconds:.2f} s, {rate / 1e9:.1f} GB/s in, "
            f"{rate / limit:.0%} of the {'link' if cached else 'slower of disk and link'}; "
            + ("bytes as the cpu backend's" if equal else "BYTES DIFFER FROM THE CPU BACKEND'S")
        )
    shutil.rmtree(work / "out", ignore_errors=True)
    rows[0]["mergekit_seconds"] = _mergekit(config, work / "theirs", inputs, device, say)
    return rows


def _mergekit(
    config: Path, out: Path, inputs: list[Path], device: Device, say: Say
) -> float | None:
    """Return the seconds of mergekit on the same files and device; None where it is not installed."""
    if importlib.util.find_spec("mergekit") is None:
        say("mergekit is not installed: not compared")
        return None
    make_resident(inputs)
    flags = ["--cuda"] if device.name.startswith("cuda") else []
    command = [
        str(Path(sys.executable).parent / "mergekit-yaml"),
        str(config),
        str(out),
        "--quiet",
        *flags,
    ]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    seconds = time.perf_counter() - start
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        say(f"mergekit failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}")
        return None
    say(f"mergekit{' --cuda' if flags else ''}: {seconds:.1f} s")
    return seconds


def rehearse(say: Say, folder: Path | None = None) -> dict[str, Any]:
    """Go through all of it with host memory for a device, at a tiny size."""
    from fastmerge.streaming.device import HostDevice

    return measure(
        HostDevice(), ops.choose("cpu", "cpu"), say, parameters=2e6, folder=folder, copied=1 << 22
    )


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
