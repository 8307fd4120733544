"""Memory of whole merges, measured and planned.

A 70B-shaped merge of eight experts in 4 GB has tensors of true size for a few layers.

The experts are eight names of one folder: nine models take the disk of two, and every byte is read.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

import fastmerge
from fastmerge.checkpoint import OutputTensor, plan_layout
from fastmerge.dtypes import DType
from fastmerge.registry import get

#: Llama 70B: the embedding, one gate projection, an attention matrix and a norm.
TENSORS = [
    OutputTensor("model.embed_tokens.weight", DType.BF16, (128256, 8192)),
    OutputTensor("model.layers.0.mlp.gate_proj.weight", DType.BF16, (28672, 8192)),
    OutputTensor("model.layers.0.self_attn.q_proj.weight", DType.BF16, (8192, 8192)),
    OutputTensor("model.norm.weight", DType.BF16, (8192,)),
]
EXPERTS = [f"e{k}" for k in range(8)]

#: Prints the process's own peak in bytes: VmHWM, since getrusage counts what was shared at the fork.
RUN = """
import re, sys, fastmerge
fastmerge.merge(sys.argv[1], sys.argv[2], max_memory=sys.argv[3], io=sys.argv[4], force=True)
print(int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024)
"""


def bits(x: np.ndarray) -> bytes:
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def write_model(folder: Path, pool: bytes) -> None:
    """Write TENSORS, filled with the bytes of `pool` over and over."""
    folder.mkdir()
    (shard,) = plan_layout(TENSORS, 10**12).shards
    with (folder / "model.safetensors").open("wb") as f:
        f.write(shard.header)
        left = shard.size - len(shard.header)
        while left:
            left -= f.write(memoryview(pool)[: min(left, len(pool))])
    (folder / "config.json").write_text('{"model_type": "llama"}')


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    base = rng.standard_normal((32 << 20) + 8, np.float32) * 0.03
    change = rng.standard_normal(base.size, np.float32) * 0.001
    write_model(folder / "base", bits(base))
    write_model(folder / "expert", bits(base + change))
    for name in EXPERTS:
        (folder / name).symlink_to("expert")
    return folder


@pytest.mark.huge
@pytest.mark.parametrize("io", ["mmap", "direct"])
@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "dare_ties"])
def test_seventy_billion_shapes_of_eight_experts_in_four_gigabytes(
    models: Path, method: str, io: str, tmp_path: Path
) -> None:
    lines = "".join(
        f"- {{model: {models / n}, parameters: {{weight: 0.5, density: 0.3}}}}\n" for n in EXPERTS
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"merge_method: {method}\nbase_model: {models / 'base'}\nmodels:\n{lines}")
    plan = fastmerge.plan(recipe, max_memory="4GB")
    command = [sys.executable, "-c", RUN, str(recipe), str(tmp_path / "out"), "4GB", io]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout)
    print(f"{method}, {io}: peak {peak / 1e6:.0f} MB, planned {plan.peak_memory / 1e6:.0f} MB")
    assert peak <= 4e9
    assert peak == pytest.approx(plan.peak_memory, rel=0.15)


#: What takes long, taken few times: the memory is the same.
FEW_STEPS = {"wudi": {"steps": 2}, "dop": {"steps": 2}, "lore": {"sweeps": 2}}


@pytest.mark.huge
@pytest.mark.parametrize("shape", [(1536, 3072), (3072, 1536)], ids=str)
@pytest.mark.parametrize("method", [n for n in fastmerge.list_methods() if get(n).cost])
def test_methods_that_decompose_keep_to_their_plan(
    method: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    """Two matrices, so that the second is read while the first is decomposed."""
    rng = np.random.default_rng(0)
    layers = [rng.standard_normal(shape, np.float32) * 0.03 for _ in range(2)]
    for name in ("base", "e0", "e1", "e2"):
        (tmp_path / name).mkdir()
        tensors = {f"model.layers.{i}.mlp.up_proj.weight": x for i, x in enumerate(layers)}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        layers = [x + rng.standard_normal(shape, np.float32) * 0.001 for x in layers]
    recipe = tmp_path / "r.yaml"
    models = [{"model": str(tmp_path / f"e{k}")} for k in range(3)]
    document = {
        "merge_method": method,
        "base_model": str(tmp_path / "base"),
        "models": models,
        "parameters": FEW_STEPS.get(method, {}),
    }
    recipe.write_text(yaml.safe_dump(document))
    plan = fastmerge.plan(recipe, max_memory="4GB")
    command = [sys.executable, "-c", RUN, str(recipe), str(tmp_path / "out"), "4GB", "auto"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout)
    print(f"{method}, {shape}: peak {peak / 1e6:.0f} MB, planned {plan.peak_memory / 1e6:.0f} MB")
    assert 0.6 * plan.peak_memory < peak <= 1.05 * plan.peak_memory
