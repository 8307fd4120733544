"""Singular value decompositions: all singular values, and as many triples as are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from fastmerge.linalg.gram import gram, times
from fastmerge.linalg.leading import LEAST_RATIO, refined

if TYPE_CHECKING:
    from torch import Tensor

Route = Literal["auto", "lapack", "gram"]

#: Distance from 1 to the next number, by bytes of an element.
EPS = {4: 2.0**-23, 8: 2.0**-52}


class SVD(NamedTuple):
    """a ~ u diag(s) vh. u: [m, k]; s: [k], descending; vh: [k, n]."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def product(self) -> Tensor:
        """Return u diag(s) vh."""
        return (self.u * self.s) @ self.vh


@dataclass(frozen=True)
class Spectrum:
    """A decomposed matrix. s: [min(m, n)] float64, all singular values, descending."""

    s: Tensor
    _a: Tensor
    _left: Tensor | None  # left singular vectors, where the right ones are made from them
    _whole: SVD | None

    def top(self, k: int | None = None) -> SVD:
        """Return the k largest triples, at most all, in the type of the matrix."""
        k = len(self.s) if k is None else min(k, len(self.s))
        if self._whole is not None:
            return SVD(self._whole.u[:, :k], self._whole.s[:k], self._whole.vh[:k])
        assert self._left is not None
        if len(self._a) > len(self._left):  # decomposed from the other side
            u, s, vh = replace_matrix(self, self._a.mT).top(k)
            return SVD(vh.mT, s, u.mT)
        u, s, dtype = self._left[:, :k], self.s[:k], self._a.dtype
        # In float64: the least of them would take on rounding of the largest.
        vh = times(lambda columns: (u.mT @ columns) * _inverse(s)[:, None], self._a, k)
        return SVD(u.to(dtype), s.to(dtype), vh)

    def rank(self, floor: float | None = None) -> int:
        """Return how many singular values are above a share of the largest; default: max(m, n) eps of
        the type: what is below is rounding of the matrix itself."""
        if not len(self.s):
            return 0
        if floor is None:
            floor = max(self._a.shape) * EPS[self._a.element_size()]
        return int((self.s > floor * self.s[0]).sum())

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return u diag(function(s)) vh over the numerical rank; the rest of the matrix is left out."""
        rank = self.rank()
        values = function(self.s)[:rank]
        if self._whole is not None:
            u, _, vh = self.top(rank)
            return (u * values.to(u.dtype)) @ vh
        assert self._left is not None
        u = self._left[:, :rank]
        root = (u * (values * _inverse(self.s[:rank]))) @ u.mT
        if len(self._a) == len(root):
            return times(lambda columns: root @ columns, self._a)
        return times(lambda columns: root @ columns, self._a.mT).mT


def replace_matrix(spectrum: Spectrum, a: Tensor) -> Spectrum:
    """Return the decomposition of the transposed matrix."""
    return Spectrum(spectrum.s, a, spectrum._left, None)


def spectrum(a: Tensor, *, route: Route = "auto") -> Spectrum:
    """Decompose a matrix.

    Args:
        a: [m, n] float32 or float64.
        route: lapack: a full decomposition (gesdd). gram: eigenvectors of the short side's Gram matrix in
            float64; the other side's are made from them, orthogonal to about eps64 (s_1 / s_i)^2: to what
            float32 holds down to the numerical rank of a float32 matrix. Half as dear where a is square,
            less where it is not. auto: gram for float32, lapack for float64.
    """
    import torch

    if route == "auto":
        route = "gram" if a.element_size() == 4 else "lapack"
    if route == "lapack" or 0 in a.shape:
        whole = SVD(*torch.linalg.svd(a, full_matrices=False))
        return Spectrum(whole.s.double(), a, None, whole)
    values, vectors = torch.linalg.eigh(gram(a if len(a) <= a.shape[1] else a.mT))
    return Spectrum(values.flip(0).clamp_min(0).sqrt(), a, vectors.flip(1), None)


def svd(
    a: Tensor, rank: int | None = None, *, floor: float | None = 0.0, route: Route = "auto"
) -> SVD:
    """Return the thin SVD of a matrix, or its `rank` largest triples.

    Args:
        floor: triples with s <= floor * s_1 are left out; None: those that `Spectrum.rank` leaves out.
        route: see `spectrum`; auto also refines the leading triples of a large float32 matrix, where
            they are a small part of all (`leading.refined`).
    """
    import torch

    if route == "auto" and rank is not None and a.dtype is torch.float32 and rank < min(a.shape):
        wide = len(a) <= a.shape[1]
        found = refined([a if wide else a.mT], rank)
        if found is not None and (floor is None or floor < LEAST_RATIO):
            s, u = found
            other = times(lambda c: (u.mT @ c) / s[:, None], a if wide else a.mT, len(s))
            u, s = u.to(a.dtype), s.to(a.dtype)
            return SVD(u, s, other) if wide else SVD(other.mT, s, u.mT)
    whole = spectrum(a, route=route)
    if floor == 0:
        return whole.top(rank)
    kept = whole.rank(floor)
    return whole.top(kept if rank is None else min(rank, kept))


def _inverse(s: Tensor) -> Tensor:
    """Return 1 / s, 0 for 0."""
    return (s > 0) / s.masked_fill(s == 0, 1)
