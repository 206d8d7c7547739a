"""``cholesky_inverse_core``: the rank-aware core of Cholesky QR on a batch of small Gram matrices.

For the Gram matrix G = PᵀP (..., k, k) of a panel P, return T (..., k, k) such that the columns of Q = P T are
orthonormal, or exactly zero if a column of P depends on the ones before it, and the mask of the nonzero columns.

Columns are first scaled by ``scale`` (the norm of the data a column came from, so that "dependent" means "below the
rounding noise of that data"). Two Cholesky factorisations replace a pivoted one. The first is of G + δI, with δ = θ/4.
If column j is at distance s from the columns before it, with coefficients c, its pivot is about s² + δ(1 + ‖c‖²) and
column j of the inverse factor has squared norm (1 + ‖c‖²)/pivot. Noise of relative size √δ in the data moves s by
√δ·(1 + ‖c‖²)^½, so a column stands out of the noise if s² > 3δ(1 + ‖c‖²), that is if the squared norm is below 1/θ.
The pivot alone would not tell, since columns that nearly cancel have large coefficients. Columns that do not stand out
are removed, and the second factorisation is of the remaining ones. No branch depends on the data, so nothing waits for
the device. On a CPU, where a read waits for nothing, one factorisation is enough if every column stands out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op, reads_are_free


def cost(k: int) -> Cost:
    """Work of one call: two factorisations and two triangular inverses, in float64."""
    return Cost(flops=4 * k * k * k // 3, bytes=8 * 2 * k * k)


@op(
    "cholesky_inverse_core(Small[k,k] gram, Small[k] scale, float threshold) -> (Small[k,k], Small[k])",
    cost,
    "small_spd.cholesky_inverse_core",
)
def cholesky_inverse_core(gram: Tensor, scale: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the transform T and the boolean mask (..., k) of its nonzero columns.

    Parameters
    ----------
    gram
        (..., k, k), float64, symmetric positive semi-definite up to rounding.
    scale
        (..., k), float64, >= 0: the length that column j is measured against.
    threshold
        θ: four times the squared noise of a column relative to ``scale``. Columns that stay stand out of this noise.
    """
    equilibrated, inverse_scale, identity = _equilibrated(gram, scale)
    if reads_are_free(gram):
        _, inverse, info, stands_out = _factored(equilibrated, identity, threshold)
        if ((info == 0).all() & stands_out.all()).item():
            # Every column stays.
            return inverse.mT * inverse_scale[..., :, None], torch.ones_like(scale, dtype=torch.bool)
    shifted, _, _, live = _factored(equilibrated + (threshold / 4) * identity, identity, threshold)
    kept = live.to(gram.dtype)
    masked = equilibrated * kept[..., :, None] * kept[..., None, :] + torch.diag_embed(1 - kept)
    factor, info = torch.linalg.cholesky_ex(masked)
    # Columns that nearly cancel one another can pass the first test and still break the second factorisation;
    # the shifted factor then serves as a preconditioner, and the next pass orthonormalises.
    factor = torch.where((info == 0)[..., None, None], factor, shifted)
    inverse = torch.linalg.solve_triangular(factor, torch.diag_embed(kept * inverse_scale), upper=False)
    return inverse.mT * kept[..., None, :], live


def live_columns(gram: Tensor, scale: Tensor, threshold: float) -> Tensor:
    """Return only the mask of `cholesky_inverse_core`, with less work on a CPU."""
    if not reads_are_free(gram):
        return cholesky_inverse_core(gram, scale, threshold)[1]
    equilibrated, _, identity = _equilibrated(gram, scale)
    return _factored(equilibrated + (threshold / 4) * identity, identity, threshold)[-1]


def _equilibrated(gram: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scaled G, the factors of its rows and columns, and I."""
    inverse_scale = torch.where(scale > 0, 1 / scale, 0)
    equilibrated = gram * inverse_scale[..., :, None] * inverse_scale[..., None, :]
    return equilibrated, inverse_scale, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)


def _factored(matrix: Tensor, identity: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the factor, its inverse, ``info`` (0 if they exist), and the mask of columns that stand out of noise."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    # Squared norms of the rows of the inverse are (1 + ‖c‖²) / pivot.
    return factor, inverse, info, inverse.square().sum(-1) * threshold < 1


@cholesky_inverse_core.gradient
def _gradient(inputs: tuple[Tensor, Tensor, float], gradients: tuple[Tensor, Tensor]) -> tuple[Tensor, None, None]:
    """From TᵀGT = I: dT = −T Φ(Tᵀ dG T), where Φ takes the upper triangle and half the diagonal."""
    transform = cholesky_inverse_core(*inputs)[0]
    half = torch.triu(transform.mT @ gradients[0])
    half.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    of_gram = -transform @ half @ transform.mT
    return (of_gram + of_gram.mT) / 2, None, None
