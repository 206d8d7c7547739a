"""Textbook forms that the library's choices are compared with: one projection or two, and two ways to start."""

from __future__ import annotations

import torch
from torch import Tensor


def update(values: Tensor, basis: Tensor, columns: Tensor, decay: float, weight: float, passes: int) -> tuple:
    """Return d and U after Brand's update at the old rank with LAPACK's QR and eigh, projecting once or twice.

    The core is in float64, so that only the projections tell.
    """
    r = basis.shape[1]
    inside = basis.mT @ columns
    orthonormal, triangle = torch.linalg.qr(columns - basis @ inside)
    for _ in range(passes - 1):
        again = basis.mT @ orthonormal
        inside = inside + again @ triangle
        orthonormal, correction = torch.linalg.qr(orthonormal - basis @ again)
        triangle = correction @ triangle
    stacked = torch.cat([inside, triangle]).double()
    core = weight * stacked @ stacked.mT
    core[:r, :r] += decay * torch.diag(values)
    spectrum, vectors = torch.linalg.eigh((core + core.mT) / 2)
    rotation = vectors.flip(1)[:, :r].to(basis.dtype)
    return spectrum.flip(0)[:r].clamp_min(0), torch.cat([basis, orthonormal], dim=1) @ rotation


def subspace_update(
    core: Tensor, basis: Tensor, columns: Tensor, decay: float, weight: float, start: str, iterations: int
) -> tuple[Tensor, Tensor]:
    """Return S and U after an update truncated by subspace iteration, started at the old basis or at the diagonal."""
    r = basis.shape[1]
    inside = basis.mT @ columns
    orthonormal, triangle = torch.linalg.qr(columns - basis @ inside)
    stacked = torch.cat([inside, triangle])
    expanded = weight * stacked @ stacked.mT
    expanded[:r, :r] += decay * core
    chosen = torch.arange(r) if start == "old basis" else expanded.diagonal().topk(r).indices
    rotation = torch.eye(len(expanded), dtype=core.dtype)[:, chosen]
    for _ in range(iterations):
        rotation = torch.linalg.qr(expanded @ rotation).Q
    return rotation.mT @ expanded @ rotation, torch.cat([basis, orthonormal], dim=1) @ rotation


def brand_update(values: Tensor, basis: Tensor, columns: Tensor, decay: float, weight: float) -> tuple[Tensor, Tensor]:
    """Return d and U after Brand's update as torch code has it: project, ``qr``, ``eigh``, rotate, in one dtype."""
    r = basis.shape[1]
    inside = basis.mT @ columns
    orthonormal, triangle = torch.linalg.qr(columns - basis @ inside)
    stacked = torch.cat([inside, triangle])
    core = weight * stacked @ stacked.mT
    core[:r, :r].diagonal().add_(values, alpha=decay)
    spectrum, vectors = torch.linalg.eigh(core)
    kept = spectrum[-r:].flip(0).clamp_min(0)
    return kept, torch.cat([basis, orthonormal], dim=1) @ vectors[:, -r:].flip(1)
