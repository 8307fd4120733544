"""Golden vectors: results of the papers' own code, for every oracle and on every backend.

`pytest tests/test_vectors.py --vectors DIR` reads another folder of the same shape. Nothing is
passed over in silence: an unknown file, case or expected key fails, and what is listed as unclaimed
is skipped with its reason.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quant_vectors
import torch
from quant_vectors import Vector
from vector_cases import Case, read_cases, tensor
from vector_claims import claim_of, unclaimed_reason
from vector_runners import BackendRunner, OracleRunner, Runner

from fastmerge import _cpu

#: The golden files that hold no vectors: test_instructions.py and test_triton_build.py read them.
RECORDS = {
    Path(__file__).parent / "golden" / name
    for name in ("instructions.json", "triton_build.json", "cuda_build.json")
}
RUNNERS: tuple[Runner, ...] = (OracleRunner(), BackendRunner("reference"), BackendRunner("cpu"))


def _items(root: Path) -> list[Any]:
    """Return (case or file, runner or reason) for everything under `root`; a reason of '' fails."""
    items = []
    files = {p for p in root.rglob("*") if p.suffix in (".json", ".npz")} - RECORDS
    for folder in {p.parent for p in files if p.name == quant_vectors.MANIFEST}:
        files -= quant_vectors.listed_files(folder)
    for path in sorted(files):
        cases = read_cases(path) if path.suffix == ".json" else []
        if not cases:
            reason = unclaimed_reason(path.stem, path.parent.name, "*")
            items.append(pytest.param(str(path), reason or "", id=path.stem))
        for case in cases:
            label = f"{case.file}-{case.name}"
            reason = unclaimed_reason(case.file, case.folder, case.name)
            if claim_of(case) is None:
                items.append(pytest.param(label, reason or "", id=label))
                continue
            items += [pytest.param(case, run, id=f"{label}-{run.name}") for run in RUNNERS]
    return items


def _coded_items(root: Path) -> list[Any]:
    folders = sorted(p.parent for p in root.rglob(quant_vectors.MANIFEST))
    vectors = [v for folder in folders for v in quant_vectors.read_vectors(folder)]
    return [
        pytest.param(v, isa, id=f"{v.name}-{isa}")
        for v in vectors
        for isa in _cpu.available_isas().split()
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"vector", "isa"} <= set(metafunc.fixturenames):
        root = Path(metafunc.config.getoption("vectors"))
        metafunc.parametrize(("vector", "isa"), _coded_items(root))
    if {"case", "run"} <= set(metafunc.fixturenames):
        root = Path(metafunc.config.getoption("vectors"))
        items = _items(root)
        if not items and not _coded_items(root):
            items = [pytest.param(str(root), "", id="empty")]
        metafunc.parametrize(("case", "run"), items)


def _check(key: str, got: Any, want: Any, tolerance: float) -> None:
    if isinstance(want, dict):
        assert set(got) == set(want), f"{key}: tensors {sorted(got)}, expected {sorted(want)}"
        for name in want:
            _check(f"{key}[{name}]", got[name], want[name], tolerance)
        return
    if isinstance(want, list):
        assert len(got) == len(want), f"{key}: {len(got)} entries"
        for k, (one, other) in enumerate(zip(got, want, strict=True)):
            _check(f"{key}[{k}]", one, other, tolerance)
        return
    if want is None:
        assert got is None, f"{key}: expected none, got {got}"
        return
    assert tuple(got.shape) == tuple(want.shape), f"{key}: {tuple(got.shape)}"
    error = (got.double() - want).abs() - tolerance * want.abs().clamp(min=1)
    worst = int(error.nan_to_num(nan=torch.inf).argmax())
    assert bool((error <= 0).all()), (
        f"{key}: element {worst} is {got.flatten()[worst].item()!r}, "
        f"expected {want.flatten()[worst].item()!r} within {tolerance:g}"
    )


def test_vector(case: Case | str, run: Runner | str) -> None:
    if isinstance(case, str) or isinstance(run, str):
        if not run:
            pytest.fail(f"{case}: no method claims this; extend CLAIMS or UNCLAIMED")
        pytest.skip(f"not claimed: {run}")
    claim = claim_of(case)
    assert claim is not None
    checks = claim(case)
    unknown = set(case.expected) - set(checks)
    assert not unknown, f"no check for the expected keys {sorted(unknown)}"
    for key, value in case.expected.items():
        got = checks[key](run)
        want = tensor(value)
        if got is None and want is not None:
            assert isinstance(run, BackendRunner), f"the oracle side does not show {key}"
            continue
        _check(key, got, want, case.tolerance)


def test_coded_vector(vector: Vector, isa: str) -> None:
    before = _cpu.isa()
    assert _cpu.set_isa(isa)
    try:
        quant_vectors.check(vector)
    finally:
        _cpu.set_isa(before)


def _folder(path: Path, **entry: Any) -> Path:
    """Write a folder of one coded vector, which `entry` changes."""
    golden = Path(__file__).parent / "golden" / "quant"
    vector = quant_vectors.read_vectors(golden)[0]
    arrays = {**vector.arrays, **entry.pop("arrays", {})}
    np.savez(path / "one.npz", **arrays)
    np.savez(path / "inputs.npz", **{vector.entry["input"]: vector.input})
    listed = {
        "inputs_file": "inputs.npz",
        "vectors": [{**vector.entry, "file": "one.npz", **entry}],
    }
    (path / quant_vectors.MANIFEST).write_text(json.dumps(listed))
    return path


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"format": "novel"}, "unknown format"),
        ({"arrays": {"novel": np.zeros(1, np.uint8)}}, "does not list"),
        ({"arrays": {"absmax": np.zeros(48, np.float32)}}, "absmax"),
    ],
)
def test_an_unknown_or_changed_coded_vector_fails(
    entry: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (vector,) = quant_vectors.read_vectors(_folder(tmp_path, **entry))

    with pytest.raises(AssertionError, match=words):
        quant_vectors.check(vector)


def test_an_array_that_nothing_checks_fails(tmp_path: Path) -> None:
    extra = np.zeros(1, np.uint8)
    golden = Path(__file__).parent / "golden" / "quant"
    listed = quant_vectors.read_vectors(golden)[0].entry["arrays"]
    digest = hashlib.sha256(extra.tobytes()).hexdigest()
    listed = {**listed, "novel": ["uint8", [1], digest]}
    folder = _folder(tmp_path, **{"arrays": {"novel": extra}})
    manifest = json.loads((folder / quant_vectors.MANIFEST).read_text())
    manifest["vectors"][0]["arrays"] = listed
    (folder / quant_vectors.MANIFEST).write_text(json.dumps(manifest))

    (vector,) = quant_vectors.read_vectors(folder)

    with pytest.raises(AssertionError, match=r"unchecked arrays \['novel'\]"):
        quant_vectors.check(vector)


def test_a_file_beside_the_manifest_is_reported(tmp_path: Path) -> None:
    _folder(tmp_path)
    (tmp_path / "novel.npz").write_bytes(b"")

    assert [item.id for item in _items(tmp_path)] == ["novel"]


def test_an_unknown_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "novel.json").write_text(
        json.dumps({"cases": [{"name": "a", "inputs": {}, "expected": {}}]})
    )
    (tmp_path / "other.npz").write_bytes(b"")

    items = {item.id: item.values[1] for item in _items(tmp_path)}

    assert items == {"novel-a": "", "other": ""}
