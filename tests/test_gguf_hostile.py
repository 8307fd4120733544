"""GGUF headers: what is broken gives one clear line, fast and in little memory."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_files import (
    ARRAY,
    F32,
    STRING,
    TYPE_F32,
    TYPE_Q4_0,
    U32,
    Raw,
    array,
    entry,
    good,
    key,
    text,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastmerge.checkpoint import gguf as container
from fastmerge.checkpoint.gguf import BLOCK_TYPES, GgufFile, ValueType, byte_count, read_gguf
from fastmerge.errors import CheckpointError

DAMAGES: dict[str, tuple[Callable[[], bytes], str]] = {}


def damage(name: str, expect: str, **parts: object) -> None:
    """A good file with some parts replaced."""

    def build() -> bytes:
        raw = good()
        for part, value in parts.items():
            setattr(raw, part, value)
        return raw.build()

    assert name not in DAMAGES
    DAMAGES[name] = (build, expect)


def raw_damage(name: str, expect: str, change: Callable[[bytes], bytes]) -> None:
    DAMAGES[name] = (lambda: change(good().build()), expect)


def values(*more: bytes) -> list[bytes]:
    return good().values + list(more)


def entries(*more: bytes) -> list[bytes]:
    return good().entries + list(more)


for n in (0, 1, 4, 23):
    raw_damage(f"{n} bytes", f"has {n} bytes, too short", lambda raw, n=n: raw[:n])
damage("no magic", "is not a GGUF file: it begins with b'PK", magic=b"PK\3\4")
damage("safetensors", "is not a GGUF file", magic=b"\x80\0\0\0")
damage("older format", "older than GGUF", magic=b"tjgg")
raw_damage(
    "git-lfs pointer", "git-lfs pointer", lambda raw: b"version https://git-lfs.github.com/spec"
)
damage("version 0", "is GGUF version 0; 2 and 3 are known", version=0)
damage("version 1", "is GGUF version 1, which nothing reads", version=1)
damage("version 4", "is GGUF version 4; 2 and 3", version=4)
damage("big-endian", "is big-endian; convert it with gguf-convert-endian", version=0x03000000)
for n in (1000, 2**31, 2**40, 2**63, 2**64 - 1):
    damage(f"{n} values", f"claims {n} values, more than its", n_values=n)
    damage(f"{n} tensors", f"claims {n} tensors, more than its", n_tensors=n)

# keys
damage("empty key", "is b'', not a name", values=values(key("", U32, bytes(4))))
damage("key twice", "has key 'toy.scale' twice", values=values(key("toy.scale", F32, bytes(4))))
damage(
    "key with a line break", r"is b'a\nb', not a name", values=values(key("a\nb", U32, bytes(4)))
)
damage("key not UTF-8", r"is b'\xff', not a name", values=values(key(b"\xff", U32, bytes(4))))
damage("key of a surrogate", "not a name", values=values(key(b"\xed\xa0\x80", U32, bytes(4))))
damage("long key", "claims 65536 bytes; 65535", values=values(key("k" * 65536, U32, bytes(4))))
damage("endless key", f"claims {2**63} bytes", values=values(struct.pack("<Q", 2**63)))

# values
damage("unknown type", "has a value of unknown type 13", values=values(key("k", 13, bytes(8))))
damage("type far away", "unknown type 4294967295", values=values(key("k", 2**32 - 1, bytes(8))))
damage("truth of 2", "is 2, neither true nor false", values=values(key("k", 7, b"\2")))
damage(
    "array of wrong truths",
    "is 255, neither true nor false",
    values=values(key("k", ARRAY, array(7, 2, b"\0\xff"))),
)
damage("text not UTF-8", "key 'k' is not UTF-8", values=values(key("k", STRING, text(b"a\xff"))))
damage(
    "text past the end",
    "ends within key 'k'",
    values=values(key("k", STRING, struct.pack("<Q", 2**40))),
)
damage(
    "array of arrays",
    "is an array of arrays",
    values=values(key("k", ARRAY, array(ARRAY, 1, array(U32, 1, bytes(4))))),
)
damage(
    "array of an unknown type",
    "unknown type 77",
    values=values(key("k", ARRAY, array(77, 1, bytes(4)))),
)
for n in (2**10, 2**32, 2**60, 2**64 - 1):
    for of in (0, U32, STRING, 12):
        damage(
            f"array of {n} of type {of}",
            f"key 'k' claims {n} elements, more than",
            values=values(key("k", ARRAY, array(of, n, b""))),
        )

# alignment
for name, content in {"0": 0, "3": 3, "31": 31, "4294967295": 2**32 - 1}.items():
    damage(
        f"alignment {name}",
        f"general.alignment is {name}, not a power of two",
        values=values(key("general.alignment", U32, struct.pack("<I", content))),
    )
damage(
    "alignment of another type",
    "general.alignment is 32, not a power",
    values=values(key("general.alignment", 10, struct.pack("<Q", 32))),
)
damage(
    "alignment as text",
    "general.alignment is '32', not",
    values=values(key("general.alignment", STRING, text("32"))),
)
damage(
    "alignment past the end",
    "past the end of the file",
    values=values(key("general.alignment", U32, struct.pack("<I", 2**31))),
    entries=[entry("a", [3, 2], TYPE_F32, 0)],
)

# tensors
damage("empty name", "empty name", entries=entries(entry("", [1], TYPE_F32, 0)))
damage("name with NUL", "control characters", entries=entries(entry("a\0", [1], TYPE_F32, 0)))
damage("name not UTF-8", "name of tensor 3 of 3 is not", entries=entries(entry(b"\xff", [1], 0, 0)))
damage("long name", "claims a name of 70000 bytes", entries=entries(entry("n" * 70000, [1], 0, 0)))
damage("tensor twice", "names tensor 'a' twice", entries=entries(entry("a", [1], TYPE_F32, 64)))
damage("5 dimensions", "has 5 dimensions; 4 is", entries=entries(entry("c", [1] * 5, 0, 64)))
damage(
    "many dimensions",
    "has 4294967295 dimensions",
    entries=entries(entry("c", [1], 0, 64, n_dims=2**32 - 1)),
)
for kind in (4, 5, 31, 36, 42, 2**31, 2**32 - 1):
    damage(
        f"type {kind}",
        f"tensor 'c' has unknown type {kind}",
        entries=entries(entry("c", [1], kind, 0)),
    )
for dims in ([2**63], [2**64 - 1], [2**32, 2**32], [0, 2**63], [2**62, 1], [2**21] * 3):
    damage(
        f"dimensions {dims}", "shape of too many elements", entries=entries(entry("c", dims, 0, 64))
    )
for dims in ([31], [33, 2], [1]):
    damage(
        f"blocks in rows {dims}",
        f"rows of {dims[0]} elements, but Q4_0 takes a multiple of 32",
        entries=entries(entry("c", dims, TYPE_Q4_0, 64)),
    )
damage("scalar of blocks", "rows of 1 elements", entries=entries(entry("c", [], TYPE_Q4_0, 64)))
for offset in (1, 33, 63, 2**63 + 1):
    damage(
        f"offset {offset}",
        f"offset {offset}, which is not a multiple of 32",
        entries=entries(entry("c", [1], TYPE_F32, offset)),
    )
for offset in (64, 96, 2**40, 2**64 - 32):
    damage(
        f"offset {offset} past the end",
        "past the end of the file",
        entries=entries(entry("c", [1], TYPE_F32, offset)),
    )
damage("same place", "'c' overlaps 'a'", entries=entries(entry("c", [6], TYPE_F32, 0)))
damage("into the next", "'b' overlaps 'a'", entries=[entry("a", [9], 0, 0), good().entries[1]])
damage("inside another", "overlaps", entries=entries(entry("c", [16], TYPE_F32, 0)))
damage(
    "empty inside another",
    "overlaps",
    entries=[entry("a", [16], TYPE_F32, 0), entry("c", [0], TYPE_F32, 32)],
)
raw_damage("data cut", "ends at byte", lambda raw: raw[:-15])


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    build, expect = DAMAGES[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(build())
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert expect in message
    assert str(path) in message
    assert message.isprintable() and len(message) < 400 + len(str(path))


def test_good_file_opens(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(good().build())
    found = read_gguf(path)
    assert list(found.metadata) == [
        "general.architecture",
        "toy.block_count",
        "toy.scale",
        "toy.names",
        "toy.numbers",
        "toy.flag",
    ]
    assert found.get("toy.names") == ["x", "yz"] and found.get("toy.numbers") == [1, 2, 3]
    assert found.metadata["toy.numbers"].of is ValueType.U32
    assert found.get("toy.flag") is True and found.get("toy.none", 7) == 7
    data = path.stat().st_size - 64
    a, b = found.tensors["a"], found.tensors["b"]
    assert (a.shape, a.offset, a.n_bytes) == ((2, 3), data, 24)
    assert (b.shape, b.offset, b.n_bytes, BLOCK_TYPES[b.type].name) == (
        (32,),
        data + 32,
        18,
        "Q4_0",
    )
    assert path.read_bytes()[a.offset : a.offset + 24] == bytes(range(24))
    assert found.path == path and found.alignment == 32
    found.identity.check_unchanged()


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    raw = good().build()
    path = tmp_path / "model.gguf"
    for n in range(len(raw) - 14):  # the last 14 bytes are padding
        path.write_bytes(raw[:n])
        with pytest.raises(CheckpointError):
            read_gguf(path)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_gguf(tmp_path)


def test_version_2_and_holes_are_read(tmp_path: Path) -> None:
    """Padding may be longer than it need be, and a scalar has no dimensions."""
    raw = good()
    raw.version = 2
    raw.entries = [entry("late", [], TYPE_F32, 96), entry("early", [2], TYPE_F32, 0)]
    raw.data = bytes(100)
    path = tmp_path / "model.gguf"
    path.write_bytes(raw.build())
    found = read_gguf(path)
    assert list(found.tensors) == ["early", "late"]
    assert found.tensors["late"].shape == () and found.tensors["late"].n_bytes == 4


def test_limits_on_what_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(good().build())
    monkeypatch.setattr(container, "ELEMENT_LIMIT", 4)
    with pytest.raises(
        CheckpointError, match=r"'toy\.numbers' makes it 5 elements of arrays; 4 is"
    ):
        read_gguf(path)
    monkeypatch.setattr(container, "ELEMENT_LIMIT", 5)
    monkeypatch.setattr(container, "HEADER_LIMIT", 100)
    with pytest.raises(CheckpointError, match="header of more than 100 bytes"):
        read_gguf(path)


@pytest.mark.parametrize("name", [n for n in DAMAGES if "array of" in n or "past the end" in n])
def test_claims_take_no_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(DAMAGES[name][0]())
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def _check_consistent(found: GgufFile, size: int) -> None:
    end = 0
    for name, tensor in found.tensors.items():
        assert name == tensor.name and name and "\n" not in name
        assert tensor.n_bytes == byte_count(tensor.type, tensor.shape, "")
        assert end <= tensor.offset and tensor.offset % found.alignment == 0
        end = tensor.offset + tensor.n_bytes
        assert end <= size


def _survives(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    try:
        found = read_gguf(path)
    except CheckpointError as error:
        assert str(error).isprintable()
    else:
        _check_consistent(found, len(raw))


_FUZZ = settings(
    deadline=2000,  # milliseconds: no claim makes the reader slow
    max_examples=400,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@_FUZZ
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes(tmp_path: Path, raw: bytes, headed: bool) -> None:
    head = b"GGUF\3\0\0\0" + bytes([2]) + bytes(7) + bytes([2]) + bytes(7)
    _survives(tmp_path / "x.gguf", head + raw if headed else raw)


@_FUZZ
@given(st.data())
def test_mutated_file(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(good().build())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "copy", "number"]))
        if kind == "set" and raw:
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "number":
            large = data.draw(st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1, 2**62, 2**64 - 1]))
            raw[at : at + 8] = struct.pack("<Q", large)
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del raw[at : at + data.draw(st.integers(1, 40))]
        else:
            raw[at:at] = raw[at : at + data.draw(st.integers(1, 40))]
    _survives(tmp_path / "x.gguf", bytes(raw))


_NUMBER = st.integers(0, 40) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1])
_ENTRY = st.builds(
    entry,
    st.text(max_size=3) | st.sampled_from(["a", "b"]),
    st.lists(_NUMBER, max_size=5),
    st.sampled_from([*BLOCK_TYPES, 4, 99]),
    st.sampled_from([0, 32, 64, 96, 128, 1, 2**63]),
)
_VALUE = st.builds(
    key,
    st.text(max_size=3) | st.sampled_from(["general.alignment", "k"]),
    st.integers(0, 13),
    st.binary(max_size=12) | st.builds(array, st.integers(0, 13), _NUMBER, st.binary(max_size=16)),
)


@_FUZZ
@given(st.lists(_VALUE, max_size=3), st.lists(_ENTRY, max_size=4), st.integers(0, 200))
def test_random_parts(tmp_path: Path, some: list[bytes], tensors: list[bytes], n: int) -> None:
    _survives(tmp_path / "x.gguf", Raw(some, tensors, bytes(n)).build())
