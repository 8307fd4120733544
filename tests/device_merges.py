"""Whole merges of files by way of a device, with kernels of any backend, against the cpu backend's bytes.

Used where a GPU backend runs without a GPU: by Triton's interpreter and by the emulated CUDA module.
"""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import families
import torch

import fastmerge
from fastmerge import budget
from fastmerge.backends import Kernels, streamed_order
from fastmerge.streaming.device import Device

#: Between them: all statistics, all keep stages, both elections, ranks, row-wise sums, plain copies.
METHODS = ("linear", "ties", "dare_ties", "della", "breadcrumbs", "sce", "model_stock", "nuslerp",
           "ties scope: model")  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (130, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 96),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.1.mlp.down_proj.weight": (63, 97),
    "model.layers.1.input_layernorm.weight": (64,),
    "model.norm.weight": (),
}


def write_sharded_family(folder: Path) -> None:
    """Write base and three experts of SHAPES, each in two shards, with an integer tensor."""
    for name, state in families.family(SHAPES, torch.bfloat16).items():
        state["model.position_ids"] = torch.arange(77)
        families.write_model(folder / name, state, shards=2)


def merge(
    folder: Path,
    method: str,
    out: str,
    backend: str | Kernels,
    device: Device | str,
    **options: object,
) -> dict[str, bytes]:
    """Return the output's shards. method: a name, or one followed by what goes into `parameters`."""
    name, _, extra = method.partition(" ")
    recipe = folder / f"{name}.yaml"
    recipe.write_text(families.recipe(name, extra))
    fastmerge.merge(
        recipe, folder / out, backend=backend, device=device, out_shard_size="20k", **options  # type: ignore[arg-type]
    )  # fmt: skip
    return {p.name: p.read_bytes() for p in (folder / out).glob("*.safetensors")}


@patch.object(budget, "DEVICE_ITEM_BYTES", 1 << 15)  # so that there are several items
@patch.object(streamed_order, "SMALLEST", 1 << 12)  # and so that cuts over the model are sampled
@patch.object(streamed_order, "RUN", 16)
def check_merge(folder: Path, method: str, backend: str | Kernels, device: Device) -> None:
    """Hold a merge, and one that is interrupted and resumed, to the cpu backend's bytes."""
    want = merge(folder, method, "host", "cpu", "cpu", force=True)
    assert len(want) > 1
    assert merge(folder, method, f"whole {method}", backend, device) == want

    def interrupt(name: str, done: int, total: int) -> None:
        if done > total * 2 // 3:  # in a walk, also where statistics come first
            raise KeyboardInterrupt

    out = f"resumed {method}"
    try:
        merge(folder, method, out, backend, device, progress=interrupt)
        raise AssertionError("not interrupted")
    except KeyboardInterrupt:
        pass
    assert (folder / out / "fastmerge.journal").exists()
    assert merge(folder, method, out, backend, device, resume=True) == want


# ---- quantised ---------------------------------------------------------------------------------------------

WIDE = families.LLAMA | {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
WIDE_SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (128, 128),
    "model.layers.0.mlp.down_proj.weight": (128, 128),
    "model.layers.0.input_layernorm.weight": (128,),
}


def write_quantised_family(folder: Path) -> None:
    """Write a dense base and two experts, the first in NF4 with double quantisation as well."""
    for name, state in families.family(WIDE_SHAPES, torch.bfloat16).items():
        families.write_model(folder / name, state, WIDE)
    copy = {"merge_method": "passthrough", "models": [{"model": str(folder / "e1")}]}
    fastmerge.merge(copy, folder / "nf4", quantize="nf4-dq", backend="cpu")


def check_quantised_merge(
    folder: Path, quantize: str, backend: str | Kernels, device: Device
) -> None:
    """Hold a merge of codes into codes to the cpu backend's bytes."""
    experts = [
        {"model": str(folder / m), "parameters": {"weight": 0.6, "density": 0.4}}
        for m in ("nf4", "e2")
    ]
    recipe = {
        "merge_method": "ties",
        "base_model": str(folder / "base"),
        "models": experts,
        "dtype": "bfloat16",
    }
    written = []
    for j, (each, where) in enumerate((("cpu", "cpu"), (backend, device))):
        out = folder / f"{quantize}-{j}"
        fastmerge.merge(recipe, out, quantize=quantize, backend=each, device=where)  # type: ignore[arg-type]
        written.append({p.name: p.read_bytes() for p in out.glob("*.safetensors")})
    assert written[0] and written[0] == written[1], quantize
