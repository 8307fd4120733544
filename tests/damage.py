"""Ways to break a good model folder, each with a part of the one line that must name it.

`make_good_folder` writes a folder of two shards with an index; a damage changes it in place. The
same list serves the reader's tests and end-to-end tests of the command line.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARD_1 = "model-00001-of-00002.safetensors"
SHARD_2 = "model-00002-of-00002.safetensors"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

A, B, C, D = "model.a.weight", "model.b.weight", "model.c.bias", "lm_head.weight"
MOST = 2**63 - 1


@dataclass(frozen=True)
class Damage:
    """One way to break a good folder. expect is part of the error that must follow."""

    name: str
    apply: Callable[[Path], None]
    expect: str


DAMAGES: list[Damage] = []


def make_good_folder(path: Path) -> None:
    """Write a valid model: A, B and C in SHARD_1, D in SHARD_2; an index and a config.json."""
    path.mkdir(parents=True, exist_ok=True)
    first = {A: ("F32", [2, 3]), B: ("BF16", [4]), C: ("F32", [2])}
    second = {D: ("F16", [3, 2])}
    write_shard(path / SHARD_1, *good_shard(first))
    write_shard(path / SHARD_2, *good_shard(second))
    weight_map = dict.fromkeys(first, SHARD_1) | dict.fromkeys(second, SHARD_2)
    write_json(path / INDEX, {"metadata": {"total_size": 52}, "weight_map": weight_map})
    write_json(path / "config.json", {"architectures": ["Toy"], "torch_dtype": "float32"})


def good_shard(tensors: dict[str, tuple[str, list[int]]]) -> tuple[dict[str, Any], bytes]:
    """Return a header and small finite data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape) in tensors.items():
        n = 1
        for size in shape:
            n *= size
        element = {"F32": struct.pack("<f", 0.5), "BF16": b"\x00\x3f", "F16": b"\x00\x38"}[dtype]
        start = len(data)
        data += element * n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(data)]}
    return header, data


def write_shard(path: Path, header: Any, data: bytes) -> None:
    """Write a file from a header: an object, JSON text, or bytes as they are."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def read_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _add(name: str, expect: str, apply: Callable[[Path], object]) -> None:
    def run(folder: Path) -> None:
        apply(folder)

    DAMAGES.append(Damage(name, run, expect))


# ---- ways to write a damage ---------------------------------------------------------------------


def _bytes(name: str, expect: str, change: Callable[[bytes], bytes]) -> None:
    """Change the first shard's bytes."""

    def apply(folder: Path) -> None:
        path = folder / SHARD_1
        path.write_bytes(change(path.read_bytes()))

    _add(name, expect, apply)


def _raw_header(name: str, expect: str, header: str | bytes) -> None:
    """Replace the first shard's header and keep its data."""
    _add(name, expect, lambda f: write_shard(f / SHARD_1, header, read_shard(f / SHARD_1)[1]))


