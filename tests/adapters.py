"""Small models and LoRA adapters on disk, and what they mean, by numpy: for the tests of adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fastmerge.checkpoint import TensorInfo
from fastmerge.checkpoint.coded import CodedInfo
from fastmerge.dtypes import DType

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
UP_1 = "model.layers.1.mlp.up_proj"

SHAPES = {
    "model.embed_tokens.weight": (6, 8),
    f"{Q}.weight": (8, 8),
    f"{Q}.bias": (8,),
    f"{UP}.weight": (12, 8),
    f"{UP_1}.weight": (12, 8),
    "model.norm.weight": (8,),
    "model.conv.weight": (4, 8, 3),
    "lm_head.weight": (6, 8),
}

#: What peft 0.10 wrote beside what tests set.
USUAL = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 2,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "up_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}


def write_base(
    folder: Path, dtype: torch.dtype = torch.float32, without: tuple[str, ...] = ()
) -> Path:
    """Write a model of SHAPES and of an integer tensor."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    state = {n: torch.randn(s).to(dtype) for n, s in SHAPES.items() if n not in without}
    save_file({**state, "model.steps": torch.tensor([3])}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    return folder


def factors(
    module: str, rank: int = 2, shape: tuple[int, int] | None = None, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Return lora_A and lora_B of one module under their stored names."""
    out, into = shape or SHAPES[f"{module}.weight"]
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, into, generator=generator),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }


def write_adapter(
    folder: Path, tensors: dict[str, torch.Tensor] | None = None, **settings: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = factors(Q) if tensors is None else tensors
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(USUAL | settings))
    return folder


def values(info: TensorInfo | CodedInfo) -> np.ndarray:
    """Return what a tensor means, in float64, from its bytes alone."""
    if isinstance(info, CodedInfo):
        assert list(info.parts) == ["codes"]
        found = values(info.parts["codes"])
        low = info.low_rank
        if low is not None:
            found = found + low.scale * (values(low.b) @ values(low.a))
        return found
    data = info.file.read_bytes()[info.offset : info.offset + info.n_bytes]
    if info.dtype is DType.BF16:
        narrow = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
        return narrow.view(np.float32).astype(np.float64).reshape(info.shape)
    kinds = {DType.F32: np.float32, DType.F16: np.float16, DType.F64: np.float64}
    return np.frombuffer(data, kinds[info.dtype]).astype(np.float64).reshape(info.shape)
