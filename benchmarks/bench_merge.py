"""Time whole merges, as processes, against mergekit on the same files in the same run.

    python benchmarks/bench_merge.py [--parameters 120e6] [--runs 3] [--work DIR]

Inputs are random bf16 checkpoints with Llama's names and shapes, read from a warm page cache.
Seconds are wall time of
the whole process, start-up included; peak memory is the kernel's own account of it. Writes
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000,
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu",
}  # fmt: skip
EXPERT = {
    "linear": "weight: 0.5",
    "task_arithmetic": "weight: 0.5",
    "ties": "{weight: 0.5, density: 0.3}",
    "dare_ties": "{weight: 0.5, density: 0.3}",
    "breadcrumbs": "{weight: 0.5, density: 0.8}",
    "della": "{weight: 0.5, density: 0.5}",
    "sce": "",
    "model_stock": "",
    "slerp": "",
}


def shapes(n_parameters: float) -> tuple[dict[str, tuple[int, ...]], int, int]:
    """Choose layers of width 1024 until `n_parameters` is reached."""
    hidden, inner, vocab = 1024, 2816, 32000
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
    return names, n_layers, hidden


def make_family(work: Path, n_parameters: float, n_experts: int) -> int:
    names, n_layers, hidden = shapes(n_parameters)
    config = {
        **CONFIG,
        "num_hidden_layers": n_layers,
        "hidden_size": hidden,
        "intermediate_size": 2816,
    }
    generator = torch.Generator().manual_seed(0)
    base = {k: torch.randn(s, generator=generator) * 0.03 for k, s in names.items()}
    for m in range(n_experts + 1):
        folder = work / ("base" if m == 0 else f"expert{m}")
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            k: (v if m == 0 else v + torch.randn(v.shape, generator=generator) * 0.001).bfloat16()
            for k, v in base.items()
        }
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
    return sum(torch.Size(s).numel() for s in names.values())


def recipe(method: str, n_experts: int) -> str:
    if method == "slerp":
        return (
            "merge_method: slerp\nbase_model: ./base\nparameters: {t: 0.5}\n"
            "models:\n- model: ./base\n- model: ./expert1\n"
        )
    lines = [f"merge_method: {method}"]
    if method != "linear":
        lines.append("base_model: ./base")
    lines.append("models:")
    for m in range(1, n_experts + 1):
        lines.append(f"- model: ./expert{m}")
        if EXPERT[method]:
            lines.append(
                f"  parameters: {EXPERT[method] if '{' in EXPERT[method] else '{' + EXPERT[method] + '}'}"
            )
    return "\n".join([*lines, "dtype: bfloat16", ""])


#: Runs a command and prints its seconds and peak memory. A small process of its own: the kernel counts
#: what a child shares with its parent at the fork into the child's peak, and this one holds torch.
LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
errors = child.stderr.read()
_, status, usage = os.wait4(child.pid, 0)
seconds = time.perf_counter() - start
if status:
    sys.exit(errors.decode()[-2000:])
print(json.dumps({"seconds": seconds, "peak_mb": usage.ru_maxrss * 1024 / 1e6}))
"""


def timed(command: list[str], work: Path) -> dict[str, float]:
    launcher = [sys.executable, "-S", "-c", LAUNCHER, *command]
    done = subprocess.run(launcher, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(r[key] for r in runs) for key in runs[0]}


def machine() -> str:
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
            break
    return f"{model}, {os.cpu_count()} cores, Linux, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=120e6)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(EXPERT))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--name", default="small")
    options = parser.parse_args()
    work: Path = options.work
    n = make_family(work, options.parameters, options.experts)
    rows: list[dict[str, Any]] = []
    moved: dict[str, int] = {}
    for method in options.methods:
        (work / f"{method}.yaml").write_text(recipe(method, options.experts))
        operands = 2 if method == "slerp" else options.experts + (method != "linear")
        moved[method] = (operands + 1) * 2 * n
        ours = [str(BIN / "fastmerge"), "merge", f"{method}.yaml", "out-ours", "--force", "-q"]
        theirs = [str(BIN / "mergekit-yaml"), f"{method}.yaml", "./out-theirs", "--quiet"]
        timed(ours, work)
        row = {
            "method": method,
            "fastmerge": median([timed(ours, work) for _ in range(options.runs)]),
        }
        shutil.rmtree(work / "out-theirs", ignore_errors=True)
        slow = [timed(theirs, work)]
        row["mergekit"] = median(slow)
        rows.append(row)
        print(
            method,
            {k: {a: round(b, 2) for a, b in v.items()} for k, v in row.items() if k != "method"},
        )
    result = {
        "machine": machine(), "parameters": n, "experts": options.experts, "dtype": "bf16",
        "runs": f"{options.runs} (mergekit: 1)", "bytes_moved": moved, "rows": rows,
        "versions": {p: importlib.metadata.version(p) for p in ("fastmerge", "mergekit", "torch")},
    }  # fmt: skip
    out = ROOT / "benchmarks" / "results" / f"merge-{options.name}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
