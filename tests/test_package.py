"""The source distribution is whole: it builds in isolation, without torch, and its module loads elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_sdist_builds_in_isolation_and_imports(tmp_path: Path) -> None:
    def run(*command: object, cwd: Path = ROOT) -> str:
        # The way of a machine without nvcc: test_cuda_build.py looks at what nvcc makes.
        environment = {**os.environ, "FASTMERGE_CUDA": "0"}
        done = subprocess.run(
            [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run(sys.executable, "-m", "build", "--sdist", "-o", tmp_path, ROOT)
    (sdist,) = tmp_path.glob("fastmerge-*.tar.gz")
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, sdist)
    # From elsewhere and with only the target in front: the checkout must not lend a file.
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import fastmerge, numpy as np;"
        "x = fastmerge.merge_tensors(None, [np.ones(3, 'f4'), np.zeros(3, 'f4')], method='linear', weight=1);"
        "assert (x == 0.5).all(); assert 'torch' not in sys.modules; print(fastmerge.__file__)"
    )
    where = run(sys.executable, "-c", code, cwd=tmp_path)
    assert where.startswith(str(target))
    built = {p.name.split(".")[0] for p in (target / "fastmerge").glob("*.so")}
    assert built == {"_cpu"}  # the checkout's own _cuda, if it has one, is not asked for
    assert (target / "fastmerge" / "triton_kernels" / "fused.py").exists()
