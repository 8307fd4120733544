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
