"""The core of Cholesky QR where columns have to go: those that stay lose nothing by it."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

# torch.linalg does not list its error in __all__.
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from brandla_kernels import cholesky_inverse_core, live_columns, reads_are_free


def ranked_core(gram: Tensor, scale: Tensor, threshold: float) -> Tensor:
    """Return T as `cholesky_inverse_core` does, by a way that is good where columns depend on one another too.

    A column that depends on the ones before it is dropped, and with it the noise of those times its coefficients on
    them: no noise any more where a coefficient on a weak column is large. So the columns are taken in an order in which
    none is measured against much weaker ones. On a CPU, where it is known whether any has to go, the eigenvectors of G
    serve then, of which the least go.
    """
    if reads_are_free(gram):
        transform, live = cholesky_inverse_core(gram, scale, threshold)
        if bool(_nothing_goes(live, scale).all()):
            return transform
        if not gram.requires_grad:
            with suppress(LinAlgError):
                return _principal(gram, scale, live, threshold)
    order = _order(gram, scale, threshold)
    transform, _ = cholesky_inverse_core(permuted(gram, order), scale.gather(-1, order), threshold)
    return transform.take_along_dim(order.argsort(-1)[..., :, None], -2)


def _principal(gram: Tensor, scale: Tensor, live: Tensor, threshold: float) -> Tensor:
    """Return T for the span of the eigenvectors of D G D, D = 1/scale, whose eigenvalues are above the threshold.

    The columns of P D V Λ^(−½) may be turned among themselves, by rounding alone where eigenvalues agree. They are
    turned into those of Gram–Schmidt on the columns that live, which depend on them continuously.
    """
    unit = torch.where(scale > 0, 1 / scale, 0)
    equilibrated = gram * unit[..., :, None] * unit[..., None, :]
    finite = equilibrated.sum((-2, -1)).isfinite()[..., None, None]
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(torch.where(finite, equilibrated, 0)))
    kept = values > threshold
    roots = torch.where(kept, values, 0).sqrt()
    order = _stable(live)
    turn = torch.linalg.qr((vectors * roots[..., None, :]).mT.take_along_dim(order[..., None, :], -1)).Q
    transform = unit[..., :, None] * ((vectors * torch.where(kept, 1 / roots, 0)[..., None, :]) @ turn)
    transform = transform * kept[..., None, :]
    return torch.where(finite, transform, float("nan"))


def strongest_first(gram: Tensor, scale: Tensor, threshold: float) -> Tensor | None:
    """Return an order (..., k) in which no column is measured against much weaker ones; None for that they have."""
    if reads_are_free(gram) and bool(_nothing_goes(live_columns(gram, scale, threshold), scale).all()):
        return None
    return _order(gram, scale, threshold)


def permuted(gram: Tensor, order: Tensor) -> Tensor:
    """Return Πᵀ G Π."""
    return gram.take_along_dim(order[..., :, None], -2).take_along_dim(order[..., None, :], -1)


def _order(gram: Tensor, scale: Tensor, threshold: float) -> Tensor:
    """Take first what stands out of longer columns at a coarse threshold, then at a finer one, then the rest.

    Pivoting, three levels deep: a coefficient on an earlier column is at most about θ^(−1/6). Columns that all stand
    out clearly of the ones before them stay in their order.
    """
    levels = (threshold ** (1 / 3), threshold ** (2 / 3))
    clear = _nothing_goes(live_columns(gram, scale, levels[0]), scale)
    order = torch.where(clear, _natural(scale), gram.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True))
    for level in levels:
        live = live_columns(permuted(gram, order), scale.gather(-1, order), level)
        order = order.gather(-1, _stable(live))
    return order


def _stable(live: Tensor) -> Tensor:
    """Return the order that puts the columns that live first."""
    return torch.argsort((~live).to(torch.uint8), dim=-1, stable=True)


def _natural(scale: Tensor) -> Tensor:
    return torch.arange(scale.shape[-1], device=scale.device).expand(scale.shape)


def _nothing_goes(live: Tensor, scale: Tensor) -> Tensor:
    """Say whether all columns live that are not zero: bool (..., 1)."""
    return (live | (scale == 0)).all(-1, keepdim=True)
