"""The library's arithmetic for one small factor, as the torch calls written out: no checks, no dispatch, no batches.

For data that take one pass, such as a stream in its steady state. What a call of the library takes beyond these is its
overhead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from brandla import LowRankEigh, LowRankSym


class _Expanded(NamedTuple):
    core: Tensor
    panel: Tensor
    overlap: Tensor
    transform: Tensor
    drift: Tensor

    def rotate(self, basis: Tensor, rotation: Tensor) -> Tensor:
        r = basis.shape[1]
        rotation = rotation.float()
        below = self.transform.float() @ rotation[r:]
        above = rotation[:r] - self.drift.float() @ rotation[:r] / 2 - self.overlap.float() @ below
        return (basis @ above).addmm_(self.panel, below)


def eigh_update(eigh: LowRankEigh, columns: Tensor, decay: float, weight: float) -> LowRankEigh:
    """`brandla.eigh_update` at the old rank."""
    values, basis = eigh
    r = basis.shape[1]
    expanded = _expand(torch.diag(values), basis, columns, decay, weight)
    normalized, diagonal, scale, finite = _normalized(expanded.core)
    normalized = normalized.float()
    normalized.diagonal().add_(torch.where(diagonal > 0, 0.0, -1.0))
    spectrum, vectors = torch.linalg.eigh(normalized)
    bool(torch.isfinite(spectrum).all() & torch.isfinite(vectors).all())
    spectrum, vectors = spectrum.flip(0)[:r], vectors.flip(1)[:, :r]
    rotation = (vectors * (spectrum > -0.5)).masked_fill_(~finite, float("nan"))
    rotation = 1.5 * rotation - rotation @ (rotation.mT @ rotation) / 2
    spectrum = (spectrum.clamp_min(0) * scale.float()).masked_fill_(~finite, float("nan"))
    spectrum = torch.where(spectrum.abs().amax() < torch.finfo(spectrum.dtype).tiny, 0, spectrum)
    return LowRankEigh(spectrum, expanded.rotate(basis, rotation))


def subspace_update(sym: LowRankSym, columns: Tensor, decay: float, weight: float) -> LowRankSym:
    """`brandla.subspace_update` at the old rank, with two iterations."""
    old, basis = sym
    r = basis.shape[1]
    expanded = _expand(old, basis, columns, decay, weight)
    normalized, diagonal, scale, finite = _normalized(expanded.core)
    order = torch.where(finite, diagonal, 0).topk(r).indices
    image = normalized.index_select(1, order)
    gram = image.mT @ image
    rotation = image @ _inverse_core(gram)
    image = normalized @ rotation
    inner = rotation.mT @ image
    root = image @ _inverse_core((inner + inner.mT) / 2)
    gram = root.mT @ root
    transform = _inverse_core(gram)
    rotation, triangle = root @ transform, transform.mT @ gram
    core = triangle @ triangle.mT
    core = ((core + core.mT) * (scale / 2)).masked_fill_(~finite, float("nan")).float()
    rotation.masked_fill_(~finite, float("nan"))
    core = torch.where(core.abs().amax() < torch.finfo(core.dtype).tiny, 0, core)
    return LowRankSym(core, expanded.rotate(basis, rotation))


def damped_solve(eigh: LowRankEigh, rhs: Tensor, damping: float) -> Tensor:
    """`brandla.damped_solve` without a tail."""
    values, basis = eigh
    middle = -values / (values + damping) / damping
    return rhs / damping + basis @ (middle[:, None] * (basis.mT @ rhs))


def _expand(old: Tensor, basis: Tensor, columns: Tensor, decay: float, weight: float) -> _Expanded:
    r = basis.shape[1]
    projection = basis.mT @ columns
    panel = torch.addmm(columns, basis, projection, alpha=-1)
    coefficients, gram = projection.double(), (panel.mT @ panel).double()
    own = gram.diagonal()
    length = (coefficients.square().sum(0) + own).sqrt()
    bool((own > 1e-4 * length.square()).all())
    unit = own.rsqrt()
    factor, info = torch.linalg.cholesky_ex(gram * unit[:, None] * unit[None, :])
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(gram), dtype=gram.dtype), upper=False)
    bool((info == 0) & (inverse.square().sum(1) <= 16).all())
    transform, triangle = inverse.mT * unit[:, None], factor.mT / unit[None, :]
    bool(((length.square()[:, None] * transform.square()).sum(0) <= 16).all())
    overlap = (basis.mT @ panel).double()
    stacked = torch.cat([coefficients + overlap, triangle])
    core = (stacked * weight) @ stacked.mT
    core[:r, :r] += old.double() * decay
    return _Expanded(core, panel, overlap, transform, _drift(basis))


def _inverse_core(gram: Tensor) -> Tensor:
    """Inverse factor of a Gram matrix all of whose columns stand out."""
    inverse_scale = 1 / gram.diagonal().clamp_min(0).sqrt()
    factor, info = torch.linalg.cholesky_ex(gram * inverse_scale[:, None] * inverse_scale[None, :])
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(gram), dtype=gram.dtype), upper=False)
    bool((info == 0) & (inverse.square().sum(1) < 1e8).all())
    return inverse.mT * inverse_scale[:, None]


def _drift(basis: Tensor) -> Tensor:
    r = basis.shape[1]
    norms = basis.square().sum(0).sqrt()
    live = norms > 0.5
    chosen = torch.where(live, (norms - 1).abs(), 0).nan_to_num().topk(-(-r // 8)).indices
    identity = torch.diag(live.double())
    deviation = (basis.mT @ basis.index_select(1, chosen)).double() - identity.index_select(1, chosen)
    drift = torch.zeros_like(identity).index_copy_(1, chosen, deviation)
    return drift.index_copy_(0, chosen, deviation.mT)


def _normalized(core: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the core over its largest diagonal entry, its diagonal, that entry, and whether all of it is finite."""
    diagonal = core.diagonal()
    finite = torch.isfinite(core.sum())
    largest = diagonal.amax()
    scale = torch.where(finite & (largest > 0), largest, 1)
    return (core / scale).masked_fill_(~finite, 0), diagonal, scale, finite
