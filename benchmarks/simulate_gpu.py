"""Replay a merge of huge models on a simulated GPU: the real pipeline, in real time, with headers alone.

    python benchmarks/simulate_gpu.py [--card H100] [--billions 70] [--experts 3] [--method ties]
        [--read-rate 50G] [--write-rate 50G] [--one-drive] [--max-vram SIZE] [--out FILE] [--picture FILE]
        [--trace FILE]
    python benchmarks/simulate_gpu.py --table       several of them, for the README: four minutes

The planner, the threads, the rings and the order of copies and kernels are the ones that merge; disks, link
and kernels only take the time that their rates say, and inputs are files of headers with holes behind them.
So this measures what the pipeline adds to its slowest stage, and takes as long as the merge would.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # the simulated device

import simulation

from fastmerge import api
from fastmerge.bench import environment
from fastmerge.cards import CARDS, REACHED
from fastmerge.checkpoint import parse_size
from fastmerge.engine import Engine
from fastmerge.forecast import Forecast, card_rates, forecast
from fastmerge.planner import Plan
from fastmerge.streaming.ring import FEEDING_THREADS
from fastmerge.streaming.trace import Span, Trace, busy_seconds, write_chrome_trace

RESULTS = Path(__file__).resolve().parent / "results"

#: Seconds before a copy starts, and a kernel.
COPY_LATENCY, LAUNCH_LATENCY = 5e-6, 5e-6

#: What --table replays: the floors that docs/gpu.md speaks of.
TABLE: tuple[dict[str, Any], ...] = (
    {"card": "H100", "experts": 3},
    {"card": "H100", "experts": 8},
    {"card": "H100", "experts": 3, "method": "linear"},
    {"card": "H100", "experts": 3, "read_rate": 28e9, "write_rate": 28e9, "one_drive": True},
    {"card": "RTX4090", "experts": 3, "read_rate": 25e9, "write_rate": 25e9},
    {"card": "RTX4090", "experts": 8, "read_rate": 25e9, "write_rate": 25e9},
)

#: (hidden, inner, layers, key and value width, vocabulary) by billions of parameters: Llama 3's.
SIZES = {1: (2048, 8192, 16, 512, 128256), 8: (4096, 14336, 32, 1024, 128256),
         70: (8192, 28672, 80, 1024, 128256)}  # fmt: skip
SHARD_BYTES = 5_000_000_000

PARAMETERS = {"ties": "{weight: 0.5, density: 0.3}", "linear": "{weight: 0.5}",
              "task_arithmetic": "{weight: 0.5}", "dare_ties": "{weight: 0.5, density: 0.3}"}  # fmt: skip


def shapes(billions: int) -> dict[str, tuple[int, ...]]:
    hidden, inner, layers, kv, vocab = SIZES[billions]
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        names |= {f"model.layers.{i}.{k}.weight": s for k, s in layer.items()}
    return names | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write_headers(folder: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Write a bf16 checkpoint of headers: behind them are holes, which take no disk."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, shape in tensors.items():
        n = 2 * math.prod(shape)
        if size + n > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, size + n]}
        size += n
    files = {}
    for s, header in enumerate(shards):
        name = f"model-{s + 1:05}-of-{len(shards):05}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        end = max(t["data_offsets"][1] for t in header.values())
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        files |= dict.fromkeys(header, name)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Nowhere:
    """An output that the simulated drive takes."""

    journal = None

    def fd(self, shard: int) -> int:
        return -1

    def direct_fd(self, shard: int) -> int:
        return -1


@dataclass(frozen=True)
class Replay:
    """What a replay showed. seconds: of the engine; stages: (name, busy seconds) of the simulated parts."""

    plan: Plan
    forecast: Forecast
    seconds: float
    stages: dict[str, float]
    spans: list[Span]
    device_peak: int
    host_peak: int

    @property
    def limit(self) -> str:
        """The slowest stage."""
        return max(self.stages, key=lambda name: self.stages[name])

    @property
    def over(self) -> float:
        """What the pipeline adds to its slowest stage, as a share of it."""
        return self.seconds / self.stages[self.limit] - 1


def replay(
    folder: Path,
    *,
    card: str = "H100",
    billions: int = 70,
    experts: int = 3,
    method: str = "ties",
    read_rate: float = 50e9,
    write_rate: float = 50e9,
    one_drive: bool = False,
    duplex: float = 1.0,
    max_vram: int | None = None,
    time_scale: float = 1.0,
) -> Replay:
    """Run the pipeline over headers in `folder`, written if they are not there.

    one_drive: reads and writes share the read rate. duplex: of the link, while it copies out as well.
    time_scale: rates are so many times higher: shorter, and harder for the host.
    """
    known = replace(
        CARDS[card],
        link=CARDS[card].link * time_scale,
        bandwidth=CARDS[card].bandwidth * time_scale,
    )
    models = ["base", *(f"expert{k}" for k in range(1, experts + 1))]
    for name in models:
        if not (folder / name).exists():
            write_headers(folder / name, shapes(billions))
    lines = [f"merge_method: {method}", "models:"]
    for name in models[1:]:
        lines += [f"  - model: {folder / name}", f"    parameters: {PARAMETERS[method]}"]
    lines += [f"base_model: {folder / 'base'}"] if method != "linear" else []
    config = "\n".join([*lines, "dtype: bfloat16", ""])
    device = simulation.SimulatedDevice(
        known.link, known.link, known.memory, moves_data=False, duplex=duplex,
        copy_latency=COPY_LATENCY, launch_latency=LAUNCH_LATENCY,
    )  # fmt: skip
    plan = api.plan(config, device=device, max_vram=max_vram, max_memory="8GB")
    plan.raise_conflicts()
    kernels = simulation.SimulatedKernels(device, known.bandwidth * REACHED)
    native = simulation.native()
    reading = native.Disk(False, read_rate, moves_data=False, depth=FEEDING_THREADS)
    shares = {"shares": reading} if one_drive else {}
    writing = native.Disk(True, write_rate, moves_data=False, **shares)
    trace = Trace()
    engine = Engine(
        plan, kernels, Nowhere(), device=device, trace=trace,
        chunk_elements=kernels.chunk_elements, disks=lambda writes: writing if writes else reading,
    )  # fmt: skip
    report = engine.run()
    names = ("drive", "drive") if one_drive else ("drive, reads", "drive, writes")
    drives = [
        Span(lane, lane, start, end, n)
        for lane, disk in zip(names, (reading, writing), strict=True)
        for start, end, n in disk.spans()
    ]
    spans = [*drives, *report.spans]
    lanes = dict.fromkeys((names[0], "copy in", "compute", "copy out", names[1]))
    rates = replace(
        card_rates(known, (read_rate, "given"), (write_rate, "given")), one_disk=one_drive
    )
    return Replay(
        plan, forecast(plan, rates), report.seconds,
        {lane: busy_seconds(spans, lane) for lane in lanes}, spans,
        device.native.peak_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        + plan.device.pinned,  # its pages were never touched
    )  # fmt: skip


def text(done: Replay) -> str:
    """Return the replay as a table."""
    names = dict(zip(done.stages, (s.seconds for s in done.forecast.stages), strict=True))
    lines = [f"{'stage':<16}{'forecast':>10}{'busy':>10}{'of the time':>13}"]
    for name, seconds in done.stages.items():
        share = f"{seconds / done.seconds:.0%}"
        lines.append(f"{name:<16}{names[name]:>8.2f} s{seconds:>8.2f} s{share:>13}")
    lines += [
        f"{'all':<16}{done.forecast.seconds:>8.2f} s{done.seconds:>8.2f} s"
        f"   {done.over:+.1%} over the slowest stage",
        f"device memory at most {done.device_peak / 1e9:.2f} GB, "
        f"host memory {done.host_peak / 1e9:.2f} GB (pinned {done.plan.device.pinned / 1e9:.2f} GB)",  # type: ignore[union-attr]
    ]
    if done.plan.streamed:
        lines.append(f"streamed: {', '.join(sorted(done.plan.streamed))}")
    return "\n".join(lines)


def draw(done: Replay, path: Path, title: str, window: float | None = None) -> None:
    """Draw who worked when: all of the time above, its first second below, where idle gaps can be seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lanes = [*done.stages, "merging"]
    labels = {"merging": "host: recipes"}
    origin = min(s.start for s in done.spans)
    colours = dict(
        zip(lanes, ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377"), strict=False)
    )
    figure, axes = pyplot.subplots(2, 1, figsize=(11, 6.2), constrained_layout=True)
    whole = max(s.end for s in done.spans) - origin
    for axis, end in zip(axes, (whole, window or min(1.0, whole)), strict=True):
        for row, lane in enumerate(lanes):
            bars = [
                (s.start - origin, max(s.end - s.start, end / 4000))
                for s in done.spans
                if s.lane == lane and s.start - origin < end and not s.name.startswith("waiting")
            ]
            axis.broken_barh(bars, (row - 0.36, 0.72), color=colours[lane], linewidth=0)
        axis.set_yticks(range(len(lanes)), [labels.get(lane, lane) for lane in lanes])
        axis.invert_yaxis()
        axis.set_xlim(0, end)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("seconds")
    axes[0].set_title(title, loc="left")
    axes[1].set_title("its beginning", loc="left", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--card", choices=CARDS, default="H100")
    parser.add_argument("--billions", type=int, choices=SIZES, default=70)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--method", choices=PARAMETERS, default="ties")
    parser.add_argument("--read-rate", type=parse_size, default="50G", metavar="SIZE")
    parser.add_argument("--write-rate", type=parse_size, default="50G", metavar="SIZE")
    parser.add_argument("--one-drive", action="store_true", help="reads and writes share it")
    parser.add_argument("--duplex", type=float, default=1.0, help="of the link both ways at once")
    parser.add_argument("--max-vram", type=parse_size, metavar="SIZE")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--trace", type=Path)
    parser.add_argument(
        "--table", action="store_true", help="write benchmarks/results/simulated.json"
    )
    options = vars(parser.parse_args(arguments))
    picture, trace, whole = (options.pop(name) for name in ("picture", "trace", "table"))
    rows = []
    for wanted in TABLE if whole else ({},):
        row = {**options, **wanted}
        with tempfile.TemporaryDirectory() as folder:
            done = replay(Path(folder), **row)
        title = (
            f"{row['method']}, {row['billions']} B x {row['experts']}, {CARDS[row['card']].title}, "
            f"drives {row['read_rate'] / 1e9:g} and {row['write_rate'] / 1e9:g} GB/s"
            + (" in all" if row["one_drive"] else "")
        )
        print(f"simulated: {title}\n{text(done)}\n", flush=True)
        rows.append(
            {
                **row, "shared": " in all" if row["one_drive"] else "", "seconds": done.seconds,
                "forecast": done.forecast.seconds, "stages": done.stages, "limit": done.limit,
                "device_peak": done.device_peak, "host_peak": done.host_peak,
            }
        )  # fmt: skip
    if picture:
        draw(done, picture, title)
    if trace:
        write_chrome_trace(trace, done.spans)
    if whole:
        result = {**environment("fastmerge"), "rows": rows}
        RESULTS.joinpath("simulated.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
