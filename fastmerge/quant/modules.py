"""What the names of weights tell: heads, routers, embeddings, and modules that runtimes fuse into one."""

from __future__ import annotations

import re

from fastmerge.quant.format import Quantised

_HEAD = re.compile(r"(.*\.)?(lm_head|embed_out|output|score)")
_ROUTER = re.compile(r"(.*\.)?(gate|router|\w*_router|shared_expert_gate|ffn_gate_inp\w*)(\.\w+)?")
_EMBEDDING = re.compile(r"(.*\.)?(\w*embed\w*|token_embd|wte|wpe|shared|relative_attention_bias)")
_NORM = re.compile(r"(.*\.)?(\w*norm\w*|ln_\w+)")
_CONVOLUTION = re.compile(r"(.*\.)?\w*conv\w*")
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block|blk)\.(\d+)\.")

#: Towers and blocks beside the language model, by a word of the name.
_BESIDE = re.compile(
    r"(?:^|\.)(vision\w*|visual|vit|image_\w+|audio\w*|multi_modal_projector|mm_projector|modality_projection"
    r"|connector|resampler|mtp\w*)(?:\.|$)"
)

#: Last words of modules that read the same input and that runtimes make one of -> what they are called then.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "w13",
    "w3": "w13",
    "q_a_proj": "fused_qkv_a_proj",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj",
}


def module_of(name: str) -> str:
    """Return the module of a weight's name."""
    return name.removesuffix(".weight")


def is_head(name: str) -> bool:
    """Return whether a weight gives the logits."""
    return _HEAD.fullmatch(module_of(name)) is not None and layer_of(name) is None


def is_router(name: str) -> bool:
    """Return whether a weight chooses experts."""
    return _ROUTER.fullmatch(module_of(name)) is not None


def is_embedding(name: str) -> bool:
    return _EMBEDDING.fullmatch(module_of(name)) is not None and not is_head(name)


def is_norm(name: str) -> bool:
    return _NORM.fullmatch(module_of(name)) is not None


def is_convolution(name: str) -> bool:
    return _CONVOLUTION.fullmatch(module_of(name)) is not None


def is_beside(name: str) -> bool:
    """Return whether a weight is of a vision or audio tower, a projector or of multi-token prediction."""
    return _BESIDE.search(module_of(name)) is not None


def layer_of(name: str) -> int | None:
    """Return the index of the block that a weight belongs to, None outside of blocks."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def shares_scale(name: str) -> str | None:
    """Return the key of weights that runtimes fuse and give one scale of the tensor; None: it is alone."""
    parent, _, last = module_of(name).rpartition(".")
    return f"{parent}.{_FUSED[last]}" if parent and last in _FUSED else None


def left_out(model: Quantised) -> list[str]:
    """Return the modules that stay dense, the output head included: a tied one has no weight of its own."""
    names = [module_of(name) for name in model.kept]
    head = any(map(is_head, [*model.coded, *model.kept]))
    return names if head else [*names, "lm_head"]
