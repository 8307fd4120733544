"""Sub-MoE's merge of experts and MC-SMoE's low-rank and sparse split."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmerge import ops
from fastmerge.errors import ConflictError, NonFiniteError, RecipeError


def experts(k: int = 3, m: int = 12, n: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(k)
    return torch.randn(k, m, n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 6)])
def test_experts_merge_as_by_the_decomposition_of_all_of_them(rank: int, m: int, n: int) -> None:
    w = experts(3, m, n)
    f = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    u, s, vh = torch.linalg.svd(torch.cat(list(w), 1), full_matrices=False)
    v = vh.reshape(len(s), 3, n).permute(1, 0, 2)
    want = (u[:, :rank] * s[:rank]) @ (f[:, None, None] * v[:, :rank]).sum(0)
    for rule in (None, "task_arithmetic"):
        found = ops.merge_experts(w, (f * 7).tolist(), rank, rule=rule)
        assert torch.allclose(found, want, rtol=1e-9, atol=1e-9)


def test_all_directions_are_the_average() -> None:
    w = experts()
    assert torch.allclose(ops.merge_experts(w), w.mean(0))
    assert torch.allclose(ops.merge_experts(w, [0, 0, 0]), w.mean(0))
    assert torch.allclose(ops.merge_experts(list(w), [1, 0, 0], 12), w[0])


def test_a_rule_merges_the_right_vectors() -> None:
    w = experts()
    found = ops.merge_experts(w, None, 5, rule="ties", density=0.4)
    assert torch.linalg.matrix_rank(found) == 5
    assert not torch.allclose(found, ops.merge_experts(w, None, 5))


def test_float16_experts_give_float16() -> None:
    w = experts().half()
    found = ops.merge_experts(w, None, 4)
    assert found.dtype is torch.float16
    want = ops.merge_experts(w.double(), None, 4)
    assert float((found.double() - want).norm() / want.norm()) < 1e-3


@pytest.mark.parametrize("share", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("params", [{}, {"rule": "linear"}], ids=str)
def test_large_float32_experts_share_the_directions_of_float64(
    params: dict[str, str], share: float
) -> None:
    """Whether float32's eigenvectors stand, or are refined by its Gram matrix, or by the experts."""
    generator = torch.Generator().manual_seed(2)
    low = torch.randn(3, 800, 20, generator=generator) @ torch.randn(20, 300, generator=generator)
    w = share * low + torch.randn(3, 800, 300, generator=generator)
    found = ops.merge_experts(w, None, 100, **params)
    want = ops.merge_experts(w.double(), None, 100, **params)
    assert float((found.double() - want).norm() / want.norm()) < 1e-5


def test_low_rank_and_sparse_parts_add_up() -> None:
    w = experts()[0]
    whole = ops.low_rank_sparse(w, rank=3, keep_rows=1.0)
    assert torch.allclose(whole.product(), w)
    part = ops.low_rank_sparse(w, rank=3, keep_rows=0.25)
    assert part.rows.tolist() == sorted(part.rows.tolist()) and len(part.rows) == 3
    rest = (w - part.left @ part.right).norm(dim=1)
    left_out = [i for i in range(12) if i not in part.rows.tolist()]
    assert rest[part.rows].min() >= rest[left_out].max()
    assert torch.allclose((w - part.product()).norm() ** 2, (rest[left_out] ** 2).sum())


def test_the_rank_follows_from_the_ratio() -> None:
    w = experts()[0]
    assert ops.low_rank_sparse(w, ratio=0.3).left.shape[1] == math.ceil(0.3 * 12 * 20 / 32)
    assert ops.low_rank_sparse(w, ratio=5.0).left.shape[1] == 12
    assert ops.low_rank_sparse(w, rank=0, keep_rows=0.0).product().abs().max() == 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weights": []}, ConflictError, "no expert"),
        ({"weights": [torch.ones(2, 3), torch.ones(3, 2)]}, ConflictError, r"weights\[1\] is \[3"),
        ({"weights": [torch.ones(2)]}, ConflictError, "floating-point matrix"),
        ({"frequency": [1.0]}, RecipeError, "1 values for 3 experts"),
        ({"frequency": [1.0, -1.0, 1.0]}, RecipeError, r"frequency\[1\]"),
        ({"rank": 13}, RecipeError, r"rank must be in \[1, 12\]"),
        ({"weights": torch.full((1, 2, 2), torch.nan)}, NonFiniteError, "flat index 0"),
    ],
)
def test_bad_experts_are_refused(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ops.merge_experts(**{"weights": experts(), **arguments})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either rank or ratio"),
        ({"rank": 1, "ratio": 0.1}, "either rank or ratio"),
        ({"rank": 13}, r"rank must be in \[0, 12\]"),
        ({"ratio": math.nan}, "ratio must be"),
        ({"rank": 1, "keep_rows": 1.5}, "keep_rows must be"),
    ],
)
def test_bad_splits_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        ops.low_rank_sparse(experts()[0], **arguments)
