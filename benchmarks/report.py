"""Render the documents' tables: methods from the registry, figures from benchmarks/results/*.json.

python benchmarks/report.py            rewrite README.md and docs/ between their markers
python benchmarks/report.py --check    exit 1 if a table there is not what would be rendered
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "svd.md")
MARKER = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end table -->", re.DOTALL)

Row = dict[str, Any]
#: A heading and what it says of a row; KeyError where the row has nothing to say.
Column = tuple[str, Callable[[Row], str]]


def table(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """Return a Markdown table; a column that no row has a value for is left out."""

    def cell(say: Callable[[Row], str], row: Row) -> str:
        try:
            return say(row)
        except KeyError:
            return ""

    cells = [(heading, [cell(say, row) for row in rows]) for heading, say in columns]
    shown = [(heading, column) for heading, column in cells if any(column)]
    headings = [heading for heading, _ in shown]
    body = zip(*(column for _, column in shown), strict=True)
    lines = [headings, *body]
    ruled = [f"| {' | '.join(line)} |" for line in lines]
    return [ruled[0], "|---" * len(shown) + "|", *ruled[1:]]


def provenance(data: Row, what: str) -> str:
    """Return the line above a table: machine, what was measured, versions, date."""
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return f"{data['machine']}; {what}; {versions}; {data['date']}.\n"


def methods_table() -> str:
    from fastmerge.cli import method_table

    return method_table()


COMPARED = (
    "\nOutputs are compared on a sample of tensors. Where mergekit computes in bfloat16 its rounding shows; "
    "methods that drop at random (`dare_ties`, `della`) draw other masks than mergekit."
)

# ---- one function per kind of result ---------------------------------------------------------------


def merge_table(data: Row) -> list[str]:
    """Whole merges from the page cache, ours and mergekit's, on the same files in the same run."""
    columns: list[Column] = [
        ("method", lambda r: r["method"]),
        ("fastmerge", lambda r: f"{r['fastmerge']['seconds']:.2f} s"),
        ("`--no-fsync`", lambda r: f"{r['fastmerge_no_fsync']['seconds']:.2f} s"),
        ("copy of as much", lambda r: f"{r['floor_seconds']:.2f} s"),
        ("GB/s moved", lambda r: f"{r['bytes_moved'] / r['fastmerge']['seconds'] / 1e9:.2f}"),
        ("peak memory", lambda r: f"{r['fastmerge']['peak_mb']:.0f} MB"),
        ("mergekit", lambda r: f"{r['mergekit']['seconds']:.1f} s"),
        ("peak memory", lambda r: f"{r['mergekit']['peak_mb']:.0f} MB"),
        ("ratio", lambda r: f"{r['ratio']:.1f}x"),
        ("values that differ", lambda r: f"{r['difference']['share']:.2%}"),
        ("at most by", lambda r: f"{r['difference']['largest']:.2g}"),
    ]
    rows = list(data["rows"])
    for row in rows:
        if "mergekit" in row:
            row["ratio"] = row["mergekit"]["seconds"] / row["fastmerge"]["seconds"]
    ratios = [row["ratio"] for row in rows if "ratio" in row]
    if ratios:
        rows.append({"method": "geometric mean", "ratio": statistics.geometric_mean(ratios)})
    what = (
        f"{data['parameters'] / 1e6:.0f} M parameters, base and {data['experts']} experts in "
        f"{data['dtype']}, page cache warm, medians of {data['runs']} runs (mergekit: 1)"
    )
    if "copy_gb_per_s" in data:
        what += f"; a copy in memory on {data['threads']} threads moves {data['copy_gb_per_s']:.1f} GB/s"
    compared = any("difference" in row for row in rows)
    return [provenance(data, what), *table(columns, rows), *([COMPARED] if compared else [])]


def cold_table(data: Row) -> list[str]:
    """Whole merges of files that are not in the page cache, beside direct reads of the same files."""
    columns: list[Column] = [
        ("method", lambda r: r["method"]),
        ("read", lambda r: f"{r['bytes_read'] / 1e9:.2f} GB"),
        ("written", lambda r: f"{r['bytes_written'] / 1e9:.2f} GB"),
        ("output to the same disk", lambda r: f"{r['same']['engine_seconds']:.2f} s"),
        ("reads and writes at", lambda r: f"{r['same']['gb_per_s']:.2f} GB/s"),
        ("of the disk", lambda r: f"{r['same']['share_of_disk']:.0%}"),
    ]
    if all("elsewhere" in r for r in data["rows"]):
        columns += [
            ("output elsewhere", lambda r: f"{r['elsewhere']['engine_seconds']:.2f} s"),
            ("reads at", lambda r: f"{r['elsewhere']['gb_per_s']:.2f} GB/s"),
            ("of the disk", lambda r: f"{r['elsewhere']['share_of_disk']:.0%}"),
        ]
    what = (
        f"{data['parameters'] / 1e6:.0f} M parameters, base and {data['experts']} experts, nothing in the "
        f"page cache, medians of {data['runs']} runs; direct reads alone reach "
        f"{data['disk_gb_per_s']:.2f} GB/s"
    )
    return ["From the disk:\n", provenance(data, what), *table(columns, data["rows"])]


