"""Instructions per element of the main kernels, counted by callgrind: a slower kernel shows on any machine.

    python tests/test_instructions.py --record      after a change that is meant

Counted on the AVX2 build, on one thread, because valgrind knows no AVX-512. Each case runs at two sizes whose
difference is taken, so that what does not grow with the tensor (Python, set-up) does not count.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fastmerge import _cpu

HERE = Path(__file__).parent
RECORD = HERE / "golden" / "instructions.json"
NAMES = [
    "ties walk K=2", "ties walk K=4", "ties walk K=8", "linear walk K=4", "dare walk K=4",
    "order statistic K=4", "moments K=4", "gram K=4",
]  # fmt: skip
ELEMENTS = 1 << 19  # and twice as many: beyond 2^17, where rank cuts are found another way
TOLERANCE = 0.05


def compiler() -> str:
    """Return what compiled the kernels, as it signs its objects: other compilers give other counts."""
    found = re.search(rb"(GCC: \([^)]*\) |clang version )[0-9.]+", Path(_cpu.__file__).read_bytes())
    return found.group().decode() if found else "unknown"


def count(folder: Path) -> dict[str, float]:
    """Return instructions per element of every case; folder: for what callgrind writes."""
    marks = folder / "marks.so"
    source = str(HERE / "callgrind_marks.c")
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", source, "-o", str(marks)], check=True)
    environment = {
        **os.environ,
        "FASTMERGE_CPU_ISA": "avx2",
        "OPENBLAS_NUM_THREADS": "1",  # numpy's threads would be emulated, too
        "PYTHONHASHSEED": "0",
    }
    valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no",
                f"--callgrind-out-file={folder / 'counts'}"]  # fmt: skip
    script = [sys.executable, str(HERE / "count_instructions.py"), str(marks), str(ELEMENTS)]
    done = subprocess.run(
        [*valgrind, *script, *NAMES], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    totals: dict[str, int] = {}
    for dump in folder.glob("counts.*"):
        text = dump.read_text()
        label = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
        assert label and total, f"{dump}: callgrind wrote no label or no total"
        totals[label.group(1)] = int(total.group(1))
    return {
        name: (totals[f"{name} {2 * ELEMENTS}"] - totals[f"{name} {ELEMENTS}"]) / ELEMENTS
        for name in NAMES
    }


def why_not() -> str | None:
    """Return why instructions cannot be counted, or compared, here."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if shutil.which("gcc") is None or not Path("/usr/include/valgrind/callgrind.h").exists():
        return "gcc or valgrind's headers are not installed"
    if "avx2" not in _cpu.available_isas().split():
        return "this processor has no AVX2"
    return None


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    recorded: dict[str, Any] = json.loads(RECORD.read_text())
    if recorded["compiler"] != compiler():
        pytest.skip(f"recorded with {recorded['compiler']}, built with {compiler()}")
    return recorded["instructions_per_element"]


@pytest.fixture(scope="module")
def counted(record: dict[str, float], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return count(tmp_path_factory.mktemp("callgrind"))


@pytest.mark.parametrize("name", NAMES)
def test_instructions_per_element(
    name: str, record: dict[str, float], counted: dict[str, float]
) -> None:
    """Fewer is news as well: record it, or the next loss of as much stays unseen."""
    assert counted[name] == pytest.approx(record[name], rel=TOLERANCE), (
        f"{name}: {counted[name]:.2f} instructions per element, recorded {record[name]:.2f}; "
        "if that is meant, run python tests/test_instructions.py --record"
    )


def main() -> None:
    reason = "usage: python tests/test_instructions.py --record"
    if sys.argv[1:] == ["--record"]:
        reason = why_not() or ""
    if reason:
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        counts = {name: round(value, 2) for name, value in count(Path(folder)).items()}
    record = {"isa": "avx2", "compiler": compiler(), "instructions_per_element": counts}
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print(RECORD.read_text(), end="")


if __name__ == "__main__":
    main()
