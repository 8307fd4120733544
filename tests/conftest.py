"""Options of the test run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--vectors",
        default=str(GOLDEN),
        metavar="DIR",
        help="folder of golden vectors for test_vectors.py, sub-folders included",
    )


# Most tensors here are small: torch's thread team costs more than it gives, above all beside other work.
torch.set_num_threads(1)