def sweep_table(data: Row) -> list[str]:
    """Ours alone over sizes and numbers of experts."""
    columns: list[Column] = [
        ("method", lambda r: r["method"]),
        ("parameters", lambda r: f"{r['parameters'] / 1e9:.2f} B"),
        ("experts", lambda r: str(r["experts"])),
        ("whole process", lambda r: f"{r['seconds']:.2f} s"),
        ("engine", lambda r: f"{r['engine_seconds']:.2f} s"),
        ("peak memory", lambda r: f"{r['peak_mb']:.0f} MB"),
        ("ns per parameter", lambda r: f"{r['ns_per_parameter']:.2f}"),
        ("ns per byte moved", lambda r: f"{r['ns_per_byte']:.3f}"),
    ]
    rows = sorted(data["rows"], key=lambda r: (r["method"], r["parameters"], r["experts"]))
    what = (
        f"page cache warm, medians of {data['runs']} runs; per parameter and byte: the engine alone"
    )
    return ["Over sizes and experts:\n", provenance(data, what), *table(columns, rows)]


def coded_table(data: Row) -> list[str]:
    """Whole merges into few bits, beside the same merge in 16 and the way round it."""

    def rival(row: Row) -> float:
        return float(row["mergekit_seconds"] + row["library_seconds"])

    columns: list[Column] = [
        ("`--quantize`", lambda r: f"`{r['format']}`"),
        ("read by", lambda r: r["consumer"]),
        (
            "loaded with",
            lambda r: ", ".join(f"{n} {v}" for n, v in r["consumer_versions"].items()),
        ),
        ("bits per weight, all", lambda r: f"{r['bits_per_weight']:.2f}"),
        ("relative RMS error", lambda r: f"{r['relative_rms']:.2%}"),
        ("written", lambda r: f"{r['bytes_written'] / 1e6:.0f} MB"),
        ("merge", lambda r: f"{r['coded']['seconds']:.2f} s"),
        ("in bf16", lambda r: f"{r['dense']['seconds']:.2f} s"),
        ("ratio", lambda r: f"{r['coded']['seconds'] / r['dense']['seconds']:.2f}"),
        ("peak memory", lambda r: f"{r['coded']['peak_mb']:.0f} MB"),
        ("mergekit, then the library", lambda r: f"{rival(r):.1f} s ({r['library']})"),
        ("faster by", lambda r: f"{rival(r) / r['coded']['seconds']:.0f}x"),
    ]
    what = (
        f"TIES of {data['experts']} experts of {data['parameters'] / 1e6:.0f} M parameters in bf16, page "
        f"cache warm, whole processes, medians of {data['runs']} runs by turns (rivals: 1), "
        f"{data['threads']} threads"
    )
    return [provenance(data, what), *table(columns, data["rows"])]


def ops_table(data: Row) -> list[str]:
    """Kernels and methods in memory, as `fastmerge bench` prints them; folded, for it is long."""
    columns: list[Column] = [
        ("operation, K experts", lambda r: r["name"]),
        ("bytes/element", lambda r: f"{r['bytes_per_element']:.0f}"),
        ("ns/element", lambda r: f"{r['ns_per_element']:.3f}"),
        ("GB/s", lambda r: f"{r['gb_per_s']:.1f}"),
        ("of a copy", lambda r: f"{r['share_of_copy']:.0%}"),
    ]
    what = (
        f"{data['isa']}, {data['threads']} threads, {data['elements'] / 1e6:.1f} M bf16 elements; "
        f"a copy on as many threads moves {data['copy_gb_per_s']:.1f} GB/s"
    )
    summary = (
        "<details><summary>In memory, kernel by kernel (<code>fastmerge bench</code>)</summary>\n"
    )
    return [summary, provenance(data, what), *table(columns, data["rows"]), "\n</details>"]


