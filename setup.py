"""Builds fastmerge._cpu: one C++17 module, its kernels compiled once per instruction set; and, where nvcc is
found, fastmerge._cuda: kernels for NVIDIA GPUs, with CUDA's runtime inside: it loads without a driver.

Needs only a compiler and pybind11 (a build requirement); never imports torch, so the wheel fits every torch.
FASTMERGE_CUDA=0 leaves _cuda out, =1 makes a missing nvcc an error. FASTMERGE_CUDA_TARGETS=90 (or 80,90)
compiles for these compute capabilities alone: for a machine's own card, in a third of the time.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
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


SLOW = ("fused_", "lean_", "quant4")  # to compile: these begin
# Compiled for these, and as PTX that a driver compiles for what comes later.
CUDA_TARGETS = [int(t) for t in os.environ.get("FASTMERGE_CUDA_TARGETS", "80,90,100").split(",")]
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "-Xptxas",
    "-warn-spills",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "-Icsrc",
]


def find_nvcc():
    """Return nvcc's path, or None where it is missing or not wanted."""
    wanted = os.environ.get("FASTMERGE_CUDA", "")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None and wanted == "1":
        sys.exit("FASTMERGE_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME/bin")
    return nvcc


# All sources of both modules side by side: few are large, and most of the time goes into those.
ParallelCompile().install()


class BuildKernels(build_ext):
    """Compile csrc/cpu/isa_*.cpp with the flags of the instruction set in their name, csrc/cuda with nvcc."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or True

    def build_extension(self, ext):
        if ext.name.endswith("._cuda"):
            self.build_cuda(ext)
            return
        compile_one = self.compiler._compile

        def compile_for_isa(obj, src, suffix, cc_args, extra, pp_opts):
            isa = Path(src).stem.removeprefix("isa_")
            return compile_one(obj, src, suffix, cc_args, extra + ISA_FLAGS.get(isa, []), pp_opts)

        self.compiler._compile = compile_for_isa
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one

    def build_cuda(self, ext):
        """One object per source, side by side; the link puts CUDA's static runtime in."""
        nvcc = find_nvcc()
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in CUDA_TARGETS]
        codes.append(f"-gencode=arch=compute_{CUDA_TARGETS[-1]},code=compute_{CUDA_TARGETS[-1]}")
        includes = [f"-I{path}" for path in [*ext.include_dirs, *self.include_dirs]]
        defines = [f"-D{name}={value}" for name, value in ext.define_macros]
        newest = max(Path(f).stat().st_mtime for f in [*ext.depends, __file__])

        def compile_one(source):
            target = folder / (Path(source).name + ".o")
            changed = max(newest, Path(source).stat().st_mtime)
            if not target.exists() or target.stat().st_mtime < changed:
                command = [nvcc, *NVCC_FLAGS, *codes, *includes, *defines, "-x", "cu", "-c", source]
                subprocess.run([*command, "-o", str(target)], check=True)
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        module = Path(self.get_ext_fullpath(ext.name))
        module.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([nvcc, "-shared", "-cudart=static", *objects, "-o", str(module)], check=True)


shared = ["csrc/bindings/cpu.cpp", *sorted(str(p) for folder in ("csrc/cpu", "csrc/io")
          for p in Path(folder).glob("*.cpp") if not p.stem.startswith("isa_"))]  # fmt: skip
cpu = Pybind11Extension(
    "fastmerge._cpu",
    sources=[f"csrc/cpu/isa_{isa}.cpp" for isa in reversed(ISAS)] + shared,  # the slowest first
    include_dirs=["csrc"],
    define_macros=[("FM_X86", "1")] if IS_X86 else [],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    depends=[str(p) for p in sorted(Path("csrc").rglob("*")) if p.suffix in {".hpp", ".inl"}],
)

modules = [cpu]
if find_nvcc():
    cuda_sources = sorted(
        str(p) for p in Path("csrc/cuda").iterdir() if p.suffix in {".cu", ".cpp"}
    )
    targets = ", ".join([*(f"sm_{t}" for t in CUDA_TARGETS), "PTX"])
    modules.append(
        Pybind11Extension(
            "fastmerge._cuda",
            # The slowest first: all are compiled side by side.
            sources=[
                *sorted(cuda_sources, key=lambda s: not any(part in s for part in SLOW)),
                "csrc/bindings/cuda.cpp",
            ],
            define_macros=[("FM_TARGETS", f'"{targets}"')],
            depends=[
                str(p) for p in sorted(Path("csrc").rglob("*")) if p.suffix in {".hpp", ".cuh"}
            ],
        )
    )

setup(ext_modules=modules, cmdclass={"build_ext": BuildKernels})
