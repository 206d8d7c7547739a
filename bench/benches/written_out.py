"""The library's arithmetic written out in torch: the units of its time, and what its overhead is measured against.

The floors are only the products that an algorithm cannot do without. The calls by hand are those of one small factor,
with no checks, no dispatch and no batches, for finite data whose squares float32 holds. The library's overhead is the
time of its call beyond these.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.benches.problems import Symmetric
from brandla import LowRankEigh, LowRankRoot


def update_floor(case: tuple[Symmetric, Tensor]) -> Callable[[], Tensor]:
    """Return a function that computes the six tall products of Brand's update of U, with two projections."""
    factor, columns = case
    basis = factor.root if isinstance(factor, LowRankRoot) else factor.eigenvectors
    r, k = basis.shape[-1], columns.shape[-1]
    first, second = (torch.randn(rows, r, device=basis.device) for rows in (r, k))

    def products() -> Tensor:
        coefficients = basis.mT @ columns
        panel = torch.addmm(columns, basis, coefficients, alpha=-1)
        again = basis.mT @ panel
        panel = torch.addmm(panel, basis, again, alpha=-1)
        panel.mT @ panel
        return (basis @ first).addmm_(panel, second)

    return products


def brand_update(values: Tensor, basis: Tensor, columns: Tensor, decay: float, weight: float) -> tuple[Tensor, Tensor]:
    """Return d and U after Brand's update, as torch code usually does it in one dtype: project, qr, eigh, rotate."""
    r = basis.shape[1]
    inside = basis.mT @ columns
    orthonormal, triangle = torch.linalg.qr(columns - basis @ inside)
    stacked = torch.cat([inside, triangle])
    core = weight * stacked @ stacked.mT
    core[:r, :r].diagonal().add_(values, alpha=decay)
    spectrum, vectors = torch.linalg.eigh(core)
    kept = spectrum[-r:].flip(0).clamp_min(0)
    return kept, torch.cat([basis, orthonormal], dim=1) @ vectors[:, -r:].flip(1)


def root_update(root: LowRankRoot, columns: Tensor, decay: float, weight: float) -> LowRankRoot:
    """Return `brandla.root_update` at the old rank."""
    factor, gram = root
    lengths, rotation = _leading(factor, gram, columns, decay, weight, gram.dtype)
    above, below = rotation[: len(gram)] * decay**0.5, rotation[len(gram) :] * weight**0.5
    return LowRankRoot((factor @ above).addmm_(columns, below), torch.diag(lengths))


def eigh_update(eigh: LowRankEigh, columns: Tensor, decay: float, weight: float) -> LowRankEigh:
    """Return `brandla.eigh_update` at the old rank, of columns that need no polish."""
    values, vectors = eigh
    lengths = values.sqrt()[:, None]
    kept, rotation = _leading(vectors, torch.diag(values), columns, decay, weight, torch.float64, lengths)
    rotation = rotation * kept.rsqrt()
    above, below = rotation[: len(values)] * lengths * decay**0.5, rotation[len(values) :] * weight**0.5
    new = (vectors @ above.to(vectors.dtype)).addmm_(columns, below.to(vectors.dtype))
    signs = torch.ones(len(values), 4, dtype=new.dtype)
    bool((new.mT @ (new @ signs) - signs).square().sum() < 1)
    return LowRankEigh(kept.to(vectors.dtype), new)


def damped_solve(eigh: LowRankEigh, rhs: Tensor, damping: float) -> Tensor:
    """Return `brandla.damped_solve` without a tail."""
    values, basis = eigh
    middle = -values / (values + damping) / damping
    return rhs / damping + basis @ (middle[:, None] * (basis.mT @ rhs))


def _leading(
    tall: Tensor, gram: Tensor, columns: Tensor, decay: float, weight: float, dtype: torch.dtype, lengths: Any = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the r leading eigenpairs of BᵀB, for B = [√ρ F, √w A] and F = ``tall`` times ``lengths`` of rank r."""
    cross = (tall.mT @ columns).double() * lengths * (decay * weight) ** 0.5
    of_columns = (columns.mT @ columns).double() * weight
    core = torch.cat([torch.cat([gram.double() * decay, cross], dim=1), torch.cat([cross.mT, of_columns], dim=1)])
    scale = core.diagonal().amax()
    values, vectors = torch.linalg.eigh((core / scale).to(dtype))
    bool(torch.isfinite(values.sum() + vectors.sum()))
    return values.flip(0)[: len(gram)].clamp_min(0) * scale.to(dtype), vectors.flip(1)[:, : len(gram)]
