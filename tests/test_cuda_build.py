"""What nvcc made of csrc/cuda for each target, read from the built module: wide loads, spills, registers.

    python tests/test_cuda_build.py --record        after a change that is meant

That every operand is read by one 16-byte load, and that nothing spills, are rules; registers are held to
what was recorded with the same nvcc.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from fastmerge.coding import Format

RECORD = Path(__file__).parent / "golden" / "cuda_build.json"
TARGETS = (80, 90, 100)
UNROLLED = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
ELECTIONS = ("none", "mass", "other")
STAGES = ("any", "all", "cut", "draw")
CODING = ("walk_any", "walk_coded", "walk_peak")


class Kernel(NamedTuple):
    """Machine instructions of one kernel on one target."""

    name: str
    target: int
    registers: int
    opcodes: Counter[str]

    def count(self, pattern: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if re.fullmatch(pattern, opcode))

    @property
    def local(self) -> int:
        """Accesses of local memory: arrays that are indexed, what a call saves, and what spills."""
        return self.count(r"(LDL|STL).*")

    @property
    def decodes(self) -> bool:
        """Whether it reads or writes codes: runs that are decoded are arrays."""
        return self.name.split()[0] in CODING or self.name.endswith("coded")


def module() -> Path | None:
    """Return the built module."""
    found = importlib.util.find_spec("fastmerge._cuda")
    return Path(found.origin) if found and found.origin else None


def cuobjdump() -> str | None:
    """Return CUDA's disassembler, from the toolkit or from Triton's wheel."""
    on_path = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if on_path or triton is None or triton.origin is None:
        return on_path
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(tool) if tool.exists() else None


def nvcc_version() -> str:
    if shutil.which("nvcc") is None:
        return "none"
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V([0-9.]+)", text)
    return found.group(1) if found else "unknown"


def why_not() -> str | None:
    if module() is None:
        return "the CUDA module is not built: nvcc was not found at install"
    return "cuobjdump is not installed" if cuobjdump() is None else None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def plain_name(mangled: str) -> str:
    """Return a kernel's name and template arguments in words."""
    lean = re.search(r"lean_kernelILi(\d+)ELN\w*?8ElectionE(\d)ELN\w*?5StageE(\d)E", mangled)
    if lean:
        k, election, stage = (int(x) for x in lean.groups())
        return f"lean {ELECTIONS[election]} {STAGES[stage]} K={k}"
    walk = re.search(r"walk_kernelILi(\d+)ELi(\d+)ELN\w*?8ElectionE(\d)E", mangled)
    if walk:
        k, width, election = (int(x) for x in walk.groups())
        return f"walk {ELECTIONS[election]} K={k or 'any'} x{width}"
    coding = re.search(r"walk_coded_kernelILN\w*?6FormatE(\d+)E", mangled)
    if coding:
        return f"walk_coded {Format(int(coding.group(1))).name.lower()}"
    arguments = r"(?:I([fd])?(?:N\w*?\d(Dense|Any)LoadE)?)?"
    name, real, load = re.findall(r"\d+([a-z_]+_kernel)" + arguments, mangled)[-1]
    words = [name.removesuffix("_kernel"), {"f": "f32", "d": "f64"}.get(real, "")]
    words += ["coded" if load == "Any" else ""]
    return " ".join(w for w in words if w)


