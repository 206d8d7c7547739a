"""The public functions over lists of factors of different n, r and k: one call for a whole network.

Each function takes lists where its namesake takes one factor and returns a list. An option is one value for all
factors, or a list or tuple with one value for each. On a CPU the factors are taken one after the other.

Examples
--------
>>> import torch, brandla
>>> factors = [brandla.LowRankEigh.zeros(n, rank=4) for n in (64, 200)]
>>> factors = brandla.grouped.eigh_update(factors, [torch.randn(64, 8), torch.randn(200, 16)], weight=[0.1, 0.2])
>>> [factor.n for factor in factors]
[64, 200]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from brandla import _check, brand, damped, randomized, subspace
from brandla.damped import LowRank, Tail
from brandla.lowrank import LowRankEigh, LowRankSVD, LowRankSym, Tracked
from brandla.randomized import LinearOperator

__all__ = [
    "damped_power",
    "damped_solve",
    "eigh_update",
    "kron_damped_solve",
    "randomized_eigh",
    "randomized_svd",
    "subspace_update",
    "svd_append",
    "svd_update",
]

Result = TypeVar("Result")
Option = TypeVar("Option")
EighFactor = TypeVar("EighFactor", LowRankEigh, Tracked[LowRankEigh])
SymFactor = TypeVar("SymFactor", LowRankSym, Tracked[LowRankSym])
Each: TypeAlias = Option | Sequence[Option]


def eigh_update(
    eighs: Sequence[EighFactor],
    columns: Sequence[Tensor],
    *,
    decay: Each[float | Tensor] = 1.0,
    weight: Each[float | Tensor] = 1.0,
    rank: Each[int | None] = None,
) -> list[EighFactor]:
    """`brandla.eigh_update` of each factor."""
    return _each("eigh_update", brand.eigh_update, (eighs, columns), decay=decay, weight=weight, rank=rank)


def subspace_update(
    syms: Sequence[SymFactor],
    columns: Sequence[Tensor],
    *,
    decay: Each[float | Tensor] = 1.0,
    weight: Each[float | Tensor] = 1.0,
    rank: Each[int | None] = None,
    iterations: Each[int] = 2,
) -> list[SymFactor]:
    """`brandla.subspace_update` of each factor."""
    options = {"decay": decay, "weight": weight, "rank": rank, "iterations": iterations}
    return _each("subspace_update", subspace.subspace_update, (syms, columns), **options)


def svd_update(
    svds: Sequence[LowRankSVD],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    *,
    decay: Each[float | Tensor] = 1.0,
    rank: Each[int | None] = None,
) -> list[LowRankSVD]:
    """`brandla.svd_update` of each factor."""
    return _each("svd_update", brand.svd_update, (svds, left, right), decay=decay, rank=rank)


def svd_append(
    svds: Sequence[LowRankSVD],
    columns: Sequence[Tensor],
    *,
    decay: Each[float | Tensor] = 1.0,
    rank: Each[int | None] = None,
) -> list[LowRankSVD]:
    """`brandla.svd_append` of each factor."""
    return _each("svd_append", brand.svd_append, (svds, columns), decay=decay, rank=rank)


def randomized_eigh(
    matrices: Sequence[Tensor | LinearOperator],
    rank: Each[int],
    *,
    oversample: Each[int] = 10,
    power_iterations: Each[int] = 2,
    generator: torch.Generator | None = None,
) -> list[LowRankEigh]:
    """`brandla.randomized_eigh` of each matrix, in order from one generator."""
    ranks = _spread("randomized_eigh", "rank", rank, len(matrices))
    options = {"oversample": oversample, "power_iterations": power_iterations, "generator": generator}
    return _each("randomized_eigh", randomized.randomized_eigh, (matrices, ranks), **options)


def randomized_svd(
    matrices: Sequence[Tensor | LinearOperator],
    rank: Each[int],
    *,
    oversample: Each[int] = 10,
    power_iterations: Each[int] = 2,
    generator: torch.Generator | None = None,
) -> list[LowRankSVD]:
    """`brandla.randomized_svd` of each matrix, in order from one generator."""
    ranks = _spread("randomized_svd", "rank", rank, len(matrices))
    options = {"oversample": oversample, "power_iterations": power_iterations, "generator": generator}
    return _each("randomized_svd", randomized.randomized_svd, (matrices, ranks), **options)


def damped_solve(
    lowranks: Sequence[LowRank],
    rhs: Sequence[Tensor],
    damping: Each[float | Tensor],
    *,
    tail: Each[Tail] = 0.0,
) -> list[Tensor]:
    """`brandla.damped_solve` with each factor."""
    dampings = _spread("damped_solve", "damping", damping, len(lowranks))
    return _each("damped_solve", damped.damped_solve, (lowranks, rhs, dampings), tail=tail)


def damped_power(
    lowranks: Sequence[LowRank],
    rhs: Sequence[Tensor],
    damping: Each[float | Tensor],
    exponent: Each[float],
    *,
    tail: Each[Tail] = 0.0,
) -> list[Tensor]:
    """`brandla.damped_power` with each factor."""
    dampings = _spread("damped_power", "damping", damping, len(lowranks))
    exponents = _spread("damped_power", "exponent", exponent, len(lowranks))
    return _each("damped_power", damped.damped_power, (lowranks, rhs, dampings, exponents), tail=tail)


def kron_damped_solve(
    lefts: Sequence[LowRank],
    rights: Sequence[LowRank],
    matrices: Sequence[Tensor | tuple[Tensor, Tensor]],
    left_damping: Each[float | Tensor],
    right_damping: Each[float | Tensor],
    *,
    left_tail: Each[Tail] = 0.0,
    right_tail: Each[Tail] = 0.0,
) -> list[Tensor | tuple[Tensor, Tensor]]:
    """`brandla.kron_damped_solve` with each pair of factors."""
    left_dampings = _spread("kron_damped_solve", "left_damping", left_damping, len(lefts))
    right_dampings = _spread("kron_damped_solve", "right_damping", right_damping, len(lefts))
    lists = (lefts, rights, matrices, left_dampings, right_dampings)
    return _each("kron_damped_solve", damped.kron_damped_solve, lists, left_tail=left_tail, right_tail=right_tail)


def _each(name: str, function: Callable[..., Any], lists: tuple[Sequence[Any], ...], **options: Any) -> list[Any]:
    lengths = [len(items) for items in lists]
    if len(set(lengths)) != 1:
        _check.fail_value(f"grouped.{name}", f"all lists must have one length; got {lengths}")
    spread = {option: _spread(name, option, value, lengths[0]) for option, value in options.items()}
    calls = zip(*lists, strict=True)
    # Every factor is computed before any is returned: bad input anywhere changes nothing.
    return [
        function(*arguments, **{option: values[index] for option, values in spread.items()})
        for index, arguments in enumerate(calls)
    ]


def _spread(name: str, option: str, value: Any, length: int) -> Sequence[Any]:
    """One value an item; a list or tuple is taken to hold them already."""
    if not isinstance(value, (list, tuple)):
        return [value] * length
    if len(value) != length:
        _check.fail_value(f"grouped.{name}", f"{option} must be one value or {length} of them; got {len(value)}")
    return value
