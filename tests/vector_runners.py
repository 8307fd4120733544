"""Two ways to compute what a golden vector expects: a method's float64 oracle, and a backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import fastmerge
from fastmerge import ops
from fastmerge.dtypes import DType
from fastmerge.evaluate import Operands, resolve
from fastmerge.methods import della, knots, opcm, sce, ties
from fastmerge.recipe import keyword_params
from fastmerge.registry import Params, TensorContext, get
from fastmerge.stages import GivenMask, RankedDrop, Walk

#: A tensor, or a small model as a map from name to tensor.
State = Any


def deltas(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return torch.stack([e - base for e in experts])


def prepared(
    method: str,
    base: Tensor,
    experts: Sequence[Tensor],
    params: Mapping[str, Any],
    masks: Sequence[Tensor] | None = None,
) -> tuple[Params, TensorContext]:
    """Return what recipe and oracle get for one tensor that is a whole model."""
    spec = get(method)
    resolved = keyword_params(spec, len(experts), True, params)
    given = None if masks is None else GivenMask(masks)
    shape = tuple(base.shape)
    return resolved, TensorContext("tensor", shape, len(experts), n_model=base.numel(), given=given)


class OracleRunner:
    """The oracle, and the oracle-side functions of intermediate results."""

    name = "oracle"

    def merge(
        self,
        method: str,
        base: State,
        experts: Sequence[State],
        masks: Sequence[Tensor] | None = None,
        **params: Any,
    ) -> State:
        if isinstance(base, dict):
            return self._merge_model(method, base, experts, params)
        resolved, context = prepared(method, base, experts, params, masks)
        return get(method).oracle(base, list(experts), resolved, context)

    def _merge_model(
        self, method: str, base: dict[str, Tensor], experts: Sequence[State], params: Any
    ) -> dict[str, Tensor]:
        """Tensor by tensor, or for model scope over all tensors as one vector in order of name."""
        if method in ("opcm", "knots"):
            first = next(iter(base.values()))
            resolved, _ = prepared(method, first, [first] * len(experts), params)
            if method == "knots":
                model = [[e[n] - t for e in experts] for n, t in base.items()]
                moved = knots.model_oracle(model, resolved)
                return {n: t + d for (n, t), d in zip(base.items(), moved, strict=True)}
            contexts = [TensorContext(n, tuple(t.shape), len(experts)) for n, t in base.items()]
            return opcm.model_oracle(base, experts, resolved, contexts)
        if params.get("scope", "model") != "model":
            each = {
                n: self.merge(method, t, [e[n] for e in experts], **params) for n, t in base.items()
            }
            return each
        names = sorted(base)

        def flat(state: dict[str, Tensor]) -> Tensor:
            return torch.cat([state[n].flatten() for n in names])

        merged = self.merge(method, flat(base), [flat(e) for e in experts], **params)
        parts = merged.split([base[n].numel() for n in names])
        return {n: part.reshape(base[n].shape) for n, part in zip(names, parts, strict=True)}

    def mask(self, method: str, base: Tensor, experts: Sequence[Tensor], **params: Any) -> Tensor:
        """Return [K, ...] bool: what the trim keeps, or what SCE selects."""
        resolved, _ = prepared(method, base, experts, params)
        delta = deltas(base, experts)
        if method == "sce":
            selected = sce.selected_oracle(delta, resolved.select_topk)
            return selected.expand(delta.shape)
        return ties.trimmed_oracle(delta, resolved)

    def elected_sign(
        self, method: str, base: Tensor, experts: Sequence[Tensor], **params: Any
    ) -> Tensor | None:
        resolved, _ = prepared(method, base, experts, params)
        delta = deltas(base, experts)
        kept = delta * ties.trimmed_oracle(delta, resolved)
        return ties.signs_oracle(ties.votes_oracle(kept, kept, resolved), resolved)

    def probability(
        self, method: str, base: Tensor, experts: Sequence[Tensor], **params: Any
    ) -> Tensor:
        resolved, _ = prepared(method, base, experts, params)
        low, high = della.probability_range(resolved)
        each = []
        for k, delta in enumerate(deltas(base, experts)):
            half = (high[k] - low[k]) / 2
            each.append(
                della.probability_oracle(delta, resolved.density[k], half, resolved.rank_by)
            )
        return torch.stack(each)

    def weights(
        self, method: str, base: Tensor, experts: Sequence[Tensor], **params: Any
    ) -> Tensor:
        resolved, _ = prepared(method, base, experts, params)
        delta = deltas(base, experts)
        selected = delta * sce.selected_oracle(delta, resolved.select_topk)
        return sce.weights_oracle(selected, resolved.uniform_below)


class BackendRunner:
    """The public functions on one backend, and what the walk of a recipe tells."""

    def __init__(self, name: str) -> None:
        self.name = name

    def merge(
        self,
        method: str,
        base: State,
        experts: Sequence[State],
        masks: Sequence[Tensor] | None = None,
        **params: Any,
    ) -> State:
        if isinstance(base, dict):
            return fastmerge.merge_state_dicts(
                base, experts, method=method, backend=self.name, **params
            )
        return fastmerge.merge_tensors(
            base, experts, method=method, backend=self.name, masks=masks, **params
        )

    def _walk(
        self, method: str, base: Tensor, experts: Sequence[Tensor], params: Mapping[str, Any]
    ) -> Walk:
        resolved, context = prepared(method, base, experts, params)
        operands = Operands(
            ops.buffer_of(base, "base"),
            [ops.buffer_of(e, "expert") for e in experts],
            context.cols,
            DType.F64,
        )
        kernels = ops.choose("cpu", self.name)
        walk, operands = resolve(kernels, get(method), resolved, context, operands)
        assert isinstance(walk, Walk)
        return walk

    def mask(self, method: str, base: Tensor, experts: Sequence[Tensor], **params: Any) -> Tensor:
        walk = self._walk(method, base, experts, params)
        mask = ops.keep_mask(base, experts, walk.keep, backend=self.name)
        return torch.from_numpy(mask).reshape(len(experts), *base.shape) != 0

    def elected_sign(
        self, method: str, base: Tensor, experts: Sequence[Tensor], **params: Any
    ) -> Tensor | None:
        return None  # lives in registers only; merged_tv shows it

    def probability(
        self, method: str, base: Tensor, experts: Sequence[Tensor], **params: Any
    ) -> Tensor:
        drop = self._walk(method, base, experts, params).keep.drop
        assert isinstance(drop, RankedDrop)
        p = ops.keep_probability(base, experts, drop, backend=self.name)
        return torch.from_numpy(p).reshape(len(experts), *base.shape)

    def weights(
        self, method: str, base: Tensor, experts: Sequence[Tensor], **params: Any
    ) -> Tensor:
        return torch.from_numpy(self._walk(method, base, experts, params).coefficient[:, 0])


Runner = OracleRunner | BackendRunner
