"""Merges that are stored in a few bits, and the libraries that load what was written.

One small family of Llama models is merged once per format; `Merges` keeps what has been made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import load

import fastmerge

transformers = pytest.importorskip("transformers", reason="transformers (extra demo) is the reader")

TIES = """merge_method: ties
base_model: ./base
models:
- {model: ./a, parameters: {weight: 0.5, density: 0.5}}
- {model: ./b, parameters: {weight: 0.7, density: 0.4}}
dtype: bfloat16
"""
BITSANDBYTES = ["nf4", "fp4", "nf4-dq", "fp4-dq"]
INT4 = ["int4", "int4-g32", "int4-g64", "int4-channel"]
COMPRESSED = [*INT4, "int4-asym", "nvfp4", "mxfp4", "fp8", "fp8-tensor"]
GGUF = ["q4_0", "q4_1", "q4_k", "q8_0", "gguf-mxfp4", "gguf-f16", "gguf-bf16"]
#: Of which no reader is installed that runs on a CPU.
UNREAD = ["gptq", "gptq-v2", "gptq-asym", "awq", "fp8-block"]
FORMATS = [*BITSANDBYTES, *COMPRESSED, *UNREAD, *GGUF]

#: Largest relative distance of a matrix from what was coded, in units of its root mean square.
ERROR = {name: 0.13 for name in FORMATS} | {
    **{"int4-channel": 0.2, "fp8": 0.03, "fp8-tensor": 0.03, "fp8-block": 0.03},
    **{"fp4": 0.17, "fp4-dq": 0.17, "q8_0": 0.01, "gguf-f16": 1e-3, "gguf-bf16": 1e-6},
}

State = dict[str, torch.Tensor]
Model = Any  # transformers.PreTrainedModel


#: Every format has whole blocks in the rows of this.
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def tiny_model(
    seed: int, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Model:
    """Return a model whose norms and biases are no constants; others differ from seed 0's by noise."""
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


class Merges:
    """The models, a recipe over them, and its results by the format that they are stored in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for seed, name in enumerate(("base", "a", "b")):
            tiny_model(seed).save_pretrained(root / name)
        (root / "ties.yaml").write_text(TIES)
        self.stored: Callable[[str], Path] = cache(self._stored)
        self.decoded: Callable[[str, str], State] = cache(self._decoded)

    def dense(self) -> Path:
        """The merge in bfloat16."""
        return self.stored("")

    def exact(self) -> State:
        """The merge in float32."""
        out = self.root / "out-exact"
        if not out.exists():
            recipe = yaml.safe_load(
                TIES.replace("bfloat16", "float32").replace("./", f"{self.root}/")
            )
            fastmerge.merge(recipe, out)
        return load(out)

    def _stored(self, format: str) -> Path:
        out = self.root / f"out-{format or 'dense'}"
        fastmerge.merge(self.root / "ties.yaml", out, quantize=format or None)
        return out

    def _decoded(self, format: str, dtype: str) -> State:
        """What fastmerge itself reads from what it wrote."""
        out = self.root / f"read-{format}-{dtype}"
        fastmerge.merge(passthrough(self.stored(format), dtype), out)
        return load(out)


def passthrough(model: Path, dtype: str) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": str(model)}], "dtype": dtype}


def needs(format: str) -> Any:
    """Return the package that reads a format; the test is skipped where it is not installed."""
    library = "bitsandbytes" if format in BITSANDBYTES else "compressed_tensors"
    library = "gguf" if format in GGUF else library
    return pytest.importorskip(library, reason=f"{library} is the reader of {format}")


def loaded(folder: Path, **options: Any) -> Model:
    """Load a folder as its users do, in the type that config.json names."""
    options = {"dtype": "auto", "device_map": {"": "cpu"}} | options
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def of_state(state: State, config: Path, dtype: torch.dtype) -> Model:
    """Return a dense model with these weights."""
    read = transformers.AutoConfig.from_pretrained(config)
    model = transformers.AutoModelForCausalLM.from_config(read, dtype=dtype)
    left = model.load_state_dict({n: t.to(dtype) for n, t in state.items()}, strict=False)
    tied = ["lm_head.weight"] if read.tie_word_embeddings else []
    assert not left.unexpected_keys and left.missing_keys in ([], tied)
    return model.eval()


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(60).reshape(3, 20)).logits.float()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the distance of two tensors, in units of the second's length."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def coded(state: Mapping[str, Any]) -> list[str]:
    """Weights of a dense model's that are coded by default."""
    return [name for name in state if name.endswith("_proj.weight")]


def dequantised(folder: Path, format: str) -> Model:
    """Return the dense model that a format's library decodes a folder to."""
    needs(format)
    if format in GGUF:
        (file,) = folder.glob("*.gguf")
        return loaded(folder, gguf_file=file.name, dtype=torch.float32)
    if format in BITSANDBYTES:
        model = loaded(folder)
        return model.dequantize(model.dtype)
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    if described["format"] == "mixed-precision":  # is decoded by the first use alone
        model = loaded(folder)
        logits(model)
        return model
    config = transformers.CompressedTensorsConfig(dequantize=True)
    return loaded(folder, quantization_config=config)
