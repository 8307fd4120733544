"""What Triton's compiler makes of the main kernels for three generations of GPUs, without any of them.

    python tests/test_triton_build.py --record      after a change that is meant

Wide loads, no spills and exact arithmetic are rules; registers are held to what was recorded.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
RECORD = HERE / "golden" / "triton_build.json"
CAPABILITIES = (80, 90, 100)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

#: 16-byte loads of operands per block, and stores, of each case.
MEMORY = {
    "linear walk K=4": (5, 1),
    "ties walk K=2": (3, 1),
    "ties walk K=4": (5, 1),
    "ties walk K=8": (9, 1),
    "dare_ties walk K=4": (5, 1),
    "dare_ties mask K=4": (0, 0),  # no value is looked at; 8 bytes of mask are stored at a time
    "dare_ties balance K=4": (5, 0),
    "sce walk K=4": (5, 1),
    "keys": (2, 2),
    "count": (16, 0),
    "moments": (8, 0),  # unrolled by four steps
    "gram": (12, 0),
    "gram columns": (3, 0),
}

#: Coded formats: what is written, and what is only read.
WRITTEN = ("bnb_nf4", "bnb_fp4", "int4", "nvfp4", "mxfp4", "gptq", "awq", "q4_0", "q4_1", "q8_0",
           "gguf_mxfp4", "fp8")  # fmt: skip
READ = ("q4_k", "q6_k", "gguf_nvfp4", "int8")
CODED = [f"decode {f}" for f in WRITTEN + READ]
CODED += [f"{stage} {f}" for f in WRITTEN for stage in ("scales", "codes")]

#: The many kernels of codes are compiled for all three only where there is time.
CASES = [
    pytest.param(name, c, marks=pytest.mark.huge if name in CODED and c != 90 else ())
    for name in [*MEMORY, *CODED]
    for c in CAPABILITIES
]


def run(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a script that must not be interpreted; folder: for Triton's cache."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


#: Called with a case's name and a capability, returns what was made of it.
Built = Callable[[str, int], dict[str, int]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("triton")

    @cache
    def compiled(group: str, *capabilities: int) -> dict[str, dict[str, int]]:
        return run("compile_triton.py", folder, group, *map(str, capabilities))

    def case(name: str, capability: int) -> dict[str, int]:
        asked = ("coded", capability) if name in CODED else ("dense", *CAPABILITIES)
        return compiled(*asked)[f"{name} sm_{capability}"]

    return case


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_read_wide(name: str, capability: int, built: Built) -> None:
    case = built(name, capability)
    assert (case["vector_loads"], case["vector_stores"]) == MEMORY[name]
    assert case["wide_loads"] == case["vector_loads"], "the machine code splits the loads"
    assert (case["narrow_loads"], case["narrow_stores"]) == (0, 0)


@pytest.mark.parametrize(("name", "capability"), CASES)
def test_kernels_do_not_spill(name: str, capability: int, built: Built) -> None:
    assert built(name, capability)["spills"] == 0


def test_every_case_is_held_to_something() -> None:
    record = json.loads(RECORD.read_text())["registers"]
    assert {name.rsplit(" ", 1)[0] for name in record} == {*MEMORY, *CODED}


@pytest.mark.parametrize(("name", "capability"), CASES)
def test_arithmetic_is_exact(name: str, capability: int, built: Built) -> None:
    """No fused multiply-add, no flushed subnormals, no approximate division."""
    case = built(name, capability)
    assert (case["fused"], case["flushed"], case["approximate"]) == (0, 0, 0)


@pytest.mark.parametrize(("name", "capability"), CASES)
def test_registers(name: str, capability: int, built: Built) -> None:
    record = json.loads(RECORD.read_text())
    if importlib.metadata.version("triton") != record["triton"]:
        pytest.skip(f"recorded with triton {record['triton']}")
    most = record["registers"][f"{name} sm_{capability}"]
    assert built(name, capability)["registers"] <= most, (
        "if that is meant, run python tests/test_triton_build.py --record"
    )


def test_whatever_is_launched_compiles(tmp_path: Path) -> None:
    """Through Triton's own binding of arguments, which the interpreter goes round."""
    variants = run("bind_triton.py", tmp_path, "7")
    assert len(variants) == 15
    assert sum(n for n, _ in variants.values()) > 130
    assert all(fused == 0 for _, fused in variants.values())


def main() -> None:
    import tempfile

    if sys.argv[1:] != ["--record"]:
        sys.exit("usage: python tests/test_triton_build.py --record")
    with tempfile.TemporaryDirectory() as folder:
        built = run("compile_triton.py", Path(folder), "all", *map(str, CAPABILITIES))
    registers = {name: case["registers"] for name, case in built.items()}
    record = {"triton": importlib.metadata.version("triton"), "registers": registers}
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print(RECORD.read_text(), end="")


if __name__ == "__main__":
    main()
