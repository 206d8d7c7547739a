"""No structure: n² numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from brandla.kfac.systems.structures.structure import Member, Structure


@dataclass(frozen=True)
class Dense(Structure):
    """All matrices, stored as (n, n). Π(S) = S."""

    dimensions: ClassVar[tuple[int, ...]] = (2,)

    def identity(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Member:
        """Return I."""
        return (torch.eye(n, dtype=dtype, device=device).expand(*groups, n, n).clone(),)

    def times(self, rows: Tensor, member: Member) -> Tensor:
        """Return X K: 2n² flops a row."""
        return rows @ member[0]

    def times_transposed(self, rows: Tensor, member: Member) -> Tensor:
        """Return X Kᵀ."""
        return rows @ member[0].mT

    def product(self, first: Member, second: Member) -> Member:
        """Return K M."""
        return (first[0] @ second[0],)

    def gram(self, rows: Tensor) -> Member:
        """Return XᵀX."""
        return (rows.mT @ rows,)

    def own_gram(self, member: Member) -> Member:
        """Return KᵀK."""
        return self.gram(member[0])

    def trace(self, member: Member) -> Tensor:
        """Sum the diagonal."""
        return member[0].diagonal(dim1=-2, dim2=-1).sum(-1)

    def flops(self, n: int) -> int:
        """2n²."""
        return 2 * n * n
