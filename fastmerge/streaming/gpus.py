"""The GPUs of this machine as a merge by several processes sees them: counted, measured, not yet opened."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from fastmerge.errors import DeviceError
from fastmerge.streaming.device import Device, TorchDevice

#: What `driver` loads: a class, as module:name. Workers get it with their share, so that tests can stand in.
DRIVER = "fastmerge.streaming.gpus:TorchGpus"


class Gpus(Protocol):
    """Devices "cuda:0" to "cuda:{count - 1}"."""

    def count(self) -> int: ...

    def total_bytes(self, index: int) -> int:
        """Return the memory of a device, whoever holds it now."""
        ...

    def pci_address(self, index: int) -> str | None:
        """Return where a device hangs, as "0000:3b:00.0"; None if that is not known."""
        ...

    def open(self, name: str, timed: bool) -> Device:
        """Return a device to merge on; timed: it is to record its spans."""
        ...


class TorchGpus:
    """Those that torch sees. None of their memory is taken before one is opened."""

    def __init__(self) -> None:
        self._cuda: Any = importlib.import_module("torch").cuda  # not typed

    def count(self) -> int:
        return int(self._cuda.device_count())

    def total_bytes(self, index: int) -> int:
        return int(self._cuda.get_device_properties(index).total_memory)

    def pci_address(self, index: int) -> str | None:
        properties = self._cuda.get_device_properties(index)
        try:
            domain, bus = properties.pci_domain_id, properties.pci_bus_id
            return f"{domain:04x}:{bus:02x}:{properties.pci_device_id:02x}.0"
        except AttributeError:  # an older torch
            return None

    def open(self, name: str, timed: bool) -> Device:
        return TorchDevice(name, timed)


def driver(name: str = "") -> Gpus:
    """Return this machine's GPUs, by way of what `name`, or DRIVER, names."""
    module, _, attribute = (name or DRIVER).partition(":")
    gpus: Gpus = getattr(importlib.import_module(module), attribute)()
    return gpus


def index_of(name: str) -> int:
    """Return which GPU "cuda" or "cuda:1" is."""
    return int(name.partition(":")[2] or 0)


def named(device: str) -> list[str]:
    """Return the devices that "cuda:0,cuda:1" or "cuda:all" means; any other name stands for itself.

    Raises:
        DeviceError: not all of a list are GPUs of this machine, or one is there twice.
    """
    if device == "cuda:all":
        count = driver().count()
        if not count:
            raise DeviceError(
                "cuda:all cannot be used: torch finds no GPU; merge with --device cpu"
            )
        return [f"cuda:{i}" for i in range(count)]
    names = [name.strip() for name in device.split(",")]
    if len(names) == 1:
        return [device]
    count = driver().count()
    for i, name in enumerate(names):
        kind, _, index = name.partition(":")
        if kind != "cuda" or not index.isdigit():
            raise DeviceError(
                f"device {device!r}: {name!r} is not a GPU of this machine; give cuda:0,cuda:1 or cuda:all"
            )
        if int(index) >= count:
            have = "torch finds no GPU" if not count else f"this machine has {count} GPUs"
            raise DeviceError(f"device {device!r}: {name} does not exist; {have}")
        if name in names[:i]:
            raise DeviceError(f"device {device!r} names {name} twice; give each GPU once")
    return names


__all__ = ["DRIVER", "Gpus", "TorchGpus", "driver", "index_of", "named"]
