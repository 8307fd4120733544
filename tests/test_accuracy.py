"""What benchmarks/accuracy.py claims of the SVD family, on a part of what it measures."""

from __future__ import annotations

import importlib

import accuracy
import pytest
import torch
from accuracy import METHODS, PRIMITIVES, Item

import fastmerge
from fastmerge.linalg import gram
from fastmerge.registry import methods

# The package's name of this module is the function's.
linalg_svd = importlib.import_module("fastmerge.linalg.svd")


@pytest.mark.parametrize("item", [*PRIMITIVES, *METHODS], ids=lambda item: item.name)
def test_no_claim_is_exceeded(item: Item) -> None:
    for row in accuracy.measured(item, few=True):
        assert row["worst"] <= row["claim"], row


def test_every_method_that_decomposes_is_measured() -> None:
    measured = {item.name.split(",")[0] for item in METHODS}
    assert measured == {spec.name for spec in methods().values() if spec.cost is not None}


def test_refined_truncation_takes_the_route_that_refines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fallback would decompose the whole Gram matrix by `spectrum`."""
    routes = []
    monkeypatch.setattr(linalg_svd, "spectrum", lambda *args, **kwargs: routes.append(args))
    refined = next(item for item in PRIMITIVES if item.name == "truncation, refined")
    for kind in refined.claims:
        list(refined.errors(kind, refined.shapes[0], 0))
    assert not routes


def test_a_planted_error_of_a_primitive_exceeds_its_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "gram", lambda a: gram(a) * (1 + 1e-13))
    item = next(item for item in PRIMITIVES if item.name == "gram")
    assert all(row["worst"] > row["claim"] for row in accuracy.measured(item, few=True))


def test_a_planted_error_exceeds_its_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    merge = fastmerge.merge_tensors

    def wrong(*args: object, **kwargs: object) -> torch.Tensor:
        found = merge(*args, **kwargs)  # type: ignore[arg-type]
        assert isinstance(found, torch.Tensor)
        found[0] *= 1.01
        return found

    monkeypatch.setattr(fastmerge, "merge_tensors", wrong)
    star = next(item for item in METHODS if item.name == "star")
    assert all(row["worst"] > row["claim"] for row in accuracy.measured(star, few=True))
