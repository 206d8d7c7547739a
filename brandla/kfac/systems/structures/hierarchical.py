"""Hierarchical matrices: a few dense rows and columns around a diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from brandla import _check
from brandla.kfac.systems.structures.structure import Member, Structure


@dataclass(frozen=True)
class Hierarchical(Structure):
    """Matrices [A₁₁ A₁₂ A₁₃; 0 D₂₂ 0; 0 A₃₂ A₃₃], D₂₂ diagonal, A₁₁ of order ``first`` and A₃₃ of order ``last``.

    They are stored as the strip [A₁₁ A₁₂ A₁₃] (first, n), the diagonal of D₂₂ (n − first − last,), and the strip
    [A₃₂ A₃₃] (last, n − first): O(n (first + last)). Π(S) takes these parts of S, A₁₂, A₁₃ and A₃₂ doubled. Where n is
    below first + last, ``first`` has what it can get and ``last`` the rest.
    """

    first: int = 16
    last: int = 16

    dimensions: ClassVar[tuple[int, ...]] = (2, 1, 2)

    def __post_init__(self) -> None:
        _check.count("Hierarchical", "first", self.first, 0)
        _check.count("Hierarchical", "last", self.last, 0)

    def identity(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Member:
        first, middle, _ = self._sizes(n)
        eye = torch.eye(n, dtype=dtype, device=device)
        parts = eye[:first], eye.new_ones(middle), eye[first + middle :, first:]
        return tuple(part.expand(*groups, *part.shape).clone() for part in parts)

    def times(self, rows: Tensor, member: Member) -> Tensor:
        """Return X K: 2n (first + last) flops a row."""
        top, diagonal, bottom = member
        head, middle, tail = rows.split(self._sizes(rows.shape[-1]), dim=-1)
        below = tail @ bottom
        count = diagonal.shape[-1]
        below[..., :count] += middle * diagonal[..., None, :]
        above: Tensor = head @ top
        return above + pad(below, (top.shape[-2], 0))

    def times_transposed(self, rows: Tensor, member: Member) -> Tensor:
        top, diagonal, bottom = member
        first, count, _ = self._sizes(rows.shape[-1])
        middle = rows[..., first : first + count] * diagonal[..., None, :]
        return torch.cat([rows @ top.mT, middle, rows[..., first:] @ bottom.mT], dim=-1)

    def product(self, first: Member, second: Member) -> Member:
        """Return K M: strips times M."""
        top, diagonal, bottom = first
        offset = top.shape[-2]
        return (
            self.times(top, second),
            diagonal * second[1],
            self.times(pad(bottom, (offset, 0)), second)[..., offset:],
        )

    def gram(self, rows: Tensor) -> Member:
        first, count, last = self._sizes(rows.shape[-1])
        head, middle, tail = rows.split((first, count, last), dim=-1)
        twice = rows.new_full((rows.shape[-1],), 2)
        top = (head.mT @ rows) * twice.index_fill(0, torch.arange(first, device=rows.device), 1)
        bottom = torch.cat([2 * (tail.mT @ middle), tail.mT @ tail], dim=-1)
        return top, middle.square().sum(-2), bottom

    def own_gram(self, member: Member) -> Member:
        """Return Π(KᵀK): K's rows are the strips and multiples of unit vectors."""
        top, diagonal, bottom = member
        squares = diagonal.square()
        alone = torch.zeros_like(top), squares, torch.zeros_like(bottom)
        below = pad(bottom, (top.shape[-2], 0))
        return self.combine((1, self.gram(top)), (1, self.gram(below)), (1, alone))

    def trace(self, member: Member) -> Tensor:
        top, diagonal, bottom = member
        corners = top.diagonal(dim1=-2, dim2=-1), bottom.diagonal(diagonal.shape[-1], dim1=-2, dim2=-1)
        return sum((corner.sum(-1) for corner in corners), start=diagonal.sum(-1))

    def flops(self, n: int) -> int:
        first, count, last = self._sizes(n)
        return 2 * (first * n + last * (n - first)) + count

    def _sizes(self, n: int) -> tuple[int, int, int]:
        first = min(self.first, n)
        last = min(self.last, n - first)
        return first, n - first - last, last
