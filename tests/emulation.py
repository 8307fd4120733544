"""Build csrc/cuda for the CPU, through csrc/emulate and under sanitizers, and load it as the CUDA backend.

python tests/emulation.py PART ...      what tests/test_emulated.py runs, in a process of its own: the
                                        sanitizers' libraries must be loaded before anything else
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
NAME = "_cuda_emulated"
FLAGS = ["-x", "c++", "-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
         "-fno-strict-aliasing", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
         "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
         f"-DFM_MODULE={NAME}", '-DFM_TARGETS="emulated"']  # fmt: skip


def sources() -> list[Path]:
    """Return the CUDA backend's sources, the slowest to compile first."""
    found = [*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda").glob("*.cpp")]
    found.sort(key=lambda p: (not p.name.startswith(("fused_", "lean_", "quant4")), p.name))
    return [*found, CSRC / "bindings" / "cuda.cpp"]


def _compile(source: Path, target: Path) -> None:
    import pybind11

    command = ["g++", *FLAGS, f"-I{CSRC}", f"-I{sysconfig.get_paths()['include']}",
               "-isystem", pybind11.get_include(), "-c", str(source), "-o", str(target)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def build(replaced: dict[str, Path] | None = None) -> Path:
    """Return the module's path; built once for a state of csrc. replaced: other texts of some sources."""
    text = b"".join(p.read_bytes() for p in sorted(CSRC.rglob("*")) if p.is_file())
    state = hashlib.blake2b(text + repr(FLAGS).encode(), digest_size=8).hexdigest()
    folder = ROOT / "build" / "emulated" / state
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # of two test processes, one builds and one waits
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(folder, replaced)


def _build(folder: Path, replaced: dict[str, Path] | None) -> Path:

    def object_of(source: Path) -> Path:
        other = (replaced or {}).get(source.name)
        target = (folder if other is None else other.parent) / f"{source.name}.o"
        if not target.exists():
            partial = target.with_suffix(".partial")
            _compile(other or source, partial)
            partial.rename(target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(o) for o in pool.map(object_of, sources())]
    module = folder / f"{NAME}.so"
    if replaced:
        module = next(iter(replaced.values())).parent / f"{NAME}.so"
    if replaced or not module.exists():
        link = ["g++", "-shared", "-fsanitize=address,undefined", *objects, "-o", str(module)]
        subprocess.run(link, check=True)
    return module


def run(module: Path, *parts: str, seed: int = 1) -> subprocess.CompletedProcess[str]:
    """Run parts of this script on a built module in a process that the sanitizers watch."""

    def library(name: str) -> str:
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
        return found.stdout.strip()

    environment = {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "FASTMERGE_EMULATE_SEED": str(seed),
        "EMULATED_MODULE": str(module),
    }
    return subprocess.run(
        [sys.executable, __file__, *parts],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


# ---- in the watched process ----------------------------------------------------------------------


def load(path: str) -> Any:
    """Return the emulated native module."""
    loader = importlib.machinery.ExtensionFileLoader(NAME, path)
    spec = importlib.util.spec_from_loader(NAME, loader)
    assert spec is not None
    native = importlib.util.module_from_spec(spec)
    loader.exec_module(native)
    return native


def kernels() -> Any:
    from fastmerge.backends.cuda import CudaKernels

    return CudaKernels("cpu", load(os.environ["EMULATED_MODULE"]))


def _cases() -> Iterator[tuple[int, tuple[int, ...], int, Any, Any]]:
    import agreement
    import cases

    seed = 0
    for shape in [*cases.SHAPES[:5], (5, 123), (64, 64), (33, 41), (6, 8), (0, 5), (7, 1)]:
        for k in agreement.EXPERTS:
            seed += 1
            rng, held = agreement.draw(
                seed, shape, k, with_base=seed % 4 != 1, shift=(0, 1, 8)[seed % 3]
            )
            yield seed, shape, k, rng, held


def walks() -> None:
    """Any combination of stages: mostly element by element, for mixed types and odd addresses."""
    import agreement
    import cases

    under_test = kernels()
    for seed, shape, k, rng, held in _cases():
        for _ in range(3):
            walk = cases.random_walk(rng, shape, k, held.base is not None)
            limit = 100 if seed % 5 == 0 else 1 << 30
            agreement.check_walk(under_test, held, walk, cases.FLOATS[seed % 4], limit)


def fused() -> None:
    """The registered methods' walks of whole, aligned runs, with a head and a tail; and split ties."""
    import agreement
    import cases

    under_test = kernels()
    for k in range(1, 19):
        for seed in range(6):
            n = (4099, 777, 70001)[seed % 3] if k < 4 else (4099, 777)[seed % 2]
            rng, held = agreement.draw(3 * seed, (n,), k, shift=8 * (seed % 2))
            for walk in agreement.plain_walks(rng, k, n):
                agreement.check_walk(under_test, held, walk, cases.FLOATS[seed % 4])


def statistics() -> None:
    import agreement
    import cases

    under_test = kernels()
    for seed, shape, k, rng, held in _cases():
        if k > 3 and seed % 2:
            continue
        limit = 100 if seed % 5 == 0 else 1 << 30
        for request in agreement.statistics(rng, shape, k):
            agreement.check_statistic(under_test, held, request, limit)
        agreement.check_masks(under_test, held, cases.random_keep(rng, shape, k))


def _streamed(under_test: Any, held: Any, requests: list[Any]) -> None:
    """The same in pieces of which a sample is looked at first, as where a device cannot hold them."""
    from unittest.mock import patch

    import agreement

    from fastmerge.backends import streamed_order
    from fastmerge.dtypes import DType

    with patch.multiple(streamed_order, SMALLEST=1, RUN=64, PART=20_000):
        for request in requests:
            agreement.check_statistic(under_test, held, request, 50_001)
            n = held.base.numel()
            wanted = under_test.sweep(request, n, n, 2, DType.F32).wanted()
            assert wanted == streamed_order.sampled_ranges(n)


def selection() -> None:
    """Cuts of tensors longer than a piece: digits over many blocks, ties found piece by piece."""
    import agreement
    import cases
    import numpy as np
    import torch

    from fastmerge.stages import OrderStatistic

    under_test = kernels()
    n = 140_001
    for seed, content in enumerate(cases.CONTENTS):
        rng = agreement.rng_of("selection", content)
        dtype = (torch.bfloat16, torch.float32, torch.float16)[seed % 3]
        base = cases.tensor(rng, (n,), content, dtype)
        experts = [cases.tensor(rng, (n,), content, dtype) for _ in range(2)]
        if content == "normal":
            experts = [(base.double() + 0.01 * e.double()).to(dtype) for e in experts]
        if content == "wide":
            experts[1] = experts[1].double()
        if content == "equal":
            experts[0] = base.clone()
        if content == "grid":
            experts[1][::7] = float("nan")
            experts[1][1::9] = -float("inf")
        held = cases.Operands(base, experts)
        requests = [
            OrderStatistic([[1, 100_000], [70_001, n - 1]]),
            OrderStatistic([[20_000], [n]], all_ties=True),
            OrderStatistic(of="variance", fraction_of_nonzero=0.3),
            OrderStatistic([[int(rng.integers(1, n))]], of="variance"),
        ]
        for request in requests:
            for limit in (1 << 30, 50_001):
                agreement.check_statistic(under_test, held, request, limit)
        _streamed(under_test, held, requests)
    _misled(under_test, n)
    # Cuts over a model, of tensors that lie across the borders of pieces.
    _model_scope(under_test, np.random.default_rng(5))


def _misled(under_test: Any, n: int) -> None:
    """A sample that is unlike the rest, so that brackets miss on either side; a bracket that holds more keys
    of one piece than are kept."""
    import agreement
    import cases
    import numpy as np
    import torch

    from fastmerge.stages import OrderStatistic

    runs = under_test._native.SAMPLE // 8
    stride, run = n // runs, np.arange(runs, dtype=np.uint64)
    shift = (run * 0x9E3779B9 % 2**32) * np.uint64(stride - 8) >> np.uint64(32)
    sampled = ((run * stride + shift) // 8 * 8)[:, None] + np.arange(8, dtype=np.uint64)
    rng = np.random.default_rng(8)
    x = rng.integers(-50, 51, n) / 64
    high, low, crowded = x.copy(), x.copy(), 4 * x
    high[sampled.astype(int)] = 8.0
    low[sampled.astype(int)] = 0.001
    crowded[65_536:131_072] = 1 + rng.permutation(65_536) / 2**23
    experts = [torch.from_numpy(e).float() for e in (high, low, crowded)]
    held = cases.Operands(torch.zeros(n), experts)
    for rank in (1, 30_000, 70_000, 100_000, n - 1):
        agreement.check_statistic(under_test, held, OrderStatistic([[rank]] * 3), 1 << 30)
    agreement.check_statistic(under_test, held, OrderStatistic(fraction_of_nonzero=0.4), 1 << 30)


def _model_scope(under_test: Any, rng: Any) -> None:
    import agreement
    import cases
    import torch

    from fastmerge.stages import OrderStatistic

    tensors = [
        [torch.from_numpy(rng.integers(-9, 10, n) / 8).to(torch.bfloat16) for _ in range(3)]
        for n in (40_000, 30_001, 7, 65_536, 500)
    ]
    model = [cases.Operands(base, experts) for base, *experts in tensors]
    for ranks in ([[50_000], [999]], [[1, 136_043], [0, 70_000]]):
        request = OrderStatistic(ranks, scope="model")
        agreement.check_model_cuts(under_test, model, request, 1 << 30)


def sums() -> None:
    """The tree over more leaves than a group holds, and long sums of both kinds."""
    import agreement
    import cases
    import numpy as np
    import torch

    from fastmerge.backends.cuda import _Queue
    from fastmerge.backends.reference_arithmetic import _combine
    from fastmerge.stages import Gram, Moments

    under_test = kernels()
    native = under_test._native
    rng = np.random.default_rng(3)
    for units, leaves, width in [
        (1, 5000, 3),
        (2, 2048, 1),
        (3, 255, 5),
        (1, 256, 2),
        (1, 4097, 1),
    ]:
        x = torch.from_numpy(rng.standard_normal((units, leaves, width)))
        nodes, out = torch.empty(16, dtype=torch.float64), torch.empty((units, width)).double()
        native.sum_tree(_Queue(native, "cpu")._queue, x.data_ptr(), units, leaves, width,
                        nodes.data_ptr(), out.data_ptr())  # fmt: skip
        for u in range(units):
            want = _combine(list(x[u]), width)
            assert torch.equal(out[u], want), (units, leaves, width)
    n = 300_001
    base, *experts = (cases.tensor(rng, (n,), "normal", torch.bfloat16) for _ in range(4))
    held = cases.Operands(base, experts)
    for limit in (1 << 30, 10_001):
        for request in (Moments("square"), Gram()):
            agreement.check_statistic(under_test, held, request, limit)


def ranks() -> None:
    """Ranked drops of rows that a block sorts in registers, or does not; kept as bits or with ranks."""
    import agreement
    import cases
    import torch

    from fastmerge.stages import Axis, Combine, Elect, GivenMask, Keep, RankedDrop, Walk

    under_test = kernels()
    for seed, content in enumerate(["grid", "normal", "equal"]):
        shapes = [(5, 600), (3, 1, 257), (2, 16), ((1, 4500), (1, 8200), (1, 16_500))[seed]]
        for shape in shapes:
            rng = agreement.rng_of("ranks", content, shape)
            base, *experts = (cases.tensor(rng, shape, content, torch.bfloat16) for _ in range(3))
            held = cases.Operands(base, experts)
            for by, rescale, axis in [("rank", False, Axis.ROW), ("rank", True, Axis.ROW),
                                      ("value", False, Axis.ROW), ("rank", True, Axis.TENSOR)]:  # fmt: skip
                drop = RankedDrop([0.2, 1.0], [0.8, 1.0], [seed, 7], axis, by, rescale)
                given = GivenMask([rng.integers(0, 2, base.numel()).astype("u1") for _ in experts])
                for keep in (Keep(drop=drop), Keep(drop=drop, given=given)):
                    agreement.check_masks(under_test, held, keep)
                    walk = Walk(
                        rng.standard_normal((2, 1)), keep=keep, elect=Elect(), combine=Combine()
                    )
                    agreement.check_walk(under_test, held, walk, torch.bfloat16)


def methods() -> None:
    """Every registered method through merge_tensors, several tensors in one launch."""
    import numpy as np
    import torch

    import fastmerge
    from fastmerge import ops

    under_test = kernels()
    entry = ops.Entry("cuda", ("cpu",), "emulated", lambda: None, lambda device: under_test)
    ops.BACKENDS = tuple(entry if e.name == "cuda" else e for e in ops.BACKENDS)
    rng = np.random.default_rng(11)

    def state(scale: float, like: Any = None) -> dict[str, Any]:
        shapes = {"a.weight": (24, 40), "a.bias": (40,), "b.weight": (9, 33), "c": (5000,)}
        return {
            name: (
                torch.from_numpy(scale * rng.standard_normal(shape))
                + (0 if like is None else like[name].double())
            ).to(torch.bfloat16)
            for name, shape in shapes.items()
        }

    base = state(1.0)
    experts = [state(0.02, base) for _ in range(2)]
    for name, spec in fastmerge.list_methods().items():
        origin = base if spec.base != "ignored" else None
        needed = experts[:1] if spec.base_is_operand else experts
        given = {p.name: 0.3 for p in spec.params if p.name in ("t", "weight", "density")}
        merged = [
            fastmerge.merge_state_dicts(origin, needed, method=name, backend=backend, **given)
            for backend in ("cuda", "cpu")
        ]
        for key, got in merged[0].items():
            same = torch.equal(got.view(torch.int16), merged[1][key].view(torch.int16))
            assert same, f"{name}: {key} differs"


def philox() -> None:
    """Random123's kat_vectors, philox4x32-10."""
    import agreement
    import torch

    from fastmerge.backends.cuda import _Queue

    native = kernels()._native
    for words, want in agreement.PHILOX_ANSWERS:
        held = torch.tensor(words, dtype=torch.int64).to(torch.uint32).clone()
        native.philox(_Queue(native, "cpu")._queue, held.data_ptr())
        assert tuple(held[:4].tolist()) == want


def merging() -> None:
    """Whole merges of files through the device pipeline, one of them interrupted and resumed."""
    import tempfile

    import device_merges

    from fastmerge.streaming.device import HostDevice

    with tempfile.TemporaryDirectory() as name:
        device_merges.write_sharded_family(Path(name))
        for method in device_merges.METHODS:
            device_merges.check_merge(Path(name), method, kernels(), HostDevice())


PARTS: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (walks, fused, statistics, selection, sums, ranks, methods, philox, merging)
}


if __name__ == "__main__":
    import coded_merges
    import torch

    torch.set_num_threads(1)
    for part in sys.argv[1:]:
        if part in PARTS:
            PARTS[part]()
        else:
            coded_merges.PARTS[part](kernels())
        print(f"{part}: as the cpu backend")
