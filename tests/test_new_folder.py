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


KILLED_AT = """
import os, sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from test_new_folder import write
calls = []
def killed(function, when):
    def counted(*args, **options):
        calls.append(function)
        if calls.count(function) == when:
            os._exit(9)
        return function(*args, **options)
    return counted
if {where!r} == "rename":
    os.rename = killed(os.rename, 2)
else:
    import shutil
    shutil.rmtree = killed(shutil.rmtree, 1)
write(Path({out!r}), "2", overwrite=True)
"""


@pytest.mark.parametrize(("where", "left"), [("rename", "1"), ("rmtree", "2")])
def test_a_swap_that_was_killed_is_settled_by_the_next_run(
    where: str, left: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write(out)
    code = KILLED_AT.format(tests=str(Path(__file__).parent), out=str(out), where=where)
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 9
    assert out.exists() == (where == "rmtree")  # with rename, between its two names
    assert ".out.partial.old" in os.listdir(tmp_path)

    with pytest.raises(CheckpointError, match=r"holds a thing; .*--overwrite"):
        write(out, "3")
    assert (out / "mark").read_text() == left

    for text in ("4", "5"):
        write(out, text, overwrite=True)
        assert (out / "mark").read_text() == text
        assert os.listdir(tmp_path) == ["out"]


def test_a_link_in_place_of_the_hidden_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    (tmp_path / ".out.partial").symlink_to("precious")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "out")
    assert (tmp_path / "precious" / "file").read_text() == "mine"
