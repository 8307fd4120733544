"""Merges by way of a device: the same bytes as on the host, in its memory budget, whatever goes wrong."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch

import fastmerge
from fastmerge.backends import Kernels
from fastmerge.streaming.device import HostDevice

MIB = 1 << 20
SHAPES = {
    "model.embed_tokens.weight": (1501, 1999),
    "a": (640, 515),
    "norm": (77,),
    "b": (300, 512),
    "c": (),
    "empty": (0, 5),
    "d": (1600, 3000),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    families.write_family(folder, SHAPES, torch.bfloat16)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    found = {p.name: p.read_bytes() for p in folder.iterdir() if p.name.endswith(".safetensors")}
    assert found
    return found


def merged(
    family: Path, method: str, out: str, backend: str | Kernels = "cpu", **options: object
) -> dict[str, bytes]:
    recipe = family / f"{method}.yaml"
    recipe.write_text(families.recipe(method))
    options = {"out_shard_size": "9M", "force": True, **options}
    fastmerge.merge(recipe, family / out, backend=backend, **options)  # type: ignore[arg-type]
    return files(family / out)


@pytest.mark.parametrize("method", families.PARAMETERS)
def test_every_method_gives_the_hosts_bytes_by_way_of_a_device(family: Path, method: str) -> None:
    want = merged(family, method, "host")
    assert merged(family, method, "device", device=HostDevice()) == want


def test_a_tensor_that_does_not_fit_is_streamed_to_the_same_bytes(family: Path) -> None:
    want = merged(family, "ties", "host")
    plan = fastmerge.plan(family / "ties.yaml", device=HostDevice(), max_vram="96MiB")
    assert plan.device is not None
    assert len(plan.streamed) == 2
    assert plan.device.total <= 96 * MIB
    assert merged(family, "ties", "device", device=HostDevice(), max_vram="96MiB") == want
