"""Compile the main Triton kernels ahead of time and print, as JSON, what the compiler made of each.

    python tests/compile_triton.py dense|coded|all 80 90 100

Needs no GPU, and must not see TRITON_INTERPRET: Triton decides at import what a kernel is.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import triton
from fastmerge.triton_kernels import fused, quant4_decode, quant4_encode, select, stats
from triton.backends.compiler import GPUTarget

from fastmerge.backends.triton import Tiles
from fastmerge.backends.triton_plan import lower_walk
from fastmerge.coding import Format, ScaleType
from fastmerge.stages import Combine, Cut, Drop, Elect, Keep, Select, Trim, Walk

BF16 = 3
TILES = Tiles()

#: Arguments whose value says nothing at compile time.
LONG = {"cols", "stride", "out_stride"}
UNSPECIALIZED = {
    "start", "n", "first_segment", "n_segments", "rounds", "unit", "rows",
    "first", "origin", "rank", "first_row", "origin_row", "all_rows", "n_groups", "width",
}  # fmt: skip
FLOATS = {"offset", "tensor_scale", "low_scale"}
POINTERS = {
    "codes",
    "scales",
    "zeros",
    "nested",
    "book",
    "group_of",
    "low_a",
    "low_b",
    "factors",
    "stored_zeros",
    "base",
    "x",
    "y",
    "out",
    "table",
    "flag",
    "keys",
    "thresholds",
    "counts",
    "lanes",
    "sums",
    "balance",
    "mask",
}


def walks() -> Iterator[tuple[str, int, Walk]]:
    """Yield name, number of experts and walk: what whole methods come down to."""

    def cut(k: int) -> Cut:
        return Cut(np.full((k, 1), 0.1), np.full((k, 1), 5))

    mean = Combine(divide_by="weight")
    yield "linear", 4, Walk(np.ones((4, 1)))
    for k in (2, 4, 8):
        yield "ties", k, Walk(np.ones((k, 1)), keep=Keep(Trim(cut(k))), elect=Elect(), combine=mean)
    drop = Drop([0.5] * 4, [1] * 4, rescale=True)
    yield "dare_ties", 4, Walk(np.ones((4, 1)), keep=Keep(drop=drop), elect=Elect(), combine=mean)
    chosen = Keep(select=Select(cut(1)))
    yield "sce", 4, Walk(np.ones((4, 1)), keep=chosen, elect=Elect(), combine=mean)


def jobs() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield name, kernel and constants of each case, as the backend launches its main body."""
    memory = {"BASE": BF16, "HAS_BASE": True, "WIDE": False, "ALIGNED": True, "MASKED": False}
    for name, k, walk in walks():
        flags = lower_walk(walk, k, False).flags | memory
        flags |= {"OUT": BF16, "TYPES": (BF16,) * k, "BLOCK": TILES.block}
        flags |= {"DRAWS_ALIGNED": True, "LONG": True}
        yield f"{name} walk K={k}", fused.merge_elements_kernel, flags
        if name == "dare_ties":
            yield f"{name} mask K={k}", fused.keep_elements_kernel, flags
            yield f"{name} balance K={k}", fused.tally_votes_kernel, flags
    yield "keys", select.write_keys_kernel, memory | {"X": BF16, "BLOCK": TILES.block}
    yield "count", select.count_above_kernel, memory | {"BLOCK": TILES.count}
    one = memory | {"X": BF16, "Y": BF16, "HAS_CARRY": False, "SEGMENTS": TILES.segments}
    one |= {"WHOLE_STEPS": True}
    yield "moments", stats.sum_lanes_kernel, one | {"TERM": 0, "HAS_MASK": True}
    yield "gram", stats.sum_lanes_kernel, one | {"TERM": 2, "HAS_MASK": False}
    yield "gram columns", stats.sum_columns_kernel, one | {"BLOCK": TILES.block}
    yield from coded_jobs()


