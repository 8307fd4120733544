"""The emulator of csrc/emulate: right kernels are right under every schedule, wrong ones are found out.

Builds tests/emulate/driver.cu with g++ and the sanitizers; no GPU and no Python module is involved.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = Path(__file__).parent / "emulate"
GXX = shutil.which("g++")
NVCC = shutil.which("nvcc")

# CUDA code reads floats as vectors of integers, and every device must round alike.
FLAGS = ["-x", "c++", "-std=c++17", "-g", "-fno-strict-aliasing", "-ffp-contract=off"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]  # `#pragma unroll` is nvcc's
SANITIZERS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SEEDS = range(1, 6)
CASES = [
    "reduce_block",
    "reduce_warp",
    "reduce_shuffle",
    "count_bytes",
    "compact_odd",
    "count_keys",
    "sum_at_last",
    "shuffle",
    "copy_stream",
    "intrinsics",
]

Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.skipif(GXX is None, reason="needs g++")


def build(out: Path, *flags: str, sources: Path = SOURCES) -> Run:
    """Compile the driver; returns a call that runs it with a seed."""
    command = [str(GXX), *FLAGS, *WARNINGS, *flags, f"-I{ROOT / 'csrc'}"]
    command += [str(sources / "driver.cu"), "-o", str(out)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr

    def run(*arguments: str, seed: int = 1) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "FASTMERGE_EMULATE_SEED": str(seed)}
        return subprocess.run(
            [str(out), *arguments], capture_output=True, text=True, env=env, timeout=60
        )

    return run


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return build(tmp_path_factory.mktemp("emulate") / "driver", *SANITIZERS)


@pytest.mark.parametrize("case", CASES)
def test_right_kernels_are_right_under_every_schedule(driver: Run, case: str) -> None:
    for seed in SEEDS:
        ran = driver(case, seed=seed)
        assert (ran.returncode, ran.stdout) == (0, "right\n"), (seed, ran.stdout, ran.stderr)


def test_the_portable_switch_gives_the_same(driver: Run, tmp_path: Path) -> None:
    portable = build(tmp_path / "driver", "-O1", "-DFASTMERGE_EMULATE_UCONTEXT")
    for case in [*CASES, "count_threads_wrongly"]:
        assert portable(case).stdout == driver(case).stdout


#: The barrier that each kernel cannot do without, as it stands in kernels.cu.
NEEDED = {
    "reduce_block": "__syncthreads();  // needed between steps\n",
    "reduce_warp": "__syncwarp();  // needed between steps of a warp\n",
    "count_bytes": "__syncthreads();  // needed before counting\n",
}


@pytest.fixture(scope="module")
def without_barriers(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The driver with one barrier of each kernel in NEEDED taken away."""
    folder = tmp_path_factory.mktemp("without_barriers")
    for source in SOURCES.glob("*.cu"):
        text = source.read_text()
        for barrier in NEEDED.values() if source.name == "kernels.cu" else ():
            assert text.count(barrier) == 1
            text = text.replace(barrier, "\n")
        (folder / source.name).write_text(text)
    return build(folder / "driver", "-O1", sources=folder)


@pytest.mark.parametrize("case", NEEDED)
def test_a_missing_barrier_gives_a_wrong_result(without_barriers: Run, case: str) -> None:
    results = [without_barriers(case, seed=seed).stdout for seed in SEEDS]
    assert any(result.startswith("wrong") for result in results), results


def test_a_read_apart_from_its_write_loses_counts_and_the_seed_says_which(driver: Run) -> None:
    results = [driver("count_threads_wrongly", seed=seed).stdout for seed in SEEDS]
    again = [driver("count_threads_wrongly", seed=seed).stdout for seed in SEEDS]
    assert all(result.startswith("wrong") for result in results)
    assert len(set(results)) > 1
    assert results == again


#: What a wrong kernel is told; `%` stands for where it happened: kernel, launch and seed, block, thread.
FAULTS = {
    "exit_before_barrier": r"%: divergent barrier: "
    r"(exits while thread \(\d+,0,0\) waits at __syncthreads|1 threads of the block have exited)",
    "two_barriers": r"%: divergent barrier: __syncthreads \(.*faults.cu:\d+\), but thread .* waits at "
    r"__syncthreads \(.*faults.cu:\d+\)",
    "deadlock": r"#: deadlock in block \(0,0,0\), no thread can run: thread \(0,0,0\) waits at "
    r"__syncthreads \(.*\); thread \(40,0,0\) waits at __syncwarp with mask 0xffffffff \(.*\)",
    "different_masks": r"#: deadlock in block .* mask 0xffffffff .* mask 0xfffffff0 ",
    "different_collectives": r"%: different collectives with one mask: __a..?_sync .* but thread",
    "lane_outside_mask": r"%: lane \d+ is not in its own mask: .* __shfl_sync with mask 0x0000ffff",
    "lane_exited": r"%: (exits while .* names its lane|mask names lane 3, which has exited)",
    "lane_outside_block": r"%: mask names lane 20, which has exited or is outside the block",
    "load_misaligned": r"%: misaligned address 0x[0-9a-f]+ of a load of 16 bytes",
    "atomic_misaligned": r"%: misaligned address 0x[0-9a-f]+ of an atomic of 4 bytes",
    "trap": r"%: __trap \(.*faults.cu:\d+\)",
    "block_too_large": r"#: block \(32,33,1\) must have 1 to 1024 threads",
    "grid_zero": r"#: grid \(1,0,1\) is outside",
    "shared_too_large": r"#: 232449 bytes of shared memory, more than the 232448 ",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_undefined_ends_with_one_line_that_says_where(driver: Run, fault: str) -> None:
    for seed in SEEDS:
        ran = driver("fault", fault, seed=seed)
        lines = ran.stderr.splitlines()
        launch = rf"emulate: kernel faults::\w+_kernel\(.*\), launch 0 of seed {seed}"
        thread = rf"{launch}, block \(\d+,0,0\), thread \(\d+,0,0\)"
        assert ran.returncode != 0
        assert len(lines) == 1, ran.stderr
        assert re.match(FAULTS[fault].replace("%", thread).replace("#", launch), lines[0]), lines[0]


def test_a_byte_behind_shared_memory_is_seen_and_the_thread_named(driver: Run) -> None:
    ran = driver("fault", "write_behind_shared")
    assert ran.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in ran.stderr
    assert "WRITE of size 1" in ran.stderr
    assert re.search("0 bytes (to the right of|after) 64-byte region", ran.stderr)
    assert re.search(
        r"write_behind_shared_kernel\(int\), .* thread \(63,0,0\): stopped", ran.stderr
    )


def test_undefined_arithmetic_in_a_kernel_is_seen(driver: Run) -> None:
    ran = driver("fault", "overflow")
    assert ran.returncode != 0
    assert "signed integer overflow" in ran.stderr


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_nvcc_takes_the_same_sources_without_a_warning(tmp_path: Path) -> None:
    listed = subprocess.run(
        [str(NVCC), "--list-gpu-code"], capture_output=True, text=True, check=True
    )
    known = {"80", "90", "100"} & set(re.findall(r"sm_(\d+)\b", listed.stdout))
    assert known
    targets = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in sorted(known)]
    flags = ["-std=c++17", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", f"-I{ROOT / 'csrc'}"]
    compiled = subprocess.run(
        [str(NVCC), *flags, *targets, "-c", str(SOURCES / "driver.cu"), "-o", str(tmp_path / "o")],
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr
    assert compiled.stderr == ""
