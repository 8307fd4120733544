"""`fastmerge bench`: what is timed is verified, its bytes are those of the performance model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fastmerge import _cpu, bench, bench_cases
from fastmerge.backends import Kernels
from fastmerge.cli import main
from fastmerge.evaluate import Operands
from fastmerge.registry import methods

CASES = {case.name: case for case in bench.cases()}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(bench, "COPIED", 1 << 20)
    monkeypatch.setattr(bench, "VERIFIED", 2 * bench.COLS)
    yield
    _cpu.set_threads(0)


def test_every_method_is_timed() -> None:
    timed = {name.split()[1] for name in CASES if name.startswith("method ")}
    assert timed == {name for name, spec in methods().items() if spec.cost is None}


@pytest.mark.parametrize("name", CASES)
def test_what_is_timed_has_the_bits_of_the_reference(name: str) -> None:
    bench.verify(CASES[name])


@pytest.mark.parametrize(
    ("name", "sweeps", "operands"),
    [
        ("linear walk K=4", 1, 4),
        ("sum of deltas walk K=4", 1, 5),
        ("ties walk K=8", 1, 9),
        ("method linear K=4", 1, 4),
        ("method task_arithmetic K=4", 1, 5),
        ("method ties K=4", 2, 5),
        ("method dare_ties K=4", 2, 5),
        ("method model_stock K=4", 2, 5),
        ("method slerp K=2", 2, 2),
        ("method sce K=4", 3, 5),
    ],
)
def test_bytes_are_those_of_the_performance_model(name: str, sweeps: int, operands: int) -> None:
    """Two bytes of each operand in each sweep, and two of the result."""
    assert bench.bytes_per_element(CASES[name]) == 2 * (sweeps * operands + 1)


def test_a_statistic_writes_nothing() -> None:
    assert bench.bytes_per_element(CASES["gram K=4"]) == 2 * 5


def test_a_kernel_with_other_bits_is_not_timed() -> None:
    def prepare(kernels: Kernels, operands: Operands) -> Callable[[], Any]:
        return lambda: np.array([0.0 if kernels.name == "cpu" else 1.0])

    with pytest.raises(AssertionError, match="wrong one"):
        bench.Bench(bench.COLS).prepare(bench.Case("wrong one", 2, prepare))


def test_operands_are_rounded_as_torch_does() -> None:
    x = np.random.default_rng(0).standard_normal(10_000, np.float32)
    x[:2] = [1 + 2**-8, 1 + 3 * 2**-8]  # halfway: to even, down and up
    theirs = torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(bench_cases.bf16(x).owner, theirs)


def test_experts_are_fine_tunes_of_the_base() -> None:
    base, experts = bench_cases.family(1 << 16)
    equal = [np.mean(e.owner == base.owner) for e in experts]
    assert len(experts) == bench_cases.MOST_EXPERTS
    assert all(0.2 < share < 0.9 for share in equal)
    assert not np.array_equal(experts[0].owner, experts[1].owner)


def test_json_of_the_command_line() -> None:
    options = ["bench", "--json", "--elements", "10000", "--threads", "1", "--only"]
    done = CliRunner().invoke(main, [*options, "linear walk, gram K"])
    table = json.loads(done.stdout)
    assert [row["name"].split()[0] for row in table["rows"]] == ["linear"] * 3 + ["gram", "row"]
    assert table["elements"] == 2 * bench.COLS
    assert table["threads"] == 1
    assert set(table) >= {"machine", "date", "versions", "isa", "copy_gb_per_s"}
    for row in table["rows"]:
        moved = row["bytes_per_element"] / row["ns_per_element"]
        assert row["gb_per_s"] == pytest.approx(moved)
        assert row["share_of_copy"] == pytest.approx(moved / table["copy_gb_per_s"])


def test_table_of_the_command_line_fits_a_terminal() -> None:
    done = CliRunner().invoke(main, ["bench", "--elements", "4096", "--only", "row order"])
    headline, empty, headings, row = done.stdout.splitlines()
    assert "copy" in headline
    assert not empty
    assert len(headings) == len(row) <= 80
    assert max(map(len, CASES)) < headings.index("bytes/element")


def test_unknown_part_is_refused_in_one_line() -> None:
    done = CliRunner().invoke(main, ["bench", "--only", "tiees"])
    assert done.exit_code == 2
    assert done.stderr == "error: nothing to time has 'tiees' in its name; see `fastmerge bench`\n"


def test_timing_needs_no_torch() -> None:
    code = "import sys, fastmerge.bench as b; b.cases(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
