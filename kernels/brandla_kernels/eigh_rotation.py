"""``eigh_rotation``: from the eigenpairs of a core to the values of an update and the rotation of its tall matrices.

`eigh_core` gives the core K/σ and the factors of its rows, ``torch.linalg.eigh`` the eigenpairs (λ, V), ascending. The
values are the ``rank`` largest σλ, descending. Values up to ``tol`` times the first become 0, with zero columns. For
the others, the rotation makes the columns of B V, a root of the truncated matrix, or the unit columns B V (σλ)^(−½).
Unit columns have the signs that make the diagonal of V positive: an entry there tells whether a new vector agrees with
the old one in its place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op, reads_are_free, recomputed_gradient
from brandla_kernels.eigh_core import EMPTY


def cost(m: int, s: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    return Cost(2 * m * s, itemsize * (m + 2 * m * s + s) + 8 * m)


@op(
    "eigh_rotation(Small[m] levels, Small[m,m] vectors, Sum[m] rows, Sum[] scale, int rank, float tol, bool unit)"
    " -> (Small[s], Small[m,s], Small[])",
    cost,
    "eigh_core.eigh_rotation",
)
def eigh_rotation(
    levels: Tensor, vectors: Tensor, rows: Tensor, scale: Tensor, rank: int, tol: float, unit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values (..., s), the rotation (..., m, s), and the largest value that is left out (...,).

    Parameters
    ----------
    levels, vectors
        λ (..., m), ascending, and V (..., m, m), float32 or float64.
    rows, scale
        Factors of rows (..., m) and σ (...,), float64; NaN makes all results NaN.
    rank
        s, at most m.
    tol
        Values up to ``tol`` times the largest become 0, and count as left out. With 0, only empty coordinates do.
    unit
        Whether the rotated columns have unit length, and the signs of the old ones.
    """
    dtype, start = levels.dtype, levels.shape[-1] - rank
    kept, rotation = levels[..., start:].flip(-1), vectors[..., start:].flip(-1)
    left_out = levels[..., start - 1] if start else 0 * levels.sum(-1)
    all_above = rank == 0
    if rank and levels.numel() and reads_are_free(levels):
        bound = tol * levels[..., -1].amax().item() if tol or unit else EMPTY / 2
        all_above = levels[..., start].amin().item() > bound
    if not all_above:
        least = tol * kept[..., :1] if tol or unit else EMPTY / 2
        alive = ~(kept <= least)
        left_out = torch.maximum(left_out, torch.where(alive, 0, kept).amax(-1))
        kept, rotation = torch.where(alive, kept, 0), rotation * alive[..., None, :]
    values = kept.clamp_min(0) * scale[..., None]
    if unit:
        # The reciprocal root of infinity makes a zero column.
        squares = values if all_above else torch.where(values > 0, values, math.inf)
        rotation = rotation * squares.rsqrt().copysign(rotation.diagonal(dim1=-2, dim2=-1).detach())[..., None, :]
    return values.to(dtype), (rotation * rows[..., :, None]).to(dtype), (left_out.clamp_min(0) * scale).to(dtype)


eigh_rotation.gradient(recomputed_gradient(eigh_rotation, 4))
