"""A merge method with a stage of its own, written in Triton: every kept delta is shrunk toward zero.

    out = base + lambda * sum_k(weight_k * shrink(delta_k, threshold_k))
    shrink(d, t) = sign(d) * max(|d| - t, 0)

Run it with `python examples/triton_stage.py`: on a GPU if there is one, else in Triton's interpreter. The
stage runs inside the one kernel that reads the base and the experts and writes the result.
"""

import os

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import triton
import triton.language as tl

import fastmerge
from fastmerge.registry import Param, method
from fastmerge.stages import Combine, Transform, Walk


@triton.jit
def shrink(v, base, index, threshold):
    """Return sign(v) * max(|v| - threshold, 0)."""
    rest = tl.maximum(tl.abs(v) - threshold, 0.0)
    return tl.where(v < 0, -rest, rest)


def shrink_reference(v, base, index, threshold):
    """The same in torch, for the reference backend and for tests."""
    rest = torch.clamp(v.abs() - threshold, min=0.0)
    return torch.where(v < 0, -rest, rest)


@method(
    "soft_threshold",
    title="Soft threshold",
    summary="shrinks every delta toward zero before it is added",
    paper="doi:10.1109/18.382009",
    base="required",
    params=[
        Param("weight", 1.0, "coefficient", scope="expert"),
        Param("threshold", 0.001, "what each |delta| loses", scope="expert", low=0.0),
        Param("lambda", 1.0, "scale of the merged delta"),
    ],
)
def soft_threshold(params, context):
    """out = base + lambda * sum_k(weight_k * shrink(delta_k, threshold_k))."""
    stage = Transform("shrink", shrink, [params.threshold], shrink_reference)
    weights = np.array([params.weight], np.float64).T
    return Walk(weights, combine=Combine(lambda_=params.lambda_), transform=stage)
    yield


@soft_threshold.oracle
def soft_threshold_oracle(base, experts, params, context):
    merged = torch.zeros_like(base, dtype=torch.float64)
    for expert, weight, t in zip(experts, params.weight, params.threshold, strict=True):
        delta = expert.double() - base.double()
        merged += weight * torch.sign(delta) * torch.clamp(delta.abs() - t, min=0.0)
    return base.double() + params.lambda_ * merged


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(64, 96, generator=draw).bfloat16()
    experts = [base + 0.01 * torch.randn(64, 96, generator=draw) for _ in range(3)]
    experts = [e.bfloat16() for e in experts]

    def merge(backend: str) -> torch.Tensor:
        return fastmerge.merge_tensors(
            base.to(device), [e.to(device) for e in experts],
            method="soft_threshold", threshold=[0.005, 0.01, 0.02], backend=backend,
        )  # fmt: skip

    compiled, plain = merge("triton").cpu(), merge("reference").cpu()
    assert torch.equal(compiled, plain)
    moved = (compiled != base).float().mean()
    print(f"triton and reference agree to the bit; {moved:.0%} of the elements moved")


if __name__ == "__main__":
    main()
