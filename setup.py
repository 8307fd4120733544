"""Builds fastmerge._cpu: one C++17 module, its kernels compiled once per instruction set.

Needs only a compiler and pybind11 (a build requirement); never imports torch, so the wheel fits every torch.
"""

import platform
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# No contraction to fused multiply-add: every instruction set must give the same bits. Without trapping
# comparisons the selects of core/stages.hpp vectorise; no result depends on it.
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math",
         "-fno-math-errno", "-Wall", "-Wextra"]  # fmt: skip
IS_X86 = platform.machine().lower() in {"x86_64", "amd64"}
ISA_FLAGS = {
    "baseline": ["-march=x86-64-v2"] if IS_X86 else [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
ISAS = list(ISA_FLAGS) if IS_X86 else ["baseline"]


class BuildKernels(build_ext):
    """Compile csrc/cpu/isa_*.cpp with the flags of the instruction set in their name."""

    def build_extension(self, ext):
        compile_one = self.compiler._compile

        def compile_for_isa(obj, src, suffix, cc_args, extra, pp_opts):
            isa = Path(src).stem.removeprefix("isa_")
            return compile_one(obj, src, suffix, cc_args, extra + ISA_FLAGS.get(isa, []), pp_opts)

        self.compiler._compile = compile_for_isa
        super().build_extension(ext)


shared = ["csrc/bindings/cpu.cpp", *sorted(str(p) for folder in ("csrc/cpu", "csrc/io")
          for p in Path(folder).glob("*.cpp") if not p.stem.startswith("isa_"))]  # fmt: skip
cpu = Pybind11Extension(
    "fastmerge._cpu",
    sources=shared + [f"csrc/cpu/isa_{isa}.cpp" for isa in ISAS],
    include_dirs=["csrc"],
    define_macros=[("FM_X86", "1")] if IS_X86 else [],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    depends=[str(p) for p in sorted(Path("csrc").rglob("*")) if p.suffix in {".hpp", ".inl"}],
)

setup(ext_modules=[cpu], cmdclass={"build_ext": BuildKernels})
