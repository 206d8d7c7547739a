"""Upper-triangular Toeplitz matrices: products are convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import ClassVar

import torch
from torch import Tensor
from torch.fft import irfft, rfft

from brandla.kfac.systems.structures.structure import Member, Structure


@dataclass(frozen=True)
class Toeplitz(Structure):
    """Upper-triangular matrices with one value b_t on each diagonal j − i = t, stored as (n,).

    Products are convolutions, by FFT: O(n log n) a row. Π(S) is the mean of each diagonal of S, doubled for t > 0.
    """

    dimensions: ClassVar[tuple[int, ...]] = (1,)

    def identity(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Member:
        return (torch.eye(1, n, dtype=dtype, device=device)[0].expand(*groups, n).clone(),)

    def times(self, rows: Tensor, member: Member) -> Tensor:
        """Return X K, entry j of a row x being Σ_i x_i b_{j−i}."""
        return _convolved(rows, member[0][..., None, :])

    def times_transposed(self, rows: Tensor, member: Member) -> Tensor:
        """Return X Kᵀ, entry i of a row x being Σ_j x_j b_{j−i}."""
        return _correlated(rows, member[0][..., None, :])

    def product(self, first: Member, second: Member) -> Member:
        return (_convolved(first[0], second[0]),)

    def gram(self, rows: Tensor) -> Member:
        """Return Π(XᵀX), from the autocorrelation of the rows."""
        n = rows.shape[-1]
        power = _transform(rows).abs().square().sum(-2)
        return (_back(power, n) * _weights(rows),)

    def own_gram(self, member: Member) -> Member:
        """Return Π(KᵀK): diagonal t of KᵀK sums to Σ_s (n − s) b_s b_{s−t}."""
        (values,) = member
        return (_correlated(values * _lengths(values), values) * _weights(values),)

    def trace(self, member: Member) -> Tensor:
        return member[0][..., 0] * member[0].shape[-1]

    def squared_norm(self, member: Member) -> Tensor:
        """Return Σ_t (n − t) b_t²."""
        return (member[0].square() * _lengths(member[0])).sum(-1)

    def flops(self, n: int) -> int:
        """Two real transforms of length L >= 2n − 1, 2.5 L log₂ L each."""
        return int(5 * _length(n) * log2(2 * _length(n)))


def _length(n: int) -> int:
    """Return the power of two from which on a circular convolution of length n does not wrap."""
    return 1 << (2 * n - 2).bit_length()


def _transform(rows: Tensor) -> Tensor:
    transform: Tensor = rfft(rows, _length(rows.shape[-1]))
    return transform


def _back(transform: Tensor, n: int) -> Tensor:
    rows: Tensor = irfft(transform, _length(n))
    return rows[..., :n]


def _convolved(rows: Tensor, values: Tensor) -> Tensor:
    return _back(_transform(rows) * _transform(values), rows.shape[-1])


def _correlated(rows: Tensor, values: Tensor) -> Tensor:
    return _back(_transform(rows) * _transform(values).conj(), rows.shape[-1])


def _lengths(values: Tensor) -> Tensor:
    """Return the number of entries n − t of each diagonal."""
    n = values.shape[-1]
    return torch.arange(n, 0, -1, dtype=values.dtype, device=values.device)


def _weights(values: Tensor) -> Tensor:
    """Return what turns sums of diagonals into the projection."""
    weights = 2 / _lengths(values)
    weights[0] /= 2
    return weights
