"""The command line: click over fastmerge.api. Imports of the work's modules wait until a command runs."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from fastmerge import summaries
from fastmerge.errors import MergeError

# NumPy's linear algebra starts a thread per core when it is imported; nothing here asks it for any.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if TYPE_CHECKING:
    from fastmerge.lora import LoraReport
    from fastmerge.planner import Plan

F = TypeVar("F", bound=Callable[..., Any])

_GROUP_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _OneLine(click.Group):
    """Prints a MergeError as its one line and exits with status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MergeError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


@click.group(cls=_OneLine, context_settings=_GROUP_SETTINGS)
@click.version_option(package_name="fastmerge")
def main() -> None:
    """Merge model checkpoints: mergekit recipes in, a model folder out."""


def _planning_options(function: F) -> F:
    options = [
        click.option("--out-shard-size", default="5B", show_default=True, metavar="SIZE",
                     help="Most bytes of one output shard (5B, 500M, 2GiB)."),
        click.option("--max-memory", metavar="SIZE", help="Most memory to use.  [default: 40% of free]"),
        click.option("--allow-missing", is_flag=True, help="Merge a tensor over the inputs that have it."),
        click.option("--strict", is_flag=True, help="Treat warnings (unknown keys, ...) as errors."),
        click.option("--seed", "--random-seed", default=0, show_default=True, help="Seed of random drops."),
        click.option("--device", metavar="NAME", default="cpu", show_default=True,
                     help="Where to compute: cpu, cuda, cuda:1, auto (a GPU if there is one), several as in "
                     "cuda:0,cuda:1 or cuda:all; plans also take a card, as in cuda:H100."),
        click.option("--cuda", "device", flag_value="cuda", hidden=True),
        click.option("--max-vram", metavar="SIZE",
                     help="Most memory of the GPU to use.  [default: 90% of free]"),
        click.option("--max-pinned", metavar="SIZE",
                     help="Most page-locked memory to use with a GPU.  [default: what keeps its link busy]"),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def _quantising_options(function: F) -> F:
    """Options that make a `quantize`: the command gets that, or None where no format is asked for."""
    options = [
        click.option("--quantize", "format", metavar="FORMAT",
                     help="Store weights in few bits: nf4, int4, nvfp4, q4_k, ...; see `fastmerge formats`."),
        click.option("--keep", multiple=True, metavar="PATTERN",
                     help="With --quantize: leave these in 16 bit (a glob, or re:EXPRESSION); repeatable."),
        click.option("--code", multiple=True, metavar="PATTERN",
                     help="With --quantize: code these, though kept by default; repeatable."),
        click.option("--code-as", multiple=True, metavar="PATTERN=FORMAT",
                     help="With --quantize: code these in another format of the family; repeatable."),
        click.option("--head", type=click.Choice(["keep", "q8", "same"]), default="keep", show_default=True,
                     help="With --quantize: what becomes of the output head."),
        click.option("--first-last-layers", default=0, metavar="N",
                     help="With --quantize: leave N layers at either end in 16 bit."),
        click.option("--rounding", type=click.Choice(["nearest", "mse"]), default="nearest",
                     show_default=True, help="With --quantize: scales as the format's library chooses them, "
                     "or by least squared error."),
        click.option("--quant-input-dtype", type=click.Choice(["bfloat16", "float16", "float32"]),
                     help="With --quantize: round to this before coding.  [default: the merge's type]"),
        click.option("--hessians", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
                     help="With --quantize int4, gptq or awq: X^T X of layers' inputs by name of weight "
                     "(safetensors); those weights are rounded by GPTQ."),
    ]  # fmt: skip

    @functools.wraps(function)
    def command(
        format: str | None,
        keep: tuple[str, ...],
        code: tuple[str, ...],
        code_as: tuple[str, ...],
        head: str,
        first_last_layers: int,
        rounding: str,
        quant_input_dtype: str | None,
        hessians: str | None,
        **others: Any,
    ) -> Any:
        from fastmerge.dtypes import parse_dtype
        from fastmerge.errors import RecipeError
        from fastmerge.quant.policy import Rules
        from fastmerge.quant.quantize import Quantize

        if format is None:
            if keep or code or code_as or first_last_layers or quant_input_dtype or hessians:
                raise RecipeError("options of coding need a format; add --quantize nf4 or the like")
            return function(quantize=None, **others)
        for text in code_as:
            if not text.rpartition("=")[0]:
                raise RecipeError(f"--code-as must be PATTERN=FORMAT, got {text!r}")
        overrides = {p: f for p, _, f in (text.rpartition("=") for text in code_as)}
        rules = Rules(keep, code, head, first_last_layers, overrides)
        dtype = parse_dtype(quant_input_dtype, "quant-input-dtype") if quant_input_dtype else None
        return function(quantize=Quantize(format, rules, rounding, dtype, hessians), **others)

    wrapped: Any = command
    for option in reversed(options):
        wrapped = option(wrapped)
    return cast(F, wrapped)


#: mergekit's flags that streaming makes pointless: accepted so that existing commands run unchanged.
_NO_OPS = (
    "--lazy-unpickle",
    "--low-cpu-memory",
    "--clone-tensors",
    "--allow-crimes",
    "--async-write",
    "--trust-remote-code",
)


def _accept_no_ops(function: F) -> F:
    for flag in _NO_OPS:
        name = flag[2:].replace("-", "_")
        function = click.option(flag, name, is_flag=True, hidden=True, expose_value=False)(function)
    return function


@main.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.argument("out", type=click.Path())
@_planning_options
@_quantising_options
@click.option(
    "--append",
    type=click.Path(exists=True, file_okay=False),
    metavar="MERGED",
    help="Add CONFIG's models to a merge that opcm made, at the cost of one expert each.",
)
@click.option("--backend", metavar="NAME", help="Force a backend; see `fastmerge backends`.")
@click.option("--force", is_flag=True, help="Replace the model in a non-empty OUT.")
@click.option("--resume", is_flag=True, help="Finish the killed merge in OUT.")
@click.option("--nan-policy", type=click.Choice(["error", "propagate"]), default="error",
              show_default=True, help="What to do with NaN or infinity in an input.")  # fmt: skip
@click.option("--copy-tokenizer/--no-copy-tokenizer", default=True, help="Copy tokenizer files.")
@click.option("--write-model-card/--no-write-model-card", default=True,
              help="Write README.md and mergekit_config.yml.")  # fmt: skip
@click.option("--ray", metavar="[ADDRESS]", is_flag=False, flag_value="auto",
              help="Merge on a Ray cluster, a task per shard: auto (the one at hand), an address, or "
              "local (started here).")  # fmt: skip
@click.option("-j", "--threads", "--num-threads", default=0, help="Kernel threads.  [default: all]")
@click.option(
    "--io",
    type=click.Choice(["auto", "mmap", "direct", "buffered", "gds"]),
    default="auto",
    show_default=True,
    help="How bytes move: mapped, past the page cache, through it, or straight to the GPU.",
)
@click.option("--fsync/--no-fsync", default=True, help="Wait for the disk before finishing.")
@click.option(
    "--profile",
    is_flag=True,
    help="Print where the time went, and write what ran when to OUT.trace.json (Chrome's format).",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@_accept_no_ops
def merge(config: str, out: str, quiet: bool, profile: bool, **options: Any) -> None:
    """Merge the models that CONFIG (a mergekit YAML file) names into the folder OUT."""
    from fastmerge import api

    trace = Path(os.path.normpath(out) + ".trace.json") if profile else None
    show = sys.stderr.isatty() and not quiet
    bar: Any = None
    planned: Plan | None = None
    shown: list[str] = []

    def on_plan(plan: Plan) -> None:
        nonlocal bar, planned
        planned = plan
        if not quiet:
            shown.extend(plan.warnings)
            for warning in shown:
                click.echo(f"warning: {warning}", err=True)
            click.echo(summaries.headline(plan), err=True)
        if show:
            from tqdm import tqdm

            unit = "flop" if plan.flops else "B"  # what takes the time
            total = plan.flops or plan.bytes_read
            bar = tqdm(total=total, unit=unit, unit_scale=True, dynamic_ncols=True)

    def progress(name: str, done: int, total: int) -> None:
        if bar is None or planned is None:
            return
        if planned.flops:
            read = f"{summaries.size(done)} of {summaries.size(max(total, done))}"
            bar.set_postfix_str(f"{read} read, {name[-40:]}")
            return
        bar.total = max(total, done)  # a rank cut may take a pass more than planned
        bar.set_postfix_str(name[-40:], refresh=False)
        bar.update(done - bar.n)

    def on_flops(done: float) -> None:
        if bar is not None:
            bar.update(done - bar.n)

    try:
        report = api.merge(
            config,
            out,
            trace=trace,
            progress=progress,
            on_flops=on_flops,
            on_plan=on_plan,
            **options,
        )
    except KeyboardInterrupt:
        click.echo(summaries.interrupted(out), err=True)
        sys.exit(130)
    finally:
        if bar is not None:
            bar.close()
    if not quiet:
        if options["resume"]:
            click.echo(summaries.resumed(report), err=True)
        for warning in report.warnings:
            if warning not in shown:  # those of the plan stand above
                click.echo(f"warning: {warning}", err=True)
        assert planned is not None
        click.echo(summaries.summary(report, planned, out), err=True)
    if profile:
        from fastmerge.streaming.stopwatch import table

        click.echo(f"{table(report.stages)}\ntrace: {trace}", err=True)


@main.command("quantize")
@click.argument("model", type=click.Path(exists=True))
@click.argument("out", type=click.Path())
@_quantising_options
@click.option("--force", is_flag=True, help="Replace the model in a non-empty OUT.")
@click.option("--resume", is_flag=True, help="Finish what was killed in OUT.")
@click.option("--max-memory", metavar="SIZE", help="Most memory to use.  [default: 40% of free]")
@click.option(
    "--device", metavar="NAME", default="cpu", show_default=True, help="Where to compute."
)
def quantize_command(model: str, out: str, quantize: Any, **options: Any) -> None:
    """Store MODEL's weights in few bits, in the folder OUT: `--quantize nf4` and the like."""
    from fastmerge.errors import RecipeError

    if quantize is None:
        raise RecipeError("say how weights are to be coded: --quantize nf4 or the like")
    _convert(model, out, quantize=quantize, **options)


@main.command("dequantize")
@click.argument("model", type=click.Path(exists=True))
@click.argument("out", type=click.Path())
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]),
              help="Type of the weights.  [default: what the model computes with]")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the model in a non-empty OUT.")
