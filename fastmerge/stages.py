"""What a method is made of: the stages of the fused walk and the statistics they need.

One coordinate of an element-wise merge goes through

    delta_k = expert_k - base                    (or expert_k itself where `takes_base` is off)
    keep      trim by |delta_k|, trim by variance over experts, random drop, given mask
    weight    value_k = coefficient_k * delta_k  (weight times rescale factor)
    elect     one sign; experts that disagree are left out
    combine   sum or max, divided, times lambda
    out = base + merged                          (or merged when `add_base` is off) one rounding, at the store

A recipe is a generator: it yields statistics, is sent their results, and returns a `Walk`. These classes
are plain data; `fastmerge.backends` turns them into kernel arguments. U is the number of units a
statistic is over:
1 for a tensor, `rows` for ROW, `cols` for COLUMN.

Methods of scope MATRIX ask for the deltas themselves (`Matrices`), compute with `fastmerge.linalg`,
and return what is to be added to the base (`Add`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class Axis(enum.IntEnum):
    """What one value of a statistic or coefficient is over."""

    TENSOR = 0
    ROW = 1  # along the last dimension: one value per row
    COLUMN = 2  # along all but the last dimension: one value per column


# ---- which coordinates of each delta survive -----------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A rank cut per expert: element i is above it iff |d| > value or (|d| == value and i <= last_tie).

    value:    [K, U] float64, |delta| as the compute type holds it; -1 everything is above, +inf nothing is.
    last_tie: [K, U] int64, flat index in the tensor of the last equal element that is above.
    """

    value: F64
    last_tie: I64
    axis: Axis = Axis.TENSOR


@dataclass(frozen=True)
class Trim:
    """Keep what is above `keep` and, when `remove` is given, not above `remove` (outliers go)."""

    keep: Cut
    remove: Cut | None = None


@dataclass(frozen=True)
class Select:
    """Keep, for all experts alike, the coordinates whose variance over experts is above the cut ([1, 1])."""

    cut: Cut


@dataclass(frozen=True)
class Drop:
    """Keep expert k's element i iff its Philox draw is below a threshold (DARE).

    keep_probability: [K] in [0, 1]; 0 and 1 are exact. key: [K] 64-bit Philox keys.
    rescale: multiply survivors by the inverse of the probability really used (threshold / 2**bits).
    """

    keep_probability: Sequence[float]
    key: Sequence[int]
    rescale: bool = False


@dataclass(frozen=True)
class RankedDrop:
    """As `Drop`, with probability low + (high - low) * q (DELLA).

    q is the rank of |delta| in its row or tensor scaled to [0, 1] (`by="rank"`; equal magnitudes: the lower
    index has the lower rank), or |delta| itself scaled between the unit's extremes (`by="value"`). A unit
    of length 1 takes the midpoint by rank, the low end by value. Experts whose low >= 1 keep everything.
    """

    low: Sequence[float]
    high: Sequence[float]
    key: Sequence[int]
    axis: Axis = Axis.ROW
    by: Literal["rank", "value"] = "rank"
    rescale: bool = False


@dataclass(frozen=True)
class GivenMask:
    """Masks from outside: one uint8 array per expert, nonzero keeps, shaped as the tensor."""

    masks: Sequence[Any]


@dataclass(frozen=True)
class Keep:
    """All the reasons for which a coordinate survives; they combine by AND.

    `given` stands in for the random draw of `drop`; its rescale then uses the exact probability.
    """

    trim: Trim | None = None
    select: Select | None = None
    drop: Drop | RankedDrop | None = None
    given: GivenMask | None = None


# ---- the fused walk ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Elect:
    """One sign per coordinate; experts whose kept delta has another sign are left out.

    by:      what is summed to vote. mass: coefficient * delta; delta: delta; count: sign(delta);
             normmass: delta*|delta| * vote_scale_k; normfrac: no sum, the expert with the largest
             delta**2 * vote_scale_k decides (the first one among equals).
    on_zero: what an exact zero vote elects: plus, minus, or none (the coordinate gets 0).
    """

    by: Literal["mass", "delta", "count", "normmass", "normfrac"] = "mass"
    on_zero: Literal["plus", "minus", "none"] = "plus"
    vote_scale: Sequence[float] | None = None


@dataclass(frozen=True)
class Combine:
    """merged = lambda * (sum or max of the elected values) / divisor.

    by:        sum, or max: the value of largest magnitude among the elected ones.
    divide_by: none; constant: `divisor`; weight: sum of `divisor_weight_k` over the elected
               experts (with `elect`; 0 becomes 1, or `floor` when one is given).
    """

    by: Literal["sum", "max"] = "sum"
    divide_by: Literal["none", "constant", "weight"] = "none"
    divisor: float = 1.0
    divisor_weight: Sequence[float] | None = None
    floor: float = 0.0
    lambda_: float = 1.0