@cache
def kernels() -> dict[tuple[str, int], Kernel]:
    """Disassemble the module: every kernel of every target."""
    tool, path = cuobjdump(), module()
    assert tool and path
    usage = subprocess.run(
        [tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    )
    registers: dict[tuple[str, int], int] = {}
    target = 0
    for line in usage.stdout.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            target = int(match.group(1))
        elif match := re.search(r"Function (\S+):", line):
            function = match.group(1)
        elif match := re.search(r"REG:(\d+)", line):
            registers[function, target] = int(match.group(1))
    found: dict[tuple[str, int], Kernel] = {}
    opcodes: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    instruction = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    with subprocess.Popen([tool, "-sass", str(path)], stdout=subprocess.PIPE, text=True) as listing:
        assert listing.stdout
        for line in listing.stdout:
            if match := instruction.match(line):
                opcodes[function, target][match.group(1)] += 1
            elif match := re.search(r"arch = sm_(\d+)", line):
                target = int(match.group(1))
            elif match := re.search(r"Function : (\S+)", line):
                function = match.group(1)
    for (function, target), counted in opcodes.items():
        if "_kernel" in function:
            name = plain_name(function)
            found[name, target] = Kernel(name, target, registers[function, target], counted)
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("election", ELECTIONS)
@pytest.mark.parametrize("width", [8, 4])
def test_every_operand_is_read_by_one_wide_load(election: str, width: int, target: int) -> None:
    """The base and K experts: K + 1 streaming loads of 16 bytes, of less only where a type has less."""
    for k in UNROLLED:
        kernel = kernels()[f"walk {election} K={k} x{width}", target]
        assert kernel.count(r"LDG\.E\.EF.*\.128.*") == k + 1, kernel.name
        # Four elements of a 16-bit type beside those of float32 have 8 bytes.
        assert kernel.count(r"LDG\.E\.EF.*\.64.*") == (0 if width == 8 else k + 1), kernel.name
        assert kernel.count(r"STG\.E\.EF.*\.128.*") >= 1, kernel.name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("election", ELECTIONS[:2])
def test_lean_walks_read_every_operand_by_one_wide_load(
    election: str, stage: str, target: int
) -> None:
    for k in range(1, 9):
        kernel = kernels()[f"lean {election} {stage} K={k}", target]
        assert kernel.count(r"LDG\.E\.EF.*\.128.*") == k + 1, kernel.name
        assert kernel.count(r"STG\.E\.EF.*\.128.*") >= 1, kernel.name


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(target: int) -> None:
    """Local memory is for what a call saves; the kernels of experts in registers make none but to divide.

    Those that go without registers for the sake of more blocks at a time may save some around rare parts.
    Those that decode have arrays there, as many as were recorded: the build warns of spills (setup.py).
    """
    for (name, at), kernel in kernels().items():
        if at == target and not kernel.decodes:
            most = 104 if "K=any" in name or not name.startswith("walk ") else 0
            assert kernel.local <= most, f"{name}: {kernel.local} accesses of local memory"


def test_arithmetic_is_exact() -> None:
    """In the PTX of all kernels: no fused multiply-add but by zero, which finds what is not finite; no flush
    of subnormals, division to nearest."""
    tool, path = cuobjdump(), module()
    assert tool and path
    ptx = subprocess.run([tool, "-ptx", str(path)], capture_output=True, text=True).stdout
    ptx = re.sub(r"\bfma\.rn\.f32 %f\d+, %f\d+, 0f00000000, (?:%f\d+|0f00000000);", "", ptx)
    pattern = r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.]+\.f(?:32|64))\s"
    floats = Counter(re.findall(pattern, ptx, re.MULTILINE))
    assert floats["div.rn.f32"] and floats["mul.rn.f32"] and floats["add.rn.f32"]
    for operation in floats:
        assert not re.match(r"(fma|mad)\.", operation), operation
        assert ".ftz" not in operation and "approx" not in operation and ".full" not in operation


@pytest.mark.parametrize("target", TARGETS)
def test_registers_are_as_recorded(target: int) -> None:
    recorded = json.loads(RECORD.read_text())
    if recorded["nvcc"] != nvcc_version():
        pytest.skip(f"recorded with nvcc {recorded['nvcc']}, here is {nvcc_version()}")
    for (name, at), kernel in kernels().items():
        if at == target:
            ceiling = recorded["registers"][f"{name} sm_{target}"]
            assert kernel.registers <= ceiling, (
                f"{name}: {kernel.registers} registers, had {ceiling}"
            )
            arrays = recorded["local"].get(f"{name} sm_{target}", 0)
            assert not kernel.decodes or kernel.local <= arrays, (
                f"{name}: {kernel.local} accesses of local memory, had {arrays}"
            )


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(__doc__)
    if why_not():
        sys.exit(why_not())
    held = {f"{n} sm_{t}": k.registers for (n, t), k in sorted(kernels().items()) if t in TARGETS}
    arrays = {f"{n} sm_{t}": k.local for (n, t), k in sorted(kernels().items()) if k.decodes}
    record = {"nvcc": nvcc_version(), "registers": held, "local": arrays}
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print(f"recorded {len(held)} kernels")
