"""One module's factors of several adapters made into one pair: the kinds of peft's add_weighted_adapter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fastmerge.errors import ConflictError, RecipeError
from fastmerge.linalg import Term, factored_svd, truncated_svd
from fastmerge.lora.folder import Factors, check_rank
from fastmerge.stored_tensors import wide
from fastmerge.tensors import merge_tensors

if TYPE_CHECKING:
    from torch import Tensor

#: Rules that go over single values: of dense changes with the ending _svd, of either factor without.
ELEMENTWISE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATIONS = ("svd", "linear", "cat", *(f"{r}_svd" for r in ELEMENTWISE), *ELEMENTWISE)

_ELECT = {"total": "mass", "frequency": "count"}


class Part(NamedTuple):
    """What one adapter adds to a weight: scale * b a, of that weight. a: [r, in]; b: [out, r]."""

    a: Tensor
    b: Tensor
    scale: float
    weight: float


@dataclass(frozen=True)
class Rule:
    """How parts are combined. density: kept share of values, for the rules of ELEMENTWISE.

    scaling_power: the power of an adapter's scale in its part; 2 is what older releases of peft computed.
    """

    combination: str = "svd"
    rank: int | None = None
    density: float | None = None
    majority_sign: str = "total"
    scaling_power: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.combination not in COMBINATIONS:
            raise RecipeError(
                f"combination must be one of {', '.join(COMBINATIONS)}, got {self.combination!r}"
            )
        if self.rank is not None and not self.truncates:
            raise RecipeError(f"combination {self.combination} takes no rank; leave it out")
        if self.rank is not None:
            check_rank("rank", self.rank)
        trims = self.elementwise in ELEMENTWISE
        if trims and self.density is None:
            raise RecipeError(
                f"combination {self.combination} needs a density: the share of values that is kept "
                "(--density 0.5)"
            )
        if self.density is not None and not trims:
            raise RecipeError(f"combination {self.combination} takes no density; leave it out")
        if self.density is not None and not 0 < self.density <= 1:
            raise RecipeError(f"density must be in (0, 1], got {self.density}")
        if self.majority_sign not in _ELECT:
            raise RecipeError(
                f"majority_sign must be total or frequency, got {self.majority_sign!r}"
            )
        if self.scaling_power not in (1, 2):
            raise RecipeError(f"scaling_power must be 1 or 2, got {self.scaling_power}")

    @property
    def truncates(self) -> bool:
        """Whether the result is a truncated decomposition."""
        return self.combination.endswith("svd")

    @property
    def elementwise(self) -> str:
        """The rule for single values."""
        return self.combination.removesuffix("_svd")

    def coefficient(self, part: Part) -> float:
        """Return what a part's b a is multiplied by."""
        return part.weight * part.scale**self.scaling_power


class Combined(NamedTuple):
    """a: [r, in]; b: [out, r]; r may be 0. wanted: the change they stand for, dense or as terms, if any."""

    factors: Factors
    wanted: Tensor | list[Term] | None


def combine(parts: Sequence[Part], rule: Rule, module: str = "module") -> Combined:
    """Combine what adapters add to one weight; c_t = weight_t scale_t^scaling_power.

    svd              the leading triples of sum_t c_t b_t a_t, from the factors: nothing is [out, in]
    cat              [b_1 .. b_T], [c_1 a_1; ..; c_T a_T]: exact, of rank sum_t r_t
    linear           (sum_t sqrt|c_t| b_t) (sum_t sign(c_t) sqrt|c_t| a_t): products of different adapters too
    RULE_svd         the leading triples of what RULE makes of the dense changes scale_t b_t a_t
    RULE             what RULE makes of either factor, with the weights of linear

    A decomposition gives b = U S, a = V^T. Its rank is `rule.rank`, by default the largest of the parts'.

    Raises:
        ConflictError: a kind that works on factors, and ranks that differ.
    """
    import torch

    terms = [Term(rule.coefficient(p), p.b, p.a) for p in parts]
    rank = rule.rank or max(len(p.a) for p in parts)
    if rule.combination == "svd":
        u, s, vh = factored_svd(terms, rank).svd
        return Combined(Factors(vh, u * s), terms)
    if rule.combination == "cat":
        a = torch.cat([wide(p.a) * c for p, (c, _, _) in zip(parts, terms, strict=True)])
        return Combined(Factors(a, torch.cat([wide(p.b) for p in parts], dim=1)), terms)
    if rule.truncates:
        changes = [wide(p.b) @ wide(p.a) * p.scale for p in parts]
        weights = [p.weight * p.scale ** (rule.scaling_power - 1) for p in parts]
        dense = _merged(changes, weights, rule, module)
        u, s, vh = truncated_svd(dense, rank, seed=rule.seed).svd
        return Combined(Factors(vh, u * s), dense)
    ranks = {len(p.a) for p in parts}
    if len(ranks) > 1:
        raise ConflictError(
            f"{module!r} has ranks {', '.join(map(str, sorted(ranks)))}, and combination "
            f"{rule.combination} adds factors of one rank; take svd or cat"
        )
    roots = [math.sqrt(abs(c)) for c, _, _ in terms]
    signed = [math.copysign(r, c) for r, (c, _, _) in zip(roots, terms, strict=True)]
    factors = Factors(
        _merged([wide(p.a) for p in parts], signed, rule, f"{module}.lora_A"),
        _merged([wide(p.b) for p in parts], roots, rule, f"{module}.lora_B"),
    )
    return Combined(factors, terms if rule.combination == "linear" else None)


def _merged(tensors: Sequence[Tensor], weights: Sequence[float], rule: Rule, name: str) -> Tensor:
    """Return what a rule for single values makes of tensors of one shape, as changes of zeros."""
    import torch

    zeros = torch.zeros_like(tensors[0])
    merge: Callable[..., Tensor] = functools.partial(merge_tensors, zeros, seed=rule.seed)
    kept = {"density": rule.density}
    match rule.elementwise:
        case "linear":
            return merge(tensors, method="task_arithmetic", weight=weights, name=name)
        case "magnitude_prune":
            # A trim without election, and without outliers.
            rules = {"gamma": 0.0, "weight": weights, "name": name}
            return merge(tensors, method="breadcrumbs", **kept, **rules)
        case "dare_linear" | "dare_ties":
            drop = {"method": "dare_linear", "rescale_mode": "inverse_keep", **kept}
            if rule.elementwise == "dare_linear":
                return merge(tensors, weight=weights, name=name, **drop)
            # peft elects signs of what is left before weights: a drop, then a vote.
            tensors = [
                merge([t], weight=1.0, name=f"{name}:{k}", **drop) for k, t in enumerate(tensors)
            ]
            kept = {"density": 1.0}
    return merge(
        tensors,
        method="ties",
        elect=_ELECT[rule.majority_sign],
        elect_on="unweighted",
        divide_by="count",
        weight=weights,
        name=name,
        **kept,
    )
