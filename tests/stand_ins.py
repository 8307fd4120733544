"""Two "GPUs" on host memory for tests of workers, which load them by name: see `gpus.DRIVER`.

What befalls a worker is told by files in the folder that FASTMERGE_TEST_FAULTS names: `die`, `stall` or
`full`, holding a number n. The first worker that comes to its nth copy back removes the file, and dies, waits
for ever, or finds the disk full. `die` may name a journal as well: until others have noted parts there, it
does not.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from fastmerge.streaming.device import Device, HostDevice, Stream

DRIVER = "stand_ins:HostGpus"
FAULTS = "FASTMERGE_TEST_FAULTS"


class FaultyDevice(HostDevice):
    """A device whose process may be made to die or to hang."""

    def __init__(self) -> None:
        super().__init__()
        self._copies = 0

    def copy(self, stream: Stream, target: int, source: int, n: int) -> None:
        if stream is Stream.COPY_OUT:
            self._copies += 1
            if (journal := self._due("die")) is not None:
                while journal and len(Path(journal).read_text().splitlines()) < 4:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            if self._due("stall") is not None:
                time.sleep(600)
            if self._due("full") is not None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().copy(stream, target, source, n)

    def _due(self, fault: str) -> str | None:
        """Return what a fault's file says behind its number, if it is to happen now."""
        folder = os.environ.get(FAULTS)
        if folder is None:
            return None
        file = Path(folder) / fault
        with suppress(OSError, ValueError):
            number, _, rest = file.read_text().partition(" ")
            if self._copies >= int(number):
                file.unlink()  # one of several fails here: the fault is the other's
                return rest
        return None


class HostGpus:
    """See `gpus.Gpus`."""

    def count(self) -> int:
        return 2

    def total_bytes(self, index: int) -> int:
        return 2 << 30

    def pci_address(self, index: int) -> str | None:
        return None

    def open(self, name: str, timed: bool) -> Device:
        return FaultyDevice()


class BrokenGpus(HostGpus):
    """Fails as only a bug does."""

    def open(self, name: str, timed: bool) -> Device:
        raise ArithmeticError("nobody expects this")


class DeadlyGpus(HostGpus):
    """Kills whoever wants one."""

    def open(self, name: str, timed: bool) -> Device:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError
