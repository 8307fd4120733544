"""Golden vectors of coded tensors: bytes that the formats' own libraries write, and what they decode to.

Reads any folder of this shape: manifest.json, which names inputs, formats, arrays and their digests, and the
.npz files it lists. A file, array or format that is not known here is a failure, as is an array unchecked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from coded_tensors import Coded, rounded
from numpy.typing import NDArray

from fastmerge.coding import Coding, Format, ScaleType
from fastmerge.dtypes import DType

Arrays = Mapping[str, NDArray[Any]]

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Vector:
    """One entry of a manifest with its file's arrays and its input."""

    folder: Path
    entry: Mapping[str, Any]
    inputs_file: str

    @property
    def name(self) -> str:
        return str(self.entry["name"])

    @property
    def arrays(self) -> Arrays:
        return dict(np.load(self.folder / self.entry["file"]))

    @property
    def input(self) -> NDArray[np.float32]:
        array: NDArray[np.float32] = np.load(self.folder / self.inputs_file)[self.entry["input"]]
        return array


def read_vectors(folder: Path) -> list[Vector]:
    """Return the vectors of a folder with a manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    return [Vector(folder, entry, manifest["inputs_file"]) for entry in manifest["vectors"]]


def listed_files(folder: Path) -> set[Path]:
    """Return every file that the manifest accounts for."""
    manifest = json.loads((folder / MANIFEST).read_text())
    names = [MANIFEST, manifest["inputs_file"], *(v["file"] for v in manifest["vectors"])]
    return {folder / name for name in names}


def check(vector: Vector) -> None:
    """Code the vector's input and compare all bytes; decode its bytes and compare all values."""
    arrays = vector.arrays
    _check_digests(vector, arrays)
    claim = CLAIMS.get(vector.entry["format"])
    assert claim is not None, f"{vector.name}: unknown format {vector.entry['format']!r}"
    seen: set[str] = set()
    claim(vector, _Watched(arrays, seen))
    assert seen == set(arrays), f"{vector.name}: unchecked arrays {sorted(set(arrays) - seen)}"


def _check_digests(vector: Vector, arrays: Arrays) -> None:
    listed = vector.entry["arrays"]
    unknown = set(arrays) - set(listed) - {"dequant"}
    assert not unknown, f"{vector.name}: arrays that the manifest does not list {sorted(unknown)}"
    for name, (dtype, shape, digest) in listed.items():
        a = arrays[name]
        assert (str(a.dtype), list(a.shape)) == (dtype, shape), f"{vector.name}: {name}"
        assert hashlib.sha256(a.tobytes()).hexdigest() == digest, f"{vector.name}: {name}"


class _Watched:
    """Arrays that note which of them were asked for."""

    def __init__(self, arrays: Arrays, seen: set[str]):
        self._arrays, self._seen = arrays, seen

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> NDArray[Any]:
        self._seen.add(name)
        return self._arrays[name]


def _same_bytes(what: str, got: NDArray[Any], want: NDArray[Any]) -> None:
    expected = np.frombuffer(np.ascontiguousarray(want).tobytes(), np.uint8)
    assert got.shape == expected.shape, f"{what}: {got.size} bytes, expected {expected.size}"
    wrong = np.flatnonzero(got != expected)
    assert not wrong.size, (
        f"{what}: {wrong.size} bytes differ, first at {wrong[0]}: "
        f"{got[wrong[0]]:#04x}, expected {expected[wrong[0]]:#04x}"
    )


def _same_values(what: str, coded: Coded, want: NDArray[np.float32]) -> None:
    got = coded.decode().reshape(want.shape)
    wrong = np.argwhere(got != want)
    assert not len(wrong), f"{what}: {len(wrong)} values differ, first at {wrong[0]}"


def _coded(
    vector: Vector, coding: Coding, parts: Mapping[str, NDArray[Any]], want: Any, **fields: Any
) -> None:
    """Encode the input: the bytes of `parts`; decode them: the values of `want`, None: do not."""
    x = rounded(vector.input, coding.dtype)
    fresh = Coded(coding, *x.shape, **fields).encode(x)
    assert set(fresh.slots) == set(parts), f"{vector.name}: parts {sorted(parts)}"
    for slot, expected in parts.items():
        _same_bytes(f"{vector.name}: {slot}", fresh.slots[slot], expected)
    if want is not None:
        _same_values(vector.name, fresh, want)


def _read_only(
    vector: Vector, coding: Coding, parts: Mapping[str, NDArray[Any]], want: Any, **fields: Any
) -> None:
    coded = Coded(coding, *want.shape, **fields)
    for slot, given in parts.items():
        coded.slots[slot][:] = np.frombuffer(np.ascontiguousarray(given).tobytes(), np.uint8)
    _same_values(vector.name, coded, want)


