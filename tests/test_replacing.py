"""Replacing an earlier model, and disks that are full."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from damage import INDEX
from safetensors.torch import load_file
from written_models import TENSORS, contents, fill, write_model

from fastmerge.checkpoint import (
    OutputFolder,
    OutputTensor,
    open_checkpoint,
    plan_layout,
)
from fastmerge.checkpoint.durable import reserve
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError

# ---- replacing an earlier model -----------------------------------------------------------------


@pytest.mark.parametrize("old", [10**9, 40, 70])
@pytest.mark.parametrize("new", [10**9, 40, 70])
def test_force_replaces_the_model(tmp_path: Path, old: int, new: int) -> None:
    write_model(tmp_path, plan_layout(TENSORS, old), 100.0)
    earlier = ["pytorch_model.bin", "pytorch_model-1.bin", "pytorch_model.bin.index.json"]
    for name in (*earlier, "model.gguf", "quantize_config.json", "hf_quant_config.json"):
        (tmp_path / name).write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    layout = plan_layout(TENSORS, new)
    with OutputFolder(tmp_path, layout, force=True) as out:
        fill(out)
        assert {n: b for n, b in contents(tmp_path).items() if not n.endswith(".partial")} == before
        out.commit({"config.json": b'{"new": 1}'})
    expected = {s.file_name for s in layout.shards} | {"config.json", "notes.txt"}
    expected |= {INDEX} if layout.index else set()
    assert set(os.listdir(tmp_path)) == expected
    for name in (s.file_name for s in layout.shards):
        assert all(
            not t.numel() or t.flatten()[0] == 0 for t in load_file(tmp_path / name).values()
        )


def test_force_keeps_the_old_model_on_failure(tmp_path: Path) -> None:
    write_model(tmp_path, plan_layout(TENSORS, 40), 100.0)
    before = contents(tmp_path)
    with (
        pytest.raises(ValueError),
        OutputFolder(tmp_path, plan_layout(TENSORS, 10**9), force=True) as out,
    ):
        fill(out)
        raise ValueError
    assert contents(tmp_path) == before


@pytest.mark.parametrize("call", ["rename", "fsync"])
@pytest.mark.parametrize("new", [10**9, 40])
def test_any_failure_during_commit_restores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, new: int
) -> None:
    """Fail the first, second, ... call in turn until the commit gets through."""
    real = getattr(os, call)
    for fail_at in range(100):
        folder = tmp_path / str(fail_at)
        write_model(folder, plan_layout(TENSORS, 40), 100.0)
        before = contents(folder)
        calls = 0

        def flaky(*args: object, fail_at: int = fail_at, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == fail_at + 1:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, flaky)
            try:
                write_model(folder, plan_layout(TENSORS, new), force=True)
            except CheckpointError as error:
                assert "input/output error" in str(error)
                assert contents(folder) == before
                if call == "fsync":
                    assert calls == fail_at + 1  # never tried again
            else:
                break
    assert 3 <= fail_at < 99


def test_folder_in_the_way_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with (
        pytest.raises(CheckpointError, match=r"config\.json is a folder"),
        OutputFolder(tmp_path, plan_layout(TENSORS, 40), force=True) as out,
    ):
        out.commit({"config.json": b"{}"})
    assert os.listdir(tmp_path) == ["config.json"]


def test_killed_run_s_leftovers_are_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "from test_checkpoint import *\n"
        "out = OutputFolder(Path(sys.argv[1]), plan_layout(TENSORS, 40)); out.__enter__()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(Path(__file__).parent)])
    assert done.returncode == -9
    assert sorted(os.listdir(folder))[0].endswith(".safetensors.partial")
    write_model(folder, plan_layout(TENSORS, 10**9))
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_links_in_the_output_are_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out" / "model.safetensors.partial").symlink_to(tmp_path / "precious")
    (tmp_path / "out" / "config.json").symlink_to(tmp_path / "precious")
    write_model(tmp_path / "out", plan_layout(TENSORS, 10**9), force=True)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "out" / "config.json").is_symlink()


# ---- a full disk --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting is not permitted")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_too_small_a_disk_is_named_before_work(small_disk: Path) -> None:
    layout = plan_layout([OutputTensor("a", DType.U8, (300_000,))], 10**9)
    out = OutputFolder(small_disk / "out", layout)
    with pytest.raises(CheckpointError, match=rf"needs {layout.disk_bytes} bytes, only \d+ free"):
        out.check()
    with pytest.raises(CheckpointError, match=r"only \d+ free"), out:
        pass
    assert os.listdir(small_disk) == []


def test_disk_that_fills_up_meanwhile(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = plan_layout([OutputTensor("a", DType.U8, (100_000,))], 10**9)
    with (
        pytest.raises(CheckpointError, match=r"needs \d+ bytes, only \d+ free"),
        OutputFolder(small_disk / "out", layout) as out,
    ):
        out.commit({"tokenizer.json": bytes(300_000)})
    assert os.listdir(small_disk) == []
    # Reserving itself finds no space where the file system told nothing before.
    monkeypatch.setattr("fastmerge.checkpoint.destination.free_bytes", lambda folder: None)
    layout = plan_layout([OutputTensor("a", DType.U8, (300_000,))], 10**9)
    with (
        pytest.raises(CheckpointError, match=r"bytes, only \d+ free"),
        OutputFolder(small_disk / "o", layout),
    ):
        pass
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_in_the_body(tmp_path: Path, code: int) -> None:
    layout = plan_layout(TENSORS, 40)
    quota = "quota" if code == errno.EDQUOT else ""
    with (
        pytest.raises(
            CheckpointError, match=rf"needs {layout.disk_bytes} bytes, only \d+ free.*{quota}"
        ),
        OutputFolder(tmp_path / "out", layout),
    ):
        raise OSError(code, os.strerror(code))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "posix_fallocate"])
def test_disk_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    expect = "cannot be written" if code == errno.EIO else r"needs \d+ bytes, only \d+ free"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match=expect) as caught:
            write_model(tmp_path / "out", plan_layout(TENSORS, 40))
    assert str(caught.value).isprintable()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL, None])
def test_file_systems_that_cannot_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def fail(*args: object) -> None:
        raise OSError(code, "no")

    if code is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", fail)
    write_model(tmp_path / "out", plan_layout(TENSORS, 40))
    assert len(open_checkpoint(tmp_path / "out").tensors) == len(TENSORS)


def test_reserve_gives_size_and_blocks(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with path.open("w+b") as file:
        reserve(file.fileno(), path, 1 << 20)
    assert path.stat().st_size == 1 << 20
