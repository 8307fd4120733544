"""Reading and writing model folders: against safetensors' own library, and through failures."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from damage import INDEX, SHARD_1, SHARD_2, make_good_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastmerge.card import hub_id, model_card
from fastmerge.checkpoint import (
    Layout,
    OutputFolder,
    OutputTensor,
    companion_files,
    identity,
    merged_config,
    open_checkpoint,
    parse_size,
    plan_layout,
    read_header,
)
from fastmerge.checkpoint.durable import reserve
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError, RecipeError

TENSORS = [
    OutputTensor("model.embed.weight", DType.F32, (5, 3)),
    OutputTensor("model.norm.weight", DType.F32, (3,)),
    OutputTensor("model.empty", DType.F32, (0, 7)),
    OutputTensor("model.scale", DType.F32, ()),
    OutputTensor("lm_head.weight", DType.F32, (5, 3)),
]


def values(tensor: OutputTensor, start: float = 0.0) -> bytes:
    t = torch.arange(tensor.n, dtype=torch.float32) + start
    return t.numpy().tobytes()


def fill(out: OutputFolder, start: float = 0.0) -> None:
    """Write every tensor at its place, last first: order must not matter."""
    for index, shard in enumerate(out.layout.shards):
        for name, info in reversed(shard.tensors.items()):
            tensor = OutputTensor(name, info.dtype, info.shape)
            os.pwrite(out.fd(index), values(tensor, start), info.offset)


def write_model(path: Path, layout: Layout, start: float = 0.0, **options: object) -> None:
    with OutputFolder(path, layout, **options) as out:  # type: ignore[arg-type]
        fill(out, start)
        out.commit({"config.json": b"{}"})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


# ---- reading ------------------------------------------------------------------------------------


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    dtypes = [d for d in DType if d not in (DType.U64, DType.U32, DType.U16)]
    tensors = {d.safetensors: torch.zeros(3, 2, dtype=getattr(torch, d.torch)) for d in dtypes}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "empty2": torch.zeros(3, 0),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = open_checkpoint(tmp_path)
    assert found.config is None
    assert set(found.tensors) == set(tensors)
    raw = (tmp_path / "model.safetensors").read_bytes()
    for name, info in found.tensors.items():
        t = tensors[name]
        assert info.shape == tuple(t.shape) and info.n == t.numel()
        assert info.dtype.torch == str(t.dtype).removeprefix("torch.")
        stored = raw[info.offset : info.offset + info.n_bytes]
        assert stored == t.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    assert read_header(tmp_path / "model.safetensors").metadata == {"format": "pt"}


@pytest.mark.parametrize("header", ["{}", "{}" + " " * 98, '{"__metadata__":{}}', "{}\n\t "])
def test_file_without_tensors(tmp_path: Path, header: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert open_checkpoint(tmp_path).tensors == {}


def test_tensors_are_in_file_order(tmp_path: Path) -> None:
    header = {
        "z": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
        "e2": {"dtype": "U8", "shape": [0], "data_offsets": [3, 3]},
        "e1": {"dtype": "U8", "shape": [0], "data_offsets": [3, 3]},
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + bytes(range(5))
    )
    found = read_header(tmp_path / "model.safetensors")
    assert list(found.tensors) == ["a", "e2", "e1", "z"]
    assert found.tensors["z"].offset == found.data_start + 3 == 8 + len(text) + 3


def test_single_file_wins_over_index(tmp_path: Path) -> None:
    make_good_folder(tmp_path)
    save_file({"only": torch.ones(2)}, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    assert list(found.tensors) == ["only"]
    assert [f.name for f in found.weight_files] == ["model.safetensors"]


def test_shards_without_index(tmp_path: Path) -> None:
    make_good_folder(tmp_path)
    indexed = open_checkpoint(tmp_path)
    (tmp_path / INDEX).unlink()
    assert open_checkpoint(tmp_path) == indexed
    assert [t.file.name for t in indexed.tensors.values()] == [SHARD_1] * 3 + [SHARD_2]


def test_other_names_of_weights(tmp_path: Path) -> None:
    save_file({"b": torch.ones(2)}, tmp_path / "weights-b.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "weights-a.safetensors")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not read")
    (tmp_path / "._weights-a.safetensors").write_bytes(b"not read")
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b"]


def test_consolidated_is_a_second_copy(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]
    (tmp_path / "consolidated.safetensors").write_bytes(b"not read")
    save_file({"x": torch.ones(2)}, tmp_path / "model-other.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["x"]


def test_links_are_followed(tmp_path: Path) -> None:
    """The hub's cache keeps files under their hash and links to them."""
    make_good_folder(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert len(open_checkpoint(tmp_path / "snapshot").tensors) == 4


def test_config_with_infinity(tmp_path: Path) -> None:
    make_good_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    config = open_checkpoint(tmp_path).config
    assert config == {"time_step_limit": [0.0, float("inf")]}
    assert b"Infinity" in merged_config(config, DType.F32, None)


@pytest.mark.parametrize("change", ["truncate", "grow", "replace", "touch", "remove"])
def test_changed_file_is_noticed(tmp_path: Path, change: str) -> None:
    make_good_folder(tmp_path)
    found = open_checkpoint(tmp_path)
    found.check_unchanged()
    path = tmp_path / SHARD_2
    assert identity(path) in found.identities
    if change == "truncate":
        os.truncate(path, path.stat().st_size - 1)
    elif change == "grow":
        os.truncate(path, path.stat().st_size + 1)
    elif change == "replace":
        (tmp_path / "new").write_bytes(path.read_bytes())
        os.replace(tmp_path / "new", path)
    elif change == "touch":
        os.utime(path, ns=(0, 0))
    else:
        path.unlink()
    expected = {
        "truncate": "bytes while it was being read",
        "grow": "bytes while it was being read",
        "replace": "was replaced by another file",
        "touch": "was written to",
        "remove": "cannot be read",
    }[change]
    with pytest.raises(CheckpointError, match=f"{SHARD_2}.*{expected}"):
        found.check_unchanged()


# ---- layout -------------------------------------------------------------------------------------


def test_one_shard_has_no_index() -> None:
    layout = plan_layout(TENSORS, 10**9)
    (shard,) = layout.shards
    assert shard.file_name == "model.safetensors" and layout.index is None
    assert list(shard.tensors) == [t.name for t in TENSORS]
    assert len(shard.header) % 4096 == 0
    assert layout.total_size == sum(t.n_bytes for t in TENSORS)
    assert shard.size == layout.disk_bytes == layout.total_size + len(shard.header)
    assert layout.places()["model.scale"] == (0, shard.tensors["model.scale"])


def test_overflowing_tensor_starts_a_shard() -> None:
    sizes = [3, 3, 5, 11, 0, 2, 8]  # limit 10
    layout = plan_layout([OutputTensor(f"t{i}", DType.U8, (n,)) for i, n in enumerate(sizes)], 10)
    assert [list(s.tensors) for s in layout.shards] == [
        ["t0", "t1"],
        ["t2"],
        ["t3", "t4"],
        ["t5", "t6"],
    ]
    assert [s.file_name for s in layout.shards][::3] == [
        "model-00001-of-00004.safetensors",
        "model-00004-of-00004.safetensors",
    ]
    assert layout.index is not None
    index = json.loads(layout.index)
    assert index["metadata"] == {"total_size": 32, "total_parameters": 32}
    assert index["weight_map"]["t3"] == "model-00003-of-00004.safetensors"


def test_misaligned_tensors_are_put_widest_first() -> None:
    tensors = [
        OutputTensor("mask", DType.BOOL, (3,)),
        OutputTensor("half", DType.BF16, (1,)),
        OutputTensor("wide", DType.F64, (1,)),
        OutputTensor("half2", DType.F16, (1,)),
    ]
    (shard,) = plan_layout(tensors, 10**9).shards
    assert list(shard.tensors) == ["wide", "half", "half2", "mask"]
    assert all(t.offset % t.dtype.itemsize == 0 for t in shard.tensors.values())


@pytest.mark.parametrize(
    ("name", "expect"),
    [("", "empty name"), ("a\n", "control characters"), ("__metadata__", "cannot name a tensor")],
)
def test_names_that_cannot_be_stored(name: str, expect: str) -> None:
    with pytest.raises(CheckpointError, match=expect):
        plan_layout([OutputTensor(name, DType.F32, (1,))], 100)


def test_duplicate_names_are_refused() -> None:
    with pytest.raises(CheckpointError, match="two tensors are named 'a'"):
        plan_layout([OutputTensor("a", DType.F32, (1,))] * 2, 100)


@given(
    st.lists(
        st.tuples(st.sampled_from(list(DType)), st.lists(st.integers(0, 5), max_size=3)), max_size=8
    ),
    st.integers(1, 200),
)
@settings(deadline=None, max_examples=60)
def test_layout_is_what_readers_accept(
    tmp_path_factory: pytest.TempPathFactory, specs: list[tuple[DType, list[int]]], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("layout") / "out"
    tensors = [OutputTensor(f"t.{i}.ü", d, tuple(s)) for i, (d, s) in enumerate(specs)]
    layout = plan_layout(tensors, limit)
    with OutputFolder(folder, layout) as out:
        out.commit()
    found = open_checkpoint(folder)
    assert {n: (t.dtype, t.shape) for n, t in found.tensors.items()} == {
        t.name: (t.dtype, t.shape) for t in tensors
    }
    for shard in layout.shards:
        with safe_open(folder / shard.file_name, "pt") as library:
            assert set(library.keys()) == set(shard.tensors)
        for name, info in shard.tensors.items():
            assert found.tensors[name].offset == info.offset
            assert info.offset % info.dtype.itemsize == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("5000000000", 5 * 10**9),
        ("5B", 5 * 10**9),
        ("5b", 5 * 10**9),
        ("5GB", 5 * 10**9),
        ("5G", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("500M", 5 * 10**8),
        ("10k", 10**4),
        ("10kB", 10**4),
        ("2T", 2 * 10**12),
        ("1.5GB", 15 * 10**8),
        ("4GiB", 4 * 2**30),
        ("1 MiB", 2**20),
        ("3KiB", 3 * 1024),
        (" 7 ", 7),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "-1",
        "0",
        "0GB",
        "0.1",
        "5BB",
        "5GBB",
        "5 G B",
        "1e9",
        "5X",
        "5\n6",
        "²",
        "٥GB",
        "1_000",
        "1,5GB",
        ".5GB",
        "5.GB",
        "inf",
        "nan",
        "9" * 30,
        "9" * 9000,
        "99999999T",
        "0x10",
    ],
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_size(text)
    assert str(caught.value).isprintable() and str(caught.value).startswith("size must ")


# ---- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [10**9, 40])
def test_library_reads_what_is_written(tmp_path: Path, limit: int) -> None:
    folder = tmp_path / "deep" / "er" / "out"
    layout = plan_layout(TENSORS, limit)
    source = tmp_path / "source.model"
    source.write_bytes(b"\1" * 3_000_000)
    with OutputFolder(folder, layout) as out:
        fill(out)
        out.commit(
            {"config.json": b"{}", "both": b"small"},
            {"tokenizer.model": source, "both": source, "1_Pooling/config.json": source},
        )
    shards = [s.file_name for s in layout.shards]
    others = ["config.json", "both", "tokenizer.model", "1_Pooling/config.json"]
    if limit == 40:
        assert len(shards) == 3
        others.append(INDEX)
    found = contents(folder)
    assert set(found) == {*shards, *others}
    assert found["both"] == b"small" and len(found["1_Pooling/config.json"]) == 3_000_000
    loaded: dict[str, torch.Tensor] = {}
    for name in shards:
        loaded |= load_file(folder / name)
        with safe_open(folder / name, "pt") as library:
            assert library.metadata() == {"format": "pt"}
    assert {n: tuple(t.shape) for n, t in loaded.items()} == {t.name: t.shape for t in TENSORS}
    for tensor in TENSORS:
        expected = torch.arange(tensor.n, dtype=torch.float32).reshape(tensor.shape)
        assert torch.equal(loaded[tensor.name], expected)
    assert set(open_checkpoint(folder).tensors) == {t.name for t in TENSORS}


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt(), SystemExit(1)])
def test_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with (
        pytest.raises(type(error)),
        OutputFolder(tmp_path / "a" / "b", plan_layout(TENSORS, 40)) as out,
    ):
        assert out.partial_path(1).stat().st_size == out.layout.shards[1].size
        raise error
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with OutputFolder(tmp_path / "out", plan_layout(TENSORS, 40)) as out:
        fill(out)
    assert list((tmp_path / "out").iterdir()) == []  # a folder that was there stays


