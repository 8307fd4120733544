"""What benchmarks/accuracy.py claims of the SVD family, on a part of what it measures."""

from __future__ import annotations

import accuracy
import pytest
import torch
from accuracy import METHODS, PRIMITIVES, Item

import fastmerge


@pytest.mark.parametrize("item", [*PRIMITIVES, *METHODS], ids=lambda item: item.name)
def test_no_claim_is_exceeded(item: Item) -> None:
    for row in accuracy.measured(item, few=True):
        assert row["worst"] <= row["claim"], row


def test_every_kind_without_a_claim_has_a_reason() -> None:
    for item in (*PRIMITIVES, *METHODS):
        if item.name != "SVD of a sum of factors":
            missing = set(accuracy.KINDS) - set(item.claims)
            assert all(kind in item.why for kind in missing), item.name


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
