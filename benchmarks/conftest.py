"""Options of `pytest benchmarks/bench_ops.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmerge.bench import ELEMENTS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastmerge bench")
    group.addoption("--elements", type=int, default=ELEMENTS, help="elements of each operand")
    group.addoption("--threads", type=int, default=0, help="kernel and copy threads; 0: all")
    group.addoption("--results", type=Path, metavar="FILE", help="write the table here as JSON")
