"""Render the README's tables: methods from the registry, speeds from benchmarks/results/*.json.

python benchmarks/report.py            rewrite README.md between its markers
python benchmarks/report.py --check    exit 1 if a table in README.md is not what would be rendered
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end table -->", re.DOTALL)


def methods_table() -> str:
    from fastmerge.cli import method_table

    return method_table()


def merge_table() -> str:
    """Render one row per method: seconds and memory of both programs on the same files, one run."""
    blocks = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("merge-*.json")):
        data: dict[str, Any] = json.loads(path.read_text())
        blocks.append(
            f"{data['machine']}; {data['parameters'] / 1e6:.0f} M parameters, base and "
            f"{data['experts']} experts in {data['dtype']}, page cache warm, medians of {data['runs']} runs; "
            f"fastmerge {data['versions']['fastmerge']}, mergekit {data['versions']['mergekit']}.\n"
        )
        blocks.append(
            "| method | fastmerge | GB/s moved | peak memory | mergekit | peak memory | ratio |"
        )
        blocks.append("|---|---|---|---|---|---|---|")
        for row in data["rows"]:
            ours, theirs = row["fastmerge"], row["mergekit"]
            ratio = theirs["seconds"] / ours["seconds"]
            rate = data["bytes_moved"][row["method"]] / ours["seconds"] / 1e9
            blocks.append(
                f"| {row['method']} | {ours['seconds']:.2f} s | {rate:.2f} | {ours['peak_mb']:.0f} MB | "
                f"{theirs['seconds']:.1f} s | {theirs['peak_mb']:.0f} MB | {ratio:.0f}x |"
            )
        blocks.append("")
    return "\n".join(blocks).rstrip()


TABLES = {"methods": methods_table, "merge": merge_table}


def render(text: str) -> str:
    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end table -->"

    return MARKER.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    text = readme.read_text()
    wanted = render(text)
    if parser.parse_args().check:
        if text != wanted:
            sys.exit(
                "README.md: a table was edited by hand or is stale; run python benchmarks/report.py"
            )
        return
    readme.write_text(wanted)


if __name__ == "__main__":
    main()