def gpu_table(data: Row) -> list[str]:
    """What one card was measured at: kernels beside a copy, then whole methods beside torch."""
    columns: list[Column] = [
        ("kernel", lambda r: r["name"]),
        ("backend", lambda r: r["backend"]),
        ("bytes/element", lambda r: f"{r['bytes'] / r['elements']:.1f}"),
        ("us", lambda r: f"{r['kernel_s'] * 1e6:.0f}"),
        ("20th, 80th percentile", lambda r: f"{r['kernel_p20_s'] * 1e6:.0f}, {r['kernel_p80_s'] * 1e6:.0f}"),
        ("GB/s", lambda r: f"{r['bytes_per_s'] / 1e9:.0f}"),
        ("of a copy", lambda r: f"{r['share_of_copy']:.0%}"),
        ("readings of the operands", lambda r: f"{r['sweeps']:.2f}" if r["sweeps"] else ""),
    ]  # fmt: skip
    checked = ", ".join(
        f"{v['backend']} {v['checks']} checks, {len(v['failures']) or 'none'} wrong"
        for v in data["verification"]
    )
    what = (
        f"{data['elements'] / 2**20:.0f} Mi bf16 elements, caches flushed between runs, median time in the "
        f"launches; a copy moves {data['copy_bytes_per_s'] / 1e9:.0f} GB/s; "
        f"against the cpu backend's bits: {checked or 'not checked in this run'}"
    )
    of = ", ".join(sorted({r["backend"] for r in data["kernels"]})) or "no kernel"
    summary = (
        f"<details><summary>{data['machine'].split(',')[0]}, kernel by kernel: {of}</summary>\n"
    )
    parts = [summary, provenance(data, what), *table(columns, data["kernels"])]
    if data["rivals"]:
        parts += ["", *_rivals_table(data)]
    return [*parts, "\n</details>"]


def _rivals_table(data: Row) -> list[str]:
    backends = [v for v in ("cuda", "triton") if any(v in r for r in data["rivals"])]
    kinds = [*backends, "eager", "compiled"]

    def ms(kind: str) -> Callable[[Row], str]:
        return lambda r: f"{r[kind]['wall_s'] * 1e3:.2f} ms"

    def ratio(ours: str, theirs: str) -> Callable[[Row], str]:
        return lambda r: f"{r[theirs]['wall_s'] / r[ours]['wall_s']:.1f}x"

    said = {"eager": "torch, eager", "compiled": "`torch.compile`"}
    columns: list[Column] = [("method", lambda r: f"{r['method']} K={r['experts']}")]
    columns += [(said.get(kind, kind), ms(kind)) for kind in kinds]
    for ours in backends:
        columns += [(f"{ours} over {kind}", ratio(ours, kind)) for kind in ("eager", "compiled")]
    above = "Whole methods through `merge_tensors`, statistics and host time included, on the same tensors:\n"
    return [above, *table(columns, data["rivals"])]


def files_table(data: Row) -> list[str]:
    """Whole merges of files on one card, beside its link and the disk."""
    columns: list[Column] = [
        ("method", lambda r: r["method"]),
        ("from", lambda r: "page cache" if r["cached"] else "disk"),
        ("seconds", lambda r: f"{r['seconds']:.2f}"),
        ("process, start-up included", lambda r: f"{r['whole_seconds']:.2f}"),
        ("GB/s read", lambda r: f"{r['read_rate'] / 1e9:.1f}"),
        ("of the limit", lambda r: f"{r['share']:.0%}"),
        ("cpu backend", lambda r: f"{r['cpu_seconds']:.2f} s"),
        ("mergekit `--cuda`", lambda r: f"{r['mergekit_seconds']:.1f} s"),
        ("bytes", lambda r: "as the cpu backend's" if r["equal"] else "DIFFER"),
    ]
    rows = [{k: v for k, v in r.items() if v is not None} for r in data["rows"]]
    what = (
        f"{data['parameters'] / 1e9:.2f} B parameters, base and {data['experts']} experts in bf16; pinned "
        f"copies reach {data['pinned_in'] / 1e9:.1f} GB/s in, {data['pinned_out'] / 1e9:.1f} out, direct "
        f"reads {data['disk_read'] / 1e9:.1f}; the limit is the link, from the disk the slower of both"
    )
    return [provenance(data, what), *table(columns, rows)]


def files_tables() -> str:
    """Measured cards; where there are none, the command that measures."""
    return results("files-*.json", files_table)() or (
        "**Not yet measured on a GPU**; `python benchmarks/bench_gpu.py --end-to-end` measures whole merges."
    )


