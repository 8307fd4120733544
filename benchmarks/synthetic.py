"""Synthetic families of checkpoints: a Llama-shaped bf16 base and fine-tunes of it.

Deltas are heavy-tailed (Student's t with three degrees of freedom, as deltas of real fine-tunes are) and a
fifth of them is exactly zero; in bf16 many more become zero or equal, so that ties at a cut are the rule.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

#: Random numbers, cut at random places: drawing each anew would take minutes.
POOL = (1 << 24) + 43

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu",
}  # fmt: skip


def shapes(n_parameters: float) -> tuple[dict[str, tuple[int, ...]], int, int, int]:
    """Return tensor shapes, layers, width and inner width of a model of about n_parameters."""
    vocab = 32000 if n_parameters > 1e7 else 512  # small ones are for trying scripts out
    hidden = 2048 if n_parameters > 3e8 else 1024 if n_parameters > 7e7 else 256
    inner = hidden * 11 // 4
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    size = sum(torch.Size(s).numel() for s in layer.values())
    n_layers = max(1, round((n_parameters - 2 * vocab * hidden) / size))
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(n_layers):
        names.update({f"model.layers.{i}.{k}.weight": s for k, s in layer.items()})
    names["model.norm.weight"] = (hidden,)
    names["lm_head.weight"] = (vocab, hidden)
    return names, n_layers, hidden, inner


def _cuts(pool: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Yield views of a doubled pool at random offsets."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield pool[int(torch.randint(POOL, (1,), generator=generator)) :]


def _fill(cuts: Iterator[torch.Tensor], n: int) -> torch.Tensor:
    parts = []
    while n > 0:
        part = next(cuts)[: min(n, POOL)]
        parts.append(part)
        n -= part.numel()
    return torch.cat(parts)


def make_family(work: Path, n_parameters: float, n_experts: int) -> int:
    """Write work/base and work/expert1 ... of about n_parameters each; return their exact number.

    A family that is there already is kept.
    """
    names, n_layers, hidden, inner = shapes(n_parameters)
    n = sum(torch.Size(s).numel() for s in names.values())
    config = {
        **CONFIG,
        "num_hidden_layers": n_layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "vocab_size": names["lm_head.weight"][0],
    }
    folders = [work / "base", *(work / f"expert{m}" for m in range(1, n_experts + 1))]
    if all((f / "config.json").exists() for f in folders):
        return n
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(POOL, generator=generator)
    spread = torch.stack([torch.randn(POOL, generator=generator) ** 2 for _ in range(3)]).mean(0)
    heavy = torch.randn(POOL, generator=generator) / spread.sqrt()
    heavy[torch.rand(POOL, generator=generator) < 0.2] = 0
    normal, heavy = (torch.cat([x, x]) for x in (normal * 0.03, heavy * 0.0005))
    for m, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        origin, change = _cuts(normal, 1), _cuts(heavy, 1 + m)
        state = {}
        for name, shape in names.items():
            weight = _fill(origin, torch.Size(shape).numel())
            if m:
                weight = weight + _fill(change, weight.numel())
            state[name] = weight.view(shape).bfloat16()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
    return n
