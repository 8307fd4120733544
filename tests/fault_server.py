"""Runs fastmerge's command line in forked children with a fault armed: one JSON request a line, one answer.

Forking from a process that has imported everything makes a run cost milliseconds instead of a second.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

import torch  # noqa: F401

from fastmerge import _cpu, api, cli, verify  # noqa: F401


def child(request: dict[str, object], faults: ctypes.CDLL) -> None:
    log = os.open(str(request["log"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # A shell that starts its jobs in the background has them ignore SIGINT, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = os.path.realpath(str(request["below"])).encode()
    faults.fault_arm(request["kind"], ctypes.c_long(int(str(request["at"]))), folder)
    code = 1
    try:
        cli.main([str(a) for a in request["arguments"]], prog_name="fastmerge")  # type: ignore[attr-defined]
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException as error:
        print("traceback:", repr(error), file=sys.stderr)
    sys.stderr.flush()
    faults.fault_count.restype = ctypes.c_long
    count = faults.fault_count()
    faults.fault_arm(0, ctypes.c_long(0), b"/")
    with open(str(request["log"]) + ".count", "w") as file:
        file.write(str(count))
    os._exit(code)


def serve() -> None:
    faults = ctypes.CDLL(os.environ["LD_PRELOAD"])
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(request, faults)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