#: Formats that are written, with the group of each and the type of its scales.
WRITTEN = {
    Format.BNB_NF4: (64, ScaleType.F32),
    Format.BNB_FP4: (64, ScaleType.F32),
    Format.INT4: (128, ScaleType.BF16),
    Format.NVFP4: (16, ScaleType.E4M3),
    Format.MXFP4: (32, ScaleType.E8M0),
    Format.GPTQ: (128, ScaleType.F16),
    Format.AWQ: (128, ScaleType.F16),
    Format.Q4_0: (32, ScaleType.F16),
    Format.Q4_1: (32, ScaleType.F16),
    Format.Q8_0: (32, ScaleType.F16),
    Format.GGUF_MXFP4: (32, ScaleType.E8M0),
    Format.FP8: (128, ScaleType.F32),
}
GGUF = (Format.Q4_0, Format.Q4_1, Format.Q8_0, Format.GGUF_MXFP4)


def coded_jobs() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield the kernels of each coded format, for bfloat16 and long rows; asymmetric where that is."""
    read = {
        f: (0, ScaleType.F32) for f in (Format.Q4_K, Format.Q6_K, Format.GGUF_NVFP4, Format.INT8)
    }
    for f, (group, scale) in (WRITTEN | read).items():
        name = f.name.lower()
        flags: dict[str, Any] = {
            "FORMAT": int(f), "TYPE": BF16, "SCALE": int(scale), "GROUP": group, "SYMMETRIC": False,
            "GROUP_ROWS": 128 if f is Format.FP8 else 1, "OTHER_RULE": False, "V1": True, "ROTARY": 0,
            "BLOCK": TILES.block, "LONG": True,
        }  # fmt: skip
        plain = {"NESTED": False, "ACT_ORDER": False, "HAS_LOW_RANK": False, "LOW_TYPE": BF16}
        yield f"decode {name}", quant4_decode.decode_kernel, flags | plain
        if f not in WRITTEN:
            continue
        tile = {"GROUPS": TILES.block // group, "PIECE": group, "SHORT": False}
        scales = quant4_encode.scale_groups_kernel
        if f in GGUF:
            scales = quant4_encode.scale_blocks_kernel
        yield f"scales {name}", scales, flags | tile
        yield f"codes {name}", quant4_encode.store_codes_kernel, flags | tile


def compiled(kernel: Any, flags: dict[str, Any], capability: int) -> Any:
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    divisible = [["tt.divisibility", 16]]
    for i, name in enumerate(kernel.arg_names):
        if name in flags:
            signature[name] = "constexpr"
            constants[(i,)] = flags[name]
        elif name == "experts":
            signature[name] = ("i64",) * flags["K"]
            attributes |= {(i, k): divisible for k in range(flags["K"])}
        else:
            long = name in UNSPECIALIZED | POINTERS | LONG
            signature[name] = "fp32" if name in FLOATS else "i64" if long else "i32"
            if name not in UNSPECIALIZED | FLOATS:
                attributes[(i,)] = divisible
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def described(binary: Any, folder: Path) -> dict[str, Any]:
    """Return counts of instructions in the PTX, and the registers and spills of the machine code."""
    ptx: str = binary.asm["ptx"]
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [str(tool), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    sass = subprocess.run(
        [str(tool), "--dump-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    return {
        "registers": int(found[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "vector_loads": len(re.findall(r"\bld\.global\S*\.v4\.b32", ptx)),
        "narrow_loads": len(re.findall(r"\bld\.global\S*\.[bu](?:8|16)\b", ptx)),
        "vector_stores": len(re.findall(r"\bst\.global\S*\.v4\.b32", ptx)),
        "narrow_stores": len(re.findall(r"\bst\.global\S*\.[bu](?:8|16)\b", ptx)),
        "wide_loads": len(re.findall(r"\bLDG\.E[.\w]*\.128", sass)),
        "fused": len(re.findall(r"\bfma\.", ptx)),
        "flushed": ptx.count(".ftz"),
        "approximate": len(re.findall(r"\bdiv\.(?:full|approx)|\brcp\.approx", ptx)),
    }


def main() -> None:
    results: dict[str, dict[str, Any]] = {}
    group, *capabilities = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        for name, kernel, flags in jobs():
            coded = name.split()[0] in ("decode", "scales", "codes")
            if group == ("dense" if coded else "coded"):
                continue
            for capability in map(int, capabilities):
                binary = compiled(kernel, flags, capability)
                results[f"{name} sm_{capability}"] = described(binary, Path(folder))
    json.dump(results, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
