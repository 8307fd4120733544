"""Workers on a Ray cluster: one task per output shard.

The inputs and the output are folders that all machines see under the same paths. A task that dies with its
worker or machine is run again by Ray, and writes its shard again: the same bytes to the same places, so that
nothing depends on how far the first one came.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
from collections.abc import Generator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from fastmerge.budget import Target
from fastmerge.errors import BackendError, DeviceError, MergeError, RecipeError, WorkerError
from fastmerge.jobs import TensorJob
from fastmerge.planner import Plan
from fastmerge.streaming import gpus
from fastmerge.streaming.device import Device
from fastmerge.workers import (
    Assignment,
    Event,
    Finished,
    Passed,
    Wrote,
    deal_by_shard,
    merge_assigned,
)

#: How often a task is run again whose worker or machine died.
RETRIES = 3

#: More memory than any device has: each worker plans for its own, and the host's does not depend on it.
_ANY_DEVICE = 1 << 50

#: Seconds in which a cluster must answer.
_CONNECT_SECONDS = 10

#: Seconds for which tasks that were cancelled are waited for.
_CANCEL_SECONDS = 30


class RayWorkers:
    """See `workers.Workers`.

    address: of a cluster; "auto": the one at hand; "local": one that is started here and ends with the merge.
    A cluster that this process is connected to already is taken as it is.
    """

    def __init__(self, address: str, device: str | Device, threads: int) -> None:
        self._ray = _import_ray()
        if device not in ("cpu", "cuda"):
            raise DeviceError(
                f"device {device!r} cannot be chosen on a ray cluster; give cuda, a GPU for each task, or cpu"
            )
        self._address, self._device = address, str(device)
        self._threads = threads or 1
        self._connected = False
        self.planned: str | Target = "cpu" if device == "cpu" else Target("cuda", _ANY_DEVICE)
        self.n_here = 1

    def __enter__(self) -> RayWorkers:
        if not self._ray.is_initialized():
            self._connect()
            self._connected = True
        return self

    def _connect(self) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address == "local":
            # Nobody is told of a merge on this machine unless its user says so.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            options["include_dashboard"] = False
        try:
            _check_reachable(self._address)
            self._ray.init(address=self._address, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise MergeError(
                f"no ray cluster can be used at {self._address!r}: {_line(error)}; start one with "
                "`ray start --head`, or give --ray local"
            ) from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._connected:
            self._ray.shutdown()

    def adapt(self, assignment: Assignment) -> Assignment:
        """See `workers.Workers`."""
        return replace(
            assignment,
            device=self._device,
            threads=self._threads,
            flush=True,
            driver=gpus.DRIVER,
        )

    def deal(self, plan: Plan, left: Sequence[TensorJob]) -> list[tuple[str, str, list[str]]]:
        """Share tensors out by shard: what is flushed and checked together."""
        return [(file, self._device, names) for file, names in deal_by_shard(plan, left)]

    def run(
        self, assignments: Sequence[Assignment], memory: int
    ) -> Generator[tuple[int, Event], None, None]:
        """See `workers.Workers`. What a task wrote is told when it is done."""
        ray = self._ray
        demand: dict[str, Any] = {"num_cpus": self._threads, "memory": memory}
        if self._device == "cuda":
            demand["num_gpus"] = 1
        self._check_demand(demand)
        task = ray.remote(max_retries=RETRIES, **demand)(run_task)
        running: dict[Any, int] = {}
        try:
            for i, assignment in enumerate(assignments):
                name = f"fastmerge {assignment.label}"
                running[task.options(name=name).remote(assignment)] = i
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                i = running.pop(done)
                for event in self._events(done, assignments[i]):
                    yield i, event
        finally:
            self._cancel(list(running))

    def _check_demand(self, demand: dict[str, Any]) -> None:
        """Raise MergeError if no machine could ever run a task: Ray would wait for one."""
        names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
        machines = [n["Resources"] for n in self._ray.nodes() if n["Alive"]]
        if any(all(m.get(names[k], 0) >= v for k, v in demand.items()) for m in machines):
            return
        gpu = " a GPU," if "num_gpus" in demand else ""
        raise MergeError(
            f"no machine of the ray cluster has {demand['num_cpus']} CPUs,{gpu} and "
            f"{demand['memory'] >> 20} MiB of memory for a task; lower --threads or --max-memory, or add one"
        )

    def _events(self, done: Any, assignment: Assignment) -> list[Event]:
        exceptions = self._ray.exceptions
        try:
            result: list[Event] | BaseException = self._ray.get(done)
        except exceptions.RayTaskError as error:
            if "failed to import on the worker" in str(error):
                raise BackendError(
                    "a machine of the ray cluster cannot import fastmerge; install this version on all"
                ) from None
            raise RuntimeError(f"the task for {assignment.label} failed:\n{error}") from None
        except exceptions.RayError as error:
            raise WorkerError(
                f"the task for {assignment.label} was lost {RETRIES + 1} times: {_line(error)}"
            ) from None
        if isinstance(result, BaseException):
            raise result
        return result

    def _cancel(self, tasks: list[Any]) -> None:
        for task in tasks:
            self._ray.cancel(task, force=True)
        if tasks:  # their writing must have ended before anyone else touches the folder
            self._ray.wait(tasks, num_returns=len(tasks), timeout=_CANCEL_SECONDS)


def run_task(assignment: Assignment) -> list[Event] | BaseException:
    """Carry out an assignment; return what happened, or the error that its coordinator is to raise."""
    parts: list[tuple[str, int, int, int]] = []
    passed: list[Event] = []

    def report(event: Event) -> None:
        if isinstance(event, Wrote):
            parts.extend(event.parts)
        elif isinstance(event, Passed):
            passed[:] = [event]

    try:
        finished: Finished = merge_assigned(assignment, report)
    except (MergeError, OSError, MemoryError) as error:
        return error
    return [*([Wrote(parts)] if parts else []), *passed, finished]


def _check_reachable(address: str) -> None:
    """Raise OSError if nobody answers at an address, which Ray would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        if error.name != "ray":
            raise RecipeError(f"ray cannot be imported: {_line(error)}") from None
        raise RecipeError(
            "merging on a ray cluster needs ray; install it with pip install 'fastmerge[ray]'"
        ) from None


def _line(error: BaseException) -> str:
    """Return the first sentence of a message: Ray's go on with advice of many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].split(". ")[0].rstrip(".") if lines else type(error).__name__


__all__ = ["RayWorkers", "run_task"]