def test_other_people_s_files_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError), OutputFolder(tmp_path / "a" / "b", plan_layout(TENSORS, 40)):
        (tmp_path / "a" / "note").write_text("mine")
        raise ValueError
    assert contents(tmp_path) == {"a/note": b"mine"}


def test_commit_works_once(tmp_path: Path) -> None:
    out = OutputFolder(tmp_path / "out", plan_layout(TENSORS, 40))
    with pytest.raises(RuntimeError):
        out.commit()
    with out:
        out.commit()
        with pytest.raises(RuntimeError):
            out.commit()


def test_exception_after_commit_keeps_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError), OutputFolder(tmp_path / "out", plan_layout(TENSORS, 40)) as out:
        out.commit()
        raise ValueError
    assert len(open_checkpoint(tmp_path / "out").tensors) == len(TENSORS)


@pytest.mark.parametrize("name", ["../x", "/x", "", ".", "a/b/c", "a//b", "a\nb", INDEX, SHARD_1])
def test_file_names_that_are_refused(tmp_path: Path, name: str) -> None:
    layout = plan_layout(TENSORS[:2], 60)
    with (
        pytest.raises(CheckpointError, match="output file"),
        OutputFolder(tmp_path / "o", layout) as out,
    ):
        out.commit({name: b""})
    assert list(tmp_path.iterdir()) == []


