"""A 70B-shaped merge of eight experts in 4 GB: true sizes for a few tensors, on sparse files.

Holes read as zeros, so that nine models of several gigabytes need no disk; what is measured is memory.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fastmerge
from fastmerge.checkpoint import OutputTensor, plan_layout
from fastmerge.dtypes import DType

#: Llama 70B: the embedding, one gate projection, an attention matrix and a norm.
TENSORS = [
    OutputTensor("model.embed_tokens.weight", DType.BF16, (128256, 8192)),
    OutputTensor("model.layers.0.mlp.gate_proj.weight", DType.BF16, (28672, 8192)),
    OutputTensor("model.layers.0.self_attn.q_proj.weight", DType.BF16, (8192, 8192)),
    OutputTensor("model.norm.weight", DType.BF16, (8192,)),
]

#: Prints the process's own peak in bytes: VmHWM, since getrusage counts what was shared at the fork.
RUN = """
import re, sys, fastmerge
fastmerge.merge(sys.argv[1], sys.argv[2], max_memory=sys.argv[3], force=True)
print(int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024)
"""


def sparse_model(folder: Path) -> None:
    folder.mkdir()
    (shard,) = plan_layout(TENSORS, 10**12).shards
    with (folder / "model.safetensors").open("wb") as f:
        f.write(shard.header)
        f.truncate(shard.size)
    (folder / "config.json").write_text('{"model_type": "llama"}')


@pytest.mark.huge
@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_seventy_billion_shapes_of_eight_experts_in_four_gigabytes(
    method: str, tmp_path: Path
) -> None:
    names = ["base", *(f"e{k}" for k in range(8))]
    for name in names:
        sparse_model(tmp_path / name)
    models = "".join(
        f"- {{model: ./{n}, parameters: {{weight: 0.5, density: 0.3}}}}\n" for n in names[1:]
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"merge_method: {method}\nbase_model: ./base\nmodels:\n{models}")
    plan = fastmerge.plan(recipe, max_memory="4GB")
    command = [sys.executable, "-c", RUN, str(recipe), str(tmp_path / "out"), "4GB"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout)
    print(f"{method}: peak {peak / 1e6:.0f} MB, planned {plan.peak_memory / 1e6:.0f} MB")
    assert peak <= 4e9
    assert peak <= plan.peak_memory * 1.05
