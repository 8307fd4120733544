"""Model folders: reading, layout and writing, against safetensors' own library."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from damage import INDEX, SHARD_1, SHARD_2, make_good_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from written_models import TENSORS, contents, fill, write_model

from fastmerge.checkpoint import (
    OutputFolder,
    OutputTensor,
    header_digest,
    identity,
    merged_config,
    open_checkpoint,
    parse_size,
    plan_layout,
    read_header,
)
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError, RecipeError

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


def test_digests_of_headers(tmp_path: Path) -> None:
    """What they cover: a safetensors file's header alone, and of other files what describes tensors."""
    make_good_folder(tmp_path)
    gguf, config = tmp_path / "m.gguf", tmp_path / "config.json"
    gguf.write_bytes(b"GGUF\x03\0\0\0" + bytes(40))
    for path, at, covered in (
        (tmp_path / SHARD_1, -1, False),
        (tmp_path / SHARD_1, 20, True),
        (gguf, 30, True),
        (config, 3, True),
    ):
        before, content = header_digest(path), bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)
        assert (header_digest(path) != before) is covered


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
