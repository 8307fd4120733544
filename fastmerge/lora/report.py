"""What a run that wrote an adapter tells: each module's rank and residual."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModuleResult:
    """One adapted module. shape: of its weight, as stored. norm: ||D||_F of the change D that is wanted.

    residual: ||D - B A||_F / ||D||_F with the factors as stored; None where a rule for factors defines no D.
    note: what a reader should know, or empty.
    """

    module: str
    shape: tuple[int, ...]
    rank: int
    norm: float | None
    residual: float | None
    note: str = ""


@dataclass
class LoraReport:
    """An adapter that was written.

    saved: tensors that are kept whole. skipped: tensor or module -> why it has no part in the adapter.
    unchanged: tensors that the tuned model has from its base. seconds: of the whole run.
    """

    out: Path
    modules: list[ModuleResult] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    unchanged: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0

    @property
    def residual(self) -> float | None:
        """||D - B A||_F / ||D||_F over all modules whose residual is known; None where none is."""
        known = [(m.norm, m.residual) for m in self.modules if m.norm and m.residual is not None]
        if not known:
            return None
        missed = math.fsum((n * r) ** 2 for n, r in known)
        return math.sqrt(missed / math.fsum(n**2 for n, _ in known))

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {**asdict(self), "out": str(self.out), "residual": self.residual}
