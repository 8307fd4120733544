"""The processors beside a device: a copy that crosses sockets on its way to a GPU takes twice the time.

What cannot be found out, or not be done, is left as it is: nothing but speed depends on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

SYSFS = Path("/sys")


def near_cpus(pci_address: str, sysfs: Path = SYSFS) -> set[int]:
    """Return the processors of the NUMA node that a device at "0000:3b:00.0" hangs on; empty if unknown."""
    try:
        device = sysfs / "bus" / "pci" / "devices" / pci_address.lower()
        node = int((device / "numa_node").read_text())
        if node < 0:  # one node, or firmware that does not say
            return set()
        text = (sysfs / "devices" / "system" / "node" / f"node{node}" / "cpulist").read_text()
        return parse_cpu_list(text)
    except (OSError, ValueError):
        return set()


def parse_cpu_list(text: str) -> set[int]:
    """Return the processors that "0-3,8,10-11" names. Raises ValueError for what is none."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def bind(cpus: set[int]) -> set[int]:
    """Keep this process, with the threads it has and will start, on some of its processors.

    Returns:
        Those it is bound to; empty: none of `cpus` may be used, and nothing was changed.
    """
    set_affinity: Callable[[int, set[int]], None] | None
    set_affinity = getattr(os, "sched_setaffinity", None)  # Linux
    if set_affinity is None:
        return set()
    usable = cpus & os.sched_getaffinity(0)
    if not usable:
        return set()
    try:
        for thread in os.listdir("/proc/self/task"):
            set_affinity(int(thread), usable)
    except OSError:
        return set()
    return usable
