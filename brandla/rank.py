"""How many values an update keeps: a number, or a rule that adapts to the spectrum within fixed memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from brandla import _check


@dataclass(frozen=True)
class Rank:
    """Keep at most ``max`` values, and of those only the ones above ``tol`` times the largest.

    The shapes of the result are those of rank ``max``; what falls under the tolerance becomes the value 0 with a zero
    vector, on the device and with no sync, and enters the error bound of a tracked factor. Zero columns are filled
    again when the data calls for them. ``(values > 0).sum(-1)`` is the number of values kept.

    Parameters
    ----------
    max
        Largest rank, at least 1.
    tol
        Relative tolerance, in [0, 1): of eigenvalues for the symmetric updates, of singular values for the SVD.
    """

    max: int
    tol: float

    def __post_init__(self) -> None:
        _check.count("Rank", "max", self.max, 1)
        _check.tolerance("Rank", self.tol)


def most_of(rank: int | Rank | None) -> int | None:
    """Return the number behind a rule."""
    return rank.max if isinstance(rank, Rank) else rank


def tolerance_of(rank: int | Rank | None) -> float:
    """Return the tolerance of a rule; a number has none."""
    return rank.tol if isinstance(rank, Rank) else 0.0


def above(values: Tensor, tol: float) -> Tensor:
    """Mask of the values (..., r) that exceed ``tol`` times the largest of them: all at tolerance 0, and every NaN."""
    if tol == 0 or values.shape[-1] == 0:
        return torch.ones_like(values, dtype=torch.bool)
    return ~(values <= tol * values.amax(-1, keepdim=True))