def _bnb(format: Format) -> Callable[[Vector, Any], None]:
    def claim(vector: Vector, a: Any) -> None:
        params = vector.entry["params"]
        coding = Coding(format, group=params["blocksize"], nested=params["nested"])
        other = replace(coding, other_rule=True)
        want = a["dequant"]
        if not params["nested"]:
            parts = {"codes": a["weight"], "scales": a["absmax"]}
            _coded(vector, coding, parts, want)
            _coded(vector, other, {**parts, "codes": a["weight_cuda_rule"]}, None)
        else:
            offset = float(a["nested_offset"][0])
            parts = {"codes": a["weight"], "scales": a["absmax"], "nested": a["nested_absmax"]}
            _coded(vector, coding, parts, want, nested_offset=offset)
            exact = {"codes": a["weight_cuda_rule"], "scales": a["absmax_exact_rule"]}
            _coded(vector, other, {**parts, **exact}, None, nested_offset=offset)
            codes = Coded(replace(coding, group=64), 256, 64, nested_offset=0.0)
            codes.slots["codes"][:] = 0xFF  # +1 in NF4
            codes.slots["scales"][:] = np.arange(256)
            codes.slots["nested"][:] = np.frombuffer(np.float32(1).tobytes(), np.uint8)
            decoded = codes.decode().reshape(256, 64)[:, 0]
            assert (decoded == a["nested_quant_map"]).all(), f"{vector.name}: nested_quant_map"
        table = Coded(replace(coding, nested=False), 1, 64)
        table.slots["codes"][:] = np.tile(np.arange(0x01, 0x100, 0x22, dtype=np.uint8), 4)
        table.slots["scales"][:] = np.frombuffer(np.float32(1).tobytes(), np.uint8)
        assert (table.decode()[:16] == a["quant_map"]).all(), f"{vector.name}: quant_map"

    return claim


def _pack_quantized(vector: Vector, a: Any) -> None:
    params = vector.entry["params"]
    narrow = "bfloat16" in vector.entry["notes"]
    coding = Coding(
        Format.INT4,
        dtype=DType.BF16 if narrow else DType.F32,
        scale=ScaleType.BF16 if narrow else ScaleType.F32,
        group=params["group_size"],
        symmetric=params["symmetric"],
    )
    scale = a["weight_scale_as_f32"]
    if narrow:
        scale = (scale.view(np.uint32) >> 16).astype(np.uint16)
    parts = {"codes": a["weight_packed"], "scales": scale}
    if not params["symmetric"]:
        parts["zeros"] = a["weight_zero_point"]
    assert tuple(a["weight_shape"]) == vector.input.shape
    _coded(vector, coding, parts, a["dequant"])


def _nvfp4(vector: Vector, a: Any) -> None:
    coding = Coding(Format.NVFP4, scale=ScaleType.E4M3, group=vector.entry["params"]["group_size"])
    x = vector.input
    coded = Coded(coding, *x.shape).encode(x)
    assert np.float32(coded.fields["tensor_scale"]) == a["weight_global_scale"][0]
    parts = {"codes": a["weight_packed"], "scales": a["weight_scale_e4m3_bits"]}
    _coded(vector, coding, parts, a["dequant"])


def _mxfp4(vector: Vector, a: Any) -> None:
    coding = Coding(Format.MXFP4, scale=ScaleType.E8M0, group=vector.entry["params"]["group_size"])
    parts = {"codes": a["weight_packed"], "scales": a["weight_scale_e8m0"]}
    _coded(vector, coding, parts, a["dequant"])
    ocp = {
        "codes": a["weight_packed_ocp_floor_rule"],
        "scales": a["weight_scale_ocp_floor_rule"],
    }
    _coded(vector, replace(coding, other_rule=True), ocp, None)


def _gguf(format: Format, is_written: bool = True) -> Callable[[Vector, Any], None]:
    def claim(vector: Vector, a: Any) -> None:
        run = _coded if is_written else _read_only
        run(vector, Coding(format), {"codes": a["blocks"]}, a["dequant"])

    return claim


def _words(vector: Vector, a: Any) -> None:
    params = vector.entry["params"]
    format = Format.AWQ if "AWQ" in vector.entry["format"] else Format.GPTQ
    coding = Coding(format, scale=ScaleType.F16, group=params["group_size"], symmetric=False)
    parts = {"codes": a["qweight"], "scales": a["scales"]}
    if format is Format.AWQ:
        _coded(vector, coding, {**parts, "zeros": a["qzeros"]}, a["dequant"])
        return
    index = np.ascontiguousarray(a["g_idx"], np.int32)
    for v1, name in ((True, "qzeros_v1"), (False, "qzeros_v2")):
        one = replace(coding, v1=v1)
        _coded(vector, one, {**parts, "zeros": a[name]}, a["dequant"])
        _read_only(
            vector, one, {**parts, "zeros": a[name]}, a["dequant"], group_of=index.ctypes.data
        )


def _fp8(vector: Vector, a: Any) -> None:
    if "weight_scale" in a:
        coding = Coding(Format.FP8, group_rows=0)
        scale = a["weight_scale"]
    else:
        coding = Coding(Format.FP8, group=128, group_rows=128)
        scale = a["weight_scale_inv"]
    parts = {"codes": a["weight_e4m3_bits"], "scales": scale}
    _read_only(vector, coding, parts, a["dequant"])
    _coded(vector, coding, parts, a["dequant"])


#: By the manifest's `format`.
CLAIMS: Mapping[str, Callable[[Vector, Any], None]] = {
    "bitsandbytes nf4": _bnb(Format.BNB_NF4),
    "bitsandbytes fp4": _bnb(Format.BNB_FP4),
    "compressed-tensors pack-quantized": _pack_quantized,
    "compressed-tensors nvfp4-pack-quantized": _nvfp4,
    "compressed-tensors mxfp4-pack-quantized": _mxfp4,
    "ggml Q4_0": _gguf(Format.Q4_0),
    "ggml Q4_1": _gguf(Format.Q4_1),
    "ggml Q8_0": _gguf(Format.Q8_0),
    "ggml Q4_K": _gguf(Format.Q4_K),
    "ggml MXFP4": _gguf(Format.GGUF_MXFP4),
    "ggml NVFP4": _gguf(Format.GGUF_NVFP4, is_written=False),
    "AWQ gemm": _words,
    "GPTQ int4": _words,
    "FP8 E4M3 input": _fp8,
}
