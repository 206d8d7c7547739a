"""The values that capture, systems and processes exchange: rows, gradients, and the settings of a step."""

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
# Tensors of one layout can be stacked. An attrgetter costs no Python call.
layout = attrgetter("shape", "dtype", "device")
# The gradient of a layer as a matrix (..., d_out, d_in), or as the pair P (..., d_out, k), Q (..., d_in, k) for P Qᵀ.
Gradient: TypeAlias = Tensor | tuple[Tensor, Tensor]


class Version:
    """Remembers a tensor and its version, to recognise it later if nobody has written to it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = ref(tensor)
        self._version = tensor._version

    def matches(self, tensor: Tensor | None) -> bool:
        """Return whether ``tensor`` is the remembered one and is unchanged."""
        return tensor is not None and tensor is self._tensor() and tensor._version == self._version


class Shape(NamedTuple):
    """The shape of a layer's weight as a matrix (*groups, d_out, d_in); d_in includes the bias's column.

    ``one_hot`` inputs are indices, and their factor is diagonal. A ``single`` layer has no output factor: its input
    rows are whole gradients of samples.
    """

    groups: tuple[int, ...]
    d_out: int
    d_in: int
    dtype: torch.dtype
    device: torch.device
    one_hot: bool = False
    single: bool = False


class Rows(NamedTuple):
    """The uses of a weight: inputs a (*groups, N, d_in) and output gradients γ (*groups, m N, d_out) of a mean loss.

    The last entry of a is the bias's 1. ``uses`` is N, samples times ``positions``; the rows of a sample are
    adjacent. ``positions`` is 1 if calls differ in it. m > 1 if the curvature takes m gradients of each use. One-hot
    inputs are (N,) indices, with −1 for a row of zeros. A single layer's inputs are m N rows, and its gradients are the
    same rows. ``share`` is the fraction of uses that are not padding. Rows of padding are 0, and the others are
    scaled so that a mean over N is the mean over them. In ``per_term`` rows γ is divided so that N Σ γ γᵀ is the mean
    over the terms of the loss; Σ γ aᵀ is not the gradient then.
    """

    inputs: Tensor
    gradients: Tensor
    uses: int
    positions: int = 1
    single: bool = False
    share: Tensor | None = None
    per_term: bool = False

    def of_terms(self, divisor: Tensor | float) -> Rows:
        """Return rows per term of the loss: γ divided by ``divisor``. In a single layer γ is the input as well."""
        gradients = self.gradients / divisor
        return self._replace(inputs=gradients if self.single else self.inputs, gradients=gradients, per_term=True)


class Damping(NamedTuple):
    """λ, relative to each factor's largest eigenvalue or absolute."""

    value: float
    scale: Scale

    def of(self, largest: Tensor, *, several: bool = False) -> Tensor:
        """Return λ for the largest eigenvalues d₁ (*groups,) of a factor, or of several in one tensor.

        Relative damping raises d₁ of each matrix to at least ε times the largest d₁ of its factor, because smaller
        values are rounding. Relative λ is 1 if a factor is still zero, which leaves its side of the gradient unchanged,
        or if 1/λ would be infinite.
        """
        if self.scale == "absolute":
            return torch.full_like(largest, self.value)
        if groups := tuple(range(int(several), largest.ndim)):
            resolved = torch.finfo(largest.dtype).eps * largest.amax(groups, keepdim=True)
            largest = torch.maximum(largest, resolved)
        shift: Tensor = torch.nn.functional.threshold(self.value * largest, torch.finfo(largest.dtype).tiny, 1)
        return shift

    def of_matrix(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return λ for matrices (*groups, n, n), and their largest eigenvalues d₁, estimated from below with no sync.

        λ is at least n ε d₁, because rounding may make a semi-definite sum indefinite by about that much.
        """
        largest = largest_eigenvalue(matrix)
        return torch.maximum(self.of(largest), matrix.shape[-1] * torch.finfo(matrix.dtype).eps * largest), largest

    def of_each(self, largest: Sequence[Tensor]) -> list[Tensor]:
        """Return λ for each of a list of factors."""
        return map_by_kind(largest, layout, lambda members: self.of(stacked(members), several=True).unbind())


class Now(NamedTuple):
    """The settings of one training step.

    ``seed`` is new at every step. ``finite`` is a 0-dim bool tensor: if it is False, all rows are 0 and the step has
    no effect. In a CUDA graph, ``replays`` is a 0-dim tensor that grows by one with each replay.
    """

    step: int
    seed: int
    decay: float
    damping: Damping
    finite: Tensor
    replays: Tensor | int = 0


def inner_product(one: Gradient, other: Gradient) -> Tensor:
    """Return the inner product, summed over groups."""
    return _entrywise_products(one, other).sum()


def inner_products(one: Gradient, other: Gradient) -> Tensor:
    """Return the inner product in each group (*groups,). ⟨P Qᵀ, R Sᵀ⟩ = ⟨PᵀR, QᵀS⟩ needs no d_out × d_in matrix."""
    return _entrywise_products(one, other).sum((-2, -1))


def _entrywise_products(one: Gradient, other: Gradient) -> Tensor:
    """Return matrices whose entries sum to the inner product."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return dense(one) * dense(other)
    products: Tensor = (one[0].mT @ other[0]) * (one[1].mT @ other[1])
    return products


def frobenius_norm(part: Gradient) -> Tensor:
    """Return ‖·‖_F. For P Qᵀ it is at least √ε ‖P‖ ‖Q‖: below, ⟨PᵀP, QᵀQ⟩ is rounding, of either sign."""
    if isinstance(part, Tensor):
        norm: Tensor = torch.linalg.vector_norm(part)
        return norm
    first, second = (torch.linalg.vector_norm(factor) for factor in part)
    rounding = torch.finfo(first.dtype).eps ** 0.5 * first * second
    return torch.maximum(inner_product(part, part).clamp_min(0).sqrt(), rounding)


def dense(part: Gradient) -> Tensor:
    """Return a gradient as a matrix."""
    return part if isinstance(part, Tensor) else part[0] @ part[1].mT


def sizes(part: Gradient) -> tuple[int, int]:
    """Return d_out and d_in."""
    return (part.shape[-2], part.shape[-1]) if isinstance(part, Tensor) else (part[0].shape[-2], part[1].shape[-2])


def add_scaled(one: Gradient, factor: Tensor | float, other: Gradient) -> Gradient:
    """Return ``one + factor · other``: a pair if both are pairs, else a matrix."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return dense(one) + factor * dense(other)
    return torch.cat([one[0], factor * other[0]], dim=-1), torch.cat([one[1], other[1]], dim=-1)


def scaled(part: Gradient, factor: Tensor | float) -> Gradient:
    """Return ``factor · part``."""
    return part * factor if isinstance(part, Tensor) else (part[0] * factor, part[1])


def by_kind(items: Iterable[Item], kinds: Iterable[Hashable]) -> list[list[Item]]:
    """Split items into one list per kind. Items keep their order, and lists are in the order of their first items."""
    kinds = list(kinds)
    if kinds and kinds.count(kinds[0]) == len(kinds):
        return [list(items)]
    members: dict[Hashable, list[Item]] = {}
    for item, kind in zip(items, kinds, strict=True):
        members.setdefault(kind, []).append(item)
    return list(members.values())


def map_by_kind(
    items: Sequence[Item], kind_of: Callable[[Item], Hashable], function: Callable[[list[Item]], Sequence[Result]]
) -> list[Result]:
    """Call ``function`` once for all items of each kind, and return its results in the order of the items."""
    results: dict[int, Result] = {}
    for indices in by_kind(range(len(items)), map(kind_of, items)):
        results |= dict(zip(indices, function([items[index] for index in indices]), strict=True))
    return [results[index] for index in range(len(items))]
