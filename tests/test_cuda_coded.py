"""Coded operands and results of the CUDA kernels without a GPU: emulated, under ASan and UBSan.

Codes, scales and zeros are the cpu backend's, byte for byte, in whatever order blocks and threads run; and a
kernel that lacks a barrier writes others.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import coded_merges
import emulation
import pytest

from fastmerge.coding import parts_of

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

PARTS = list(coded_merges.PARTS)


@pytest.fixture(scope="module")
def module() -> Path:
    return emulation.build()


@pytest.mark.parametrize("part", PARTS)
def test_emulated_kernels_are_bit_equal(part: str, module: Path) -> None:
    done = emulation.run(module, part, seed=1 + PARTS.index(part))
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
    assert done.stdout == f"{part}: as the cpu backend\n"


def test_a_missing_barrier_is_caught(module: Path, tmp_path: Path) -> None:
    """Without the one behind coding, what coding has cost is told before all is coded."""
    text = (emulation.CSRC / "cuda" / "quant4.cu").read_text()
    barrier = text.rindex("__syncthreads();", 0, text.index("if (to.residual) {"))
    planted = tmp_path / "quant4.cu"
    planted.write_text(text[:barrier] + text[barrier + len("__syncthreads();") :])
    wrong = emulation.build({"quant4.cu": planted})
    outcomes = [emulation.run(wrong, "to blocks", seed=s) for s in (1, 2)]
    assert any(done.returncode != 0 for done in outcomes)


@pytest.mark.parametrize("name", [*coded_merges.WRITTEN, *coded_merges.READ])
def test_a_whole_tensor_is_all_of_its_parts(name: str) -> None:
    (rows, cols), coding = {**coded_merges.WRITTEN, **coded_merges.READ}[name]
    for shape in ((rows, cols), (8, 768), (16, 256 * 5)):
        for spec in parts_of(coding, *shape):
            assert spec.span(0, shape[0] * shape[1]) == (0, spec.n_bytes), spec
