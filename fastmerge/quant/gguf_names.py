"""What the Llama family's tensors are called in GGUF and in Hugging Face's checkpoints, and GGUF's types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastmerge.checkpoint.gguf import BLOCK_TYPES
from fastmerge.coding import Format
from fastmerge.dtypes import DType

#: GGUF's numbers of types whose elements stand for themselves, and of those that are decoded in blocks.
DENSE_TYPES = {
    number: DType[t.name] for number, t in BLOCK_TYPES.items() if t.name in DType.__members__
}
CODED_TYPES = {2: Format.Q4_0, 3: Format.Q4_1, 8: Format.Q8_0, 12: Format.Q4_K, 14: Format.Q6_K}
CODED_TYPES |= {39: Format.GGUF_MXFP4, 40: Format.GGUF_NVFP4}
TYPE_OF: dict[DType | Format, int] = {what: number for number, what in DENSE_TYPES.items()}
TYPE_OF |= {what: number for number, what in CODED_TYPES.items()}

#: Tensors that a runtime computes with and a Hugging Face checkpoint has not: it computes them.
AUXILIARY = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
ROPE_FACTORS = AUXILIARY[0]

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TO_WHOLE = {hf: name for name, hf in _WHOLE.items()}
_TO_LAYER = {hf: name for name, hf in _LAYER.items()}

_SUFFIX = r"(?P<suffix>weight|bias)"
_GGUF = re.compile(rf"(blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.{_SUFFIX}", re.ASCII)
_HF = re.compile(rf"(model\.layers\.(?P<layer>\d+)\.)?(?P<part>[\w.]+)\.{_SUFFIX}", re.ASCII)


@dataclass(frozen=True)
class Architecture:
    """One architecture that has these names.

    name: as GGUF's general.architecture. model_type, model_class: as in config.json. interleaved: each head's
    rows of q and k are stored in the order that the runtime's rotary embedding wants: halves taken in turn.
    """

    name: str
    model_type: str
    model_class: str
    interleaved: bool


LLAMA = Architecture("llama", "llama", "LlamaForCausalLM", True)
ARCHITECTURES = {
    a.name: a
    for a in (
        LLAMA,
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", False),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", False),
    )
}
#: By config.json's model_type; GGUF knows Mistral as Llama.
BY_MODEL_TYPE = {a.model_type: a for a in ARCHITECTURES.values()} | {"mistral": LLAMA}


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """Return the architecture of a config.json, None where GGUF's name for it or its tensors is not known."""
    model_type = config.get("model_type")
    return BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None


def hf_name(name: str) -> str | None:
    """Return what a GGUF tensor is called in a Hugging Face checkpoint, None where that is not known."""
    match = _GGUF.fullmatch(name)
    if match is None:
        return None
    layer, part, suffix = match["layer"], match["part"], match["suffix"]
    if layer is None:
        return f"{_WHOLE[part]}.{suffix}" if part in _WHOLE else None
    return f"model.layers.{layer}.{_LAYER[part]}.{suffix}" if part in _LAYER else None


def gguf_name(name: str) -> str | None:
    """Return what a Hugging Face tensor is called in GGUF, None where that is not known."""
    match = _HF.fullmatch(name)
    if match is None:
        return None
    layer, part, suffix = match["layer"], match["part"], match["suffix"]
    if layer is None:
        return f"{_TO_WHOLE[part]}.{suffix}" if part in _TO_WHOLE else None
    return f"blk.{layer}.{_TO_LAYER[part]}.{suffix}" if part in _TO_LAYER else None


def rotary_heads(name: str, heads: int, kv_heads: int) -> int | None:
    """Return how many heads the rows of a GGUF tensor belong to if it is a q or a k projection, else None."""
    match = _GGUF.fullmatch(name)
    if match is None or match["layer"] is None:
        return None
    return {"attn_q": heads, "attn_k": kv_heads}.get(match["part"])
