"""Known GPUs: memory, its bandwidth and the link to the host, for plans made without the card at hand.

Nominal figures of the makers' data sheets. What is reached of them: 88 % of the memory's bandwidth by kernels
that stream (public measurements lie between 84 and 92 %), and the link's rate for pinned copies, which for
PCIe 5.0 x16 is 55 GB/s of 63, for 4.0 half of that.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastmerge.errors import DeviceError

#: Of a memory's nominal bandwidth, what streaming kernels reach.
REACHED = 0.88

_PCIE3, _PCIE4, _PCIE5 = 12.5e9, 25e9, 55e9


@dataclass(frozen=True)
class Card:
    """One card. memory: bytes; bandwidth: bytes/s of its memory, nominal; link: bytes/s each way, pinned."""

    title: str
    memory: int
    bandwidth: float
    link: float
    link_title: str


def _card(title: str, gb: float, tb_per_second: float, link: float, link_title: str) -> Card:
    return Card(title, int(gb * 1e9), tb_per_second * 1e12, link, link_title)


#: By the name after "cuda:" in a plan's device.
CARDS = {
    "V100": _card("V100 32 GB", 32, 0.9, _PCIE3, "PCIe 3.0 x16"),
    "A100": _card("A100 80 GB", 80, 2.04, _PCIE4, "PCIe 4.0 x16"),
    "A100-40": _card("A100 40 GB", 40, 1.555, _PCIE4, "PCIe 4.0 x16"),
    "H100": _card("H100 SXM 80 GB", 80, 3.35, _PCIE5, "PCIe 5.0 x16"),
    "H200": _card("H200 141 GB", 141, 4.8, _PCIE5, "PCIe 5.0 x16"),
    "B200": _card("B200 180 GB", 180, 8.0, _PCIE5, "PCIe 5.0 x16"),
    "GH200": _card("GH200 96 GB", 96, 4.0, 300e9, "NVLink-C2C"),
    "L4": _card("L4 24 GB", 24, 0.3, _PCIE4, "PCIe 4.0 x16"),
    "L40S": _card("L40S 48 GB", 48, 0.864, _PCIE4, "PCIe 4.0 x16"),
    "RTX3090": _card("RTX 3090 24 GB", 24, 0.936, _PCIE4, "PCIe 4.0 x16"),
    "RTX4090": _card("RTX 4090 24 GB", 24, 1.008, _PCIE4, "PCIe 4.0 x16"),
    "RTX5090": _card("RTX 5090 32 GB", 32, 1.792, _PCIE5, "PCIe 5.0 x16"),
    "MI300X": _card("MI300X 192 GB", 192, 5.3, _PCIE5, "PCIe 5.0 x16"),
}


def card_of(device: str) -> Card | None:
    """Return the card that a device like "cuda:H100" names; None for one of this machine.

    Raises:
        DeviceError: neither; lists the known cards.
    """
    kind, _, name = device.partition(":")
    if kind == "cuda" and (not name or name.isdigit()):
        return None
    found = {n.lower(): c for n, c in CARDS.items()}.get(name.lower())
    if kind != "cuda" or found is None:
        raise DeviceError(
            f"device {device!r} is unknown; give cpu, cuda, cuda:0, or to plan for a card one of "
            + ", ".join(f"cuda:{n}" for n in CARDS)
        )
    return found