def test_missing_companion_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="gone cannot be read"),
        OutputFolder(tmp_path / "o", plan_layout(TENSORS, 60)) as out,
    ):
        out.commit({}, {"tokenizer.json": tmp_path / "gone"})
    assert list(tmp_path.iterdir()) == []


def test_foreign_write_to_a_shard_is_noticed(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="something else wrote"),
        OutputFolder(tmp_path / "o", plan_layout(TENSORS, 60)) as out,
    ):
        os.truncate(out.partial_path(0), 5)
        out.commit()


def test_output_is_locked(tmp_path: Path) -> None:
    layout = plan_layout(TENSORS, 10**9)
    with OutputFolder(tmp_path / "o", layout) as out:
        with (
            pytest.raises(CheckpointError, match="another merge"),
            OutputFolder(tmp_path / "o", layout),
        ):
            pass
        fill(out)
        out.commit()
    assert len(open_checkpoint(tmp_path / "o").tensors) == len(TENSORS)


# ---- where to write -----------------------------------------------------------------------------


def refuse(path: Path, expect: str, **options: object) -> None:
    out = OutputFolder(path, plan_layout(TENSORS, 10**9), **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=expect) as caught:
        out.check()
    assert str(caught.value).isprintable()
    with pytest.raises(CheckpointError, match=expect), out:
        pass


