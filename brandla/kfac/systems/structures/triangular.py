"""Lower-triangular matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from brandla.kfac.systems.structures.dense import Dense
from brandla.kfac.systems.structures.structure import Member


@dataclass(frozen=True)
class Triangular(Dense):
    """Lower-triangular matrices. Π(S) is the lower triangle of S with what is off the diagonal doubled.

    They are stored and multiplied as dense ones whose upper triangle is zero: half of the entries to learn, not half
    of the memory.
    """

    def gram(self, rows: Tensor) -> Member:
        """Return Π(XᵀX)."""
        (full,) = super().gram(rows)
        return (full.tril() + full.tril(-1),)
