"""Merge by one YAML file with mergekit and with fastmerge, in turn, on the same files: for your own recipe.

    python benchmarks/bench_peers.py CONFIG.yaml [--runs 1] [--work DIR] [--json]

Whole processes, start-up included, with the inputs in the page cache. Run it where you would run
mergekit-yaml: relative paths mean the same. What both wrote is compared on a sample of tensors; methods
that drop at random differ by their draws.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from processes import Merge, compare, median, require_mergekit

from fastmerge.bench import environment


def peers(config: Path, runs: int, work: Path) -> dict[str, Any]:
    """Run both programs `runs` times, write under `work`, and return what was measured."""
    merge = Merge(config, Path.cwd())
    ours, theirs = work / "fastmerge", work / "mergekit"
    rows = {
        "fastmerge": median([merge.ours(ours) for _ in range(runs)]),
        "mergekit": median([merge.theirs(theirs) for _ in range(runs)]),
    }
    return {
        **environment("fastmerge", "mergekit", "torch"),
        "parameters": merge.parameters,
        "bytes_moved": merge.bytes_moved,
        "runs": runs,
        **rows,
        "difference": compare(ours, theirs),
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':<12}{'seconds':>10}{'peak MB':>10}{'GB/s moved':>12}"]
    for name in ("fastmerge", "mergekit"):
        usage = result[name]
        rate = result["bytes_moved"] / usage["seconds"] / 1e9
        lines.append(f"{name:<12}{usage['seconds']:>10.2f}{usage['peak_mb']:>10.0f}{rate:>12.2f}")
    difference = result["difference"]
    ratio = result["mergekit"]["seconds"] / result["fastmerge"]["seconds"]
    lines.append(
        f"{ratio:.1f}x; of {difference['tensors']} tensors compared, {difference['share']:.2%} of the values "
        f"differ, by at most {difference['largest']:.3g}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument(
        "--work", type=Path, help="new folder to write both models to and leave them in"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    require_mergekit()
    if options.work:
        options.work.mkdir(parents=True)
        result = peers(options.config, options.runs, options.work.resolve())
    else:  # here, not in /tmp, which may be memory
        with tempfile.TemporaryDirectory(dir=".", prefix="bench-peers-") as work:
            result = peers(options.config, options.runs, Path(work).resolve())
    print(json.dumps(result, indent=2) if options.json else table(result))


if __name__ == "__main__":
    main()
