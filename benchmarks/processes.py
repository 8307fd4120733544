"""Whole merges as processes, ours and mergekit's: their seconds, their peak memory, and what they wrote."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from storage import make_resident

import fastmerge

BIN = Path(sys.executable).parent
SAMPLED = 8  # tensors that are compared

#: Runs a command and prints its seconds, peak memory and output. A small process of its own: the kernel
#: counts what a child shares with its parent at the fork into the child's peak, and this one holds torch.
LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
seconds = time.perf_counter() - start
if done.returncode:
    sys.exit(done.stderr[-2000:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_mb": peak / 1e6, "output": done.stdout}))
"""

#: Merges through the Python API and prints the engine's own report.
REPORTING = """
import dataclasses, json, sys, fastmerge
report = fastmerge.merge(sys.argv[1], sys.argv[2], quantize=sys.argv[3] or None)
print(json.dumps(dataclasses.asdict(report)))
"""

Usage = dict[str, float]  # seconds of wall time, start-up included, and peak_mb of resident memory


@dataclass(frozen=True)
class Finished:
    """A process that ended well."""

    seconds: float
    peak_mb: float
    output: str = field(repr=False)


def timed(command: Sequence[str | Path], folder: Path) -> Finished:
    """Run a command in `folder`, or exit with its complaint."""
    words = [str(word) for word in command]
    launcher = [sys.executable, "-S", "-c", LAUNCHER, *words]
    # As an installed program runs: with the bytecode that its first run leaves.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        launcher, cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr}")
    return Finished(**json.loads(done.stdout))


def median(runs: Sequence[Finished]) -> Usage:
    return {key: statistics.median(getattr(r, key) for r in runs) for key in ("seconds", "peak_mb")}


class Merge:
    """A recipe for both programs, its input files, and the bytes that a merge of it moves at least.

    config: a mergekit YAML file; folder: where the programs run, from which mergekit takes relative paths.
    """

    def __init__(self, config: Path, folder: Path) -> None:
        plan = fastmerge.plan(config)
        plan.raise_conflicts()
        self.config, self.folder = config.resolve(), folder
        self.files = sorted({o.info.file for job in plan.jobs for o in job.operands})
        self.bytes_moved = plan.bytes_read + plan.bytes_written
        self.parameters = sum(job.n for job in plan.jobs)

    def ours(self, out: Path, *flags: str) -> Finished:
        return self._warm([BIN / "fastmerge", "merge", self.config, out, "-q", *flags], out)

    def killed(self, out: Path, after: float) -> None:
        """Start a merge and kill it after some seconds, or exit: it was done by then."""
        command = [BIN / "fastmerge", "merge", self.config, out, "-q"]
        process = subprocess.Popen([str(word) for word in command], cwd=self.folder)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.kill()
        if process.wait() != -signal.SIGKILL:
            sys.exit(f"{self.config}: ended before it could be killed after {after:.0f} s")

    def resumed(self, out: Path) -> Finished:
        """Finish a merge that was killed."""
        command = [BIN / "fastmerge", "merge", self.config, out, "-q", "--resume"]
        return timed(command, self.folder)

    def theirs(self, out: Path) -> Finished:
        return self._warm([BIN / "mergekit-yaml", self.config, out, "--quiet"], out)

    def reporting(
        self, out: Path, warm: bool = False, quantize: str = ""
    ) -> tuple[Finished, dict[str, Any]]:
        """Merge the inputs as they lie, cached or not; also return the engine's report."""
        shutil.rmtree(out, ignore_errors=True)
        if warm:
            make_resident(self.files)
        command = [sys.executable, "-c", REPORTING, self.config, out, quantize]
        done = timed(command, self.folder)
        return done, json.loads(done.output)

    def _warm(self, command: Sequence[str | Path], out: Path) -> Finished:
        """Run with the inputs in the page cache and no old output to remove."""
        shutil.rmtree(out, ignore_errors=True)
        make_resident(self.files)
        return timed(command, self.folder)


def require_mergekit() -> None:
    if importlib.util.find_spec("mergekit") is None:
        sys.exit("mergekit is not installed; pip install '.[oracle]', or give --no-peer")


# ---- what was written ------------------------------------------------------------------------------


def compare(ours: Path, theirs: Path) -> dict[str, float]:
    """Compare two merged models on a sample of their tensors.

    Returns:
        largest: the largest absolute difference; share: of the values, those that differ at all;
        tensors: how many were compared.
    """
    a, b = _files(ours), _files(theirs)
    if a.keys() != b.keys():
        sys.exit(f"{ours} and {theirs} hold other tensors: {sorted(a.keys() ^ b.keys())[:3]}")
    names = sorted(a)[:: max(1, len(a) // SAMPLED)]
    largest, differing, n = 0.0, 0, 0
    for name in names:
        x, y = _load(a[name], name), _load(b[name], name)
        if x.shape != y.shape:
            sys.exit(f"{name!r} is {list(x.shape)} in {ours} but {list(y.shape)} in {theirs}")
        difference = (x.float() - y.float()).abs()
        largest = max(largest, float(difference.max()) if x.numel() else 0.0)
        differing += int(difference.count_nonzero())
        n += x.numel()
    return {"largest": largest, "share": differing / max(1, n), "tensors": len(names)}


def _files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            found |= dict.fromkeys(f.keys(), file)
    return found


def _load(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as f:
        return f.get_tensor(name)
