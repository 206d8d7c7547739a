"""Dense, triangular, block-diagonal and diagonal matrices: products block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from brandla import _check
from brandla.kfac.systems.structures.structure import Member, Structure


@dataclass(frozen=True)
class Dense(Structure):
    """All matrices, stored as (n, n). Π(S) = S."""

    dimensions: ClassVar[tuple[int, ...]] = (2,)

    def identity(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Member:
        return (torch.eye(n, dtype=dtype, device=device).expand(*groups, n, n).clone(),)

    def times(self, rows: Tensor, member: Member) -> Tensor:
        """Return X K: 2n² flops a row."""
        return rows @ member[0]

    def times_transposed(self, rows: Tensor, member: Member) -> Tensor:
        return rows @ member[0].mT

    def product(self, first: Member, second: Member) -> Member:
        return (first[0] @ second[0],)

    def gram(self, rows: Tensor) -> Member:
        return (rows.mT @ rows,)

    def own_gram(self, member: Member) -> Member:
        return self.gram(member[0])

    def trace(self, member: Member) -> Tensor:
        return member[0].diagonal(dim1=-2, dim2=-1).sum(-1)

    def flops(self, n: int) -> int:
        return 2 * n * n


@dataclass(frozen=True)
class Triangular(Dense):
    """Lower-triangular matrices. Π(S) is the lower triangle of S with what is off the diagonal doubled.

    They are stored and multiplied as dense ones whose upper triangle is zero: half of the entries to learn, not half
    of the memory.
    """

    def gram(self, rows: Tensor) -> Member:
        (full,) = super().gram(rows)
        return (full.tril() + full.tril(-1),)


@dataclass(frozen=True)
class BlockDiagonal(Structure):
    """Blocks of order b along the diagonal, stored as (⌈n/b⌉, b, b): O(n b). Π(S) is the blocks of S.

    Where b does not divide n, the last block is smaller: what is stored of it beyond is zero, and stays so. An n below
    b is one block.
    """

    block: int = 32

    dimensions: ClassVar[tuple[int, ...]] = (3,)

    def __post_init__(self) -> None:
        _check.count("BlockDiagonal", "block", self.block, 1)

    def identity(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Member:
        order = min(self.block, n)
        diagonal = torch.ones(n, dtype=dtype, device=device)
        blocks = torch.diag_embed(_cut(diagonal, order))
        return (blocks.expand(*groups, *blocks.shape).clone(),)

    def times(self, rows: Tensor, member: Member) -> Tensor:
        """Return X K: 2nb flops a row."""
        return self._joined(self._cut_rows(rows, member[0].shape[-1]) @ member[0], rows.shape[-1])

    def times_transposed(self, rows: Tensor, member: Member) -> Tensor:
        return self._joined(self._cut_rows(rows, member[0].shape[-1]) @ member[0].mT, rows.shape[-1])

    def product(self, first: Member, second: Member) -> Member:
        return (first[0] @ second[0],)

    def gram(self, rows: Tensor) -> Member:
        parts = self._cut_rows(rows, min(self.block, rows.shape[-1]))
        return (parts.mT @ parts,)

    def own_gram(self, member: Member) -> Member:
        return (member[0].mT @ member[0],)

    def trace(self, member: Member) -> Tensor:
        return member[0].diagonal(dim1=-2, dim2=-1).sum((-2, -1))

    def flops(self, n: int) -> int:
        return 2 * n * min(self.block, n)

    def _cut_rows(self, rows: Tensor, order: int) -> Tensor:
        """Return (..., N, n) as (..., ⌈n/b⌉, N, b)."""
        return _cut(rows, order).movedim(-2, -3)

    def _joined(self, parts: Tensor, n: int) -> Tensor:
        return parts.movedim(-3, -2).flatten(-2)[..., :n]


@dataclass(frozen=True)
class Diagonal(Structure):
    """Diagonal matrices, stored as (n,): everything is O(n). Π(S) is the diagonal of S."""

    dimensions: ClassVar[tuple[int, ...]] = (1,)

    def identity(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Member:
        return (torch.ones(*groups, n, dtype=dtype, device=device),)

    def times(self, rows: Tensor, member: Member) -> Tensor:
        """Return X K: n flops a row."""
        return rows * member[0][..., None, :]

    def times_transposed(self, rows: Tensor, member: Member) -> Tensor:
        return self.times(rows, member)

    def product(self, first: Member, second: Member) -> Member:
        return (first[0] * second[0],)

    def gram(self, rows: Tensor) -> Member:
        return (rows.square().sum(-2),)

    def own_gram(self, member: Member) -> Member:
        return (member[0].square(),)

    def trace(self, member: Member) -> Tensor:
        return member[0].sum(-1)

    def flops(self, n: int) -> int:
        return n


def _cut(rows: Tensor, order: int) -> Tensor:
    """Return (..., n) as (..., ⌈n/b⌉, b), filled up with zeros."""
    parts: Tensor = pad(rows, (0, -rows.shape[-1] % order)).unflatten(-1, (-1, order))
    return parts
