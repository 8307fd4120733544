"""The leading singular triples of a float32 matrix from eigenvectors found in float32 and refined in float64.

Eigenvectors of a Gram matrix in float32 cost little more than half of those in float64, and are off by about
eps32 (s_1 / s_j)^2. One step of Ogita and Aishima (2018), for the leading ones alone, and a decomposition
within what they then span leave eps64 of the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.linalg.gram import BLOCK, add_square, mirrored

if TYPE_CHECKING:
    from torch import Tensor

#: Short side from which on, and share of it up to which, refining is cheaper than decomposing in float64.
LEAST_SIDE, MOST = 768, 1 / 3
#: Least s_k / s_1 whose direction float32 tells from its rounding.
LEAST_RATIO = 1 / 64
#: More columns than are asked for: what lies just beyond the cut is told apart in float64.
MORE, SHARE_MORE = 16, 1 / 16
#: Eigenvalues nearer to each other than this many eps32 of the largest are not told apart in float32.
NEAR = 32.0
#: Of a rough answer: most of eps32 s_1^2 in shares of s_k^2 / m, the mean gap, for which eigenvectors in
#: float32 stand, and least s_k / s_1 for which the Gram matrix in float32 does. Rounding of the
#: eigenvectors weighs 10 to 50 times as much as the Gram matrix' own.
MOST_BLUR, LEAST_ROUGH = 1 / 200, 1 / 16
#: ||V^T V - I||_F beyond which float32 did not find what can be refined.
MOST_APART = 1e-2


def refined(
    parts: Sequence[Tensor], k: int, *, rough: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Return the k largest singular values and their left vectors, float64 [k] and [m, k].

    None: they are too many, or the values spread too far, for this to be cheaper or right.

    Args:
        parts: float32 matrices [m, n_i] that lie side by side, the sum of n_i at least m.
        rough: the span of the vectors is wanted to about 1e-5, not to what float64 tells: where the values
            spread little, what float32 found is returned as it is, or refined by its own Gram matrix.
    """
    import torch

    m = len(parts[0])
    width = k + max(MORE, int(k * SHARE_MORE))
    if k == 0 or m < LEAST_SIDE or width > m * MOST:
        return None
    square = parts[0].new_empty((m, m))
    for j, part in enumerate(parts):
        add_square(square, part, j > 0)
    values, vectors = torch.linalg.eigh(square)
    largest, least = float(values[-1]), float(values[-k])
    if not least > LEAST_RATIO**2 * largest:
        return None
    if rough and m * torch.finfo(values.dtype).eps * largest < MOST_BLUR * least:
        return values[-k:].flip(0).double().sqrt(), vectors[:, -k:].flip(1).double()
    lead, rest = vectors[:, -width:].double(), vectors[:, :-width]
    if rough and least > LEAST_ROUGH**2 * largest:
        image = mirrored(square).double() @ lead
    else:
        image = torch.zeros_like(lead)
        for part in parts:
            for first in range(0, part.shape[1], BLOCK):
                x = part[:, first : first + BLOCK].double()
                image.addmm_(x, x.mT @ lead)
    lead, image = _closer(lead, image, rest, values[:-width], largest)
    g = lead.mT @ lead
    g.diagonal().sub_(1)
    if not float(g.norm()) < MOST_APART:
        return None
    g.diagonal().add_(1)
    # Orthonormal again, then the eigenvectors within their span.
    root = torch.linalg.cholesky(g)
    inner = torch.linalg.solve_triangular(root, lead.mT @ image, upper=False)
    inner = torch.linalg.solve_triangular(root, inner.mT, upper=False)
    found, turn = torch.linalg.eigh((inner + inner.mT) / 2)
    turn = torch.linalg.solve_triangular(root.mT, turn.flip(1)[:, :k], upper=True)
    return found.flip(0)[:k].clamp_min(0).sqrt(), lead @ turn


def _closer(
    lead: Tensor, image: Tensor, rest: Tensor, lower: Tensor, largest: float
) -> tuple[Tensor, Tensor]:
    """Add to each leading vector j what it lacks of each other i: v_i^T (G v_j - l_j v_j) / (l_j - l_i).

    image: G lead; returned is that of the result, for which G v_i = l_i v_i is near enough.
    """
    import torch

    level = (lead * image).sum(0) / (lead * lead).sum(0)
    residual = (image - lead * level).to(rest.dtype)
    gap = level.to(rest.dtype)[None, :] - lower[:, None]
    known = gap > NEAR * torch.finfo(rest.dtype).eps * largest
    lacking = torch.where(known, (rest.mT @ residual) / gap, 0)
    return lead + rest @ lacking, image + rest @ (lower[:, None] * lacking)
