"""What GPU kernels could reach, from bytes and instructions: shown until a card has been measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastmerge.cards import CARDS as KNOWN
from fastmerge.cards import REACHED as ATTAINABLE

ELEMENTS = 1 << 26
#: Passes over the operands of an exact select: three digits of the key, then a count of the equals, which
#: tells the one piece that is searched for the last tie.
SELECT_PASSES = 4
#: Instructions an element of a TIES walk, by number of experts: of a stand-alone kernel compiled for sm_90,
#: cold paths included. The shipped kernel serves more stages; what of it runs for TIES has not been counted.
TIES_INSTRUCTIONS = {2: 584 / 8, 4: 872 / 8, 8: 1472 / 8}

#: Of a walk that draws: those of one expert, with its share of a Philox block.
DARE_INSTRUCTIONS = 176 / 8


@dataclass(frozen=True)
class Card:
    """bandwidth: nominal, bytes/s. issue: instructions of all lanes a second: 128 a clock and processor."""

    name: str
    bandwidth: float
    issue: float


CARDS = (
    Card("A100 80 GB", KNOWN["A100"].bandwidth, 108 * 128 * 1.41e9),
    Card("H100 SXM", KNOWN["H100"].bandwidth, 29.6e12),
    Card("B200", KNOWN["B200"].bandwidth, 148 * 128 * 1.85e9),
)


@dataclass(frozen=True)
class Modelled:
    """An operation on K bf16 experts: bytes moved and instructions issued an element (0: not counted)."""

    name: str
    n_bytes: float
    instructions: float = 0.0

    def seconds(self, card: Card, n: int = ELEMENTS) -> tuple[float, str]:
        """Return the time of n elements and what sets it."""
        memory = n * self.n_bytes / (ATTAINABLE * card.bandwidth)
        issue = n * self.instructions / card.issue
        return (issue, "issue") if issue > memory else (memory, "memory")


def operations() -> list[Modelled]:
    """Return the walks and the exact select: base, K experts and a result of 2 bytes an element."""
    found = []
    for k in (2, 4, 8):
        found += [
            Modelled(f"linear walk K={k}", 2.0 * (k + 1)),
            Modelled(f"task arithmetic walk K={k}", 2.0 * (k + 2)),
            Modelled(f"DARE walk K={k}", 2.0 * (k + 2), DARE_INSTRUCTIONS * k),
            Modelled(f"TIES walk K={k}", 2.0 * (k + 2), TIES_INSTRUCTIONS[k]),
            Modelled(f"exact select K={k}", 2.0 * (k + 1) * SELECT_PASSES),
        ]
    return found


def cell(card: Card) -> Callable[[Modelled], str]:
    """Return what a table says of an operation on `card`."""

    def say(operation: Modelled) -> str:
        seconds, limit = operation.seconds(card)
        return f"{seconds * 1e6:.0f} us ({limit})"

    return say
