"""Whole merges of adapters: the bytes are those of a merge of the sums, written out as models."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from adapters import factors, write_adapter
from click.testing import CliRunner

import fastmerge
from fastmerge.cli import main
from fastmerge.errors import CheckpointError
from fastmerge.verify import verify

SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (70, 33),
    "model.layers.0.self_attn.q_proj.weight": (24, 33),
    "model.layers.1.mlp.up_proj.weight": (70, 33),
    "model.norm.weight": (33,),
}
ADAPTED = [n.removesuffix(".weight") for n in SHAPES if n != "model.norm.weight"]


def summed(base: dict[str, torch.Tensor], lora: dict[str, torch.Tensor], scale: float) -> Any:
    """Return the model that base and adapter are, in float32: ranks in order, one rounding each."""
    model = {name: tensor.float() for name, tensor in base.items()}
    for name in [n.removesuffix(".weight") for n in base]:
        prefix = f"base_model.model.{name}.lora_"
        if f"{prefix}A.weight" in lora:
            a, b = (lora[f"{prefix}{x}.weight"].float().numpy() for x in "AB")
            product = np.zeros((len(b), a.shape[1]), np.float32)
            for i in range(len(a)):
                product += b[:, i : i + 1] * a[i]
            added = torch.from_numpy(np.float32(scale) * product)
            model[f"{name}.weight"] = model[f"{name}.weight"] + added
        elif f"base_model.model.{name}.weight" in lora:
            model[f"{name}.weight"] = lora[f"base_model.model.{name}.weight"]
    return model


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base, three adapters l1, l2, l3 of it, and the same as whole models e1, e2, e3."""
    root = tmp_path_factory.mktemp("adapted")
    base = families.family(SHAPES, request.param, 0)["base"]
    families.write_model(root / "base", base)
    for e in (1, 2, 3):
        modules = ADAPTED[: 4 - e]
        shapes = {m: SHAPES[f"{m}.weight"] for m in modules}
        lora = {n: t for m in modules for n, t in factors(m, e, shapes[m], seed=e).items()}
        lora = {
            n: (0.1 * t).to(torch.float16 if e == 2 else torch.float32) for n, t in lora.items()
        }
        if e == 3:
            lora["base_model.model.model.norm.weight"] = torch.full((33,), 0.5)
        write_adapter(root / f"l{e}", lora, r=e, lora_alpha=e / 2)
        families.write_model(root / f"e{e}", summed(base, lora, 0.5))
    return root


def merged(root: Path, text: str, out: Path, **options: Any) -> dict[str, bytes]:
    (root / "recipe.yaml").write_text(text)
    fastmerge.merge(root / "recipe.yaml", out, **options)
    found = families.load(out)
    return {name: found[name].numpy().tobytes() for name in sorted(found)}


def adapted(text: str) -> str:
    for e in (1, 2, 3):
        text = text.replace(f"./e{e}\n", f"./base+./l{e}\n")
    return text


@pytest.mark.parametrize("method", families.PARAMETERS)
def test_bytes_are_those_of_the_sums(method: str, root: Path, tmp_path: Path) -> None:
    text = families.recipe(method, dtype="float32")
    assert adapted(text).count("+") == text.count("./e") > 0
    want = merged(root, text, tmp_path / "want")
    assert merged(root, adapted(text), tmp_path / "found") == want
    small = merged(root, adapted(text), tmp_path / "small", chunk_elements=33 * 4)
    assert small == want


def test_base_with_an_adapter(root: Path, tmp_path: Path) -> None:
    text = families.recipe("ties", dtype="float32")
    text = text.replace("base_model: ./base\n", "base_model: ./e2\n")
    assert "base_model: ./base+./l2\n" in adapted(text)
    want = merged(root, text, tmp_path / "want")
    assert merged(root, adapted(text), tmp_path / "found") == want


NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def write_nf4(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Write a model as bitsandbytes does, of blocks of 64 over rows of 33; return its values."""
    generator = torch.Generator().manual_seed(seed)
    stored, dense = {}, {}
    table = torch.tensor(NF4)
    for name, shape in SHAPES.items():
        if len(shape) == 1:
            stored[name] = dense[name] = torch.randn(shape, generator=generator)
            continue
        n = shape[0] * shape[1]
        codes = torch.randint(256, (n // 2, 1), generator=generator).to(torch.uint8)
        peaks = torch.rand(-(-n // 64), generator=generator) + 0.5
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(shape)}
        stored |= {
            name: codes,
            f"{name}.absmax": peaks,
            f"{name}.quant_map": table.clone(),
            f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(
                list(json.dumps(state).encode())
            ).byte(),
        }
        nibbles = torch.cat([codes >> 4, codes & 15], 1).flatten().long()
        dense[name] = (table[nibbles] * peaks.repeat_interleave(64)[:n]).reshape(shape)
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    families.write_model(folder, stored, families.LLAMA | {"quantization_config": four})
    return dense


@pytest.mark.parametrize("method", ["linear", "ties", "della", "model_stock"])
def test_adapters_of_a_base_of_4_bits(method: str, tmp_path: Path) -> None:
    quantised, base = tmp_path / "four", tmp_path / "dense"
    dense = write_nf4(quantised / "base", 1)
    families.write_model(base / "base", dense)
    for e in (1, 2, 3):
        shapes = {m: SHAPES[f"{m}.weight"] for m in ADAPTED}
        lora = {n: t for m, s in shapes.items() for n, t in factors(m, 2, s, seed=e).items()}
        write_adapter(quantised / f"l{e}", lora, lora_alpha=0.2)
        families.write_model(base / f"e{e}", summed(dense, lora, 0.1))
    text = families.recipe(method, dtype="float32")
    want = merged(base, text, tmp_path / "want")
    assert merged(quantised, adapted(text), tmp_path / "found") == want
    small = merged(quantised, adapted(text), tmp_path / "small", chunk_elements=33 * 64)
    assert small == want


def test_card_and_manifest_name_the_adapter(root: Path, tmp_path: Path) -> None:
    merged(root, adapted(families.recipe("linear", dtype="float32")), tmp_path / "out")
    assert "- `base` with the adapter `l2`\n" in (tmp_path / "out" / "README.md").read_text()
    rows = verify(tmp_path / "out", sample=3).rows
    assert [(r.what, r.state) for r in rows][-1] == ("merged again", "ok")
    config = root / "l2" / "adapter_config.json"
    before = config.read_text()
    config.write_text(before.replace('"lora_alpha": 1.0', '"lora_alpha": 2.0'))
    try:
        note = verify(tmp_path / "out", sample=3).rows[-1].note
    finally:
        config.write_text(before)
    assert note.startswith("skipped: ")
    assert note.endswith(f"{root.name}/l2/adapter_config.json has changed since")


def test_merge_of_another_scale_is_not_resumed(root: Path, tmp_path: Path) -> None:
    (root / "recipe.yaml").write_text(adapted(families.recipe("linear", dtype="float32")))
    out = tmp_path / "out"

    def stop(name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastmerge.merge(root / "recipe.yaml", out, progress=stop)
    config = root / "l1" / "adapter_config.json"
    before, status = config.read_text(), config.stat()
    config.write_text(before.replace('"lora_alpha": 0.5', '"lora_alpha": 9.5'))
    os.utime(config, ns=(status.st_atime_ns, status.st_mtime_ns))
    try:
        with pytest.raises(CheckpointError, match=r"the header of .*adapter_config.json changed"):
            fastmerge.merge(root / "recipe.yaml", out, resume=True)
    finally:
        config.write_text(before)


def test_output_may_not_be_an_adapters_folder(root: Path) -> None:
    (root / "recipe.yaml").write_text(adapted(families.recipe("linear", dtype="float32")))
    before = sorted(os.listdir(root / "l1"))
    with pytest.raises(CheckpointError, match="l1"):
        fastmerge.merge(root / "recipe.yaml", root / "l1", force=True)
    assert sorted(os.listdir(root / "l1")) == before


def test_command_line_says_what_is_wrong_with_an_adapter(root: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "dora", use_dora=True)
    text = adapted(families.recipe("linear")).replace("./l1", str(tmp_path / "dora"))
    (root / "recipe.yaml").write_text(text)
    done = CliRunner().invoke(main, ["plan", str(root / "recipe.yaml")])
    assert done.exit_code == 2
    assert "adapter_config.json: the adapter is of DoRA" in done.output
    assert done.output.count("\n") == 1


def test_values_that_are_not_finite_are_refused(root: Path, tmp_path: Path) -> None:
    lora = factors(ADAPTED[0], 1, SHAPES[f"{ADAPTED[0]}.weight"])
    next(iter(lora.values()))[0, 3] = float("inf")
    save = write_adapter(tmp_path / "lora", lora, r=1)
    text = adapted(families.recipe("linear")).replace("./l1", str(save))
    with pytest.raises(fastmerge.errors.NonFiniteError, match=ADAPTED[0]):
        merged(root, text, tmp_path / "out")
