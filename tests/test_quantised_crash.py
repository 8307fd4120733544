"""Merges into codes that are killed, held in little memory, given NaN, or damaged afterwards."""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from test_crash import Fault, Runs, contents, runs

import fastmerge
from fastmerge.checkpoint import open_checkpoint
from fastmerge.checkpoint.gguf import read_gguf
from fastmerge.errors import CheckpointError, NonFiniteError, RecipeError
from fastmerge.verify import verify

__all__ = ["runs"]  # a fixture

CONFIG: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 1, "vocab_size": 64}
CONFIG = families.LLAMA | CONFIG
LAYER = "model.layers.0."
UP = f"{LAYER}mlp.up_proj.weight"


def shapes(hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one block; the gate has fewer rows than up, which have one scale of NVFP4."""
    return {
        "model.embed_tokens.weight": (64, hidden),
        f"{LAYER}self_attn.q_proj.weight": (hidden, hidden),
        f"{LAYER}self_attn.k_proj.weight": (hidden // 2, hidden),
        f"{LAYER}mlp.gate_proj.weight": (256, hidden),
        UP: (inner, hidden),
        f"{LAYER}mlp.down_proj.weight": (hidden, 512),
        f"{LAYER}input_layernorm.weight": (hidden,),
        "model.norm.weight": (hidden,),
    }


def write(root: Path, inner: int, hidden: int = 512, n_experts: int = 3) -> None:
    config = CONFIG | {"hidden_size": hidden}
    families.write_family(root, shapes(hidden, inner), torch.bfloat16, n_experts, config)
    for method in ("linear", "ties", "dare_ties"):
        (root / f"{method}.yaml").write_text(families.recipe(method))
    scope = families.recipe("ties", "scope: model")
    (root / "model.yaml").write_text(scope)


#: Recipe -> formats. Results are atomic with nf4-dq, gptq and awq, begin with a peak with nvfp4, fp8-tensor.
CASES = [
    *(("linear", f) for f in ("nf4", "nf4-dq", "gptq", "nvfp4", "fp8-tensor", "q4_k")),
    *(("ties", f) for f in ("fp4-dq", "int4-asym", "nvfp4", "fp8-tensor", "awq", "gguf-bf16")),
    *(("dare_ties", f) for f in ("nf4", "gptq-v2", "mxfp4", "fp8-block", "q8_0")),
    *(("model", f) for f in ("nf4-dq", "nvfp4", "awq", "q4_0")),
]


# ---- kills --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(runs: Runs) -> Path:
    """A family one of whose tensors is more than a work item."""
    write(runs.root / "coded", 6144)
    return runs.root / "coded"


@pytest.fixture
def out(runs: Runs) -> Iterator[Path]:
    folder = runs.root / "killed" / "out"
    folder.parent.mkdir()
    yield folder
    shutil.rmtree(runs.root / "killed")


@pytest.mark.parametrize(("recipe", "format"), CASES)
def test_resume_after_kill(runs: Runs, cut: Path, out: Path, recipe: str, format: str) -> None:
    """SIGKILL at random calls to the file system, writes torn in half: 5 moments of each case."""

    def merge(*options: str, fault: Fault = Fault.NONE, at: int = 0) -> tuple[int, str]:
        arguments = (cut / f"{recipe}.yaml", out, "--quantize", format, *options)
        return runs.run("merge", *arguments, fault=fault, at=at, below=out)

    code, text = merge(fault=Fault.KILL, at=-1)
    assert code == 0, text
    whole, n_calls = contents(out), runs.count
    errors: list[list[tuple[bytes, ...]]] = []
    generator = random.Random(f"{recipe} {format}")
    for at in sorted(generator.sample(range(n_calls), 5)):
        shutil.rmtree(out)
        fault = generator.choice([Fault.KILL, Fault.KILL_TORN])
        where = f"{fault.name} at call {at} of {n_calls}"
        assert merge(fault=fault, at=at)[0] == -signal.SIGKILL, where
        found = contents(out)
        for name in found:
            assert name not in whole or not name.endswith(WEIGHTS) or found[name] == whole[name]
        if (
            found.keys() != whole.keys() and generator.random() < 0.4
        ):  # a second kill, in the resumed run
            code, text = merge("--resume", fault=Fault.KILL, at=generator.randrange(20))
            assert code in (0, -signal.SIGKILL), (where, text)
        if contents(out).keys() != whole.keys():
            code, text = merge("--resume")
            assert code == 0, (where, text)
        found = contents(out)
        # What the first run's coding cost is not known to the second, which does not make it up.
        for text in (found.pop("README.md"), whole["README.md"]):
            errors.append(re.findall(rb"^\| `(.*)` \| .* \| (.+) %", text, re.MULTILINE))
        assert set(errors[-2]) <= set(errors[-1])
        assert errors[-1] or format == "gguf-bf16"
        assert found == {n: b for n, b in whole.items() if n != "README.md"}, where
    assert runs.run("verify", out, "--sample", 0)[0] == 0


WEIGHTS = (".safetensors", ".gguf", ".json")


# ---- memory, chunks, threads --------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("large")
    write(root, 30720)
    yield root
    shutil.rmtree(root)


@pytest.mark.parametrize(("recipe", "format"), CASES)
def test_bytes_depend_on_no_resource(large: Path, tmp_path: Path, recipe: str, format: str) -> None:
    def merged(name: str, **options: Any) -> dict[str, bytes]:
        fastmerge.merge(large / f"{recipe}.yaml", tmp_path / name, quantize=format, **options)
        return weights(tmp_path / name)

    want = merged("whole", threads=1)
    assert merged("chunks", threads=2, chunk_elements=512 * 24) == want
    assert (
        merged("little", max_memory=little(large, recipe, format), threads=2, io="direct") == want
    )


def weights(folder: Path) -> dict[str, bytes]:
    return {n: b for n, b in contents(folder).items() if n.endswith(WEIGHTS)}


def little(root: Path, recipe: str, format: str) -> str:
    """Return the least memory that a merge is planned for; methods of whole tensors then stream one."""
    for size in range(80, 400, 8):
        try:
            plan = fastmerge.plan(root / f"{recipe}.yaml", max_memory=f"{size}MB", quantize=format)
        except RecipeError:
            continue
        assert recipe in ("linear", "model") or UP in plan.streamed
        return f"{size}MB"
    raise AssertionError("no memory is enough")


# ---- inputs that hold no numbers ----------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write(tmp_path / "in", 256, 256, 2)
    return tmp_path / "in"


FORMATS = [
    "nf4",
    "fp4-dq",
    "int4-asym",
    "nvfp4",
    "mxfp4",
    "gptq",
    "awq",
    "fp8-tensor",
    "fp8-block",
    "q4_k",
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_no_number_is_one_line(small: Path, tmp_path: Path, format: str, value: float) -> None:
    state = families.load(small / "e2")
    state[UP][3, 5] = value
    families.write_model(small / "e2", state, CONFIG | {"hidden_size": 256})
    for recipe in ("linear", "ties"):
        text = (small / f"{recipe}.yaml").read_text().partition("- model: ./e3")[0]
        (small / f"{recipe}.yaml").write_text(text)
        with pytest.raises(NonFiniteError) as caught:
            fastmerge.merge(small / f"{recipe}.yaml", tmp_path / "out", quantize=format)
        line = str(caught.value)
        assert f"'{UP}' of './e2' holds NaN or infinity at flat index {3 * 256 + 5}" in line
        assert "\n" not in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["nf4", "nvfp4", "awq", "fp8", "q8_0"])
def test_sums_past_the_type_are_one_line(small: Path, tmp_path: Path, format: str) -> None:
    """bfloat16 has no 4e38: the merge overflows though its inputs are finite."""
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(small / n), "parameters": {"weight": 3e38}} for n in ("e1", "e2")],
        "parameters": {"normalize": False},
    }
    state = families.load(small / "e1")
    state[UP][3, 5] = 1e3
    families.write_model(small / "e1", state, CONFIG | {"hidden_size": 256})
    with pytest.raises(
        NonFiniteError, match="as merged holds values that bfloat16 cannot"
    ) as caught:
        fastmerge.merge(recipe, tmp_path / "out", quantize=format)
    assert UP in str(caught.value) and not (tmp_path / "out").exists()


# ---- damage -------------------------------------------------------------------------------------


def places(out: Path) -> dict[str, tuple[Path, int, int]]:
    """Return where the tensors of a module lie: file, offset, bytes."""
    if (out / "model.gguf").exists():
        stored: Any = read_gguf(out / "model.gguf").tensors.values()
        return {
            t.name: (out / "model.gguf", t.offset, t.n_bytes) for t in stored if "ffn_up" in t.name
        }
    module = UP.removesuffix(".weight")
    stored = open_checkpoint(out).tensors.values()
    return {t.name: (t.file, t.offset, t.n_bytes) for t in stored if t.name.startswith(module)}


@pytest.mark.parametrize("format", FORMATS)
def test_verify_catches_a_flipped_byte(small: Path, tmp_path: Path, format: str) -> None:
    text = (small / "linear.yaml").read_text().partition("- model: ./e3")[0]
    (small / "linear.yaml").write_text(text)
    out = tmp_path / "out"
    fastmerge.merge(small / "linear.yaml", out, quantize=format)
    good = verify(out, sample=99)
    assert good.ok and "skipped" not in good.table(), good.table()
    found = places(out)
    if format == "q4_k":  # scales lie in the blocks
        ((file, offset, n),) = found.values()
        found = {"codes": (file, offset + 17, 1), "scales": (file, offset + 1, 1)}
    assert len(found) > 1
    for file, offset, n in found.values():
        data = bytearray(file.read_bytes())
        data[offset + n // 2] ^= 1
        file.write_bytes(data)
    faults = [fault for row in verify(out, sample=99).rows for fault in row.faults]
    for name in places(out):
        assert any(name in f and "checksum" in f for f in faults), (name, faults)
        assert any(name in f and "differs from its merge at byte" in f for f in faults), name
    assert len(faults) == 2 * len(places(out))


def test_verify_knows_what_is_in_a_gguf_file(small: Path, tmp_path: Path) -> None:
    """Rotary factors are no input's; a file cut short, or with a tensor less, is told."""
    config = families.LLAMA | CONFIG | {"hidden_size": 256, "rope_parameters": LLAMA3}
    for name in ("base", "e1", "e2"):
        families.write_model(small / name, families.load(small / name), config)
    text = (small / "linear.yaml").read_text().partition("- model: ./e3")[0]
    (small / "linear.yaml").write_text(text)
    out = tmp_path / "out"
    fastmerge.merge(small / "linear.yaml", out, quantize="q8_0")
    assert "rope_freqs.weight" in read_gguf(out / "model.gguf").tensors
    assert verify(out).ok, verify(out).table()
    data = (out / "model.gguf").read_bytes()
    at = data.index(b"blk.0.ffn_up.weight")
    (out / "model.gguf").write_bytes(data[:at] + b"blk.0.ffn_ap" + data[at + 12 :])
    faults = verify(out, sample=0).rows[0].faults
    assert faults == [
        "'blk.0.ffn_ap.weight' is not in the manifest",
        "'blk.0.ffn_up.weight' is missing",
    ]
    (out / "model.gguf").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        verify(out)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