@click.option("--resume", is_flag=True, help="Finish what was killed in OUT.")
@click.option("--max-memory", metavar="SIZE", help="Most memory to use.  [default: 40% of free]")
@click.option(
    "--device", metavar="NAME", default="cpu", show_default=True, help="Where to compute."
)
def dequantize_command(model: str, out: str, dtype: str | None, **options: Any) -> None:
    """Write MODEL, a quantised folder or GGUF file, as dense safetensors to the folder OUT."""
    _convert(model, out, dtype=dtype, **options)


def _convert(model: str, out: str, dtype: str | None = None, **options: Any) -> None:
    """Merge one model with itself alone."""
    from fastmerge import api

    path = os.path.abspath(model)
    recipe = {"merge_method": "passthrough", "models": [{"model": path}]}
    if dtype is not None:
        recipe["dtype"] = dtype
    planned: list[Plan] = []
    report = api.merge(recipe, out, on_plan=planned.append, **options)
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(summaries.summary(report, planned[0], out), err=True)


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Yield a progress function that shows bytes and the time left; None where nobody looks."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=0, unit="B", unit_scale=True, dynamic_ncols=True) as bar:

        def progress(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(name[-40:], refresh=False)
            bar.update(done - bar.n)

        yield progress


def _packing_options(function: F) -> F:
    options = [
        click.argument("models", nargs=-1, required=True, type=click.Path(exists=True)),
        click.argument("base", type=click.Path(exists=True)),
        click.option("--out", required=True, type=click.Path(), help="Folder of the pack."),
        click.option("-o", "--option", "pairs", multiple=True, metavar="NAME=VALUE",
                     help="An option of the strategy, such as rank_fraction=0.1; repeatable."),
        click.option("--shard-size", default="1B", show_default=True, metavar="SIZE",
                     help="Bytes of one of the pack's files."),
        click.option("--device", default="cpu", show_default=True, metavar="NAME",
                     help="Where matrices are decomposed."),
        click.option("--overwrite", is_flag=True, help="Replace a pack in DIR."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def _applying_options(function: F) -> F:
    options = [
        click.option("--out", required=True, type=click.Path(), help="Folder of the model."),
        click.option("--out-shard-size", default="5B", show_default=True, metavar="SIZE",
                     help="Most bytes of one output shard."),
        click.option("--any-base", is_flag=True, help="Apply to a base with other values too."),
        click.option("--overwrite", is_flag=True, help="Replace a model in DIR."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def _as_options(pairs: tuple[str, ...], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return --option NAME=VALUE as a mapping; flags: what has a flag of its own."""
    from fastmerge.errors import RecipeError

    for pair in pairs:
        name, equals, _ = pair.partition("=")
        if not name or not equals:
            raise RecipeError(f"--option must be NAME=VALUE, got {pair!r}")
        if name in flags:
            raise RecipeError(f"{name} is no option of a strategy; pass --{name.replace('_', '-')}")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


@main.command("pack")
@_packing_options
@click.option("--strategy", required=True, metavar="NAME",
              help="tsv_c, twin, smile, graft or mcsmoe; see docs/packs.md.")  # fmt: skip
def pack_command(
    models: tuple[str, ...],
    base: str,
    out: str,
    pairs: tuple[str, ...],
    quiet: bool,
    **options: Any,
) -> None:
    """Compress what MODEL changes of BASE into a pack; with --strategy smile of several models."""
    from fastmerge.packs import pack

    with _bar(quiet) as progress:
        report = pack(
            models, base, out, progress=progress, **_as_options(pairs, options), **options
        )
    if not quiet:
        click.echo(summaries.pack_table(report))


@main.command("rmm")
@_packing_options
@click.option("--rank", default=16, show_default=True, help="Of each model's factors.")
@click.option("--p", "p", default=1, show_default=True, help="Directions at each position.")
def rmm_command(
    models: tuple[str, ...],
    base: str,
    out: str,
    pairs: tuple[str, ...],
    quiet: bool,
    **options: Any,
) -> None:
    """Pack several MODELS of one BASE so that `fastmerge revert` restores each."""
    from fastmerge.packs import rmm

    with _bar(quiet) as progress:
        report = rmm(models, base, out, progress=progress, **_as_options(pairs, options), **options)
    if not quiet:
        click.echo(summaries.pack_table(report))


@main.command("apply")
@click.argument("base", type=click.Path(exists=True))
@click.argument("packs", nargs=-1, required=True, metavar="PACK[:WEIGHT]...")
@_applying_options
def apply_command(base: str, packs: tuple[str, ...], quiet: bool, **options: Any) -> None:
    """Write BASE plus the weighted changes of the PACKs to a model folder."""
    from fastmerge.packs import apply_packs

    named = [_weighted(text) for text in packs]
    with _bar(quiet) as progress:
        report = apply_packs(
            base, [p for p, _ in named], weights=[w for _, w in named], progress=progress, **options
        )
    if not quiet:
        click.echo(summaries.applied(report))


def _weighted(text: str) -> tuple[str, float | None]:
    """Return folder and weight of PACK or PACK:WEIGHT; a folder of the whole name goes first."""
    from fastmerge.errors import RecipeError

    folder, colon, weight = text.rpartition(":")
    if not colon or os.path.isdir(text):
        return text, None
    try:
        return folder, float(weight)
    except ValueError:
        raise RecipeError(
            f"the weight of a pack must be a number, got {weight!r} in {text!r}"
        ) from None


@main.command("revert")
@click.argument("pack", type=click.Path(exists=True))
@click.option("--model", required=True, metavar="NAME|INDEX", help="The model to restore.")
@click.option("--base", required=True, type=click.Path(exists=True), help="The models' base.")
@_applying_options
def revert_command(pack: str, model: str, base: str, out: str, quiet: bool, **options: Any) -> None:
    """Restore one of the models in PACK."""
    from fastmerge.packs import revert

    with _bar(quiet) as progress:
        report = revert(pack, model, base, out, progress=progress, **options)
    if not quiet:
        click.echo(summaries.applied(report))


def _lora_options(function: F) -> F:
    options = [
        click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
                     help="Type of the factors."),
        click.option("--seed", default=0, show_default=True, help="Seed of decompositions and drops."),
        click.option("--overwrite", is_flag=True, help="Replace an adapter in OUT."),
        click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def _lora_report(report: LoraReport, quiet: bool, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    if not quiet:
        click.echo(summaries.lora_table(report))


@main.command("extract-lora")
@click.argument("base", type=click.Path(exists=True))
@click.argument("tuned", type=click.Path(exists=True))
@click.argument("out", type=click.Path())
@click.option("--rank", type=int, metavar="R", help="Singular triples of each change.")
@click.option("--error", type=float, metavar="E",
              help="Least rank that leaves at most this share of a change's norm.")  # fmt: skip
@click.option("--energy", type=float, metavar="E",
              help="Least rank that keeps this share of a change's squared norm.")  # fmt: skip
@click.option(
    "--max-rank", type=int, metavar="R", help="With a target, the most; alone, as --rank."
)
@click.option("--sv-epsilon", default=0.0, help="Leave out singular values up to this.")
@click.option("-i", "--include", "--include-regex", "include", multiple=True, metavar="REGEX",
              help="Only modules whose name it finds; repeatable.")  # fmt: skip
@click.option("-e", "--exclude", "--exclude-regex", "exclude", multiple=True, metavar="REGEX",
              help="No modules whose name it finds; repeatable.")  # fmt: skip
@click.option("--save-modules", "--save-module", "saved", multiple=True, metavar="NAME",
              help="What is kept whole: changed (all that is no linear layer and changed), none, or "
              "modules of this name; repeatable.  [default: changed]")  # fmt: skip
@click.option("--exact", is_flag=True, help="Decompose in full.")
@click.option("--device", default="cpu", show_default=True, metavar="NAME",
              help="Where matrices are decomposed.")  # fmt: skip
@_lora_options
def extract_lora_command(
    base: str,
    tuned: str,
    out: str,
    saved: tuple[str, ...],
    dtype: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Write what TUNED changes of BASE as a LoRA adapter that peft loads, to the folder OUT."""
    from fastmerge.lora import extract_lora

    names: Any = saved if len(saved) > 1 else (saved or ("changed",))[0]
    with _bar(quiet) as progress:
        report = extract_lora(
            base,
            tuned,
            out,
            dtype=dtype or "float32",
            save_modules=names,
            progress=progress,
            **options,
        )
    _lora_report(report, quiet, as_json)


@main.command("merge-adapters")
@click.argument("adapters", nargs=-1, required=True, type=click.Path(exists=True))
@click.argument("out", type=click.Path())
@click.option(
    "--weights", required=True, metavar="W,W", help="One for each adapter, or one for all."
)
@click.option("--combination", default="svd", show_default=True, metavar="KIND",
              help="As in peft's add_weighted_adapter: svd, linear, cat, ties, dare_linear, dare_ties, "
              "magnitude_prune; ties_svd, dare_linear_svd, dare_ties_svd, "
              "magnitude_prune_svd.")  # fmt: skip
@click.option("--rank", type=int, metavar="R",
              help="Of the result, for kinds in svd.  [default: the largest of the adapters']")  # fmt: skip
@click.option(
    "--density", type=float, metavar="D", help="Share of values kept by ties, dare, prune."
)
@click.option("--majority-sign", type=click.Choice(["total", "frequency"]), default="total",
              show_default=True, help="What elects a sign.")  # fmt: skip
@click.option("--scaling-power", type=click.Choice(["1", "2"]), default="1",
              help="2: alpha / r twice, as older releases of peft did.")  # fmt: skip
@_lora_options
def merge_adapters_command(
    adapters: tuple[str, ...],
    out: str,
    weights: str,
    scaling_power: str,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge LoRA ADAPTERS into one, in the folder OUT, without their base."""
    from fastmerge.errors import RecipeError
    from fastmerge.lora import merge_adapters

    try:
        numbers = [float(text) for text in weights.split(",")]
    except ValueError:
        raise RecipeError(
            f"--weights must be numbers with commas between, got {weights!r}"
        ) from None
    with _bar(quiet) as progress:
        report = merge_adapters(
            adapters,
            out,
            weights=numbers[0] if len(numbers) == 1 else numbers,
            scaling_power=int(scaling_power),
            progress=progress,
            **options,
        )
    _lora_report(report, quiet, as_json)


@main.command()
def formats() -> None:
    """List the formats that `--quantize` takes."""
    click.echo(summaries.format_table())


@main.command()
@click.argument("out", type=click.Path(exists=True, file_okay=False))
@click.option("--sample", default=8, show_default=True, metavar="N",
              help="Tensors to merge again with the reference backend.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seed of the sample.")
def verify(out: str, sample: int, seed: int) -> None:
    """Check the merged model in OUT against its manifest and its inputs; exit 2 if it is not whole."""
    from fastmerge.verify import verify as check

    result = check(out, sample=sample, seed=seed)
    click.echo(result.table())
    if not result.ok:
        sys.exit(2)


@main.command("plan")
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@_planning_options
@_quantising_options
@click.option(
    "--read-rate", metavar="SIZE", help="Bytes per second of the disk read.  [default: measured]"
)
@click.option(
    "--write-rate", metavar="SIZE", help="Of the disk written to.  [default: as the other]"
)
@click.option("--one-disk", is_flag=True, help="The output goes to the disk that is read from.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan_command(
    config: str,
    as_json: bool,
    read_rate: str | None,
    write_rate: str | None,
    one_disk: bool,
    **options: Any,
) -> None:
    """Say what a merge would read and write, what it needs, and what stops it; exit 2 on a conflict.

    For a device also how long each stage takes, and which one limits it.
    """
    from fastmerge import api

    plan = api.plan(config, **options)
    time = None
    rate = api.decomposition_rate() if plan.flops and options["device"] == "cpu" else None
    if plan.device is not None and not plan.conflicts:
        time = api.forecast(
            plan,
            options["device"],
            read_rate=read_rate,
            write_rate=write_rate,
            one_disk=one_disk,
        )
    if as_json:
        forecast: dict[str, Any] = {"forecast": time.as_dict()} if time else {}
        if rate:
            forecast["decomposition_seconds"] = plan.flops / rate
        click.echo(json.dumps({**plan.as_dict(), **forecast}, indent=2))
    else:
        click.echo(summaries.plan_text(plan, rate))
        if time:
            click.echo(summaries.forecast_text(time))
    if plan.conflicts:
        sys.exit(2)


@main.command()
@click.option("--markdown", is_flag=True, help="As the table of the README.")
def methods(markdown: bool) -> None:
    """List the merge methods and their parameters."""
    from fastmerge.registry import methods as known

    if markdown:
        click.echo(method_table())
        return
    for spec in known().values():
        base = {"required": "base", "optional": "base or none", "ignored": "no base"}[spec.base]
        click.echo(f"{spec.name}  ({spec.title}; {base}; {spec.paper or 'no paper'})")
        click.echo(f"    {spec.summary}")
        for p in spec.params:
            default = repr(p.default) if not isinstance(p.default, bool) else str(p.default).lower()
            where = "" if p.scope == "shared" else "  per model"
            choices = f" {'|'.join(p.choices)}" if p.choices else ""
            click.echo(f"    {p.name:<18} {default:<12}{where}{choices}  {p.doc}".rstrip())
        if spec.presets:
            click.echo(f"    preset             {'|'.join(spec.presets)}")


def method_table() -> str:
    """Render the registry as the README's table."""
    from fastmerge.registry import methods as known

    lines = [
        "| method | what it does | base | per model | shared | paper |",
        "|---|---|---|---|---|---|",
    ]
    for spec in known().values():
        per_model = ", ".join(f"`{p.name}`" for p in spec.params if p.scope != "shared")
        shared = ", ".join(f"`{p.name}`" for p in spec.params if p.scope == "shared")
        paper = spec.paper
        if paper.startswith("arXiv:"):
            paper = f"[{paper[6:]}](https://arxiv.org/abs/{paper[6:]})"
        lines.append(
            f"| `{spec.name}` | {spec.summary} | {spec.base} | {per_model} | {shared} | {paper} |"
        )
    return "\n".join(lines)


@main.command()
def backends() -> None:
    """List the backends in order of preference, with the reason why one cannot run."""
    from fastmerge import ops

    for entry in ops.BACKENDS:
        reason = entry.why_not()
        state = "ready" if reason is None else f"cannot run: {reason}"
        detail = ""
        if entry.name == "cpu" and reason is None:
            from fastmerge import _cpu

            detail = (
                f"; {_cpu.isa()} of {_cpu.available_isas()}, {_cpu.available_threads()} threads"
            )
        click.echo(f"{entry.name:<10} {','.join(entry.devices):<6} {state} ({entry.about}{detail})")


@main.command("bench")
@click.option("--elements", default=1 << 23, show_default=True, help="Elements of each operand.")
@click.option("-j", "--threads", default=0, help="Kernel and copy threads.  [default: all]")
@click.option("--only", default="", metavar="PARTS",
              help="Time what has one of these comma-separated parts in its name.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def bench_command(elements: int, threads: int, only: str, as_json: bool) -> None:
    """Time every kernel and method in memory beside a plain copy, each verified before."""
    from fastmerge.bench import HEADINGS, Bench, matching

    cases = matching(only)
    bench = Bench(elements, threads)
    if as_json:
        click.echo(json.dumps(bench.as_dict(list(bench.timings(cases))), indent=2))
        return
    click.echo(f"{bench.headline()}\n\n{HEADINGS}")
    for timing in bench.timings(cases):
        click.echo(timing.text())


if __name__ == "__main__":
    main()