def simulated_table(data: Row) -> list[str]:
    """Replays of the pipeline on a simulated device."""
    columns: list[Column] = [
        ("merge", lambda r: f"{r['method']}, {r['billions']} B x {r['experts']}"),
        ("card", lambda r: r["card"]),
        ("GB/s read, written", lambda r: f"{r['read_rate'] / 1e9:g}, {r['write_rate'] / 1e9:g}{r['shared']}"),
        ("slowest stage", lambda r: f"{r['limit']}, {r['stages'][r['limit']]:.2f} s"),
        ("forecast", lambda r: f"{r['forecast']:.2f} s"),
        ("simulated", lambda r: f"{r['seconds']:.2f} s"),
        ("over the slowest", lambda r: f"{r['seconds'] / r['stages'][r['limit']] - 1:+.1%}"),
        ("device memory", lambda r: f"{r['device_peak'] / 1e9:.1f} GB"),
        ("host memory", lambda r: f"{r['host_peak'] / 1e9:.1f} GB"),
    ]  # fmt: skip
    what = (
        "**simulated, not measured**: the pipeline itself in real time, with disks, link and kernels that "
        "take the time their rates say, and headers for inputs (`python benchmarks/simulate_gpu.py --table`)"
    )
    return [provenance(data, what), *table(columns, data["rows"])]


def modelled_gpu_table() -> str:
    """What is shown until a card has been measured."""
    columns: list[Column] = [("operation, K experts", lambda r: r["of"].name)]
    columns += [(card.name, _said_of(card)) for card in gpu_model.CARDS]
    columns += [
        ("bytes/element", lambda r: f"{r['of'].n_bytes:.0f}"),
        ("source", lambda r: "modelled"),
    ]
    rows = [{"of": operation} for operation in gpu_model.operations()]
    above = (
        "**Modelled, not yet measured on a GPU**; `python benchmarks/bench_gpu.py` measures. Bytes moved at "
        f"{gpu_model.ATTAINABLE:.0%} of the nominal memory bandwidth, or, where that is slower and they were "
        f"counted, instructions at the issue rate; {gpu_model.ELEMENTS / 2**20:.0f} Mi bf16 elements.\n"
    )
    return "\n".join([above, *table(columns, rows)])


def _said_of(card: gpu_model.Card) -> Callable[[Row], str]:
    say = gpu_model.cell(card)
    return lambda r: say(r["of"])


def gpu_tables() -> str:
    """Measured cards, or the model where there are none."""
    return results("gpu-*.json", gpu_table)() or modelled_gpu_table()


def svd_table(data: Row) -> list[str]:
    """One matrix through methods that decompose, beside FusionBench's functions and plain torch."""

    def rival(name: str) -> Callable[[Row], str]:
        def say(r: Row) -> str:
            scaled = f" ({r['steps']} of {data['steps']} steps, scaled)" if "steps" in r else ""
            return f"{r[name]:.3g} s, {r[name] / r['seconds']:.1f}x{scaled}"

        return say

    columns: list[Column] = [
        ("method", lambda r: r["method"]),
        ("matrix", lambda r: f"{r['shape'][0]} x {r['shape'][1]}"),
        ("experts", lambda r: str(r["experts"])),
        ("fastmerge", lambda r: f"{r['seconds']:.3g} s"),
        ("of it LAPACK and BLAS at least", lambda r: f"{r['floor_seconds']:.3g} s"),
        ("FusionBench", rival("fusionbench")),
        ("plain torch", rival("torch")),
        ("error", lambda r: f"{r['error']:.1e}"),
        ("FusionBench's", lambda r: f"{r['fusionbench_error']:.1e}"),
        ("torch's", lambda r: f"{r['torch_error']:.1e}"),
    ]
    device = data.get("device", "cpu")
    where = f"{data['threads']} threads" if device == "cpu" else device
    what = (
        f"float32, {where}, best of {data['repeat']} runs, one where that "
        f"takes over 2 s; adapters of rank {data['rank']}; errors against float64"
    )
    return [provenance(data, what), *table(columns, data["rows"])]


