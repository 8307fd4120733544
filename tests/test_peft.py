"""Adapters that peft saved mean what peft makes of them, and those of its other kinds are refused."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import values

from fastmerge.checkpoint import open_checkpoint
from fastmerge.checkpoint.coded import CodedInfo
from fastmerge.errors import CheckpointError
from fastmerge.quant.opening import open_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="needs the extra [oracle]")
    import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
LINEAR = ["q_proj", "v_proj", "down_proj"]


def quietly(do: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(do)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return do(*arguments, **options)

    return wrapped


@quietly
def write_llama(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | changes)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


@quietly
def train(base: Path, folder: Path, **settings: Any) -> None:
    """Save an adapter whose every parameter moved."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 5} | settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(folder)


@quietly
def merged(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return what peft makes of a base and a folder."""
    # Loaded again: patterns are saved in another order than that in which they were given.
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()


ALIKE: dict[str, dict[str, Any]] = {
    "usual": {"target_modules": LINEAR},
    "all linear": {"target_modules": "all-linear", "lora_alpha": 7},
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "by root": {"target_modules": LINEAR, "use_rslora": True},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"layers.1.mlp.down_proj": 2, "^model.layers.0.self_attn.q_proj": 4},
        "alpha_pattern": {"q_proj": 9, r".*\.1\..*": 11, "down_proj": 2},
    },
    "patterns by root": {
        "target_modules": LINEAR,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"v_proj": 9},
    },
    "biases of adapted modules": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "whole modules": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head", "norm", "o_proj"],
    },
    "gaussian": {"target_modules": LINEAR, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": LINEAR, "init_lora_weights": "orthogonal", "r": 4},
    "some layers": {"target_modules": LINEAR, "layers_to_transform": [1]},
}


@pytest.mark.parametrize("settings", ALIKE.values(), ids=ALIKE)
def test_sum_is_what_peft_merges(settings: dict[str, Any], tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    train(base, tmp_path / "lora", **settings)
    want = merged(base, tmp_path / "lora")
    found = open_model(base, tmp_path / "lora").tensors
    plain = open_checkpoint(base).tensors
    assert set(found) == set(plain) == set(want)
    changed = 0
    for name, info in found.items():
        expected = want[name].double().numpy()
        np.testing.assert_allclose(values(info), expected, rtol=1e-5, atol=1e-5, err_msg=name)
        if not isinstance(info, CodedInfo) and info == plain[name]:
            np.testing.assert_array_equal(values(info), expected, err_msg=name)
        else:
            changed += not np.allclose(values(plain[name]), expected, atol=1e-2)
    stored = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert changed >= 2 and stored["peft_type"] == "LORA"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sum_in_narrow_types(dtype: torch.dtype, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", dtype)
    train(base, tmp_path / "lora", target_modules=LINEAR, modules_to_save=["norm"])
    want = merged(base, tmp_path / "lora")
    plain = open_checkpoint(base).tensors
    for name, info in open_model(base, tmp_path / "lora").tensors.items():
        found, expected = values(info), want[name].double().numpy()
        # Theirs is rounded twice: what is added, and its sum with the weight.
        bound = torch.finfo(dtype).eps * (np.abs(found) + np.abs(found - values(plain[name])))
        assert (np.abs(found - expected) <= bound).all(), name
        assert info.dtype.torch == "float32" or f"torch.{info.dtype.torch}" == str(dtype)


@pytest.mark.parametrize(
    ("modules", "tying", "apart"),
    [
        (["embed_tokens", "lm_head"], False, True),
        (["embed_tokens"], False, True),
        (["lm_head"], False, True),
        (["embed_tokens"], True, False),
    ],
)
def test_head_and_embedding_of_a_tied_model(
    modules: list[str], tying: bool, apart: bool, tmp_path: Path
) -> None:
    base = write_llama(tmp_path / "base", tie_word_embeddings=True)
    assert "lm_head.weight" not in open_checkpoint(base).tensors
    kept = {"modules_to_save": modules, "ensure_weight_tying": tying}
    train(base, tmp_path / "lora", target_modules=["q_proj"], **kept)
    want = merged(base, tmp_path / "lora")
    found = open_model(base, tmp_path / "lora").tensors
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_array_equal(values(found[name]), want[name].double().numpy())
    assert torch.equal(want["model.embed_tokens.weight"], want["lm_head.weight"]) != apart


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"target_modules": LINEAR, "use_dora": True}, "use_dora"),
    "pissa": ({"target_modules": LINEAR, "init_lora_weights": "pissa"}, "init_lora_weights"),
    "olora": ({"target_modules": LINEAR, "init_lora_weights": "olora"}, "init_lora_weights"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
    "biases": ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
    "tokens": (
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        "trainable_token_indices",
    ),
    "parameters": (
        {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
        "target_parameters",
    ),
}


@pytest.mark.parametrize(("settings", "key"), REFUSED.values(), ids=REFUSED)
def test_other_kinds_are_refused(settings: dict[str, Any], key: str, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    train(base, tmp_path / "lora", **settings)
    with pytest.raises(CheckpointError, match=key) as caught:
        open_model(base, tmp_path / "lora")
    assert str(caught.value).isprintable()


@quietly
def write_gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_transposed_weights_are_refused(tmp_path: Path) -> None:
    base = write_gpt2(tmp_path / "base")
    train(base, tmp_path / "lora", target_modules=["c_attn", "c_proj"])
    with pytest.raises(CheckpointError, match=r"stored transposed.*fan_in_fan_out is True"):
        open_model(base, tmp_path / "lora")


@quietly
def _save_loha(base: Path, folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, peft.LoHaConfig(target_modules=["q_proj"])).save_pretrained(folder)


def test_adapters_that_are_not_lora_are_refused(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    _save_loha(base, tmp_path / "loha")
    with pytest.raises(CheckpointError, match="has peft_type 'LOHA'; only LORA is supported"):
        open_model(base, tmp_path / "loha")
