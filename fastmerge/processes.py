"""Workers as processes of this machine, one per device.

Each is a Python of its own, fed through a socket pair: it imports nothing of the program that asked, so
that a script or notebook needs no guard against being run again.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Generator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from fastmerge.budget import Target
from fastmerge.errors import MergeError, WorkerError
from fastmerge.jobs import TensorJob
from fastmerge.planner import Plan
from fastmerge.streaming import gpus
from fastmerge.workers import Assignment, Event, Finished, deal_by_bytes, merge_assigned

#: What a worker runs: first the paths that its parent imports from, of which it is to find the same modules.
_MAIN = "import sys; fd, *sys.path = sys.argv[1:]; from fastmerge.processes import serve; serve(int(fd))"


class Processes:
    """One process for each of some devices, on this machine."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = list(devices)
        self.planned: str | Target = ",".join(devices)
        self.n_here = len(devices)

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def adapt(self, assignment: Assignment) -> Assignment:
        """See `workers.Workers`. Threads are divided; 0, as many as a process may use, stays."""
        threads = assignment.threads and max(1, assignment.threads // self.n_here)
        driver, first = gpus.DRIVER, self.devices[0]
        return replace(assignment, device=first, threads=threads, driver=driver)

    def deal(self, plan: Plan, left: Sequence[TensorJob]) -> list[tuple[str, str, list[str]]]:
        """Share tensors out by bytes, whatever shard they are in."""
        shares = deal_by_bytes(left, len(self.devices))
        return [(d, d, names) for d, names in zip(self.devices, shares, strict=True) if names]

    def run(
        self, assignments: Sequence[Assignment], memory: int
    ) -> Generator[tuple[int, Event], None, None]:
        """See `workers.Workers`."""
        started: list[_Process] = []
        try:
            for assignment in assignments:
                started.append(_Process(assignment))
            running = {process.connection: i for i, process in enumerate(started)}
            while running:
                for ready in wait(list(running)):
                    assert isinstance(ready, Connection)
                    i = running[ready]
                    event = started[i].receive()
                    yield i, event
                    if isinstance(event, Finished):
                        del running[ready]
        finally:
            for process in started:
                process.kill()
            for process in started:
                process.end()


class _Process:
    """A worker as its coordinator sees it."""

    def __init__(self, assignment: Assignment) -> None:
        self._label = assignment.label
        here, there = socket.socketpair()
        with there:
            # A session of its own: Ctrl-C is for the coordinator, which ends its workers itself.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, str(there.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                start_new_session=True,
            )
        self.connection = Connection(here.detach())
        try:
            self.connection.send(assignment)
        except OSError:  # it died at once; whoever waits for it says so
            pass
        except BaseException:
            self.kill()
            self.end()
            raise

    def receive(self) -> Event:
        """Return the next event. Raises what the worker raised, or WorkerError if it is gone."""
        try:
            message: Event | BaseException = self.connection.recv()
        except (EOFError, OSError):
            raise WorkerError(self._gone()) from None
        if isinstance(message, BaseException):
            raise message
        return message

    def _gone(self) -> str:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return f"the worker on {self._label} {how}"

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        """Wait for a worker that was killed, or has finished, to be gone with all its threads."""
        self._process.wait()
        self.connection.close()


# ---- in the worker ---------------------------------------------------------------------------------


def serve(fd: int) -> None:
    """Carry out the assignment that comes through a socket, and send back what happens."""
    connection = Connection(fd)
    assignment: Assignment = connection.recv()
    threading.Thread(target=_follow, args=(connection,), daemon=True).start()
    lock = threading.Lock()

    def send(message: Any) -> None:
        data = pickle.dumps(message)
        with lock:
            connection.send_bytes(data)

    try:
        try:
            send(merge_assigned(assignment, send))
        except (MergeError, OSError, MemoryError) as error:
            send(error)
        except Exception:
            text = traceback.format_exc()
            send(RuntimeError(f"the worker on {assignment.label} failed:\n{text}"))
    except (BrokenPipeError, ConnectionResetError):
        os._exit(1)  # nobody is there to tell


def _follow(connection: Connection) -> None:
    """End this process when its coordinator is gone: another may go on in the same folder."""
    try:
        connection.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