def _header(name: str, expect: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the first shard's parsed header."""

    def apply(folder: Path) -> None:
        header, data = read_shard(folder / SHARD_1)
        change(header)
        write_shard(folder / SHARD_1, header, data)

    _add(name, expect, apply)


def _entry(name: str, expect: str, key: str, value: Any, tensor: str = B) -> None:
    """Set one key of one tensor."""
    _header(name, expect, lambda h: h[tensor].__setitem__(key, value))


def _index(name: str, expect: str, change: Callable[[dict[str, Any]], object]) -> None:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        write_json(folder / INDEX, index)

    _add(name, expect, apply)


def _text(file: str, name: str, expect: str, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    _add(name, expect, lambda f: (f / file).write_bytes(data))


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _only(name: str, expect: str, *files: str) -> None:
    """Leave nothing but config.json and these empty files."""

    def apply(folder: Path) -> None:
        _clear(folder)
        for file in ("config.json", *files):
            (folder / file).write_bytes(b"{}")

    _add(name, expect, apply)


def _unindexed(name: str, expect: str, change: Callable[[Path], object]) -> None:
    def apply(folder: Path) -> None:
        (folder / INDEX).unlink()
        change(folder)

    _add(name, expect, apply)


def _replace_by(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return apply


# ---- the first eight bytes ----------------------------------------------------------------------

for n in range(8):
    _bytes(f"file of {n} bytes", f"{SHARD_1} has {n} bytes, too short", lambda raw, n=n: raw[:n])
_bytes("header length 0", "header of length 0", lambda raw: bytes(8) + raw[8:])
for n in (100_000_001, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 9, 2**64 - 8, 2**64 - 1):
    _bytes(
        f"header length {n}",
        f"claims a header of {n} bytes; 100000000",
        lambda raw, n=n: struct.pack("<Q", n) + raw[8:],
    )
for n in (1000, 65536, 99_999_999, 100_000_000):
    _bytes(
        f"header length {n} past the end",
        f"header of {n} bytes, past the end",
        lambda raw, n=n: struct.pack("<Q", n) + raw[8:],
    )
_bytes("only a length", "past the end of the file (8 bytes)", lambda raw: raw[:8])
_bytes("header length big-endian", "100000000 is the limit", lambda raw: raw[7::-1] + raw[8:])
_bytes("git-lfs pointer", "git-lfs pointer", lambda raw: b"version https://git-lfs.github.com/spec")
_bytes("html page", "100000000 is the limit", lambda raw: b"<!DOCTYPE html><html>")
_bytes("torch archive", "100000000 is the limit", lambda raw: b"PK\x03\x04" + raw)
_bytes("gguf file", "100000000 is the limit", lambda raw: b"GGUF\x03\0\0\0" + raw)
_bytes("all zero bytes", "header of length 0", lambda raw: bytes(len(raw)))
_bytes("header cut by one", "not valid JSON", lambda raw: _with_length(raw, -1))
_bytes("header one too long", "header", lambda raw: _with_length(raw, 1))


def _with_length(raw: bytes, change: int) -> bytes:
    (length,) = struct.unpack("<Q", raw[:8])
    return struct.pack("<Q", length + change) + raw[8:]


# ---- the header's text --------------------------------------------------------------------------

for name, bad in {
    "latin-1": b'{"\xe9": 1}',
    "cut character": b'{"a": "\xe2\x82"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "overlong": b'{"\xc0\x80": 1}',
    "encoded surrogate": b'{"\xed\xa0\x80": 1}',
}.items():
    _raw_header(f"header not UTF-8: {name}", "header is not UTF-8", bad)
for name, bad_text in {
    "empty": " ",
    "words": "hello",
    "unclosed": '{"a": ',
    "single quotes": "{'a': 1}",
    "trailing comma": '{"a": 1,}',
    "two values": "{} {}",
    "comment": "{} // fine",
    "leading NUL": "\0{}",
    "trailing NUL": "{}\0\0\0\0\0\0",
    "byte order mark": "\ufeff{}",
    "unquoted key": "{a: 1}",
    "control character": '{"a\n": 1}',
    "hexadecimal": '{"a": 0x10}',
    "leading zero": '{"a": 007}',
    "huge integer": '{"a": ' + "9" * 5000 + "}",
    "bad escape": r'{"a\x41": 1}',
}.items():
    _raw_header(f"header not JSON: {name}", "header is not valid JSON", bad_text)
_raw_header("nested lists", "nested too deeply", "[" * 200_000)
_raw_header("nested objects", "nested too deeply", '{"a":' * 200_000)
_raw_header("closed nesting", "nested too deeply", "[" * 100_000 + "]" * 100_000)
for name, value in {
    "list": "[]",
    "text": '"abc"',
    "number": "12",
    "null": "null",
    "true": "true",
    "float": "1.5",
}.items():
    _raw_header(f"header is a {name}", "header is not a JSON object", value)
_raw_header("leading space", "does not begin with '{'", " {}")
for constant in ("NaN", "Infinity", "-Infinity"):
    _raw_header(f"header with {constant}", f"holds {constant}", f'{{"a": {constant}}}')
_ONE = '{"dtype":"F32","shape":[10],"data_offsets":[0,40]}'
_raw_header("tensor twice", "names 'x' twice", f'{{"x":{_ONE},"x":{_ONE}}}')
_raw_header("escaped tensor twice", "names 'x' twice", f'{{"x":{_ONE},"\\u0078":{_ONE}}}')
_raw_header("metadata twice", "names '__metadata__' twice", '{"__metadata__":{},"__metadata__":{}}')
_raw_header("metadata key twice", "names 'k' twice", '{"__metadata__":{"k":"1","k":"2"}}')
for key in ("dtype", "shape", "data_offsets"):
    _raw_header(f"{key} twice", f"names '{key}' twice", f'{{"x":{_ONE[:-1]},"{key}":1}}}}')
_raw_header("lone surrogate in a name", "lone surrogate", f'{{"\\ud800":{_ONE}}}')
_raw_header("lone surrogate in metadata", "lone surrogate", '{"__metadata__":{"k":"\\uDFFF"}}')
_raw_header("no tensors but data", "40 trailing bytes", "{}")

# ---- metadata and names -------------------------------------------------------------------------

for name, value in {"list": [], "text": "pt", "null": None, "number": 1, "true": True}.items():
    _header(
        f"metadata is a {name}",
        "__metadata__ is not a map",
        lambda h, v=value: h.__setitem__("__metadata__", v),
    )
for name, value in {
    "number": 1,
    "null": None,
    "list": ["pt"],
    "map": {"a": "b"},
    "false": False,
}.items():
    _header(
        f"metadata value is a {name}",
        "must map text to text",
        lambda h, v=value: h.__setitem__("__metadata__", {"format": v}),
    )


def _rename(header: dict[str, Any], name: str) -> None:
    header[name] = header.pop(B)


_header("empty name", "empty name", lambda h: _rename(h, ""))
for name, bad_name in {
    "NUL": "a\0b",
    "line feed": "a\nb",
    "carriage return": "a\rb",
    "tab": "a\tb",
    "escape": "\x1b[31mred",
    "backspace": "a\b",
    "delete": "a\x7f",
    "next line": "a\x85b",
    "C1 control": "a\x9b31m",
}.items():
    _header(f"name with {name}", "has control characters", lambda h, n=bad_name: _rename(h, n))

# ---- a tensor's entry ---------------------------------------------------------------------------

for name, value in {
    "null": None,
    "list": [1],
    "text": "F32",
    "number": 3,
    "true": True,
    "empty list": [],
}.items():
    _header(
        f"entry is a {name}",
        f"{SHARD_1}: tensor '{B}' is not described by an object",
        lambda h, v=value: h.__setitem__(B, v),
    )
for key in ("dtype", "shape", "data_offsets"):
    _header(f"no {key}", f"tensor '{B}' has no {key}", lambda h, k=key: h[B].pop(k))
_header("empty entry", f"tensor '{B}' has no data_offsets", lambda h: h[B].clear())
for key in ("offset", "DTYPE", "strides", "", "__metadata__"):
    _entry(f"extra key {key!r}", f"unknown key '{key}'", key, 1)

# dtype
for value in ("f32", "float32", "", "F33", "BF8", "Q4_0", "F32 ", "torch.float32", "\n", "F" * 500):
    _entry(f"unknown dtype {value[:20]!r}", "unknown dtype", "dtype", value)
for value in ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"):
    _entry(f"unsupported dtype {value}", f"has dtype {value} (", "dtype", value)
for name, value in {"null": None, "number": 2, "list": ["F32"], "map": {}, "true": True}.items():
    _entry(f"dtype is a {name}", "dtype that is not text", "dtype", value)

# shape
for name, value in {"null": None, "number": 4, "text": "4", "map": {"0": 4}, "true": True}.items():
    _entry(f"shape is a {name}", "shape that is not a list", "shape", value)
for name, value in {
    "float": 4.0,
    "text": "4",
    "null": None,
    "true": True,
    "false": False,
    "list": [4],
    "map": {},
    "exponent": 1e300,
}.items():
    _entry(f"shape holds a {name}", "not a whole number", "shape", [value])
for value in ([-4], [-1], [-2, -2], [2, -2], [-(2**63)], [-(10**30)], [0, -1]):
    _entry(f"shape {value}", "negative size", "shape", value)
for value in (
    [2**63],
    [2**64],
    [2**64 + 4],
    [MOST],
    [2**32, 2**32],
    [2**62, 4],
    [2**31, 2**31, 4],
    [0, 2**63],
    [2**63, 0],
    [10**100],
    [2**62] * 1000,
    [2] * 64,
):
    label = str(value) if len(str(value)) < 60 else f"{str(value)[:30]}... of {len(value)}"
    _entry(f"shape {label}", "too many elements", "shape", value)
for value in ([], [3], [5], [0], [2, 1], [4, 4], [1 << 40], [4, 0], [1] * 100):
    label = str(value) if len(value) < 9 else f"{len(value)} ones"
    _entry(f"shape {label} for 8 bytes", f"tensor '{B}' has 8 bytes, but BF16", "shape", value)
for value in ("F32", "U8", "I64", "F64", "BOOL", "F8_E4M3"):
    _entry(f"dtype {value} for 8 bytes", f"has 8 bytes, but {value} of shape", "dtype", value)

# data_offsets: B is at [24, 32] of 40
for name, value in {
    "null": None,
    "number": 24,
    "text": "24,32",
    "map": {"0": 24, "1": 32},
    "empty": [],
    "single": [24],
    "triple": [24, 32, 40],
    "texts": ["24", "32"],
    "floats": [24.0, 32.0],
    "null end": [24, None],
    "null start": [None, 32],
    "bools": [False, True],
    "nested": [[24, 32]],
}.items():
    _entry(f"offsets {name}", "not two whole numbers", "data_offsets", value)
for value in ([-1, 7], [-8, 0], [24, -32], [-(2**64), 8], [-32, -24]):
    _entry(f"offsets {value}", "negative data_offsets", "data_offsets", value)
for value in ([32, 24], [25, 24], [2**63, 24], [40, 0]):
    _entry(f"offsets {value}", "end before they start", "data_offsets", value)
for value in ([40, 48], [24, 41], [33, 41], [2**40, 2**40 + 8], [2**64, 2**64 + 8], [24, 10**40]):
    _entry(f"offsets {value}", "past the end of the data", "data_offsets", value)
for value in ([24, 31], [25, 32], [24, 33], [24, 24], [0, 40]):
    _entry(f"offsets {value} for 4 elements", "needs 8", "data_offsets", value)
for value in ([0, 8], [8, 16], [16, 24], [23, 31], [20, 28]):
    _entry(f"offsets {value} overlap", "overlaps", "data_offsets", value)
_entry("offsets one byte late", "hole of 1 bytes before", "data_offsets", [25, 33])
_entry("offsets of the next tensor", "hole of 8 bytes before", "data_offsets", [32, 40])

# ---- how tensors cover the data -----------------------------------------------------------------


def _empty(start: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [0], "data_offsets": [start, start]}


_header("empty tensor inside another", "overlaps", lambda h: h.__setitem__("empty", _empty(4)))
_header("alias of a whole tensor", "overlaps", lambda h: h.__setitem__("alias", dict(h[A])))
_header("first tensor missing", "hole of 24 bytes before", lambda h: h.pop(A))
_header("middle tensor missing", "hole of 8 bytes before", lambda h: h.pop(B))
_header("last tensor missing", "8 trailing bytes", lambda h: h.pop(C))
_header("all tensors missing", "40 trailing bytes", lambda h: [h.pop(k) for k in (A, B, C)])
for n in (1, 7, 4096):
    _bytes(f"{n} trailing bytes", f"has {n} trailing bytes", lambda raw, n=n: raw + bytes(n))
for n in (1, 8, 39, 40):
    _bytes(f"truncated by {n} bytes", "may be truncated", lambda raw, n=n: raw[:-n])
_bytes("a byte lost in the data", "may be truncated", lambda raw: raw[:-20] + raw[-19:])
_bytes("a byte before the data", "1 trailing bytes", lambda raw: raw[:-40] + b"\0" + raw[-40:])
_bytes("file twice", "trailing bytes", lambda raw: raw + raw)

# ---- not a readable file ------------------------------------------------------------------------

_add("shard is a folder", "is not a regular file", _replace_by(SHARD_1, Path.mkdir))
_add("shard is a pipe", "is not a regular file", _replace_by(SHARD_1, os.mkfifo))
_add(
    "shard is a device",
    "is not a regular file",
    _replace_by(SHARD_1, lambda p: p.symlink_to("/dev/zero")),
)
_add("shard is a broken link", "cannot be read", _replace_by(SHARD_1, lambda p: p.symlink_to("no")))
_add("shard links to itself", "cannot be read", _replace_by(SHARD_1, lambda p: p.symlink_to(p)))
_add("shard is empty", "has 0 bytes", _replace_by(SHARD_1, Path.touch))
_add("second shard is empty", f"{SHARD_2} has 0 bytes", _replace_by(SHARD_2, Path.touch))
_add("index is a folder", f"{INDEX} is not a regular", _replace_by(INDEX, Path.mkdir))
_add("index is a pipe", f"{INDEX} is not a regular", _replace_by(INDEX, os.mkfifo))
_add("config is a folder", "config.json is not a regular", _replace_by("config.json", Path.mkdir))
_add(
    "broken link as model.safetensors",
    f"{SINGLE} cannot be read",
    lambda f: (f / SINGLE).symlink_to("gone"),
)
_add(
    "broken model.safetensors", f"{SINGLE} has 3 bytes", lambda f: (f / SINGLE).write_bytes(b"abc")
)

# ---- the index ----------------------------------------------------------------------------------

_text(INDEX, "index empty", f"{INDEX} is not valid JSON", "")
_text(INDEX, "index cut", f"{INDEX} is not valid JSON", '{"weight_map": {"a": ')
_text(INDEX, "index is yaml", f"{INDEX} is not valid JSON", "weight_map:\n  a: b\n")
_text(INDEX, "index not UTF-8", f"{INDEX} is not UTF-8", b'{"\xff": 1}')
_text(INDEX, "index with a byte order mark", "not valid JSON", "\ufeff{}")
_text(INDEX, "index is a list", f"{INDEX} is not a JSON object", "[]")
_text(INDEX, "index is null", f"{INDEX} is not a JSON object", "null")
_text(INDEX, "index nested", "nested too deeply", '{"weight_map":' + "[" * 100_000)
_text(INDEX, "index deep", "nested too deeply", '{"weight_map":' + "[" * 99 + "]" * 99 + "}")
_text(INDEX, "index without weight_map", "has no weight_map", "{}")
_text(INDEX, "index tensor twice", "names 'a' twice", '{"weight_map": {"a": "x", "a": "y"}}')
_text(INDEX, "index with NaN", "holds NaN", '{"metadata": {"total_size": NaN}, "weight_map": {}}')
for name, value in {"list": ["a"], "null": None, "text": "a", "number": 0, "true": True}.items():
    _index(
        f"weight_map is a {name}",
        "weight_map is not a map",
        lambda i, v=value: i.__setitem__("weight_map", v),
    )
_index("weight_map empty", "weight_map is empty", lambda i: i["weight_map"].clear())
for name, value in {"number": 1, "null": None, "list": [SHARD_1], "map": {}, "true": True}.items():
    _index(
        f"weight_map value is a {name}",
        "which is not text",
        lambda i, v=value: i["weight_map"].__setitem__(A, v),
    )
for value in (
    "../other/model.safetensors",
    "..",
    ".",
    "",
    "/etc/passwd",
    "/dev/zero.safetensors",
    "sub/model.safetensors",
    "./model.safetensors",
    "..\\model.safetensors",
    "C:\\model.safetensors",
    "a\0.safetensors",
    "a\n.safetensors",
):
    _index(
        f"shard name {value!r}",
        "not a plain file name",
        lambda i, v=value: i["weight_map"].__setitem__(A, v),
    )
for value in ("config.json", "pytorch_model.bin", "model", "model.safetensors.bak", "..."):
    _index(
        f"shard name {value!r}",
        "not a .safetensors file",
        lambda i, v=value: i["weight_map"].__setitem__(A, v),
    )
_index(
    "shard name too long",
    "is missing",
    lambda i: i["weight_map"].__setitem__(A, "x" * 5000 + ".safetensors"),
)
_add("first shard missing", f"{SHARD_1} is missing", lambda f: (f / SHARD_1).unlink())
_add("second shard missing", f"{SHARD_2} is missing", lambda f: (f / SHARD_2).unlink())
_index(
    "index names a tensor no shard has",
    f"{INDEX} says that {SHARD_2} holds tensor 'ghost'",
    lambda i: i["weight_map"].__setitem__("ghost", SHARD_2),
)
_index("index lacks a tensor", f"{INDEX} does not name", lambda i: i["weight_map"].pop(B))
_index(
    "index assigns a tensor elsewhere",
    f"{INDEX} assigns to {SHARD_2}",
    lambda i: i["weight_map"].__setitem__(B, SHARD_2),
)
_index(
    "index swaps the shards",
    f"{INDEX} assigns to",
    lambda i: i["weight_map"].update({A: SHARD_2, B: SHARD_2, C: SHARD_2, D: SHARD_1}),
)
_add("shards equal", f"{INDEX} assigns to", lambda f: shutil.copy(f / SHARD_1, f / SHARD_2))
_header("renamed tensor", f"{INDEX} does not name", lambda h: _rename(h, "model.B.weight"))

# ---- folders without an index -------------------------------------------------------------------

_unindexed("one of two shards missing", f"{SHARD_2} is missing", lambda f: (f / SHARD_2).unlink())
_unindexed("first of two missing", f"{SHARD_1} is missing", lambda f: (f / SHARD_1).unlink())
_unindexed(
    "shard of a longer model",
    "model-00001-of-00003.safetensors is missing",
    lambda f: [
        (f / SHARD_1).rename(f / "model-00003-of-00003.safetensors"),
        (f / SHARD_2).unlink(),
    ],
)
_unindexed(
    "same tensor in two files",
    "holds too",
    lambda f: shutil.copy(f / SHARD_1, f / "other.safetensors"),
)
_unindexed(
    "other file broken",
    "z.safetensors has 1 bytes",
    lambda f: (f / "z.safetensors").write_text("z"),
)
_only("no weights", "holds no weights")
_only("only other JSON", "holds no weights", "tokenizer.json", "generation_config.json")
_only("only hidden weights", "holds no weights", "._model.safetensors")
_only("only partial weights", "holds no weights", "model.safetensors.partial")
_only("torch weights", "only torch weights ('pytorch_model.bin')", "pytorch_model.bin")
_only(
    "torch shards",
    "only torch weights ('pytorch_model-00001-of-00002.bin')",
    "pytorch_model-00002-of-00002.bin",
    "pytorch_model-00001-of-00002.bin",
)
_only("pth weights", "only torch weights ('consolidated.00.pth')", "consolidated.00.pth")
_only("gguf weights", "only GGUF weights ('model-q4_0.gguf')", "model-q4_0.gguf")
_only("adapter", "only an adapter ('adapter_model.safetensors')", "adapter_model.safetensors")
_only("torch adapter", "only an adapter ('adapter_model.bin')", "adapter_model.bin")
_add("empty folder", "holds no weights", _clear)
_add("no folder", "does not exist", lambda f: shutil.rmtree(f))


def _become_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def _become_link(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


def _become_pipe(folder: Path) -> None:
    shutil.rmtree(folder)
    os.mkfifo(folder)


_add("a file for a folder", "is a file; give the folder", _become_file)
_add("a broken link for a folder", "does not exist", _become_link)
_add("a pipe for a folder", "is not a folder", _become_pipe)

# ---- config.json --------------------------------------------------------------------------------

_text("config.json", "config empty", "config.json is not valid JSON", "")
_text("config.json", "config cut", "config.json is not valid JSON", '{"hidden_size": 4')
_text("config.json", "config not UTF-8", "config.json is not UTF-8", b'{"a": "\x80"}')
_text("config.json", "config is a list", "config.json is not a JSON object", "[1]")
_text("config.json", "config is a number", "config.json is not a JSON object", "5")
_text("config.json", "config nested", "nested too deeply", '{"a":' * 100_000)
_text("config.json", "config deep", "nested too deeply", '{"a_config":' * 99 + "1" + "}" * 99)
