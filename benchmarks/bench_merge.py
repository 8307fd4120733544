"""Time whole merges of synthetic checkpoints, as processes, beside what the machine could do at best.

    python benchmarks/bench_merge.py            from the page cache, against mergekit and a memory copy
    python benchmarks/bench_merge.py --cold     from the disk, against direct reads
    python benchmarks/bench_merge.py --sweep    ours alone, over sizes and numbers of experts
    python benchmarks/bench_merge.py --decompose --experts 4    methods that decompose: memory as planned and
                                                as taken, and killed half way and resumed

Inputs are bf16 with Llama's names and shapes (synthetic.py). Seconds are wall time of the whole process,
start-up included; peak memory is the kernel's own account of it. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from processes import Merge, compare, median, require_mergekit
from storage import drop_pages, read_bandwidth
from synthetic import make_family

import fastmerge
from fastmerge import _cpu
from fastmerge.api import decomposition_rate
from fastmerge.bench import copy_bandwidth, environment

ROOT = Path(__file__).resolve().parent.parent
#: Methods and what each expert is merged with.
EXPERT = {
    "linear": "weight: 0.5",
    "task_arithmetic": "weight: 0.5",
    "ties": "weight: 0.5, density: 0.3",
    "dare_ties": "weight: 0.5, density: 0.3",
    "breadcrumbs": "weight: 0.5, density: 0.8",
    "della": "weight: 0.5, density: 0.5",
    "sce": "",
    "model_stock": "",
    "slerp": "",
    "tsv_m": "",
    "iso_c": "",
}
DECOMPOSING = ["tsv_m", "iso_c"]
#: What is said once for all experts: selecting is what SCE is for, a tenth is its authors' choice.
SHARED = {"sce": "select_topk: 0.1"}
#: Of the sweep: sizes as shares of --parameters, and numbers of experts at the smallest size.
SIZES, EXPERTS = (0.1, 0.2, 0.5, 1.0), (2, 4, 8)


def recipe(method: str, n_experts: int) -> str:
    """Return mergekit YAML over ./base and ./expert1 ..."""
    if method == "slerp":
        return (
            "merge_method: slerp\nbase_model: ./base\nparameters: {t: 0.5}\n"
            "models:\n- model: ./base\n- model: ./expert1\ndtype: bfloat16\n"
        )
    lines = [f"merge_method: {method}"]
    if method != "linear":
        lines.append("base_model: ./base")
    if method in SHARED:
        lines.append(f"parameters: {{{SHARED[method]}}}")
    lines.append("models:")
    for m in range(1, n_experts + 1):
        lines.append(f"- model: ./expert{m}")
        if EXPERT[method]:
            lines.append(f"  parameters: {{{EXPERT[method]}}}")
    return "\n".join([*lines, "dtype: bfloat16", ""])


@contextmanager
def family(work: Path, n_parameters: float, n_experts: int) -> Iterator[Path]:
    """Yield a folder with a family; one under build/ stays for the next run."""
    folder = work / f"{n_parameters / 1e6:g}m"
    make_family(folder, n_parameters, n_experts)
    try:
        yield folder
    finally:
        if not work.is_relative_to(ROOT / "build"):
            shutil.rmtree(folder)


def merge_of(method: str, folder: Path, n_experts: int) -> Merge:
    config = folder / f"{method}-{n_experts}.yaml"
    config.write_text(recipe(method, n_experts))
    return Merge(config, folder)


# ---- the four benchmarks ---------------------------------------------------------------------------


def warm(options: argparse.Namespace) -> dict[str, Any]:
    """Time merges from the page cache: durable, without fsync, and mergekit's; compare what was written."""
    threads = _cpu.available_threads()
    copied = copy_bandwidth(threads)
    rows = []
    with family(options.work, options.parameters, options.experts) as folder:
        ours, theirs = folder / "out-ours", folder / "out-theirs"
        for method in options.methods:
            merge = merge_of(method, folder, options.experts)
            row: dict[str, Any] = {
                "method": method,
                "bytes_moved": merge.bytes_moved,
                "floor_seconds": merge.bytes_moved / copied,
            }
            merge.ours(ours)  # once for the program's own pages
            row["fastmerge"] = median([merge.ours(ours) for _ in range(options.runs)])
            no_fsync = [merge.ours(ours, "--no-fsync") for _ in range(options.runs)]
            row["fastmerge_no_fsync"] = median(no_fsync)
            if options.peer:
                row["mergekit"] = median([merge.theirs(theirs)])
                row["difference"] = compare(ours, theirs)
            rows.append(show(row))
        for out in (ours, theirs):
            shutil.rmtree(out, ignore_errors=True)
    return {
        "parameters": merge.parameters,
        "experts": options.experts,
        "dtype": "bf16",
        "runs": options.runs,
        "threads": threads,
        "copy_gb_per_s": copied / 1e9,
        "rows": rows,
    }


