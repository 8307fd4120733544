"""What the command line prints: a merge's plan, headline and summary, in words and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastmerge.engine import Report
    from fastmerge.forecast import Forecast
    from fastmerge.lora import LoraReport
    from fastmerge.packs import ApplyReport, PackReport
    from fastmerge.planner import Plan


def size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return (
                f"{n:.0f} {unit}"
                if unit == "B"
                else f"{n:.3g} {unit}"
                if n < 100
                else f"{n:.0f} {unit}"
            )
        n /= 1000
    raise AssertionError


def _operations(flops: float) -> str:
    for unit, scale in (("Pflop", 1e15), ("Tflop", 1e12), ("Gflop", 1e9)):
        if flops >= scale:
            return f"{flops / scale:.3g} {unit}"
    return f"{flops / 1e6:.3g} Mflop"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.3g} h"


def pack_table(report: PackReport) -> str:
    """Return what became of each module of a pack, and of the whole."""
    widest = max([6, *(len(m.name) for m in report.modules)])
    lines = [f"{'module':<{widest}}  {'residual':>8}  {'size':>7}  stored as"]
    for m in report.modules:
        lines.append(f"{m.name:<{widest}}  {m.residual:8.2%}  {m.ratio:7.1%}  {m.terms}")
    rate = report.bytes_read / report.seconds if report.seconds else 0.0
    share = report.n_bytes / report.dense_bytes if report.dense_bytes else 0.0
    lines.append(
        f"wrote {report.out}: {len(report.modules)} tensors changed, {report.unchanged} as in the base; "
        f"{size(report.n_bytes)}, {share:.1%} of the models' {size(report.dense_bytes)}, in "
        f"{report.seconds:.2f} s ({size(rate)}/s read)"
    )
    return "\n".join(lines)


def lora_table(report: LoraReport) -> str:
    """Return rank and residual of each module of an adapter, and what has no part in it."""
    widest = max([6, *(len(m.module) for m in report.modules)])
    lines = [f"{'module':<{widest}}  {'shape':>13}  {'rank':>5}  {'norm':>9}  {'residual':>8}"]
    for m in report.modules:
        shape = " x ".join(map(str, m.shape))
        norm = "-" if m.norm is None else f"{m.norm:.4g}"
        row = f"{m.module:<{widest}}  {shape:>13}  {m.rank:>5}  {norm:>9}  {_share(m.residual):>8}"
        lines.append(f"{row}  {m.note}".rstrip())
    ranks = [m.rank for m in report.modules]
    mean = f"{sum(ranks) / len(ranks):.4g}"
    total = f"all {len(ranks)}, mean rank"
    lines.append(f"{total:<{widest + 15}}  {mean:>5}  {'':>9}  {_share(report.residual):>8}")
    lines += _named("kept whole", report.saved)
    for reason in dict.fromkeys(report.skipped.values()):
        names = [n for n, why in report.skipped.items() if why == reason]
        lines += _named(f"left out, {reason}", names)
    if report.unchanged:
        lines.append(f"as in the base: {report.unchanged} tensors")
    lines.append(
        f"wrote {report.out}: {size(report.bytes_written)} of {size(report.bytes_read)} read, in "
        f"{duration(report.seconds)}"
    )
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _named(what: str, names: Sequence[str], most: int = 4) -> list[str]:
    """Return a line with the first names and the number of others; none for none."""
    if not names:
        return []
    shown = names[:most]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{what}: {', '.join(shown)}{more}"]


def applied(report: ApplyReport) -> str:
    """Return what applying packs wrote."""
    moved = report.bytes_read + report.bytes_written
    rate = moved / report.seconds if report.seconds else 0.0
    return (
        f"wrote {report.out}: {report.n_tensors} tensors, {report.changed} of them changed, "
        f"{size(report.bytes_written)} in {report.seconds:.2f} s ({size(rate)}/s moved)"
    )


def headline(plan: Plan) -> str:
    models = len(plan.checkpoints)
    device = ""
    if plan.device is not None:
        streamed = f", {len(plan.streamed)} tensors streamed" if plan.streamed else ""
        device = f", {size(plan.device.total)} on {plan.device.name}{streamed}"
    work = f", {_operations(plan.flops)} of decompositions" if plan.flops else ""
    return (
        f"{plan.spec.name}: {len(plan.jobs)} tensors of {models} models; reads {size(plan.bytes_read)}, "
        f"writes {size(plan.bytes_written)}, peak memory about {size(plan.peak_memory)}{device}{work}"
    )


def summary(report: Report, plan: Plan, out: str) -> str:
    moved = report.bytes_read + report.bytes_written
    rate = moved / report.seconds if report.seconds else 0.0
    wrote = (
        f"wrote {out}: {report.n_tensors} tensors, {size(report.bytes_written)} in "
        f"{report.seconds:.2f} s ({size(rate)}/s moved, {report.backend} backend)"
    )
    return "\n".join([wrote, *_what_coding_cost(report, plan)])


def _what_coding_cost(report: Report, plan: Plan) -> list[str]:
    """Return a line of what was coded, and how far that is from the merge where this run coded it."""
    if plan.quantize is None or not plan.coded:
        return []
    from fastmerge.backends import Residual

    line = (
        f"coded {len(plan.coded)} tensors as {plan.quantize.format}, "
        f"{_bits_per_coded_weight(plan):.2f} bits per weight"
    )
    total = Residual.of_all(report.residuals.values())
    error = f", relative RMS error {100 * total.relative_rms:.2f} %" if total.squares else ""
    return [line + error, *_what_hessians_gained(report)]


def _what_hessians_gained(report: Report) -> list[str]:
    known = [r.relative_output for r in report.residuals.values()]
    pairs = [pair for pair in known if pair is not None]
    if not pairs:
        return []
    written, nearest = (100 * sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return [
        f"rounded {len(pairs)} of them with their Hessians: the error of what layers give is {written:.2f} % "
        f"on average, {nearest:.2f} % if rounded to nearest"
    ]


def _bits_per_coded_weight(plan: Plan) -> float:
    """Return what a weight that is coded takes, with its share of scales."""
    n = sum(j.n for j in plan.coded)
    return 8 * sum(j.bytes_out for j in plan.coded) / n if n else 0.0


def interrupted(out: str) -> str:
    from fastmerge.checkpoint import JOURNAL

    if (Path(out) / JOURNAL).exists():
        return f"interrupted; finish {out} with --resume, or start again with --force"
    return "interrupted; nothing was left behind"


def resumed(report: Report) -> str:
    if not report.resumed:
        return "note: there was no killed merge to resume; merged from the start"
    return f"resumed: {size(report.bytes_kept)} were there already"


def forecast_text(time: Forecast) -> str:
    """Return a table of the stages, and the one that decides."""
    lines = [f"\n{'stage':<10}{'moves':>10}{'at':>12}{'takes':>10}  rate"]
    for stage in time.stages:
        mark = "  <- the limit" if stage is time.limit else ""
        lines.append(
            f"{stage.name:<10}{size(stage.n_bytes):>10}{size(stage.rate) + '/s':>12}"
            f"{stage.seconds:>8.2f} s  {stage.origin}{mark}"
        )
    lines.append(
        f"about {time.seconds:.1f} s, all stages overlapped: {time.limit.name} limits it "
        f"(modelled; the first item takes {time.fill:.2f} s to come through)"
    )
    return "\n".join(lines)


def _coded_rows(plan: Plan) -> list[tuple[str, str]]:
    if plan.quantize is None:
        return []
    bits = f"{_bits_per_coded_weight(plan):.3g} bits per weight" if plan.coded else "none"
    return [
        (
            "coded",
            f"{len(plan.coded)} tensors as {plan.quantize.format}, {bits}; {plan.bits_per_weight:.3g} with "
            "what stays dense",
        )
    ]


def _work_rows(plan: Plan, rate: float | None) -> list[tuple[str, str]]:
    """Return what decompositions take. rate: operations per second, as one of them was timed."""
    if not plan.flops:
        return []
    n = sum(plan.cost(job).flops > 0 for job in plan.jobs)
    takes = ""
    if rate:
        takes = (
            f", about {duration(plan.flops / rate)} at {_operations(rate)}/s (one was timed here)"
        )
    return [
        ("compute", f"{_operations(plan.flops)} in {n} {'matrix' if n == 1 else 'matrices'}{takes}")
    ]


def plan_text(plan: Plan, rate: float | None = None) -> str:
    data = plan.as_dict()
    n_shards = len(data["shards"])
    rows = [
        ("method", f"{plan.spec.name} ({plan.spec.title})"),
        ("inputs", ", ".join(str(i.ref) for i in plan.recipe.inputs)),
        (
            "base",
            str(plan.recipe.inputs[plan.recipe.base].ref)
            if plan.recipe.base is not None
            else "none",
        ),
        ("tensors", f"{data['merged']} merged, {data['copied']} copied"),
        ("parameters", f"{data['parameters']:,}"),
        ("read", size(data["bytes_read"])),
        ("write", f"{size(data['bytes_written'])} in {n_shards} file{'s' * (n_shards != 1)}"),
        *_work_rows(plan, rate),
        *_coded_rows(plan),
        ("peak memory", f"about {size(data['peak_memory'])}"),
        ("disk", size(data["disk"])),
    ]
    if plan.device is not None:
        budget = plan.device
        held = f"{size(budget.operands)} operands, {size(budget.results)} results, " + (
            f"{size(budget.scratch)} kernels"
        )
        rows += [
            ("device", budget.name),
            ("VRAM", f"{size(budget.total)} of {size(budget.limit)} ({held})"),
            ("pinned", f"{size(budget.pinned)} of host memory, blocks of {size(budget.block)}"),
        ]
        if plan.streamed:
            names = ", ".join(sorted(plan.streamed)[:3])
            rows.append(("streamed", f"{len(plan.streamed)} too large for the device: {names}"))
    lines = [f"{name:<12} {value}" for name, value in rows]
    lines += [f"warning: {w}" for w in data["warnings"]]
    lines += [f"conflict: {c}" for c in data["conflicts"]]
    if not data["conflicts"]:
        lines.append("no conflicts")
    return "\n".join(lines)


def format_table() -> str:
    """Return the formats of few bits with what they take of a square matrix, as text."""
    from fastmerge.coding import Coding, Format, parts_of
    from fastmerge.dtypes import DType
    from fastmerge.quant.formats import FORMATS
    from fastmerge.quant.gguf_formats import GGUF_FORMATS

    side = 4096
    codings = {f.name: (f.family, f.coding(DType.BF16, (side, side))) for f in FORMATS.values()}
    for name, what in GGUF_FORMATS.items():
        coding = Coding(Format.DENSE, what) if isinstance(what, DType) else Coding(what)
        codings[name] = ("GGUF (one file)", coding)
    lines = [f"{'format':<14}{'bits per weight':>16}  written as"]
    for name, (family, coding) in codings.items():
        bits = 8 * sum(p.n_bytes for p in parts_of(coding, side, side)) / side**2
        lines.append(f"{name:<14}{bits:>16.2f}  {family}")
    return "\n".join(lines)
