"""Structures of inverse-free factors: algebras of n × n matrices. ``STRUCTURES`` maps names to them."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import ClassVar, TypeAlias, cast

import torch
from torch import Tensor
from torch.fft import irfft, rfft
from torch.nn.functional import pad

from brandla import _check
from brandla.lowrank import add_dims

# The stored tensors of a matrix of a structure, or of a batch of matrices.
Member: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Structure:
    """A linear space of n × n matrices that contains I and the products of its members. The base class is all matrices.

    Members K have leading group dimensions. Vectors are rows: X (*groups, N, n) is N vectors, and the groups of X and K
    broadcast. The projection Π(S) of a symmetric S is the member m whose symmetric part (m + mᵀ)/2 is nearest to S in
    the Frobenius norm, and the smallest such m. So a triangular m has twice the entries of S off the diagonal.

    ``dimensions`` are the numbers of dimensions of the stored tensors, without groups.

    References
    ----------
    W. Lin and others, "Structured inverse-free natural gradient descent", ICML 2024, arXiv 2312.05705, section 3.2.
    """

    dimensions: ClassVar[tuple[int, ...]] = (2,)

    def identity(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Member:
        """Return I."""
        return (torch.eye(n, dtype=dtype, device=device).expand(*groups, n, n).clone(),)

    def times(self, rows: Tensor, member: Member) -> Tensor:
        """Return X K."""
        return rows @ member[0]

    def times_transposed(self, rows: Tensor, member: Member) -> Tensor:
        """Return X Kᵀ."""
        return self.times(rows, (member[0].mT,))

    def product(self, first: Member, second: Member) -> Member:
        """Return K M."""
        return (first[0] @ second[0],)

    def gram(self, rows: Tensor) -> Member:
        """Return Π(XᵀX)."""
        return (rows.mT @ rows,)

    def own_gram(self, member: Member) -> Member:
        """Return Π(KᵀK)."""
        return self.gram(member[0])

    def trace(self, member: Member) -> Tensor:
        """Return tr K, shape (*groups,)."""
        return member[0].diagonal(dim1=-2, dim2=-1).sum(-1)

    def flops(self, n: int) -> int:
        """Return the flops of X K for each row of X."""
        return 2 * n * n

    def squared_norm(self, member: Member) -> Tensor:
        """Return ‖K‖_F², shape (*groups,)."""
        squares = [part.square().flatten(-count).sum(-1) for part, count in zip(member, self.dimensions, strict=True)]
        return sum(squares[1:], start=squares[0])

    def combine(self, *terms: tuple[Tensor | float, Member]) -> Member:
        """Return Σ c K over (c, K); the numbers c may be tensors of shape (*groups,)."""
        scaled = [
            [part * add_dims(by, count) for part, count in zip(member, self.dimensions, strict=True)]
            for by, member in terms
        ]
        return tuple(sum(parts[1:], start=parts[0]) for parts in zip(*scaled, strict=True))

    def dense(self, member: Member, n: int) -> Tensor:
        """Return K as a dense matrix, for tests and small cases."""
        return self.times(torch.eye(n, dtype=member[0].dtype, device=member[0].device), member)


@dataclass(frozen=True)
class Dense(Structure):
    """All matrices, stored as (n, n). Π(S) = S."""


@dataclass(frozen=True)
class Triangular(Dense):
    """Lower-triangular matrices. Π(S) is the lower triangle of S with the entries off the diagonal doubled.

    They are stored and multiplied as dense matrices with a zero upper triangle: half of the entries to learn, but not
    half of the memory.
    """

    def gram(self, rows: Tensor) -> Member:
        (full,) = super().gram(rows)
        return (full.tril() + full.tril(-1),)


@dataclass(frozen=True)
class BlockDiagonal(Structure):
    """Blocks of order b along the diagonal, stored as (⌈n/b⌉, b, b): O(n b). Π(S) is the blocks of S.

    If b does not divide n, the last block is smaller, and its stored padding is and stays zero. If n < b, there is one
    block.
    """

    block: int = 32

    dimensions: ClassVar[tuple[int, ...]] = (3,)

    def __post_init__(self) -> None:
        _check.count("BlockDiagonal", "block", self.block, 1)

    def identity(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Member:
        blocks = torch.diag_embed(self._blocks(torch.ones(1, n, dtype=dtype, device=device))[:, 0])
        return (blocks.expand(*groups, *blocks.shape).clone(),)

    def times(self, rows: Tensor, member: Member) -> Tensor:
        return (self._blocks(rows) @ member[0]).movedim(-3, -2).flatten(-2)[..., : rows.shape[-1]]

    def gram(self, rows: Tensor) -> Member:
        return super().gram(self._blocks(rows))

    def own_gram(self, member: Member) -> Member:
        return super().gram(member[0])

    def trace(self, member: Member) -> Tensor:
        return super().trace(member).sum(-1)

    def flops(self, n: int) -> int:
        return 2 * n * min(self.block, n)

    def _blocks(self, rows: Tensor) -> Tensor:
        """Return (..., N, n) as (..., ⌈n/b⌉, N, b), padded with zeros."""
        order = min(self.block, rows.shape[-1])
        return cast(Tensor, pad(rows, (0, -rows.shape[-1] % order)).unflatten(-1, (-1, order)).movedim(-2, -3))


@dataclass(frozen=True)
class Diagonal(Structure):
    """Diagonal matrices, stored as (n,): all costs are O(n). Π(S) is the diagonal of S."""

    dimensions: ClassVar[tuple[int, ...]] = (1,)

    def identity(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Member:
        return (torch.ones(*groups, n, dtype=dtype, device=device),)

    def times(self, rows: Tensor, member: Member) -> Tensor:
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


@dataclass(frozen=True)
class Hierarchical(Structure):
    """Matrices [A₁₁ A₁₂ A₁₃; 0 D₂₂ 0; 0 A₃₂ A₃₃], D₂₂ diagonal, A₁₁ of order ``first`` and A₃₃ of order ``last``.

    They are stored as the strip [A₁₁ A₁₂ A₁₃] (first, n), the diagonal of D₂₂ (n − first − last,), and the strip
    [A₃₂ A₃₃] (last, n − first): O(n (first + last)). Π(S) takes these parts of S, with A₁₂, A₁₃ and A₃₂ doubled. If n <
    first + last, A₁₁ has order min(first, n), and A₃₃ takes the rest.
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
        top, diagonal, bottom = member
        head, middle, tail = rows.split(self._sizes(rows.shape[-1]), dim=-1)
        below = tail @ bottom
        below[..., : diagonal.shape[-1]] += middle * diagonal[..., None, :]
        return cast(Tensor, head @ top + pad(below, (top.shape[-2], 0)))

    def times_transposed(self, rows: Tensor, member: Member) -> Tensor:
        top, diagonal, bottom = member
        first, count, _ = self._sizes(rows.shape[-1])
        middle = rows[..., first : first + count] * diagonal[..., None, :]
        return torch.cat([rows @ top.mT, middle, rows[..., first:] @ bottom.mT], dim=-1)

    def product(self, first: Member, second: Member) -> Member:
        """Return K M: strips times M."""
        top, diagonal, bottom = first
        offset = top.shape[-2]
        below = self.times(pad(bottom, (offset, 0)), second)[..., offset:]
        return self.times(top, second), diagonal * second[1], below

    def gram(self, rows: Tensor) -> Member:
        head, middle, tail = rows.split(self._sizes(rows.shape[-1]), dim=-1)
        top = torch.cat([head.mT @ head, 2 * (head.mT @ rows[..., head.shape[-1] :])], dim=-1)
        bottom = torch.cat([2 * (tail.mT @ middle), tail.mT @ tail], dim=-1)
        return top, middle.square().sum(-2), bottom

    def own_gram(self, member: Member) -> Member:
        """Return Π(KᵀK). The rows of K are the strips, and multiples of unit vectors."""
        top, diagonal, bottom = member
        above, middle, below = self.gram(torch.cat([top, pad(bottom, (top.shape[-2], 0))], dim=-2))
        return above, middle + diagonal.square(), below

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


