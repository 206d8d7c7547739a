"""What a structure is: an algebra of n × n matrices, stored and multiplied at less than the cost of dense ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

# A matrix of a structure, or a batch of them: the tensors that it is stored as.
Member: TypeAlias = tuple[Tensor, ...]


class Structure(ABC):
    """A linear space of n × n matrices that holds I and the products of its members.

    Members K have leading group dimensions. Vectors are rows: X (*groups, N, n) stands for N of them, and the groups of
    X and K broadcast. The projection Π(S) of a symmetric S is the member m whose symmetric part (m + mᵀ)/2 is nearest
    to S in the Frobenius norm, and of those the least: a triangular m has the entries of S off the diagonal twice.

    ``dimensions`` are those of each stored tensor, groups left out.

    References
    ----------
    W. Lin and others, "Structured inverse-free natural gradient descent", ICML 2024, arXiv 2312.05705, section 3.2.
    """

    dimensions: ClassVar[tuple[int, ...]]

    @abstractmethod
    def identity(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Member:
        """Return I."""

    @abstractmethod
    def times(self, rows: Tensor, member: Member) -> Tensor:
        """Return X K."""

    @abstractmethod
    def times_transposed(self, rows: Tensor, member: Member) -> Tensor:
        """Return X Kᵀ."""

    @abstractmethod
    def product(self, first: Member, second: Member) -> Member:
        """Return K M."""

    @abstractmethod
    def gram(self, rows: Tensor) -> Member:
        """Return Π(XᵀX)."""

    @abstractmethod
    def own_gram(self, member: Member) -> Member:
        """Return Π(KᵀK)."""

    @abstractmethod
    def trace(self, member: Member) -> Tensor:
        """Return tr K, shape (*groups,)."""

    @abstractmethod
    def flops(self, n: int) -> int:
        """Return the work of X K for each row of X."""

    def squared_norm(self, member: Member) -> Tensor:
        """Return ‖K‖_F², shape (*groups,)."""
        squares = [part.square().flatten(-count).sum(-1) for part, count in zip(member, self.dimensions, strict=True)]
        return sum(squares[1:], start=squares[0])

    def combine(self, *terms: tuple[Tensor | float, Member]) -> Member:
        """Return Σ c K over (c, K); the numbers c may be tensors of shape (*groups,)."""
        members = zip(*(self._scaled(member, by) for by, member in terms), strict=True)
        return tuple(sum(parts[1:], start=parts[0]) for parts in members)

    def dense(self, member: Member, n: int) -> Tensor:
        """Return K as a dense matrix, for tests and small cases."""
        return self.times(torch.eye(n, dtype=member[0].dtype, device=member[0].device), member)

    def _scaled(self, member: Member, by: Tensor | float) -> Member:
        if not isinstance(by, Tensor):
            return tuple(part * by for part in member)
        return tuple(
            part * by.reshape(*by.shape, *(1,) * count) for part, count in zip(member, self.dimensions, strict=True)
        )
