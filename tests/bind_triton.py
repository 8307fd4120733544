"""Compile all that random walks, statistics and codecs launch, as Triton's own launcher would; needs no GPU.

    python tests/bind_triton.py SEEDS

A stand-in for the driver names the GPU; nothing is run, so results are noise and only compile errors count.
Prints, as JSON, how many variants of each kernel there were and how many of them hold fused multiply-adds.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import Any

import agreement
import cases
import coded_cases
import coded_tensors
import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton_probes import halve

from fastmerge import ops
from fastmerge.backends.triton import Tiles, TritonKernels
from fastmerge.backends.triton_coded import decode, encode
from fastmerge.coding import Coding, Format, ScaleType
from fastmerge.dtypes import DType
from fastmerge.stages import Transform, Walk

NOISE = (IndexError, ValueError, OverflowError)  # of results that no kernel wrote


class NamedDriver:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compiling(TritonKernels):
    """Kernels that are compiled for their arguments and not launched."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.tiles = Tiles(direct=16)
        self.variants: dict[str, set[str]] = {}

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **flags: Any) -> None:
        options = {"num_warps": 4, "enable_fp_fusion": False}
        binary = kernel.warmup(*args, **flags, grid=grid, **options)
        self.variants.setdefault(kernel.fn.__name__, set()).add(binary.asm["ptx"])


def compile_codecs(kernels: Compiling) -> None:
    """Code and decode a tensor by every coding; decode what few tensors have."""
    for case, (coding, rows, cols) in enumerate(coded_cases.WRITTEN + coded_cases.READ):
        host = coded_tensors.Coded(coding, rows, cols)
        values, held = coded_cases.values_buffer(np.zeros((rows, cols), np.float32), coding.dtype)
        out = coded_cases.viewed(host)
        if case < len(coded_cases.WRITTEN):
            encode(kernels, out, values, held.data_ptr())
        decode(kernels, out)
    x, _ = coded_cases.values_buffer(np.zeros(64, np.float32), DType.F16)
    for coding, more in (
        (Coding(Format.BNB_NF4, group=64, nested=True), {}),
        (Coding(Format.GPTQ, scale=ScaleType.F16, group=32), {"group_of": x}),
        (Coding(Format.Q8_0), {"low_a": x, "low_b": x}),
    ):
        out = coded_cases.viewed(coded_tensors.Coded(coding, 8, 64))
        decode(kernels, replace(out, slots={**out.slots, **more}))


def main() -> None:
    triton.runtime.driver.set_active(NamedDriver())
    kernels = Compiling()
    for seed in range(int(sys.argv[1])):
        k, shape = 1 + seed % 3, ((4099,), (3, 1100), (64, 64))[seed % 3]
        rng, held = agreement.draw(
            seed, shape, k, with_base=seed % 5 != 4, shift=int(seed % 7 == 3)
        )
        walk = cases.random_walk(rng, shape, k, held.base is not None)
        if seed == 0:
            walk = Walk(
                walk.coefficient, walk.axis, transform=Transform("halve", halve, [[0.5] * k])
            )
        chunk = ops._chunk(held.base, held.experts)
        out = torch.zeros(shape, dtype=cases.FLOATS[seed % 4])
        kernels.walk(walk, chunk, ops.buffer_of(out, "out"))
        kernels.keep_mask(walk.keep, chunk)
        for request in agreement.statistics(rng, shape, k):
            sweep = kernels.sweep(request, chunk.n, chunk.cols, k, chunk.compute)  # type: ignore[arg-type]
            with suppress(*NOISE):
                sweep.feed(chunk)
            with suppress(*NOISE):
                sweep.result()
    compile_codecs(kernels)
    fused = Counter(
        {name: sum("fma." in p for p in all_) for name, all_ in kernels.variants.items()}
    )
    counts = {name: [len(all_), fused[name]] for name, all_ in kernels.variants.items()}
    json.dump(counts, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
