"""The ways bytes move: the same output from all, the page cache left as it was, lost pages never believed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import families
import pytest
import torch
from click.testing import CliRunner

import fastmerge
from fastmerge import _cpu
from fastmerge.checkpoint import open_direct
from fastmerge.cli import main
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.streaming.sources import Io, is_warm
from fastmerge.streaming.stopwatch import table

#: More than one request of 4 MiB, sizes that are no multiple of a block, and small ones.
SHAPES = {
    "a": (1501, 1999),
    "e": (1600, 3000),
    "norm": (77,),
    "b": (640, 515),
    "c": (),
    "d": (300, 512),
}
MODES = [io.value for io in Io if io is not Io.GDS]


@pytest.fixture
def family(tmp_path: Path) -> Path:
    families.write_family(tmp_path, SHAPES, torch.bfloat16)
    return tmp_path


def merge(family: Path, method: str, out: str, **options: object) -> bytes:
    recipe = family / "recipe.yaml"
    recipe.write_text(families.recipe(method))
    fastmerge.merge(recipe, family / out, force=True, **options)  # type: ignore[arg-type]
    return (family / out / "model.safetensors").read_bytes()


def drop_cache(path: Path) -> None:
    """Take a file out of the page cache; skip where that cannot be done or not be seen."""
    path.read_bytes()
    if not is_warm(path):
        pytest.skip("the file system does not say what is cached")
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if is_warm(path):
        pytest.skip("the file system keeps all pages in memory")


def inputs(family: Path) -> list[Path]:
    return sorted(family.glob("*/model.safetensors"))


@pytest.mark.parametrize("method", ["linear", "ties", "passthrough"])
def test_modes_agree(family: Path, method: str) -> None:
    want = merge(family, method, "out")
    for io in MODES:
        assert merge(family, method, "out", io=io) == want, io
        assert merge(family, method, "out", io=io, fsync=False) == want, io


def test_unknown_mode(family: Path) -> None:
    with pytest.raises(
        RecipeError, match="io must be one of auto, mmap, direct, buffered, gds, got 'x'"
    ):
        merge(family, "linear", "out", io="x")


def test_warm_is_seen(family: Path) -> None:
    path = inputs(family)[0]
    drop_cache(path)
    assert not is_warm(path)
    path.read_bytes()
    assert is_warm(path)


@pytest.mark.parametrize("io", ["auto", "direct", "buffered"])
def test_page_cache_is_as_before(family: Path, io: str) -> None:
    """Cold inputs stay cold, warm ones warm."""
    paths = inputs(family)
    cold = paths[1]
    drop_cache(cold)
    for path in paths:
        if path != cold:
            path.read_bytes()
    merge(family, "linear", "out", io=io)
    assert not is_warm(cold)
    assert all(is_warm(p) for p in paths if p != cold)


def test_output_bypasses_the_page_cache(family: Path) -> None:
    drop_cache(inputs(family)[0])
    probe = open_direct(inputs(family)[0], os.O_RDONLY)
    if probe < 0:
        pytest.skip("no O_DIRECT here")
    os.close(probe)
    recipe = family / "recipe.yaml"
    recipe.write_text(families.recipe("linear"))
    for io, cached in (("direct", False), ("buffered", True)):
        fastmerge.merge(recipe, family / io, io=io)
        assert is_warm(family / io / "model.safetensors") is cached


@pytest.mark.parametrize("io", ["mmap", "direct", "buffered"])
def test_truncated_under_way(family: Path, io: str) -> None:
    """A file that loses its end while it is mapped: no signal kills the process, no zeros are merged."""
    victim = family / "e2" / "model.safetensors"
    recipe = family / "recipe.yaml"
    recipe.write_text(families.recipe("linear"))

    def truncate(*_: object) -> None:
        os.truncate(victim, 4096)

    # Before the file is opened for its tensors, and after its first tensor is merged.
    for when in ({"on_plan": truncate}, {"progress": truncate}):
        families.write_family(family, SHAPES, torch.bfloat16)
        with pytest.raises(CheckpointError, match=r"e2/model.safetensors: .*(truncated|changed)"):
            fastmerge.merge(recipe, family / "out", io=io, **when)  # type: ignore[arg-type]
        assert not (family / "out").exists()


def test_a_page_that_is_gone_is_counted(tmp_path: Path) -> None:
    """Touching a mapped page behind the file's end reads zeros and is known afterwards."""
    import ctypes

    path = tmp_path / "f"
    path.write_bytes(b"x" * (1 << 20))
    fd = os.open(path, os.O_RDWR)
    mapping = _cpu.Mapping(fd, 1 << 20)
    before = _cpu.lost_pages()
    assert ctypes.string_at(mapping.address + 5000, 1) == b"x"
    os.ftruncate(fd, 4096)
    assert ctypes.string_at(mapping.address + 5000, 1) == b"\0"
    assert _cpu.lost_pages() == before + 1
    transfers = _cpu.Transfers(False, 1)
    error, _ = transfers.wait(transfers.submit([(-1, -1, 0, 1 << 19, mapping.address + (1 << 19))]))
    assert error is not None
    transfers.close()
    os.close(fd)


def test_ranks_over_a_tensor_need_all_of_it(family: Path) -> None:
    """Drops by rank in the tensor cannot be streamed: they are refused in too little memory."""
    text = families.recipe("della", "rank_by: tensor")
    recipe = family / "recipe.yaml"
    recipe.write_text(text)
    shapes = {"w": (4000, 2500)}
    families.write_family(family / "large", shapes, torch.bfloat16)
    (family / "large" / "recipe.yaml").write_text(text)
    assert "rank_by" in text
    fastmerge.merge(recipe, family / "out")
    with pytest.raises(RecipeError, match="too little"):
        fastmerge.plan(family / "large" / "recipe.yaml", max_memory="200MB")


def test_profile(family: Path) -> None:
    """The merging thread's stages add up to the time that the engine took, and planning and finishing."""
    recipe = family / "recipe.yaml"
    recipe.write_text(families.recipe("ties"))
    report = fastmerge.merge(recipe, family / "out", io="direct")
    assert report.io == "direct"
    own = {s.name: s.seconds for s in report.stages if not s.threads}
    engine = sum(own.values()) - own["planning"] - own["finishing"]
    assert engine == pytest.approx(report.seconds) and min(own.values()) >= 0
    assert own["statistics"] > 0 and own["walk"] > 0
    behind = {s.name: s for s in report.stages if s.threads}
    assert behind["reading"].n_bytes == report.bytes_read and behind["reading"].seconds > 0
    assert behind["writing"].n_bytes == report.bytes_written
    command = ["merge", str(recipe), str(family / "out"), "--force", "-q", "--profile"]
    *printed, last = CliRunner().invoke(main, command).output.splitlines()
    assert last == f"trace: {family / 'out.trace.json'}"
    lines = table(report.stages).splitlines()
    assert len(printed) == len(lines)
    for line, other in zip(lines, printed, strict=True):
        assert line.split()[0] == other.split()[0] and len(line) <= 80


def test_transfers_that_are_dropped_say_so(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    arena = _cpu.Arena(1 << 20)
    with file.open("rb") as f:
        segment = (f.fileno(), -1, 0, 1 << 20, arena.address)
        transfers = _cpu.Transfers(False, 1)
        tickets = [transfers.submit([segment] * 50) for _ in range(20)]
        transfers.close()
        errors = [transfers.wait(t)[0] for t in tickets]
        late = transfers.wait(transfers.submit([segment]))[0]
    assert errors[-1] is not None and errors[-1][0] == errno.ECANCELED
    assert late is not None and late[0] == errno.ECANCELED
