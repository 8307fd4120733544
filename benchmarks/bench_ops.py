"""The cases of `fastmerge bench` under pytest-benchmark, which keeps their history in .benchmarks/.

    pytest benchmarks/bench_ops.py --benchmark-autosave [--benchmark-compare] [-k ties]
        [--elements 8388608] [--threads 0] [--results benchmarks/results/ops.json]

Every case is verified before it is timed. `--results` writes what `fastmerge bench --json` prints.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastmerge import bench

Table = tuple[bench.Bench, list[bench.Timing]]


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """Yield the run and the list that its rows go to; write them when all is timed."""
    option = request.config.getoption
    run, rows = bench.Bench(option("--elements"), option("--threads")), list[bench.Timing]()
    yield run, rows
    path: Path | None = option("--results")
    if path:
        path.write_text(json.dumps(run.as_dict(rows), indent=2) + "\n")


@pytest.mark.parametrize("case", bench.cases(), ids=lambda case: case.name)
def test_op(case: bench.Case, table: Table, benchmark: Any) -> None:
    run, rows = table
    benchmark.pedantic(run.prepare(case), rounds=bench.RUNS, warmup_rounds=1)
    if benchmark.enabled:
        rows.append(run.timing(case, benchmark.stats.stats.min))
        benchmark.extra_info.update(headline=run.headline(), **rows[-1].as_dict())
