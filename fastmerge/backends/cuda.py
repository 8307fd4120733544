"""The Cuda backend."""

from __future__ import annotations

from fastmerge.backends import Kernels


def why_not() -> str | None:
    """Return why this backend cannot run here, or None."""
    return "not built"


class CudaKernels(Kernels):
    """Kernels for `device`."""

    name = "cuda"

    def __init__(self, device: str) -> None:
        raise NotImplementedError(device)
