"""The textbook form that the library is compared with on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


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
