"""No file, however broken, makes the reader do anything but raise one clear line."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from damage import DAMAGES, INDEX, SHARD_1, SHARD_2, Damage, make_good_folder
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastmerge.checkpoint import Header, open_checkpoint, read_header
from fastmerge.errors import CheckpointError


def test_good_folder_opens(tmp_path: Path) -> None:
    make_good_folder(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.tensors) == 4
    assert [f.name for f in checkpoint.weight_files] == [SHARD_1, SHARD_2]


def test_damages_are_many_and_distinct() -> None:
    assert len(DAMAGES) >= 200
    assert len({d.name for d in DAMAGES}) == len(DAMAGES)


def _ascii_name(damage: Damage) -> str:
    return damage.name.encode("unicode_escape").decode()


@pytest.mark.parametrize("damage", DAMAGES, ids=_ascii_name)
def test_damage_is_named(tmp_path: Path, damage: Damage) -> None:
    folder = tmp_path / "model"
    make_good_folder(folder)
    damage.apply(folder)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert damage.expect in message
    assert str(folder) in message
    assert message.isprintable()  # so one line, whatever the file's names hold
    assert len(message) < 600 + len(str(folder)) * 2 or damage.name == "shard name too long"


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a refusing `open` rather than file modes, which root may ignore."""
    make_good_folder(tmp_path)
    real = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).name == SHARD_1:
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=f"{SHARD_1} cannot be read: permission denied"):
        open_checkpoint(tmp_path)


def test_read_error_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_good_folder(tmp_path)

    def fail(fd: int, n: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(CheckpointError, match=r"cannot be read: input/output error"):
        read_header(tmp_path / SHARD_1)


def test_file_that_shrinks_while_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_good_folder(tmp_path)
    monkeypatch.setattr(os, "pread", lambda fd, n, offset: b"")
    with pytest.raises(CheckpointError, match=r"ends at byte 0, before byte 8"):
        read_header(tmp_path / SHARD_1)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_good_folder(tmp_path)
    whole = read_header(tmp_path / SHARD_1)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, offset: pread(fd, min(n, 3), offset))
    assert read_header(tmp_path / SHARD_1) == whole


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_impossible_path(path: str) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be a path|does not exist"):
        open_checkpoint(path)


def test_path_with_line_break_is_spelt_on_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "a\nb")
    assert "\n" not in str(caught.value)


def test_reader_opens_no_descriptor_for_good(tmp_path: Path) -> None:
    make_good_folder(tmp_path)
    before = sorted(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else []
    open_checkpoint(tmp_path)
    (tmp_path / SHARD_2).write_bytes(b"abc")
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
    if before:
        assert sorted(os.listdir("/proc/self/fd")) == before


def _check_consistent(header: Header, size: int) -> None:
    """What the engine relies on: tensors cover the data exactly, in order."""
    end = header.data_start
    for name, info in header.tensors.items():
        assert name == info.name and name
        assert not any(c in name for c in "\0\n\r\x1b")
        n = 1
        for length in info.shape:
            n *= length
        assert info.n == n and info.n_bytes == n * info.dtype.itemsize
        assert info.offset == end
        end += info.n_bytes
    assert end == size


def _survives(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert str(error).isprintable()
    else:
        _check_consistent(header, len(raw))


_FUZZ = settings(
    deadline=None,
    max_examples=400,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@_FUZZ
@given(st.binary(max_size=200))
@example(b"\x02\0\0\0\0\0\0\0{}")
def test_random_bytes(tmp_path: Path, raw: bytes) -> None:
    _survives(tmp_path / "x.safetensors", raw)


@_FUZZ
@given(st.text(max_size=100), st.binary(max_size=16))
def test_random_header_text(tmp_path: Path, text: str, data: bytes) -> None:
    encoded = text.encode(errors="surrogatepass")
    raw = len(encoded).to_bytes(8, "little") + encoded + data
    _survives(tmp_path / "x.safetensors", raw)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "BF16", "U8", "F4", "dtype", "shape", "data_offsets"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
_SMALL = st.integers(-2, 24) | st.sampled_from([2**31, 2**62, 2**63, 2**64])
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F64", "F4", "BOOL", "?"]),
        "shape": st.lists(_SMALL, max_size=3),
        "data_offsets": st.lists(_SMALL, min_size=2, max_size=2).map(sorted),
    }
)


@_FUZZ
@given(
    st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), _ENTRY | _JSON, max_size=4),
    st.integers(0, 24),
)
@example({"b": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}, 1)
def test_random_headers(tmp_path: Path, header: dict[str, object], n_data: int) -> None:
    encoded = json.dumps(header).encode()
    raw = len(encoded).to_bytes(8, "little") + encoded + bytes(n_data)
    _survives(tmp_path / "x.safetensors", raw)


@_FUZZ
@given(st.data())
def test_mutated_file(tmp_path: Path, data: st.DataObject) -> None:
    make_good_folder(tmp_path)
    raw = bytearray((tmp_path / SHARD_1).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "copy"]))
        if kind == "set" and raw:
            raw[at] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'{}[]",:0-9')))
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del raw[at : at + data.draw(st.integers(1, 40))]
        else:
            raw[at:at] = raw[at : at + data.draw(st.integers(1, 40))]
    _survives(tmp_path / "x.safetensors", bytes(raw))


@_FUZZ
@given(_JSON)
def test_random_index(tmp_path: Path, value: object) -> None:
    make_good_folder(tmp_path)
    for text in (json.dumps(value), json.dumps({"weight_map": value})):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path)
        assert str(caught.value).isprintable()


def test_devices_are_never_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Path("/dev/null")
    assert stat.S_ISCHR(device.stat().st_mode)

    def refuse(*args: object) -> int:
        raise AssertionError("opened a device")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_header(device)