@dataclass(frozen=True)
class Toeplitz(Structure):
    """Upper-triangular matrices with one value b_t on each diagonal j − i = t, stored as (n,).

    Products are convolutions, by FFT: O(n log n) per row. Π(S) is the mean of each diagonal of S, doubled for t > 0.
    """

    dimensions: ClassVar[tuple[int, ...]] = (1,)

    def identity(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Member:
        return (torch.eye(1, n, dtype=dtype, device=device)[0].expand(*groups, n).clone(),)

    def times(self, rows: Tensor, member: Member) -> Tensor:
        """Return X K: entry j of a row x is Σ_i x_i b_{j−i}."""
        return _inverse_transform(_transform(rows) * _transform(member[0][..., None, :]), rows)

    def times_transposed(self, rows: Tensor, member: Member) -> Tensor:
        """Return X Kᵀ: entry i of a row x is Σ_j x_j b_{j−i}."""
        return _inverse_transform(_transform(rows) * _transform(member[0][..., None, :]).conj(), rows)

    def product(self, first: Member, second: Member) -> Member:
        return (_inverse_transform(_transform(first[0]) * _transform(second[0]), first[0]),)

    def gram(self, rows: Tensor) -> Member:
        """Return Π(XᵀX), from the autocorrelation of the rows."""
        return (_inverse_transform(_transform(rows).abs().square().sum(-2), rows) * _diagonal_weights(rows),)

    def own_gram(self, member: Member) -> Member:
        """Return Π(KᵀK): diagonal t of KᵀK sums to Σ_s (n − s) b_s b_{s−t}."""
        (values,) = member
        products = _transform(values * _diagonal_lengths(values)) * _transform(values).conj()
        return (_inverse_transform(products, values) * _diagonal_weights(values),)

    def trace(self, member: Member) -> Tensor:
        return member[0][..., 0] * member[0].shape[-1]

    def squared_norm(self, member: Member) -> Tensor:
        """Return Σ_t (n − t) b_t²."""
        return (member[0].square() * _diagonal_lengths(member[0])).sum(-1)

    def flops(self, n: int) -> int:
        """Return the flops of two real transforms of length L >= 2n − 1, 2.5 L log₂ 2L each."""
        return int(5 * _fft_length(n) * log2(2 * _fft_length(n)))


def _fft_length(n: int) -> int:
    """Return the least power of two at which a circular convolution of length-n vectors does not wrap."""
    return 1 << (2 * n - 2).bit_length()


def _transform(rows: Tensor) -> Tensor:
    return cast(Tensor, rfft(rows, _fft_length(rows.shape[-1])))


def _inverse_transform(transform: Tensor, like: Tensor) -> Tensor:
    n = like.shape[-1]
    return cast(Tensor, irfft(transform, _fft_length(n))[..., :n])


def _diagonal_lengths(values: Tensor) -> Tensor:
    """Return the number of entries n − t of each diagonal."""
    return torch.arange(values.shape[-1], 0, -1, dtype=values.dtype, device=values.device)


def _diagonal_weights(values: Tensor) -> Tensor:
    """Return the weights that turn sums of diagonals into the projection."""
    weights = 2 / _diagonal_lengths(values)
    weights[0] /= 2
    return weights


STRUCTURES: dict[str, Structure] = {
    "dense": Dense(),
    "diagonal": Diagonal(),
    "block-diagonal": BlockDiagonal(),
    "triangular": Triangular(),
    "hierarchical": Hierarchical(),
    "toeplitz": Toeplitz(),
}
