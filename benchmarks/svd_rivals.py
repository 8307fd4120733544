"""What the SVD family is timed against: FusionBench's own functions, and the published steps in plain torch.

FusionBench is loaded from a folder (`pip install --no-deps --target DIR fusion-bench`), its function files
alone: importing the whole package takes a dozen others that no function here uses.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Deltas = Sequence[Tensor]


# ---- FusionBench -----------------------------------------------------------------------------------


class FusionBench:
    """FusionBench's functions on lists of deltas of one matrix."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.device = device
        self.root = folder / "fusion_bench"
        if not self.root.is_dir():
            raise SystemExit(
                f"{folder} holds no fusion_bench; pip install --no-deps --target {folder} fusion-bench"
            )
        about = next(folder.glob("fusion_bench-*.dist-info"))
        self.version = about.name.removeprefix("fusion_bench-").removesuffix(".dist-info")

    def _function(self, file: str, name: str) -> Callable[..., Any]:
        with _stand_ins():
            path = self.root / "method" / file
            spec = importlib.util.spec_from_file_location(f"rival_{path.stem}", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        function = getattr(module, name)

        def quiet(*args: Any, **kwargs: Any) -> Any:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                return function(*args, **kwargs)

        return quiet

    def tsv_m(self) -> Callable[[Deltas], Tensor]:
        run = self._function(
            "task_singular_vector/utils/TSVM_utils.py", "compute_and_sum_svd_mem_reduction"
        )
        return lambda deltas: run([{"w": d} for d in deltas], accelerator=self.device)["w"]

    def iso_c(self) -> Callable[[Deltas], Tensor]:
        run = self._function("isotropic_merging/iso_utils.py", "iso_c")
        return lambda deltas: run([{"w": d} for d in deltas], accelerator=self.device)["w"]

    def wudi(self, steps: int) -> Callable[[Deltas], Tensor]:
        run = self._function("wudi/wudi.py", "wudi_merging")
        return lambda deltas: run(
            [{"w": d} for d in deltas], accelerator=self.device, iter_num=steps
        )["w"]

    def knots(self) -> Callable[[Deltas], Tensor]:
        """Its alignment, and the average of what it aligned: what it does beside is its ties, elsewhere."""
        align = self._function("knots/knots_utils.py", "subspace_alignment")

        def run(deltas: Deltas) -> Tensor:
            u, s, rows = align(list(deltas))
            merged: Tensor = (u * s) @ torch.stack(list(rows)).mean(0)
            return merged

        return run


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Stand in for what FusionBench's function files import and its functions do not need."""

    def module(name: str, **names: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(names)
        made.__path__ = []
        return made

    class Anything:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

    def same(value: Any) -> Any:
        return value

    @contextlib.contextmanager
    def nothing(*_: Any, **__: Any) -> Iterator[None]:
        yield

    def progress(items: Any, **_: Any) -> Any:
        return items

    progress.write = lambda *_: None  # type: ignore[attr-defined]
    stand_ins = [
        module(
            "fusion_bench",
            BaseAlgorithm=Anything,
            BaseModelPool=Anything,
            auto_register_config=same,
        ),
        module("fusion_bench.mixins", LightningFabricMixin=type("LightningFabricMixin", (), {})),
        module("fusion_bench.utils", timeit_context=nothing),
        module("fusion_bench.utils.type", StateDictType=dict),
        module(
            "fusion_bench.utils.state_dict_arithmetic", state_dict_add=None, state_dict_sub=None
        ),
        module("tqdm", tqdm=progress),
    ]
    kept = {m.__name__: sys.modules.get(m.__name__) for m in stand_ins}
    sys.modules.update({m.__name__: m for m in stand_ins})
    try:
        yield
    finally:
        for name, before in kept.items():
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before


# ---- plain torch -----------------------------------------------------------------------------------


def tsv_m(deltas: Deltas) -> Tensor:
    """A decomposition of each delta and of both rows of factors."""
    k = min(deltas[0].shape) // len(deltas)
    found = [torch.linalg.svd(d, full_matrices=False) for d in deltas]

    def orthogonal(side: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(side, full_matrices=False)
        return u @ vh

    u = orthogonal(torch.cat([f.U[:, :k] for f in found], 1))
    v = orthogonal(torch.cat([f.Vh[:k] for f in found]))
    return (u * torch.cat([f.S[:k] for f in found])) @ v


def iso_c(deltas: Deltas) -> Tensor:
    """One decomposition of the sum."""
    u, s, vh = torch.linalg.svd(torch.stack(list(deltas)).sum(0), full_matrices=False)
    return s.mean() * (u @ vh)


def wudi(deltas: Deltas, steps: int) -> Tensor:
    """Adam on the published loss, by automatic differentiation."""
    x = torch.nn.Parameter(torch.stack(list(deltas)).sum(0))
    optimizer = torch.optim.Adam([x], lr=1e-5)
    norms = [d.square().sum() for d in deltas]
    for _ in range(steps):
        optimizer.zero_grad()
        losses = [((x - d) @ d.mT).square().sum() / n for d, n in zip(deltas, norms, strict=True)]
        torch.autograd.backward(torch.stack(losses).sum())
        optimizer.step()
    return x.detach()


def optmerge(deltas: Deltas, steps: int) -> Tensor:
    """Decompositions, then gradient descent on the published loss, by automatic differentiation.

    As its authors store them, what is cut off is zeros: factors have the matrix' full size.
    """
    rank = min(deltas[0].shape) // len(deltas)
    targets, rows, norms = [], [], []
    for d in deltas:
        u, s, vh = torch.linalg.svd(d, full_matrices=False)
        s[rank:] = 0
        targets.append((u * s) @ vh)
        rows.append(s[:, None] * vh)
        norms.append(d.square().sum())
    x = torch.nn.Parameter(torch.stack(list(deltas)).mean(0))
    optimizer = torch.optim.SGD([x], lr=1e-4, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = [
            ((x - y) @ z.mT).square().sum() / n
            for y, z, n in zip(targets, rows, norms, strict=True)
        ]
        torch.autograd.backward(torch.stack(losses).sum())
        optimizer.step()
    return x.detach()


def knots(deltas: Deltas) -> Tensor:
    """A decomposition of all deltas side by side, signs elected in its coordinates."""
    u, s, vh = torch.linalg.svd(torch.cat(list(deltas), 1), full_matrices=False)
    kept = s > 1e-5
    rows = torch.stack(((s[:, None] * vh)[kept]).chunk(len(deltas), 1))
    sign = rows.sum(0).sign()
    agrees = rows.sign() == sign
    merged = (rows * agrees).sum(0) / agrees.sum(0).clamp_min(1)
    return u[:, kept] @ merged


def lora_svd(deltas: Deltas, rank: int) -> tuple[Tensor, Tensor]:
    """Adapters merged as PEFT's `svd` does: a decomposition of the sum of their products."""
    u, s, vh = torch.linalg.svd(torch.stack(list(deltas)).sum(0), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def sub_moe(experts: Deltas, rank: int) -> Tensor:
    """A decomposition of all experts side by side, their coordinates averaged."""
    u, s, vh = torch.linalg.svd(torch.cat(list(experts), 1), full_matrices=False)
    rows = torch.stack(vh[:rank].chunk(len(experts), 1)).mean(0)
    return (u[:, :rank] * s[:rank]) @ rows
