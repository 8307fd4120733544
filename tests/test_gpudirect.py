"""Reads straight into a device's memory: through a stand-in for kvikio, which needs a driver even to read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch

import fastmerge
from fastmerge.errors import BackendError, CheckpointError, ReadError, RecipeError
from fastmerge.streaming import gpudirect
from fastmerge.streaming.device import HostDevice, Memory

KVIKIO = """
import os, threading, time

opened, reads = [], []


class Future:
    def __init__(self, buffer, size, offset, path):
        self.arguments = buffer, size, offset, path

    def get(self):
        buffer, size, offset, path = self.arguments
        if "fails" in os.environ.get("FAKE_KVIKIO", ""):
            raise RuntimeError("cuFile: internal error\\nand more")
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), size, offset)
        if "short" in os.environ.get("FAKE_KVIKIO", ""):
            data = data[:-1]
        import torch
        buffer[: len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return len(data)


class CuFile:
    def __init__(self, path, flags):
        assert flags == "r"
        self.path, self.closed = path, False
        opened.append(self)

    def pread(self, buffer, size, file_offset):
        assert buffer.numel() == size
        reads.append(size)
        return Future(buffer, size, file_offset, self.path)

    def close(self):
        self.closed = True
"""
DRIVER = "def get(name):\n    return {'is_gds_available': AVAILABLE}[name]\n"
DEFAULTS = "known = {}\n\n\ndef set(name, value):\n    known[name] = value\n"


@pytest.fixture
def kvikio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    package = tmp_path / "modules" / "kvikio"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(KVIKIO)
    (package / "cufile_driver.py").write_text(DRIVER.replace("AVAILABLE", "True"))
    (package / "defaults.py").write_text(DEFAULTS)
    monkeypatch.syspath_prepend(str(package.parent))
    yield package
    for name in ("kvikio", "kvikio.cufile_driver", "kvikio.defaults"):
        sys.modules.pop(name, None)


class Tensors(HostDevice):
    """Its memory is torch's, as a GPU's is."""

    def allocate(self, n_bytes: int) -> Memory:
        held = torch.empty(n_bytes + 512, dtype=torch.uint8)
        skip = -held.data_ptr() % 512
        return Memory(held.data_ptr() + skip, n_bytes, owner=held[skip : skip + n_bytes])


@pytest.fixture
def family(tmp_path: Path) -> Path:
    shapes = {"a": (501, 199), "norm": (77,), "c": (), "empty": (0, 5), "d": (300, 512)}
    families.write_family(tmp_path, shapes, torch.bfloat16)
    return tmp_path


def merge(family: Path, method: str, out: str, **options: object) -> bytes:
    recipe = family / "recipe.yaml"
    recipe.write_text(families.recipe(method))
    fastmerge.merge(recipe, family / out, backend="cpu", force=True, **options)  # type: ignore[arg-type]
    return (family / out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("max_vram", [None, "66MiB"])
def test_straight_reads_give_the_same_bytes(
    family: Path, kvikio: Path, monkeypatch: pytest.MonkeyPatch, method: str, max_vram: str | None
) -> None:
    want = merge(family, method, "host")
    monkeypatch.setattr(gpudirect, "why_not", lambda device: None)
    assert merge(family, method, "out", device=Tensors(), io="gds", max_vram=max_vram) == want
    fake = sys.modules["kvikio"]
    assert sum(fake.reads) == fastmerge.plan(family / "recipe.yaml").bytes_read
    assert fake.opened and all(file.closed for file in fake.opened)
    assert sys.modules["kvikio.defaults"].known == {"num_threads": gpudirect.THREADS}


def test_a_straight_read_that_fails_or_ends_early(
    family: Path, kvikio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpudirect, "why_not", lambda device: None)
    monkeypatch.setenv("FAKE_KVIKIO", "fails")
    with pytest.raises(
        ReadError, match=r"reading at byte \d+ failed: cuFile: internal error; what is"
    ):
        merge(family, "ties", "failed", device=Tensors(), io="gds")
    monkeypatch.setenv("FAKE_KVIKIO", "short")
    with pytest.raises(CheckpointError, match="truncated while being read"):
        merge(family, "ties", "short", device=Tensors(), io="gds")


def test_why_straight_reads_cannot_be_had(
    family: Path, kvikio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(name="cuda:0")
    assert gpudirect.why_not(gpu) is None  # type: ignore[arg-type]
    assert gpudirect.why_not(HostDevice()) == "cpu is not an NVIDIA GPU"
    (kvikio / "cufile_driver.py").write_text(DRIVER.replace("AVAILABLE", "False"))
    monkeypatch.delitem(sys.modules, "kvikio.cufile_driver")
    assert "no GPUDirect Storage here" in str(gpudirect.why_not(gpu))  # type: ignore[arg-type]
    (kvikio / "cufile_driver.py").write_text("raise ImportError('libcufile.so: no such file')")
    monkeypatch.delitem(sys.modules, "kvikio.cufile_driver")
    assert "does not load (libcufile.so: no such file)" in str(gpudirect.why_not(gpu))  # type: ignore[arg-type]
    with pytest.raises(
        BackendError, match=r"io gds cannot be used: cpu is not an NVIDIA GPU; choose auto"
    ):
        merge(family, "ties", "out", device=HostDevice(), io="gds")
    with pytest.raises(RecipeError, match="io gds reads into a GPU's memory"):
        merge(family, "ties", "out", io="gds")
    with pytest.raises(RecipeError, match="io mmap merges in the files' own memory"):
        merge(family, "ties", "out", device=HostDevice(), io="mmap")


def test_kvikio_is_optional() -> None:
    if gpudirect.importlib.util.find_spec("kvikio"):
        pytest.skip("the gds extra is installed")
    assert "pip install 'fastmerge[gds]'" in str(gpudirect.why_not(SimpleNamespace(name="cuda:0")))  # type: ignore[arg-type]