@dataclass(frozen=True)
class Transform:
    """A method's own stage, in Triton, between keep and weight: v = function(v, base, index, *arguments).

    function:  `@triton.jit` function of a block: v, the kept and rescaled deltas, and base (zeros
               without one), in the compute type; index, int64 flat indices in the tensor; one scalar per
               row of `arguments`, in the compute type. It returns the new v. Division is `tl.div_rn`;
               fusion of multiply-add is off.
    arguments: [A][K] one value per expert of each argument.
    reference: the same on torch tensors, for the reference backend and for tests; None: only Triton runs it.
    """

    name: str
    function: Any
    arguments: Sequence[Sequence[float]] = ()
    reference: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Walk:
    """The whole element-wise merge of one tensor. coefficient: [K, U] by `axis`.

    Without `add_base` the experts themselves are merged, or their deltas where `only_delta` says so.
    """

    coefficient: F64
    axis: Axis = Axis.TENSOR
    keep: Keep = field(default_factory=Keep)
    elect: Elect | None = None
    combine: Combine = field(default_factory=Combine)
    add_base: bool = True
    transform: Transform | None = None
    only_delta: bool = False

    def __post_init__(self) -> None:
        if self.add_base and self.only_delta:
            raise ValueError("only_delta: the base is not added; say add_base=False")

    @property
    def takes_base(self) -> bool:
        """Whether the base is subtracted from the experts."""
        return self.add_base or self.only_delta


@dataclass(frozen=True)
class Copy:
    """The output is operand `index`, unchanged (0 is the base if there is one, else the first expert)."""

    index: int = 0


@dataclass(frozen=True)
class Add:
    """The output is base + scale * values, rounded once. values: as many elements as the tensor has, of any
    type."""

    values: Tensor
    scale: float = 1.0


Outcome = Walk | Copy | Add


# ---- statistics: what a recipe may yield ----------------------------------------------------------


@dataclass(frozen=True)
class OrderStatistic:
    """Yield to get `list[Cut]`, one per requested rank: the cut above which exactly `rank` elements lie.

    ranks: per expert, how many elements lie above each cut, [K][R]; among equal magnitudes the
    lowest flat index
           is above. all_ties: every element equal to the cut value counts as above (`last_tie` is the end).
    of:    delta: |expert_k - base|; variance: population variance over experts, then K is 1.
    fraction_of_nonzero: instead of ranks, int(fraction * number of nonzero elements).
    scope: tensor, row or model (one cut over all merged tensors of the model).
    """

    ranks: Sequence[Sequence[int]] = ()
    scope: Literal["tensor", "row", "model"] = "tensor"
    of: Literal["delta", "variance"] = "delta"
    fraction_of_nonzero: float | None = None
    all_ties: bool = False


@dataclass(frozen=True)
class Moments:
    """Yield to get `MomentResult`: one moment of each expert's delta, before and after `keep`.

    of: abs, the sum of |d|; square, that of d*d; max, the largest |d|. Sums are in float64 with a reduction
    tree fixed by element index. scope: tensor or model.
    """

    of: Literal["abs", "square", "max"]
    keep: Keep = field(default_factory=Keep)
    scope: Literal["tensor", "model"] = "tensor"


@dataclass(frozen=True)
class MomentResult:
    """[K] float64 each; `kept` after the keep stages (a rescale inside a drop stage is not applied)."""

    all: F64
    kept: F64


@dataclass(frozen=True)
class Gram:
    """Yield to get [K, K, U] float64 inner products of deltas (or of values when `delta` is off)."""

    delta: bool = True
    axis: Axis = Axis.TENSOR


@dataclass(frozen=True)
class SignBalance:
    """Yield to get an int: how many coordinates elect plus minus how many elect minus (zero votes:
    neither)."""

    keep: Keep
    coefficient: F64
    elect: Elect
    scope: Literal["tensor", "model"] = "tensor"


@dataclass(frozen=True)
class Matrices:
    """Yield to get `Deltas`: the experts' changes of one tensor as matrices of `shape`."""

    shape: tuple[int, int]


class Deltas(Protocol):
    """[rows, cols] torch tensors in the compute type, where the operands are. Each is computed when it
    is asked for, and not kept: a method holds as many at once as it needs."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, k: int) -> Tensor:
        """Return expert_k - base."""
        ...

    def total(self, weight: Sequence[float]) -> Tensor:
        """Return sum_k weight_k * (expert_k - base), by one reading of the operands."""
        ...

    def factors(self, k: int) -> tuple[Tensor, Tensor] | None:
        """Return B [rows, r] and A [r, cols] with expert_k - base = B A, of an adapter; else None."""
        ...


@dataclass(frozen=True)
class Joined:
    """Yield to get `join` of the values that all merged tensors of the model yield, in order of their names.

    For methods that say `joins`, and as the last thing that a recipe asks for: its operands are gone when it
    is answered. What it holds meanwhile should be no more than what it will add. The answer is plain data; it
    goes to the manifest.
    """

    value: Any
    join: Callable[[Sequence[Any]], Mapping[str, Any]]


Statistic = OrderStatistic | Moments | Gram | SignBalance
Request = Statistic | Matrices | Joined


# ---- what a chunk must hold ----------------------------------------------------------------------


class Grain(enum.IntEnum):
    """The smallest piece of a tensor that a statistic or walk can be given on its own."""

    ELEMENT = 0
    ROW = 1
    TENSOR = 2


def grain(request: Statistic | Walk) -> Grain:
    """Return how finely a tensor may be cut for `request`; results do not depend on the cutting."""
    if isinstance(request, OrderStatistic):
        return Grain.ROW if request.scope == "row" else Grain.ELEMENT
    if isinstance(request, Gram):
        return Grain.ELEMENT if request.axis is Axis.TENSOR else Grain.ROW
    drop = request.keep.drop
    if isinstance(drop, RankedDrop):
        return Grain.ROW if drop.axis is Axis.ROW else Grain.TENSOR
    return Grain.ELEMENT
