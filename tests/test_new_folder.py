"""A folder that is made whole or not at all: what a crash, a second run and an earlier folder leave."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastmerge.checkpoint.new_folder import NewFolder
from fastmerge.errors import CheckpointError


def new(path: Path, overwrite: bool = False) -> NewFolder:
    files = re.compile("mark|part")
    return NewFolder(path, what="a thing", mark="mark", files=files, overwrite=overwrite, inputs=[])


def write(path: Path, text: str = "1", overwrite: bool = False) -> None:
    with new(path, overwrite) as made:
        (made.hidden / "mark").write_text(text)
        made.commit()


def test_it_appears_whole_and_replaces_one_of_its_kind(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out")
    write(tmp_path / "a" / "b" / "out", "2", overwrite=True)
    assert (tmp_path / "a" / "b" / "out" / "mark").read_text() == "2"
    assert os.listdir(tmp_path / "a" / "b") == ["out"]


def test_files_of_others_are_never_lost(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds 'notes.txt', which is no part of a thing"):
        write(tmp_path / "out", "2", overwrite=True)
    assert (tmp_path / "out" / "mark").read_text() == "1"


def test_two_runs_to_one_place_do_not_mix(tmp_path: Path) -> None:
    with new(tmp_path / "out") as first:
        (first.hidden / "part").write_text("first")
        with pytest.raises(CheckpointError, match="is being written by another run"):
            write(tmp_path / "out")
        assert (first.hidden / "part").read_text() == "first"
    assert not os.listdir(tmp_path)


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from test_new_folder import new
with new(Path({out!r})) as made:
    (made.hidden / "part").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == [".out.partial"]

    write(tmp_path / "out")

    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["mark"]


def test_a_link_in_place_of_the_hidden_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    (tmp_path / ".out.partial").symlink_to("precious")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "out")
    assert (tmp_path / "precious" / "file").read_text() == "mine"
