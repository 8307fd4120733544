"""The CUDA kernels without a GPU: the same .cu files, compiled by g++ for an emulated device.

Under ASan and UBSan, every kernel gives the cpu backend's bits, in whatever order blocks and threads run; and
a kernel that lacks a barrier does not, which shows that the emulator can fail.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import emulation
import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def module() -> Path:
    return emulation.build()


@pytest.mark.parametrize("part", emulation.PARTS)
def test_emulated_kernels_are_bit_equal(part: str, module: Path) -> None:
    done = emulation.run(module, part, seed=1 + list(emulation.PARTS).index(part))
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
    assert done.stdout == f"{part}: as the cpu backend\n"


# The line behind a barrier, and the part that shows that the barrier is gone: a thread then reads what
# another has not written yet.
PLANTED = {
    "select.cu": ("    const int digit = int(shared[0]);", "selection"),
    "stats.cu": ("; j < n) x[j] = sum[m];", "sums"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_missing_barrier_is_caught(name: str, module: Path, tmp_path: Path) -> None:
    text = (emulation.CSRC / "cuda" / name).read_text()
    behind, part = PLANTED[name]
    barrier = text.rindex("__syncthreads();", 0, text.index(behind))
    planted = tmp_path / name
    planted.write_text(text[:barrier] + text[barrier + len("__syncthreads();") :])
    wrong = emulation.build({name: planted})
    outcomes = [emulation.run(wrong, part, seed=s) for s in (1, 2)]
    assert any(done.returncode != 0 for done in outcomes), f"{name} without a barrier went unseen"
