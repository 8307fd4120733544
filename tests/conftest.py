"""Options of the test run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

# Triton decides when a kernel is declared whether it is compiled or interpreted.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

# The benchmarks are scripts, not a package.
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--vectors",
        default=str(GOLDEN),
        metavar="DIR",
        help="folder of golden vectors for test_vectors.py, sub-folders included",
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a quantised model -> its folder, written when it is first asked for; not to be changed."""
    from quant_folders import FOLDERS, write_dense

    root = tmp_path_factory.mktemp("quantised")
    write_dense(root / "dense")

    def get(name: str) -> Path:
        if not (root / name).exists():
            FOLDERS[name](root / "dense", root / name)
        return root / name

    return get


# Most tensors here are small: torch's thread team costs more than it gives, above all beside other work.
torch.set_num_threads(1)
