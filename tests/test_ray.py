"""Merges on a Ray cluster of this machine: the bytes of one process, whatever becomes of a task."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import families
import pytest
import stand_ins
import torch

import fastmerge
from fastmerge.checkpoint import JOURNAL
from fastmerge.engine import Report
from fastmerge.errors import DeviceError, MergeError, NonFiniteError, RecipeError, WorkerError
from fastmerge.streaming import gpus

pytest.importorskip("ray", reason="ray is not installed")

SHAPES = {
    "model.embed_tokens.weight": (301, 299),
    **{f"model.layers.{i}.mlp.weight": (200 + i, 301) for i in range(4)},
    "model.norm.weight": (77,),
}
RECIPES = {m: families.recipe(m) for m in ("linear", "ties", "della")} | {
    "ties_model": families.recipe("ties", "scope: model, rescale: true")
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of faults of a cluster of two workers, each with a GPU that is none."""
    import ray

    folder = tmp_path_factory.mktemp("faults")
    paths = [str(Path(__file__).parent), str(Path(fastmerge.__file__).parent.parent)]
    environment = {stand_ins.FAULTS: str(folder), "PYTHONPATH": os.pathsep.join(paths)}
    with patch.dict(os.environ, {**environment, "RAY_USAGE_STATS_ENABLED": "0"}):
        ray.init(
            num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False,
            object_store_memory=80 << 20, logging_level="ERROR",
        )  # fmt: skip
        with patch.object(gpus, "DRIVER", stand_ins.DRIVER):
            yield folder
        ray.shutdown()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    families.write_family(folder, SHAPES, torch.bfloat16)
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"}


def merge(family: Path, recipe: str, out: Path, **options: object) -> Report:
    options = {"out_shard_size": "300k", **options}
    return fastmerge.merge(family / f"{recipe}.yaml", out, **options)  # type: ignore[arg-type]


def one_process(family: Path, recipe: str, tmp_path: Path) -> dict[str, bytes]:
    merge(family, recipe, tmp_path / "one" / "out")
    return files(tmp_path / "one" / "out")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_cluster_gives_the_bytes_of_one_process(
    family: Path, tmp_path: Path, faults: Path, recipe: str, device: str
) -> None:
    want = one_process(family, recipe, tmp_path)
    passed: list[int] = []
    report = merge(
        family, recipe, tmp_path / "ray" / "out", ray="auto", device=device,
        progress=lambda name, done, total: passed.append(done),
    )  # fmt: skip
    assert files(tmp_path / "ray" / "out") == want
    n_shards = len([n for n in want if n.endswith(".safetensors")])
    assert n_shards > 2
    assert len(passed) == n_shards + (recipe == "ties_model")
    assert passed[-1] == report.bytes_read
    assert report.n_tensors == len(SHAPES)


def test_the_task_of_a_dead_worker_is_done_again(
    family: Path, tmp_path: Path, faults: Path
) -> None:
    want = one_process(family, "ties", tmp_path)
    (faults / "die").write_text("2")
    merge(family, "ties", tmp_path / "ray" / "out", ray="auto", device="cuda")
    assert not (faults / "die").exists()
    assert files(tmp_path / "ray" / "out") == want


def test_a_task_that_always_dies_leaves_what_is_written_to_resume(
    family: Path, tmp_path: Path, faults: Path
) -> None:
    want = one_process(family, "ties", tmp_path)
    out = tmp_path / "ray" / "out"
    with patch.object(gpus, "DRIVER", "stand_ins:DeadlyGpus"), pytest.raises(WorkerError) as error:
        merge(family, "ties", out, ray="auto", device="cuda")
    text = str(error.value)
    assert text.startswith("the task for model-0000")
    assert "was lost 4 times: " in text and text.endswith("--resume goes on") and "\n" not in text
    assert (out / JOURNAL).exists()
    merge(family, "ties", out, ray="auto", resume=True)
    assert files(out) == want


def test_an_error_arrives_as_its_one_line(family: Path, tmp_path: Path, faults: Path) -> None:
    for name in ("base", "e1", "e2", "e3"):
        shutil.copytree(family / name, tmp_path / name)
    state = families.load(tmp_path / "e2")
    state["model.layers.3.mlp.weight"][77, 12] = float("nan")
    families.write_model(tmp_path / "e2", state)
    shutil.copy(family / "ties.yaml", tmp_path)
    texts = []
    for ray in (None, "auto"):
        with pytest.raises(NonFiniteError) as error:
            merge(tmp_path, "ties", tmp_path / "out", ray=ray)
        texts.append(str(error.value))
        assert not (tmp_path / "out").exists()
    assert texts[0] == texts[1]


def test_an_interrupt_cancels_tasks_and_keeps_what_is_done(
    family: Path, tmp_path: Path, faults: Path
) -> None:
    want = one_process(family, "linear", tmp_path)
    out = tmp_path / "ray" / "out"
    (faults / "stall").write_text("2")

    timers = [threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))]

    def interrupt(name: str, done: int, total: int) -> None:
        if timers:  # when the first task is done; another waits for ever, now or soon
            timers.pop().start()

    # A shell that starts its jobs in the background has them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            merge(family, "linear", out, ray="auto", device="cuda", progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (out / JOURNAL).exists() and not list(out.glob("*.safetensors"))
    report = merge(family, "linear", out, resume=True)
    assert report.bytes_kept > 0
    assert files(out) == want


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"device": "cuda:1"}, DeviceError, "cannot be chosen on a ray cluster; give cuda"),
        ({"threads": 1000}, MergeError, "no machine of the ray cluster has 1000 CPUs"),
        ({"backend": "none"}, MergeError, "backend 'none' is unknown"),
    ],
)
def test_what_cannot_be_is_refused(
    family: Path, tmp_path: Path, faults: Path, options: dict[str, object],
    error: type[Exception], words: str,
) -> None:  # fmt: skip
    with pytest.raises(error, match=words) as raised:
        merge(family, "linear", tmp_path / "out", ray="auto", **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_a_cluster_that_does_not_answer(family: Path, tmp_path: Path, address: str) -> None:
    with (
        patch("ray.is_initialized", lambda: False),
        pytest.raises(MergeError, match=r"no ray cluster can be used at .*refused; start one with"),
    ):
        merge(family, "linear", tmp_path / "out", ray=address)
    assert not (tmp_path / "out").exists()


def test_object_stores_are_refused(family: Path) -> None:
    with pytest.raises(RecipeError, match="output 's3://bucket/out' is not a folder"):
        fastmerge.merge(family / "linear.yaml", "s3://bucket/out", ray="auto")


def test_without_ray_the_remedy_is_named(family: Path, tmp_path: Path) -> None:
    with (
        patch.dict(sys.modules, {"ray": None}),
        pytest.raises(RecipeError, match=r"install it with pip install 'fastmerge\[ray\]'"),
    ):
        merge(family, "linear", tmp_path / "out", ray="auto")
