"""The values that flow between capture, systems and processes: rows, gradients, and what a step brings."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import attrgetter
from typing import Literal, NamedTuple, TypeAlias, TypeVar
from weakref import ref

import torch
from torch import Tensor

from brandla._small import largest_eigenvalue
from brandla.lowrank import stacked

Item = TypeVar("Item")
Result = TypeVar("Result")
Scale = Literal["relative", "absolute"]
Side = Literal["input", "output"]
# What tensors that can be stacked have in common; no call of Python's.
layout = attrgetter("shape", "dtype", "device")
# The gradient of a layer as a matrix (..., d_out, d_in), or P (..., d_out, k) and Q (..., d_in, k) standing for P Qᵀ.
Gradient: TypeAlias = Tensor | tuple[Tensor, Tensor]


class Noted:
    """A tensor as it is now, to tell later whether a tensor is that one and nobody has written to it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = ref(tensor)
        self._version = tensor._version

    def is_still(self, tensor: Tensor | None) -> bool:
        """Say so."""
        return tensor is not None and tensor is self._tensor() and tensor._version == self._version


class Shape(NamedTuple):
    """Of a layer's weight as a matrix (*groups, d_out, d_in), the bias's column counted in.

    ``one_hot`` inputs are given as indices, and their factor is diagonal. ``single`` layers have no output factor:
    their input rows are whole gradients of samples.
    """

    groups: tuple[int, ...]
    d_out: int
    d_in: int
    dtype: torch.dtype
    device: torch.device
    one_hot: bool = False
    single: bool = False


class Rows(NamedTuple):
    """Uses of a weight: inputs a (*groups, N, d_in) and output gradients γ (*groups, m N, d_out) of a mean loss.

    The bias's 1 is the last entry of a. ``uses`` is N, samples times ``positions``, sample by sample; m > 1 where the
    curvature takes m gradients of every use. One-hot inputs are (N,) indices, −1 for a row of zeros; those of single
    layers are m N rows, and their gradients the same. ``share`` is the part of the uses that is no padding, whose rows
    are 0; the others are scaled so that means over N are those over them. ``counted`` rows have been divided by what
    makes N Σ γ γᵀ the mean over the terms of the loss, so that Σ γ aᵀ is no gradient.
    """

    inputs: Tensor
    gradients: Tensor
    uses: int
    positions: int = 1
    single: bool = False
    share: Tensor | None = None
    counted: bool = False

    def of_terms(self, divisor: Tensor | float) -> Rows:
        """Divide γ by what makes the rows those of terms; of single layers it is in both places."""
        gradients = self.gradients / divisor
        return self._replace(inputs=gradients if self.single else self.inputs, gradients=gradients, counted=True)