def test_output_must_be_empty(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    refuse(tmp_path, "is not empty.*'note'.*--force")
    assert contents(tmp_path) == {"note": b"mine"}


def test_output_must_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refuse(tmp_path / "file", "is a file; give a folder", force=True)
    refuse(tmp_path / "file" / "sub", "cannot be created: .*file is a file", force=True)
    (tmp_path / "link").symlink_to("gone")
    refuse(tmp_path / "link", "is not a folder")


def test_output_must_not_be_an_input(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_good_folder(model)
    (tmp_path / "link").symlink_to(model)
    before = contents(model)
    for path in (model, tmp_path / "link", tmp_path / "x" / ".." / "model"):
        for force in (False, True):
            if path.exists() or force is False:
                refuse(path, "is an input|not empty", inputs=[model], force=force)
    refuse(tmp_path, "of an input, which --force might delete", inputs=[model], force=True)
    assert contents(model) == before


def test_output_must_not_hold_what_an_input_links_to(tmp_path: Path) -> None:
    make_good_folder(tmp_path / "store")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / SHARD_1).symlink_to(tmp_path / "store" / SHARD_1)
    refuse(tmp_path / "store", "of an input", inputs=[tmp_path / "model"], force=True)


def test_output_may_be_a_new_folder_inside_an_input(tmp_path: Path) -> None:
    make_good_folder(tmp_path)
    write_model(tmp_path / "merged", plan_layout(TENSORS, 40), inputs=[tmp_path])
    assert len(open_checkpoint(tmp_path).tensors) == 4


def test_output_folder_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", deny)
    with (
        pytest.raises(CheckpointError, match="cannot be written: permission denied"),
        OutputFolder(tmp_path / "o", plan_layout(TENSORS, 40)),
    ):
        pass


# ---- replacing an earlier model -----------------------------------------------------------------


@pytest.mark.parametrize("old", [10**9, 40, 70])
@pytest.mark.parametrize("new", [10**9, 40, 70])
def test_force_replaces_the_model(tmp_path: Path, old: int, new: int) -> None:
    write_model(tmp_path, plan_layout(TENSORS, old), 100.0)
    for name in ("pytorch_model.bin", "pytorch_model-1.bin", "pytorch_model.bin.index.json"):
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


# ---- companions and configuration ---------------------------------------------------------------


def test_companions(tmp_path: Path) -> None:
    wanted = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tok_x.Tok", null]}}',
        "tokenizer.model": "",
        "vocab.json": "{}",
        "merges.txt": "",
        "spiece.model": "",
        "generation_config.json": "{}",
        "chat_template.jinja": "",
        "additional_chat_templates/tool.jinja": "",
        "preprocessor_config.json": "{}",
        "modules.json": "[]",
        "1_Pooling/config.json": "{}",
        "modeling_x.py": "from .layers_x import Layer\nfrom . import rope_x\n",
        "layers_x.py": "from .modeling_x import Model\n",
        "rope_x.py": "",
        "tok_x.py": "",
    }
    auto_map = {"AutoModel": "modeling_x.Model", "AutoConfig": "owner/repo--conf.C", "A": "../up.X"}
    others = {
        "config.json": json.dumps({"auto_map": auto_map}),
        "LICENSE": "",
        "README.md": "",
        "train.py": "",
        "conf.py": "",
        "model.safetensors": "",
        "training_args.bin": "",
        "docs/config.json": "",
        INDEX: "",
    }
    for name, text in (wanted | others).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "vocab.txt").mkdir()
    assert companion_files(tmp_path) == {n: tmp_path / n for n in sorted(wanted)}


