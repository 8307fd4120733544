"""What test_instructions.py runs under callgrind: each case at two sizes, between marks.

python tests/count_instructions.py MARKS.so ELEMENTS CASE...    sizes are ELEMENTS and twice as many
"""

from __future__ import annotations

import ctypes
import sys

from fastmerge import _cpu, bench, ops


def main(library: str, elements: str, *names: str) -> None:
    marks = ctypes.CDLL(library)
    _cpu.set_threads(1)
    kernels = ops.choose("cpu", "cpu")
    cases = {case.name: case for case in bench.cases()}
    for name in names:
        for n in (int(elements), 2 * int(elements)):
            run = cases[name].prepare(kernels, cases[name].operands(n))
            run()  # what is done once only, such as growing scratch memory, is not counted
            marks.start_counting()
            run()
            marks.stop_counting(f"{name} {n}".encode())


main(*sys.argv[1:])
