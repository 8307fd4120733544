"""Small model families on disk for end-to-end tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 130,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}

#: Expert parameters that make every method do something at each stage.
PARAMETERS = {
    "linear": "{weight: 0.6}",
    "task_arithmetic": "{weight: 0.6}",
    "ties": "{weight: 0.6, density: 0.4}",
    "dare_linear": "{weight: 0.6, density: 0.4}",
    "dare_ties": "{weight: 0.6, density: 0.4}",
    "della": "{weight: 0.6, density: 0.5, epsilon: 0.2}",
    "della_linear": "{weight: 0.6, density: 0.5, epsilon: 0.2}",
    "breadcrumbs": "{weight: 0.6, density: 0.7, gamma: 0.05}",
    "breadcrumbs_ties": "{weight: 0.6, density: 0.7, gamma: 0.05}",
    "slerp": "",
    "nuslerp": "{weight: 0.3}",
    "model_stock": "",
    "sce": "",
    "passthrough": "{scale: 0.5}",
}
GLOBAL = {"slerp": "{t: 0.3}", "sce": "{select_topk: 0.6}"}
N_EXPERTS = {"slerp": 1, "nuslerp": 2, "passthrough": 1}
DETERMINISTIC = [m for m in PARAMETERS if not m.startswith(("dare", "della"))]


def llama_shapes() -> dict[str, tuple[int, ...]]:
    h, inner, vocab = 64, 96, 130
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, h)}
    for i in range(3):
        p = f"model.layers.{i}."
        names |= {
            p + "self_attn.q_proj.weight": (h, h),
            p + "self_attn.k_proj.weight": (h // 2, h),
            p + "self_attn.v_proj.weight": (h // 2, h),
            p + "self_attn.o_proj.weight": (h, h),
            p + "mlp.gate_proj.weight": (inner, h),
            p + "mlp.up_proj.weight": (inner, h),
            p + "mlp.down_proj.weight": (h, inner),
            p + "input_layernorm.weight": (h,),
            p + "post_attention_layernorm.weight": (h,),
        }
    return names | {"model.norm.weight": (h,), "lm_head.weight": (vocab, h)}


def write_model(
    folder: Path,
    state: dict[str, torch.Tensor],
    config: dict[str, object] | None = None,
    shards: int = 1,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or LLAMA))
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(state)
    files = {}
    for s in range(shards):
        file = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        held = {name: state[name] for name in names[s::shards]}
        save_file(held, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def family(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, n_experts: int = 3
) -> dict[str, dict[str, torch.Tensor]]:
    """Return base, e1, e2, ...: experts are the base plus noise a tenth of its size."""
    generator = torch.Generator().manual_seed(7)
    base = {k: torch.randn(s, generator=generator) * 0.1 for k, s in shapes.items()}
    models = {"base": {k: v.to(dtype) for k, v in base.items()}}
    for e in range(1, n_experts + 1):
        models[f"e{e}"] = {
            k: (v + 0.01 * torch.randn(v.shape, generator=generator)).to(dtype)
            for k, v in base.items()
        }
    return models


def write_family(
    root: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    n_experts: int = 3,
    config: dict[str, object] | None = None,
) -> None:
    """Write the models of `family` into folders of their names."""
    for name, state in family(shapes, dtype, n_experts).items():
        write_model(root / name, state, config)


def recipe(method: str, extra: str = "", dtype: str = "") -> str:
    """Return a recipe over ./base and ./e1 ..., with the parameters above; `extra` goes into `parameters`."""
    lines = [f"merge_method: {method}"]
    if method not in ("linear", "passthrough"):
        lines.append("base_model: ./base")
    shared = GLOBAL.get(method, "{}").strip("{}")
    both = ", ".join(filter(None, [shared, extra]))
    if both:
        lines.append(f"parameters: {{{both}}}")
    lines.append("models:")
    if method == "slerp":
        lines.append("- model: ./base")
    for e in range(1, N_EXPERTS.get(method, 3) + 1):
        lines.append(f"- model: ./e{e}")
        if PARAMETERS[method]:
            lines.append(f"  parameters: {PARAMETERS[method]}")
    if dtype:
        lines.append(f"dtype: {dtype}")
    return "\n".join(lines) + "\n"


def load(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def weight_bytes(folder: Path) -> bytes:
    return b"".join(f.read_bytes() for f in sorted(folder.glob("*.safetensors")))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors are equal to the bit, NaN and the sign of zero included."""
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(*raw)
