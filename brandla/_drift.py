"""How far a basis has drifted from orthonormal, and how a rotation takes that out; ``docs/orthonormalisation.md``."""

from __future__ import annotations

import torch
from torch import Tensor

from brandla._sharded import WHOLE, Rows
from brandla_kernels import Tall, project, reads_are_free, tall

# Rows squared at a time, so that no second copy of a basis is made.
_ROWS = 4096


def measure_drift(basis: Tall, rows: Rows = WHOLE) -> Tensor:
    """Return UᵀU − I in float64, for the eighth of the columns that drifted furthest; 0 elsewhere.

    Each update rounds a little orthogonality away, and what a column of long standing has lost it never gets back by
    itself. The norm of a column shows how far it has drifted; corrected columns fall back behind the others, so every
    column has its turn after a few updates, at an eighth of the cost of a full Gram matrix. For a list on a GPU, or
    sharded, where launches and messages count for more than products, all columns are measured.
    """
    r = tall.columns(basis)
    if not isinstance(basis, Tensor) and not (rows is WHOLE and reads_are_free(basis[0])):
        inner = rows.total(project(basis, basis)).double()
        return inner - torch.diag_embed((inner.diagonal(dim1=-2, dim2=-1) > 0.25).double())
    norms = rows.total(tall.stacked(tall.each(_squared_lengths, basis))).sqrt()
    live = norms > 0.5
    identity = torch.diag_embed(live.double())
    if r == 0:
        return identity
    chosen = torch.where(live, (norms - 1).abs(), 0).nan_to_num().topk(-(-r // 8), dim=-1).indices
    index = chosen[..., None, :].expand(*norms.shape, chosen.shape[-1])
    inner = rows.total(project(basis, tall.each(tall.columns_at, basis, chosen))).double()
    deviation = inner - identity.gather(-1, index)
    drift = torch.zeros_like(identity).scatter_(-1, index, deviation)
    return drift.scatter_(-2, index.mT, deviation.mT)


def _squared_lengths(basis: Tensor) -> Tensor:
    """Return ‖u_j‖² (..., r), a slab of rows at a time."""
    slabs = [slab.square().sum(-2) for slab in basis.split(_ROWS, dim=-2)]
    return slabs[0] if len(slabs) == 1 else torch.stack(slabs).sum(0)


def without_drift(drift: Tensor, rotation: Tensor) -> Tensor:
    """Return (I − E/2) W: to first order, the rotation of U (I + E)^(−1/2), which is orthonormal again."""
    return rotation - drift @ rotation / 2
