"""The benchmarks' own parts: synthetic families, comparison of outputs, storage, rendered tables."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_peers
import families
import processes
import pytest
import report
import storage
import torch

from fastmerge import bench

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def synthetic(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return benchmarks/synthetic.py with a small pool of random numbers."""
    module = importlib.import_module("synthetic")
    monkeypatch.setattr(module, "POOL", (1 << 16) + 43)
    return module


@pytest.fixture
def bench_merge(synthetic: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return benchmarks/bench_merge.py, cut short."""
    monkeypatch.delitem(sys.modules, "bench_merge", raising=False)
    monkeypatch.setattr(bench, "COPIED", 1 << 20)
    module = importlib.import_module("bench_merge")
    monkeypatch.setattr(module, "SIZES", (0.5, 1.0))
    monkeypatch.setattr(module, "EXPERTS", (2,))
    return module


# ---- families --------------------------------------------------------------------------------------


def test_families_are_the_same_every_time(synthetic: ModuleType, tmp_path: Path) -> None:
    """Also of another number of experts: a sweep over experts merges the same ones."""
    n = synthetic.make_family(tmp_path / "a", 1e6, 2)
    synthetic.make_family(tmp_path / "b", 1e6, 1)
    for folder in ("base", "expert1"):
        assert families.weight_bytes(tmp_path / "a" / folder) == families.weight_bytes(
            tmp_path / "b" / folder
        )
    base, first, second = (
        families.load(tmp_path / "a" / m) for m in ("base", "expert1", "expert2")
    )
    assert sum(x.numel() for x in base.values()) == n
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], second[name])
    changes = (first[name].float() - base[name].float()).flatten()
    assert 0.2 < float((changes == 0).float().mean()) < 0.9
    assert changes.abs().max() > 20 * changes.abs().mean()  # heavy tails


def test_a_family_that_is_there_is_kept(synthetic: ModuleType, tmp_path: Path) -> None:
    synthetic.make_family(tmp_path, 1e6, 1)
    file = tmp_path / "expert1" / "model.safetensors"
    written = file.stat().st_mtime_ns
    synthetic.make_family(tmp_path, 1e6, 1)
    assert file.stat().st_mtime_ns == written


# ---- processes and files ---------------------------------------------------------------------------


def test_comparison_finds_what_differs(tmp_path: Path) -> None:
    x = torch.arange(1000, dtype=torch.float32).bfloat16()
    y = x.clone()
    y[:10] += 8
    families.write_model(tmp_path / "a", {"w": x, "v": x.clone()})
    families.write_model(tmp_path / "b", {"w": y, "v": x})
    found = processes.compare(tmp_path / "a", tmp_path / "b")
    assert found == {"largest": 8.0, "share": 10 / 2000, "tensors": 2}
    same = processes.compare(tmp_path / "a", tmp_path / "a")
    assert (same["largest"], same["share"]) == (0.0, 0.0)


def test_comparison_refuses_models_of_other_tensors(tmp_path: Path) -> None:
    families.write_model(tmp_path / "a", {"w": torch.zeros(3)})
    families.write_model(tmp_path / "b", {"v": torch.zeros(3)})
    families.write_model(tmp_path / "c", {"w": torch.zeros(4)})
    with pytest.raises(SystemExit, match="other tensors"):
        processes.compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(SystemExit, match=r"'w' is \[3\] in .* but \[4\]"):
        processes.compare(tmp_path / "a", tmp_path / "c")


def test_peak_memory_is_that_of_the_process(tmp_path: Path) -> None:
    code = "x = bytearray(200_000_000); x[::4096] = b'1' * len(x[::4096]); print('done')"
    done = processes.timed([sys.executable, "-S", "-c", code], tmp_path)
    assert done.output == "done\n"
    assert 200 < done.peak_mb < 230
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        processes.timed([sys.executable, "-c", "1 / 0"], tmp_path)


def test_pages_are_dropped_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(9 << 20) + b"end")
    storage.drop_pages([file])
    storage.make_resident([file])
    assert read_bandwidth(file) > 0


def read_bandwidth(file: Path) -> float:
    try:
        return storage.read_bandwidth(file)
    except OSError as error:
        if error.errno == errno.EINVAL:
            pytest.skip("this file system knows no direct reads")
        raise


MODES = {
    "--no-peer": (1, {"bytes_moved", "floor_seconds", "fastmerge", "fastmerge_no_fsync"}),
    "--cold": (1, {"bytes_read", "same"}),
    "--sweep": (3, {"experts", "ns_per_parameter", "ns_per_byte"}),
    "--decompose": (1, {"planned_mb", "peak_mb", "same_bytes"}),
}


@pytest.mark.parametrize("mode", MODES)
def test_merge_benchmark(
    mode: str, bench_merge: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours alone, on a family as small as they come, which goes afterwards."""
    monkeypatch.setattr(bench_merge, "read_bandwidth", read_bandwidth)
    method = "iso_c" if mode == "--decompose" else "linear"
    options = ["--parameters", "1e6", "--runs", "1", "--methods", method, "--name", "found"]
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_merge.py", mode, *options, *folders])
    bench_merge.main()
    found = json.loads((tmp_path / "found.json").read_text())
    n_rows, keys = MODES[mode]
    assert len(found["rows"]) == n_rows
    assert all(set(row) >= keys for row in found["rows"])
    assert set(found) >= {"machine", "date", "versions"}
    assert all(row.get("same_bytes", True) for row in found["rows"])
    assert not list((tmp_path / "work").iterdir())
    tables = {
        "--no-peer": report.merge_table,
        "--cold": report.cold_table,
        "--sweep": report.sweep_table,
        "--decompose": report.decompose_table,
    }
    assert len(table_rows(tables[mode](found))) == n_rows


# ---- tables ----------------------------------------------------------------------------------------


def table_rows(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("|")][2:]


def merged(method: str, ours: float, theirs: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": method,
        "bytes_moved": 4e9,
        "fastmerge": {"seconds": ours, "peak_mb": 100.4},
    }
    if theirs is not None:
        row["mergekit"] = {"seconds": theirs, "peak_mb": 900}
    return row


def result(**fields: Any) -> dict[str, Any]:
    place = {"machine": "a machine", "date": "2026-01-02", "versions": {"fastmerge": "9"}}
    return {**place, "parameters": 5e8, "experts": 3, "dtype": "bf16", "runs": 3, **fields}


def test_merge_table_has_ratios_and_their_geometric_mean() -> None:
    rows = [merged("linear", 2, 8), merged("ties", 1, 16)]
    head, headings, rule, *body = report.merge_table(result(rows=rows))
    assert head == (
        "a machine; 500 M parameters, base and 3 experts in bf16, page cache warm, medians of 3 runs "
        "(mergekit: 1); fastmerge 9; 2026-01-02.\n"
    )
    assert headings == (
        "| method | fastmerge | GB/s moved | peak memory | mergekit | peak memory | ratio |"
    )
    assert rule == "|---|---|---|---|---|---|---|"
    assert body == [
        "| linear | 2.00 s | 2.00 | 100 MB | 8.0 s | 900 MB | 4.0x |",
        "| ties | 1.00 s | 4.00 | 100 MB | 16.0 s | 900 MB | 16.0x |",
        "| geometric mean |  |  |  |  |  | 8.0x |",
    ]


def test_merge_table_shows_what_was_measured_only() -> None:
    row = merged("linear", 2, None)
    row |= {"floor_seconds": 0.5, "fastmerge_no_fsync": {"seconds": 1.5, "peak_mb": 100}}
    lines = report.merge_table(result(rows=[row], threads=2, copy_gb_per_s=8.0))
    assert "2 threads moves 8.0 GB/s" in lines[0]
    assert lines[1] == (
        "| method | fastmerge | `--no-fsync` | copy of as much | GB/s moved | peak memory |"
    )
    assert table_rows(lines) == ["| linear | 2.00 s | 1.50 s | 0.50 s | 2.00 | 100 MB |"]


def test_tables_come_from_all_result_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = "a\n<!-- table: merge -->\nstale\n<!-- end table -->\nb\n"
    assert "stale" not in report.render(text)
    for name, seconds in (("merge-1.json", 1), ("merge-2.json", 2)):
        (tmp_path / name).write_text(json.dumps(result(rows=[merged("linear", seconds, 4)])))
    rendered = report.render(text)
    assert "| 4.0x |" in rendered
    assert "| 2.0x |" in rendered
    assert report.render(rendered) == rendered


def test_readme_is_rendered() -> None:
    text = (ROOT / "README.md").read_text()
    assert report.render(text) == text


def test_table_of_peers() -> None:
    usage = {
        "fastmerge": {"seconds": 2.0, "peak_mb": 100.0},
        "mergekit": {"seconds": 9.0, "peak_mb": 800.0},
    }
    difference = {"largest": 0.5, "share": 0.25, "tensors": 8}
    lines = bench_peers.table({"bytes_moved": 4e9, "difference": difference, **usage}).split("\n")
    assert lines[1].split() == ["fastmerge", "2.00", "100", "2.00"]
    assert lines[2].split() == ["mergekit", "9.00", "800", "0.44"]
    assert lines[3].startswith("4.5x; of 8 tensors compared, 25.00% of the values differ")


def test_peers_run_the_same_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mergekit", reason="the extra [oracle] is not installed")
    families.write_family(tmp_path, families.llama_shapes(), torch.float32)
    (tmp_path / "recipe.yaml").write_text(families.recipe("task_arithmetic"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merged").mkdir()
    found = bench_peers.peers(Path("recipe.yaml"), 1, tmp_path / "merged")
    assert found["difference"]["largest"] < 1e-6
    assert found["mergekit"]["seconds"] > 0
    assert "x; of" in bench_peers.table(found)