def cold(options: argparse.Namespace) -> dict[str, Any]:
    """Time merges of files that are not in the page cache, and direct reads of the same files between.

    The output goes to the same disk, which then moves both, and to memory, so that the disk only reads.
    """
    rows, bandwidths = [], []
    memory = Path("/dev/shm")
    with family(options.work, options.parameters, options.experts) as folder:
        outs = {"same": folder / "out-ours"}
        if memory.is_dir():
            outs["elsewhere"] = memory / "fastmerge-bench"
        for method in options.methods:
            merge = merge_of(method, folder, options.experts)
            row: dict[str, Any] = {"method": method}
            for where, out in outs.items():
                reports, seconds = [], []
                for i in range(options.runs):
                    drop_pages(merge.files)
                    done, report = merge.reporting(out)
                    reports.append(report)
                    seconds.append(done.seconds)
                    bandwidths.append(read_bandwidth(merge.files[i % len(merge.files)]))
                    shutil.rmtree(out)
                row["bytes_read"] = reports[0]["bytes_read"]
                row["bytes_written"] = reports[0]["bytes_written"]
                row[where] = {
                    "seconds": statistics.median(seconds),
                    "engine_seconds": statistics.median(r["seconds"] for r in reports),
                }
            rows.append(show(row))
    disk = statistics.median(bandwidths) / 1e9
    for row in rows:
        for where in outs:
            moved = row["bytes_read"] + (row["bytes_written"] if where == "same" else 0)
            rate = moved / row[where]["engine_seconds"] / 1e9
            row[where] |= {"gb_per_s": rate, "share_of_disk": rate / disk}
    return {
        "parameters": merge.parameters,
        "experts": options.experts,
        "runs": options.runs,
        "disk_gb_per_s": disk,
        "rows": rows,
    }


def sweep(options: argparse.Namespace) -> dict[str, Any]:
    """Time ours over sizes and numbers of experts, from the page cache.

    Rates are the engine's: the start of a process takes as long for a small model as for a large one.
    """
    families = [(SIZES[0] * options.parameters, sorted({options.experts, *EXPERTS}))]
    families += [(size * options.parameters, [options.experts]) for size in SIZES[1:]]
    rows = []
    for n_parameters, numbers in families:
        with family(options.work, n_parameters, max(numbers)) as folder:
            out = folder / "out-ours"
            for method in options.methods:
                for n_experts in numbers:
                    merge = merge_of(method, folder, n_experts)
                    runs = [merge.reporting(out, warm=True) for _ in range(options.runs + 1)][1:]
                    engine = statistics.median(report["seconds"] for _, report in runs)
                    row = {
                        "method": method,
                        "parameters": merge.parameters,
                        "experts": n_experts,
                        "bytes_moved": merge.bytes_moved,
                        **median([done for done, _ in runs]),
                        "engine_seconds": engine,
                        "ns_per_parameter": engine / merge.parameters * 1e9,
                        "ns_per_byte": engine / merge.bytes_moved * 1e9,
                    }
                    rows.append(show(row))
            shutil.rmtree(out)
    return {"runs": options.runs, "rows": rows}


def decompose(options: argparse.Namespace) -> dict[str, Any]:
    """Time merges that decompose; kill another half way, resume it, and compare what both wrote."""
    rows = []
    with family(options.work, options.parameters, options.experts) as folder:
        whole, killed = folder / "out-ours", folder / "out-killed"
        for method in options.methods:
            merge = merge_of(method, folder, options.experts)
            plan = fastmerge.plan(merge.config)
            rate = decomposition_rate()
            done = merge.ours(whole)
            shutil.rmtree(killed, ignore_errors=True)
            merge.killed(killed, done.seconds / 2)
            resumed = merge.resumed(killed)
            row = {
                "method": method,
                "flops": plan.flops,
                "planned_seconds": plan.flops / rate,
                "planned_mb": plan.peak_memory / 1e6,
                "seconds": done.seconds,
                "peak_mb": done.peak_mb,
                "resumed_seconds": resumed.seconds,
                "same_bytes": same_files(whole, killed),
            }
            rows.append(show(row))
        for out in (whole, killed):
            shutil.rmtree(out, ignore_errors=True)
    return {
        "parameters": merge.parameters,
        "experts": options.experts,
        "threads": _cpu.available_threads(),
        "rows": rows,
    }


def same_files(a: Path, b: Path) -> bool:
    """Return whether two models' weights are the same bytes."""
    names = sorted(p.name for p in a.glob("*.safetensors"))
    return names == sorted(p.name for p in b.glob("*.safetensors")) and all(
        filecmp.cmp(a / name, b / name, shallow=False) for name in names
    )


def show(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row as it comes; the README has the table."""
    flat = {
        f"{key} {inner}".strip(): value
        for key, field in row.items()
        for inner, value in (field.items() if isinstance(field, dict) else [("", field)])
    }
    words = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in flat.items())
    print("; ".join(words), flush=True)
    return row


Benchmark = Callable[[argparse.Namespace], dict[str, Any]]
#: By mode: benchmark, parameters, methods.
MODES: dict[str, tuple[Benchmark, float, list[str]]] = {
    "merge": (warm, 540e6, [m for m in EXPERT if m not in DECOMPOSING]),
    "cold": (cold, 540e6, ["linear", "ties", "dare_ties"]),
    "sweep": (sweep, 1e9, ["ties", "linear"]),
    "decompose": (decompose, 540e6, DECOMPOSING),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    mode = parser.add_mutually_exclusive_group()
    for name in ("cold", "sweep", "decompose"):
        mode.add_argument(f"--{name}", action="store_const", const=name, dest="mode")
    parser.add_argument("--parameters", type=float, help="540e6; of the largest of the sweep: 1e9")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3, help="of ours; mergekit runs once")
    parser.add_argument("--methods", nargs="+", choices=list(EXPERT), metavar="METHOD")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--name", help="of the result file; merge-540m, cold, sweep or decompose-540m"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.set_defaults(mode="merge")
    options = parser.parse_args()
    benchmark, parameters, methods = MODES[options.mode]
    options.parameters = options.parameters or parameters
    options.methods = options.methods or methods
    options.work = options.work.resolve()
    peer = options.mode == "merge" and options.peer
    if peer:
        require_mergekit()
    packages = ["fastmerge", "torch", *(["mergekit"] if peer else [])]
    result = {**environment(*packages), **benchmark(options)}
    size = f"-{options.parameters / 1e6:g}m" if options.mode in ("merge", "decompose") else ""
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{options.name or options.mode + size}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