def decompose_table(data: Row) -> list[str]:
    """Whole merges that decompose: time and memory beside their plan, and what a killed one took to go on."""
    columns: list[Column] = [
        ("method", lambda r: r["method"]),
        ("operations", lambda r: f"{r['flops'] / 1e12:.3g} Tflop"),
        ("time", lambda r: f"{r['seconds']:.0f} s"),
        ("planned", lambda r: f"{r['planned_seconds']:.0f} s"),
        ("peak memory", lambda r: f"{r['peak_mb']:.0f} MB"),
        ("planned", lambda r: f"{r['planned_mb']:.0f} MB"),
        ("killed half way, resumed in", lambda r: f"{r['resumed_seconds']:.0f} s"),
        ("the same bytes", lambda r: "yes" if r["same_bytes"] else "no"),
    ]
    what = (
        f"a Llama-shaped model of {data['parameters'] / 1e6:.0f} M parameters, base and {data['experts']} "
        f"experts in bf16, {data['threads']} threads"
    )
    return [provenance(data, what), *table(columns, data["rows"])]


def accuracy_table(data: Row) -> list[str]:
    """The worst error of each primitive and method by kind of input, beside what is claimed."""
    items: dict[str, Row] = {}
    for row in data["rows"]:
        items.setdefault(row["item"], {})[row["kind"]] = row

    def cell(kind: str) -> Callable[[Row], str]:
        return lambda r: f"{r['of'][kind]['worst']:.0e} ({r['of'][kind]['claim']:.0e})"

    columns: list[Column] = [("of", lambda r: r["name"])]
    columns += [(kind, cell(kind)) for kind in data["kinds"]]
    shapes = ", ".join(f"{m} x {n}" for m, n in data["shapes"])
    what = (
        f"the worst relative error (what is claimed), float32 against float64; {shapes}, refined: "
        f"{' x '.join(map(str, data['large']))}, {data['seeds']} seeds; methods: "
        f"{' and '.join(map(str, data['experts']))} experts"
    )
    kinds = "; ".join(f"{kind}: {said}" for kind, said in data["kinds"].items())
    why: dict[str, list[str]] = {}
    for name, reason in data["why"].items():
        why.setdefault(reason, []).append(name)
    reasons = [f"- {'; '.join(names)}: {reason}." for reason, names in why.items()]
    rows = [{"name": name, "of": of} for name, of in items.items()]
    return [provenance(data, what), *table(columns, rows), f"\n{kinds}.\n", *reasons]


def svd_methods_table() -> str:
    """Methods that decompose: what becomes of other tensors, and parameters with their defaults."""
    from fastmerge.registry import Param, methods

    def said(param: Param) -> str:
        value = param.default
        if value is None or isinstance(value, bool):
            return f"`{param.name}` {str(value).lower()}"
        return f"`{param.name}` {f'{value:g}' if isinstance(value, float) else value}"

    policy = ("tables", "conv", "fused", "exclude")
    columns: list[Column] = [
        ("method", lambda r: f"`{r['of'].name}`"),
        ("what it does", lambda r: r["of"].summary),
        ("of its own, by default", lambda r: ", ".join(map(said, r["own"]))),
        ("which tensors, by default", lambda r: ", ".join(map(said, r["policy"]))),
    ]
    rows = [
        {
            "of": spec,
            "own": [p for p in spec.params if p.name not in policy],
            "policy": [p for p in spec.params if p.name in policy],
        }
        for spec in methods().values()
        if spec.cost is not None
    ]
    return "\n".join(table(columns, rows))


def results(pattern: str, render: Callable[[Row], list[str]]) -> Callable[[], str]:
    """Return a renderer of all result files of a pattern; nothing where there are none."""

    def rendered() -> str:
        files = sorted(RESULTS.glob(pattern))
        return "\n\n".join("\n".join(render(json.loads(file.read_text()))) for file in files)

    return rendered


TABLES = {
    "methods": methods_table,
    "merge": results("merge-*.json", merge_table),
    "cold": results("cold.json", cold_table),
    "sweep": results("sweep.json", sweep_table),
    "gpu": gpu_tables,
    "files": files_tables,
    "simulated": results("simulated.json", simulated_table),
    "coded": results("coded.json", coded_table),
    "ops": results("ops.json", ops_table),
    "svd_methods": svd_methods_table,
    "svd_speed": results("svd.json", svd_table),
    "svd_gpu": results("svd-*.json", svd_table),
    "svd_merges": results("decompose-*.json", decompose_table),
    "svd_accuracy": results("accuracy_svd.json", accuracy_table),
}


def render(text: str) -> str:
    def between(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end table -->"

    return MARKER.sub(between, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for document in DOCUMENTS:
        text = document.read_text()
        wanted = render(text)
        if text == wanted:
            continue
        if check:
            name = document.relative_to(ROOT)
            sys.exit(
                f"{name}: a table was edited by hand or is stale; run python benchmarks/report.py"
            )
        document.write_text(wanted)


if __name__ == "__main__":
    main()
