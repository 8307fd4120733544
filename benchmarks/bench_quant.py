"""Time whole merges into few bits, as processes, beside the same merge in 16 bits and the way round it.

    python benchmarks/bench_quant.py            from the page cache; against mergekit and a quantiser after it

The rival merges with mergekit to bf16 and then codes that model with the format's own library on the CPU:
bitsandbytes through transformers, compressed-tensors' own functions tensor by tensor. Inputs are those of
bench_merge.py. Seconds are wall time of whole processes. Results go to benchmarks/results/coded.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from bench_merge import ROOT, family, merge_of, show
from processes import Merge, median, require_mergekit, timed

from fastmerge import _cpu
from fastmerge.bench import copy_bandwidth, environment
from fastmerge.quant.gguf_formats import GGUF_FORMATS

#: What is written, what reads it, and what codes a dense model in it on a CPU.
FORMATS = {
    "nf4": ("transformers + bitsandbytes", ("transformers", "bitsandbytes"), "bitsandbytes"),
    "nf4-dq": ("transformers + bitsandbytes", ("transformers", "bitsandbytes"), None),
    "int4": ("transformers + compressed-tensors", ("transformers", "compressed-tensors"),
             "compressed-tensors"),
    "nvfp4": ("transformers + compressed-tensors", ("transformers", "compressed-tensors"), None),
    "mxfp4": ("transformers + compressed-tensors", ("transformers", "compressed-tensors"), None),
    "gptq": ("GPTQModel, vLLM; here the layout alone", (), None),
    "awq": ("AutoAWQ, vLLM; here the layout alone", (), None),
    "fp8": ("transformers + compressed-tensors", ("transformers", "compressed-tensors"), None),
    "q4_0": ("transformers (GGUF)", ("transformers", "gguf"), None),
    "q4_k": ("transformers (GGUF)", ("transformers", "gguf"), None),
}  # fmt: skip

#: Codes a dense folder with a library on the CPU and saves it: what a user does after mergekit.
RIVALS = {
    "bitsandbytes": """
import sys, torch, transformers
config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
model.save_pretrained(sys.argv[2])
""",
    "compressed-tensors": """
import json, pathlib, shutil, sys, torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors import safe_open
from safetensors.torch import save_file
args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
source, target = map(pathlib.Path, sys.argv[1:3])
target.mkdir(parents=True, exist_ok=True)
out = {}
for file in sorted(source.glob("*.safetensors")):
    with safe_open(file, "pt") as f:
        for name in f.keys():
            w = f.get_tensor(name)
            if w.ndim != 2 or "embed" in name or "lm_head" in name:
                out[name] = w
                continue
            groups = w.unflatten(-1, (-1, 128))
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            codes = quantize(w, scale, zero, args, dtype=torch.int8)
            module = name.removesuffix(".weight")
            out[module + ".weight_packed"] = pack_to_int32(codes, 4)
            out[module + ".weight_scale"] = scale
            out[module + ".weight_shape"] = torch.tensor(w.shape)
save_file(out, target / "model.safetensors", metadata={"format": "pt"})
""",
}


def coded(options: argparse.Namespace) -> dict[str, Any]:
    """Time TIES into 16 bits and into each format by turns, and the rivals once."""
    threads = _cpu.available_threads()
    rows = []
    with family(options.work, options.parameters, options.experts) as folder:
        merge = merge_of("ties", folder, options.experts)
        ours, theirs = folder / "out-ours", folder / "out-theirs"
        merged = median([merge.theirs(theirs)]) if options.peer else None
        for name in options.formats:
            row = _row(merge, name, ours, options.runs)
            library = FORMATS[name][2]
            if merged is not None and library is not None:
                row["mergekit_seconds"] = merged["seconds"]
                row["library"] = library
                row["library_seconds"] = _rival(library, theirs, folder)
            rows.append(show(row))
        for out in (ours, theirs):
            shutil.rmtree(out, ignore_errors=True)
    return {
        "parameters": merge.parameters,
        "experts": options.experts,
        "runs": options.runs,
        "threads": threads,
        "copy_gb_per_s": copy_bandwidth(threads) / 1e9,
        "rows": rows,
    }


def _row(merge: Merge, name: str, out: Path, runs: int) -> dict[str, Any]:
    """Time both merges, one after the other, so that the machine's moods strike both."""
    merge.ours(out, "--quantize", name)  # once for the program's own pages
    dense, coded_runs = [], []
    for _ in range(runs):
        dense.append(merge.ours(out, "--no-copy-tokenizer"))
        coded_runs.append(merge.ours(out, "--quantize", name, "--no-copy-tokenizer"))
    report = merge.reporting(out, warm=True, quantize=name)[1]
    sums = [sum(r[key] for r in report["residuals"].values()) for key in ("errors", "squares")]
    consumer, packages, _ = FORMATS[name]
    size = sum(f.stat().st_size for f in out.iterdir() if f.suffix in (".safetensors", ".gguf"))
    return {
        "format": name,
        "container": "gguf" if name in GGUF_FORMATS else "safetensors",
        "consumer": consumer,
        "consumer_versions": {p: importlib.metadata.version(p) for p in packages},
        "bits_per_weight": 8 * size / merge.parameters,
        "relative_rms": (sums[0] / sums[1]) ** 0.5,
        "bytes_written": size,
        "dense": median(dense),
        "coded": median(coded_runs),
    }


def _rival(library: str, merged: Path, folder: Path) -> float:
    """Code mergekit's model with a library; the seconds of that process."""
    out = folder / "out-coded"
    shutil.rmtree(out, ignore_errors=True)
    done = timed([sys.executable, "-c", RIVALS[library], merged, out], folder)
    shutil.rmtree(out, ignore_errors=True)
    return done.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=float, default=540e6)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--runs", type=int, default=5, help="of ours; the rivals run once")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    options.work = options.work.resolve()
    if options.peer:
        require_mergekit()
    packages = ["fastmerge", "torch", *(["mergekit", "bitsandbytes"] if options.peer else [])]
    result = {**environment(*packages), **coded(options)}
    path = options.results / "coded.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
