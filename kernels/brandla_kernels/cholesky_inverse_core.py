"""``cholesky_inverse_core``: the rank-aware core of Cholesky QR on a batch of small Gram matrices.

For the Gram matrix G = PᵀP (..., k, k) of a panel P, return T (..., k, k) such that the columns of Q = P T are
orthonormal, or exactly zero where a column of P depends on the ones before it, and the mask of the columns that live.

Columns are first scaled by ``scale`` (the norm of the data a column came from, so that "dependent" means "below the
rounding noise of that data"). Two Cholesky factorisations replace a pivoted one: the first, of G + δI, shows by its
pivots the squared distance of each column from the span of those before it; columns under the threshold θ = 4δ are
taken out, and the second factors what is left. No branch depends on the data, so nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op


def cost(k: int) -> Cost:
    """Work of one call: two factorisations and a triangular inverse, in float64."""
    return Cost(flops=k * k * k, bytes=8 * 2 * k * k)


@op("cholesky_inverse_core(Tensor gram, Tensor scale, float threshold) -> (Tensor, Tensor)", cost)
def cholesky_inverse_core(gram: Tensor, scale: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the transform T and the boolean mask (..., k) of its nonzero columns.

    Parameters
    ----------
    gram
        (..., k, k), float64, symmetric positive semi-definite up to rounding.
    scale
        (..., k), float64, >= 0: the length that column j is measured against.
    threshold
        θ: the squared distance, relative to ``scale``, under which a column counts as dependent.
    """
    inverse_scale = torch.where(scale > 0, 1 / scale, 0)
    equilibrated = gram * inverse_scale[..., :, None] * inverse_scale[..., None, :]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    shifted = torch.linalg.cholesky_ex(equilibrated + (threshold / 4) * identity).L
    live = shifted.diagonal(dim1=-2, dim2=-1).square() > threshold
    kept = live.to(gram.dtype)
    masked = equilibrated * kept[..., :, None] * kept[..., None, :] + torch.diag_embed(1 - kept)
    factor, info = torch.linalg.cholesky_ex(masked)
    # Columns that nearly cancel one another can pass the first test and still break the second factorisation;
    # the shifted factor then serves as a preconditioner, and the next pass orthonormalises.
    factor = torch.where((info == 0)[..., None, None], factor, shifted)
    inverse = torch.linalg.solve_triangular(factor, torch.diag_embed(kept * inverse_scale), upper=False)
    return inverse.mT * kept[..., None, :], live
