"""SMILE's layer, as its pack has it: a base's linear layer with low-rank experts and a router for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastmerge.errors import ConflictError, RecipeError
from fastmerge.packs.reading import Pack
from fastmerge.packs.terms import change_of, factors, matrix_part


class SmileExpert(NamedTuple):
    """left right x + bias. left: [m, k] or None for a change that is whole; right: [k, n], else [m, n];
    bias: [m] or None, the difference of biases. router: [gate_k, n]."""

    left: Tensor | None
    right: Tensor
    bias: Tensor | None
    router: Tensor


class SmileLinear(torch.nn.Module):
    """y = W x + b + sum over the top_k experts of p_e (U_e S_e V_e^T x + b_e - b)

    p: softmax over all experts of ||V_(e, gate)^T x||, of the top_k ones divided by their sum.

    Args:
        weight: [m, n], the base's; bias: [m] or None.
        experts: one for each model.
        top_k: experts that a token goes through.
    Source: arXiv:2408.10174.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, experts: Sequence[SmileExpert], top_k: int = 1
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= len(experts):
            raise RecipeError(f"top_k must be in [1, {len(experts)}], got {top_k}")
        self.top_k, self.n_experts = top_k, len(experts)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        for i, expert in enumerate(experts):
            for slot, tensor in expert._asdict().items():
                self.register_buffer(f"{slot}_{i}", tensor)

    def expert(self, i: int) -> SmileExpert:
        """Return one of the experts, where the layer's tensors are."""
        held = self._buffers
        right, router = held[f"right_{i}"], held[f"router_{i}"]
        assert right is not None and router is not None
        return SmileExpert(held[f"left_{i}"], right, held[f"bias_{i}"], router)

    def router_logits(self, x: Tensor) -> Tensor:
        """Return the lengths of x along each expert's leading directions: [..., n] -> [..., experts]."""
        each = (self.expert(i).router for i in range(self.n_experts))
        return torch.stack([functional.linear(x, rows).norm(dim=-1) for rows in each], -1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]"""
        share, chosen = self.router_logits(x).softmax(-1).topk(self.top_k, -1)
        share = share / share.sum(-1, keepdim=True)
        weight = self._buffers["weight"]
        assert weight is not None
        out = functional.linear(x, weight, self._buffers["bias"])
        for i in range(self.n_experts):
            own = (share * (chosen == i)).sum(-1)
            taken = own > 0
            if bool(taken.any()):
                out[taken] += own[taken, None] * _through(self.expert(i), x[taken])
        return out


def _through(expert: SmileExpert, x: Tensor) -> Tensor:
    """Return what an expert adds for rows x: [tokens, n] -> [tokens, m]."""
    if expert.left is None:
        return functional.linear(x, expert.right, expert.bias)
    return functional.linear(functional.linear(x, expert.right), expert.left, expert.bias)


def smile_layer(
    pack: Pack, module: str, weight: Tensor, bias: Tensor | None = None, top_k: int = 1
) -> SmileLinear | None:
    """Return the layer of a module such as "model.layers.0.mlp.up_proj"; None: no model changes its weight.

    Args:
        pack: of strategy smile. weight, bias: the base's.
    Raises:
        ConflictError: the pack is of another strategy, or its shape is not the weight's.
    """
    if pack.manifest.strategy != "smile":
        raise ConflictError(
            f"{pack.path} is a pack of strategy {pack.manifest.strategy}; layers are made of smile packs"
        )
    name = f"{module}.weight"
    entry = pack.manifest.modules.get(name)
    if entry is None:
        return None
    if entry.shape != tuple(weight.shape):
        raise ConflictError(
            f"{name} is {list(weight.shape)} but {list(entry.shape)} in {pack.path}"
        )
    n_experts = len(pack.manifest.experts)
    biases = _bias_changes(pack, f"{module}.bias", n_experts)
    terms = pack.terms(name)
    experts = []
    for e in range(n_experts):
        own = [t for t in terms if t.info.expert == e]
        low = next((t for t in own if t.info.kind == "low_rank"), None)
        gate = next((t for t in own if t.info.kind == "router"), None)
        rows = (
            torch.zeros(1, weight.shape[1])
            if gate is None
            else matrix_part(gate, "rows", entry.shape)
        )
        if low is None:
            left, right = None, change_of(own, entry.shape, e, weight.dtype == torch.float64)
        else:
            transposed, right = factors(low, entry.shape, e)
            left = transposed.mT
        cast = [None if t is None else t.to(weight) for t in (left, right, biases[e], rows)]
        experts.append(SmileExpert(*cast))  # type: ignore[arg-type]
    return SmileLinear(weight, bias, experts, top_k)


def _bias_changes(pack: Pack, name: str, n_experts: int) -> list[Tensor | None]:
    entry = pack.manifest.modules.get(name)
    if entry is None:
        return [None] * n_experts
    terms = pack.terms(name)
    return [change_of(terms, entry.shape, e, wide=True) for e in range(n_experts)]
