"""The Triton backend."""

from __future__ import annotations

from fastmerge.backends import Kernels


def why_not() -> str | None:
    """Return why this backend cannot run here, or None."""
    return "not built"


class TritonKernels(Kernels):
    """Kernels for `device`."""

    name = "triton"

    def __init__(self, device: str) -> None:
        raise NotImplementedError(device)
