"""Diagonal matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from brandla.kfac.systems.structures.structure import Member, Structure


@dataclass(frozen=True)
class Diagonal(Structure):
    """Diagonal matrices, stored as (n,): everything is O(n). Π(S) is the diagonal of S."""

    dimensions: ClassVar[tuple[int, ...]] = (1,)

    def identity(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Member:
        """Return I."""
        return (torch.ones(*groups, n, dtype=dtype, device=device),)

    def times(self, rows: Tensor, member: Member) -> Tensor:
        """Return X K: n flops a row."""
        return rows * member[0][..., None, :]

    def times_transposed(self, rows: Tensor, member: Member) -> Tensor:
        """Return X Kᵀ = X K."""
        return self.times(rows, member)

    def product(self, first: Member, second: Member) -> Member:
        """Return K M."""
        return (first[0] * second[0],)

    def gram(self, rows: Tensor) -> Member:
        """Return the sums of squares of the columns."""
        return (rows.square().sum(-2),)

    def own_gram(self, member: Member) -> Member:
        """Return K²."""
        return (member[0].square(),)

    def trace(self, member: Member) -> Tensor:
        """Sum the diagonal."""
        return member[0].sum(-1)

    def flops(self, n: int) -> int:
        """Return n."""
        return n
