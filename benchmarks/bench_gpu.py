"""Build, verify and time every GPU kernel on this machine: one command, eight minutes at most.

    python benchmarks/bench_gpu.py [--quick] [--only verify,kernels,small,rivals] [--backend cuda|triton|both]
        [--elements N] [--seed N] [--seconds N] [--out FILE] [--no-build]
    python benchmarks/bench_gpu.py --end-to-end [--parameters N] [--folder DIR]     whole merges of files

Needs a GPU, a compiler, pybind11, triton and what fastmerge itself needs; nothing from a network. Every
kernel is held to the cpu backend's bits first, and what fails is not timed. Times are on the stream, in the
launches alone; `call` is the host's view, planning included. Exit status: 1 a kernel is wrong, 2 nothing
could run.

`--end-to-end` merges a synthetic family of as many parameters as memory and disk allow, from the page cache
and from the disk, beside measured pinned copies and direct reads, and mergekit --cuda where it is installed.
`--rehearse [--emulated _cuda_emulated.so]` goes through all of it on the host at tiny sizes: its times mean
nothing and go to build/.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))  # this checkout's fastmerge, installed or not

import fastmerge  # noqa: E402

fastmerge.__path__.append(str(ROOT))  # where a checkout has triton_kernels

import gpu_device  # noqa: E402
import torch  # noqa: E402
from gpu_device import Gpu, Host, Subject  # noqa: E402
from gpu_parts import BUDGET, PARTS, QUICK, REHEARSAL, Bench, Progress, Sizes, line_of  # noqa: E402

BUILD_SECONDS = 300.0


def build(progress: Progress) -> str | None:
    """Build the extensions in place; return why not, in a line."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    progress.say("building: " + " ".join(command[1:]))
    # A session of its own: compilers that outlive the build would disturb what is timed.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    made = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]
    try:
        output, _ = made.communicate(timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(made.pid, signal.SIGKILL)
        made.communicate()
        return f"not built in {BUILD_SECONDS:.0f} s; build it first, then run with --no-build"
    importlib.invalidate_caches()
    if made.returncode == 0:
        return None
    lines = [line for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
    return telling[0].strip()[:300]


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="benchmarks/results/gpu-<card>.json")
    parser.add_argument("--elements", type=int, help="of each operand that is timed; 64 Mi")
    parser.add_argument("--seed", type=int, help="of all operands; from the clock")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="for all of it; 480")
    parser.add_argument("--quick", action="store_true", help="ten repetitions, fewer checks")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help=", ".join(PARTS))
    parser.add_argument("--backend", choices=("cuda", "triton", "both"), default="both")
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--end-to-end", action="store_true", help="whole merges of files instead")
    parser.add_argument("--parameters", type=float, default=8e9, help="of one model, at most")
    parser.add_argument(
        "--folder", type=Path, help="where the family is written; the temporary folder"
    )
    parser.add_argument("--rehearse", action="store_true", help="on the host, at tiny sizes")
    parser.add_argument(
        "--emulated", type=Path, help="the CUDA module built for the host, to rehearse with"
    )
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    if options.rehearse and options.out and options.out.resolve().is_relative_to(RESULTS):
        parser.error("a rehearsal measures nothing: write it elsewhere than to benchmarks/results")
    return options


def sizes_of(options: argparse.Namespace) -> Sizes:
    sizes = REHEARSAL if options.rehearse else QUICK if options.quick else Sizes()
    if options.elements:
        sizes = replace(sizes, elements=max(4096, options.elements // 4096 * 4096))
    return sizes


def find_subjects(
    options: argparse.Namespace, device: Host, progress: Progress
) -> tuple[list[Subject], dict[str, str]]:
    """Return the backends that run here, and why the others do not."""
    wanted = ("cuda", "triton") if options.backend == "both" else (options.backend,)
    subjects, reasons = [], {}
    for name in wanted:
        try:
            found = gpu_device.subject_of(name, device, options.emulated)
        except Exception as error:  # a half-built module must not hide the other backend
            found = f"{type(error).__name__}: {line_of(error)}"
        if isinstance(found, str):
            reasons[name] = found
            progress.say(f"{name} does not run here: {found}")
        else:
            subjects.append(found)
    return subjects, reasons


def end_to_end(options: argparse.Namespace, device: Host, progress: Progress) -> int:
    """Merge files; return 1 if a byte is not the cpu backend's."""
    import gpu_files

    from fastmerge import ops
    from fastmerge.streaming.device import TorchDevice

    card = re.sub(r"\W+", "-", device.name.lower().removeprefix("nvidia ")).strip("-")
    default = RESULTS / f"files-{card}.json"
    if options.rehearse:
        default = ROOT / "build" / "files-rehearsal.json"
        result = gpu_files.rehearse(progress.say, options.folder)
    else:
        backend = None if options.backend == "both" else options.backend
        on = TorchDevice("cuda:0")
        result = gpu_files.measure(
            on, ops.choose(on.name, backend), progress.say,
            parameters=options.parameters, seconds=progress.left - 60, folder=options.folder,
        )  # fmt: skip
    out = options.out or default
    gpu_files.write({**gpu_device.environment(device), **result}, out)
    progress.say(f"wrote {out}")
    return 0 if all(row["equal"] for row in result["rows"]) and result["rows"] else 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    progress = Progress(options.seconds)
    if options.rehearse:
        progress.say("REHEARSAL on the host: no time below means anything")
    elif not torch.cuda.is_available():
        progress.say("no GPU that torch can use; --rehearse goes through all of this without one")
        return 2
    unbuilt = None
    if not options.no_build and not options.rehearse and options.backend != "triton":
        unbuilt = build(progress)
        if unbuilt:
            progress.say(f"the build failed, going on with what is there: {unbuilt}")
    device = Host() if options.rehearse else Gpu()
    if options.end_to_end:
        return end_to_end(options, device, progress)
    subjects, reasons = find_subjects(options, device, progress)
    if not subjects:
        progress.say("no backend can run here")
        return 2
    card = re.sub(r"\W+", "-", device.name.lower().removeprefix("nvidia ")).strip("-")
    default = (
        ROOT / "build" / "gpu-rehearsal.json" if options.rehearse else RESULTS / f"gpu-{card}.json"
    )
    out = options.out or default
    seed = int(time.time()) % 100_000 if options.seed is None else options.seed
    bench = Bench(
        device,
        subjects,
        sizes_of(options),
        seed=seed,
        out=out,
        quick=options.quick,
        progress=progress,
    )
    bench.result |= {
        "not_run": reasons,
        "build": unbuilt or ("not asked for" if options.no_build else "done"),
    }
    progress.say(
        f"{device.name}; {', '.join(s.label for s in subjects)}; seed {seed}; results go to {out}"
    )
    status = bench.run(options.only)
    progress.say(f"wrote {out}" + ("; SOMETHING IS WRONG, see above" if status else ""))
    return status


if __name__ == "__main__":
    sys.exit(main())