class Damping(NamedTuple):
    """λ, relative to each factor's largest eigenvalue or absolute."""

    value: float
    scale: Scale

    def of(self, largest: Tensor, *, stacked: bool = False) -> Tensor:
        """Return λ for the largest eigenvalues (*groups,) of a factor, or of several in one tensor.

        Relative to no less than ε times the largest eigenvalue of all matrices of a factor: what is below cannot be
        told from rounding. It is 1 where a factor is zero so far, which leaves its side of the gradient as it is, and
        where λ would be too small for 1/λ to be finite.
        """
        if self.scale == "absolute":
            return torch.full_like(largest, self.value)
        if groups := tuple(range(int(stacked), largest.ndim)):
            resolved = torch.finfo(largest.dtype).eps * largest.amax(groups, keepdim=True)
            largest = torch.maximum(largest, resolved)
        shift: Tensor = torch.nn.functional.threshold(self.value * largest, torch.finfo(largest.dtype).tiny, 1)
        return shift

    def of_matrix(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return λ for matrices (*groups, n, n), and their largest eigenvalues d₁, estimated from below with no sync.

        λ is no less than n ε d₁: a matrix that was summed up is semi-definite up to about that.
        """
        largest = largest_eigenvalue(matrix)
        return torch.maximum(self.of(largest), matrix.shape[-1] * torch.finfo(matrix.dtype).eps * largest), largest

    def of_each(self, largest: Sequence[Tensor]) -> list[Tensor]:
        """Return λ for each of a list of factors."""
        return alike(largest, layout, lambda members: self.of(stacked(members), stacked=True).unbind())


class Now(NamedTuple):
    """What a step of training has besides data.

    ``seed`` is new at every step. Where ``finite``, a 0-dim bool tensor, is False, the rows are all 0 and the step
    counts for nothing. In a CUDA graph ``replays`` is a 0-dim tensor that each replay finds larger by one.
    """

    step: int
    seed: int
    decay: float
    damping: Damping
    finite: Tensor
    replays: Tensor | int = 0


def inner(one: Gradient, other: Gradient) -> Tensor:
    """Return the inner product."""
    return _products(one, other).sum()


def inner_of_each(one: Gradient, other: Gradient) -> Tensor:
    """Return the inner products of matrices (*groups,); ⟨P Qᵀ, R Sᵀ⟩ = ⟨PᵀR, QᵀS⟩ needs no d_out × d_in matrix."""
    return _products(one, other).sum((-2, -1))


def _products(one: Gradient, other: Gradient) -> Tensor:
    """Return what the inner product is the sum of."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return dense(one) * dense(other)
    products: Tensor = (one[0].mT @ other[0]) * (one[1].mT @ other[1])
    return products


def length(part: Gradient) -> Tensor:
    """Return ‖·‖_F; of a product P Qᵀ no less than √ε ‖P‖ ‖Q‖, below which ⟨PᵀP, QᵀQ⟩ is rounding, of either sign."""
    if isinstance(part, Tensor):
        norm: Tensor = torch.linalg.vector_norm(part)
        return norm
    first, second = (torch.linalg.vector_norm(factor) for factor in part)
    rounding = torch.finfo(first.dtype).eps ** 0.5 * first * second
    return torch.maximum(inner(part, part).clamp_min(0).sqrt(), rounding)


def dense(part: Gradient) -> Tensor:
    """Return the matrix."""
    return part if isinstance(part, Tensor) else part[0] @ part[1].mT


def sizes(part: Gradient) -> tuple[int, int]:
    """Return d_out and d_in."""
    return (part.shape[-2], part.shape[-1]) if isinstance(part, Tensor) else (part[0].shape[-2], part[1].shape[-2])


def plus(one: Gradient, factor: Tensor | float, other: Gradient) -> Gradient:
    """``one + factor · other``: of two pairs, the pair of both; else a matrix."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return dense(one) + factor * dense(other)
    return torch.cat([one[0], factor * other[0]], dim=-1), torch.cat([one[1], other[1]], dim=-1)


def scaled(part: Gradient, factor: Tensor | float) -> Gradient:
    """``factor · part``."""
    return part * factor if isinstance(part, Tensor) else (part[0] * factor, part[1])


def by_kind(items: Iterable[Item], kinds: Iterable[Hashable]) -> list[list[Item]]:
    """Return the items of each kind, in their order."""
    kinds = list(kinds)
    if kinds and kinds.count(kinds[0]) == len(kinds):
        return [list(items)]
    members: dict[Hashable, list[Item]] = {}
    for item, kind in zip(items, kinds, strict=True):
        members.setdefault(kind, []).append(item)
    return list(members.values())


def alike(
    items: Sequence[Item], kind_of: Callable[[Item], Hashable], of: Callable[[list[Item]], Sequence[Result]]
) -> list[Result]:
    """Return what ``of`` makes of all items of a kind, in the order of the items."""
    results: dict[int, Result] = {}
    for indices in by_kind(range(len(items)), map(kind_of, items)):
        results |= dict(zip(indices, of([items[index] for index in indices]), strict=True))
    return [results[index] for index in range(len(items))]
