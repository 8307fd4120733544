"""Matrix primitives of the SVD family, on torch tensors of any device: what methods of scope MATRIX
are made of.

A matrix is [rows, cols] float32 or float64; results have its type and device. float32 matrices are
decomposed with float64 inside wherever float32 would lose what a method needs. Nothing here knows a
method or a file.
"""

from fastmerge.linalg.factored import Term, factored_svd
from fastmerge.linalg.gram import cholesky, gram, inner, times
from fastmerge.linalg.polar import Polar, polar
from fastmerge.linalg.randomized import Truncated, truncated_svd
from fastmerge.linalg.svd import EPS, SVD, Spectrum, spectrum, svd

__all__ = [
    "EPS",
    "SVD",
    "Polar",
    "Spectrum",
    "Term",
    "Truncated",
    "cholesky",
    "factored_svd",
    "gram",
    "inner",
    "polar",
    "spectrum",
    "svd",
    "times",
    "truncated_svd",
]