@pytest.mark.parametrize("text", ["", "[]", '{"auto_map": 3}', '{"auto_map": {"a": [{}]}}'])
def test_companions_of_odd_configurations(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert companion_files(tmp_path) == {}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_keeps_the_donor_s_key(key: str) -> None:
    donor = {
        "architectures": ["X"],
        key: "float16",
        "tie_word_embeddings": True,
        "quantization_config": {"bits": 4},
        "text_config": {key: "float16", "hidden_size": 4, "quantization_config": {}},
        "vision_config": {"hidden_size": 8},
        "name": "ü",
    }
    before = json.dumps(donor)
    out = json.loads(merged_config(donor, DType.BF16, None))
    assert list(out) == [
        "architectures",
        key,
        "tie_word_embeddings",
        "text_config",
        "vision_config",
        "name",
    ]
    assert out[key] == "bfloat16" and out["tie_word_embeddings"] is True
    assert out["text_config"] == {key: "bfloat16", "hidden_size": 4}
    assert out["vision_config"] == {"hidden_size": 8}
    assert json.dumps(donor) == before


def test_config_gets_what_it_lacks() -> None:
    assert json.loads(merged_config({}, DType.F32, None)) == {"dtype": "float32"}
    donor = {"text_config": {"tie_word_embeddings": True}}
    out = json.loads(merged_config(donor, DType.F32, False))
    assert out["tie_word_embeddings"] is False
    assert out["text_config"] == {"tie_word_embeddings": False}


# ---- model card ---------------------------------------------------------------------------------


def card(**changes: object) -> str:
    fields: dict[str, object] = {
        "title": "out",
        "recipe_text": "merge_method: ties\n",
        "method_title": "TIES",
        "method_paper": "arXiv:2306.01708",
        "base_models": ["org/base", "org/math", "org/base"],
        "inputs": ["org/base", "/data/secret/math", "./code/"],
        "dtype": "bfloat16",
    }
    return model_card(**(fields | changes))  # type: ignore[arg-type]


def front_matter(text: str) -> dict[str, object]:
    _, yaml_text, _ = text.split("---\n", 2)
    return yaml.safe_load(yaml_text)


def test_card() -> None:
    text = card()
    assert front_matter(text) == {
        "base_model": ["org/base", "org/math"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["fastmerge", "merge", "mergekit"],
    }
    assert "[TIES](https://arxiv.org/abs/2306.01708)" in text
    assert "bfloat16" in text
    assert "- [org/base](https://huggingface.co/org/base)\n- `math`\n- `code`\n" in text
    assert "secret" not in text
    assert "```yaml\nmerge_method: ties\n```\n" in text


def test_card_without_hub_models() -> None:
    assert "base_model" not in front_matter(card(base_models=[]))


@pytest.mark.parametrize(
    "name",
    [
        'a"b',
        "a: b",
        "a\nb: c",
        "---",
        "#x",
        "a\\b",
        "\x00\x07\x7f\x85",
        "ü\u2028\ufeff",
        "😀",
        "- x",
        "'",
        "{a}",
        "&a",
        "*a",
        "!!python/object:os.system",
        "",
        "null",
        "1e5",
        "%",
    ],
)
def test_front_matter_survives_any_name(name: str) -> None:
    # not split by `---`: a name may hold that
    lines = card(base_models=[name]).split("\n")
    end = lines.index("---", 1)
    assert yaml.safe_load("\n".join(lines[1:end]))["base_model"] == [name]


@pytest.mark.parametrize("ticks", ["`", "```", "`````"])
def test_recipe_survives_backticks(ticks: str) -> None:
    recipe = f"a: 1\n{ticks}\n# b {ticks}x\n"
    lines = card(recipe_text=recipe).split("\n")
    opening = next(i for i, line in enumerate(lines) if line.endswith("`yaml"))
    fence = lines[opening].removesuffix("yaml")
    assert len(fence) >= 3
    closing = lines.index(fence, opening + 1)
    assert "\n".join(lines[opening + 1 : closing]) == recipe.rstrip("\n")


def test_card_escapes_markup() -> None:
    text = card(
        title="a\n# b <script>", inputs=["./x`y\nz"], method_title="[x](y)", method_paper=""
    )
    assert "\n# a \\# b \\<script\\>\n" in text
    assert "- ``x`y z``\n" in text
    assert "\\[x\\](y), stored" in text


@pytest.mark.parametrize(
    ("paper", "link"),
    [
        ("2306.01708", "(https://arxiv.org/abs/2306.01708)"),
        ("https://example.org/paper", "[TIES](https://example.org/paper)"),
        ("Smith 2020", "TIES (Smith 2020)"),
        ("javascript:alert(1)", "TIES (javascript:alert(1))"),
    ],
)
def test_card_links_the_paper(paper: str, link: str) -> None:
    assert link in card(method_paper=paper)


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/name-7B.v1") == "org/name-7B.v1"
    for local in ("./name", "/a/b", "name", "a/b/c", "../b", "~/b", "a/", "", "a b/c", "a/b\n"):
        assert hub_id(local) is None
        assert hub_id(local, {"_name_or_path": "org/name"}) == "org/name"
        assert hub_id(local, {"_name_or_path": local}) is None
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub_id("org/name") is None
    assert hub_id("org/name", {"_name_or_path": "other/name"}) == "other/name"
    assert hub_id("x", {"_name_or_path": 3}) is None
