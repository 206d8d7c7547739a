"""The public functions over lists of factors of different n, r and k: one call for a whole network.

Each function takes lists where its namesake takes one factor and returns a list. An option is one value for all
factors, or a list or tuple with one value for each. `root_update`, `eigh_update`, `damped_solve`, `damped_power` and
`kron_damped_solve` take all factors of equal rank (for the updates also of equal k) together, whatever their n: a
GPU launches each kernel once, and on a CPU the small matrices of all are stacked. The other functions take turns.

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

from brandla import _check, brand, damped, randomized, root
from brandla._ranges import ranged
from brandla._sharded import WHOLE, kind_of
from brandla.damped import LowRank, Tail
from brandla.lowrank import LowRankEigh, LowRankRoot, LowRankSVD, Rank, Tracked
from brandla.randomized import LinearOperator
from brandla.root import Compress, Update, stack, stack_numbers

__all__ = [
    "damped_power",
    "damped_solve",
    "eigh_update",
    "kron_damped_solve",
    "randomized_eigh",
    "randomized_svd",
    "root_update",
    "svd_append",
    "svd_update",
]

Result = TypeVar("Result")
Option = TypeVar("Option")
EighFactor = TypeVar("EighFactor", LowRankEigh, Tracked[LowRankEigh])
RootFactor = TypeVar("RootFactor", LowRankRoot, Tracked[LowRankRoot])
Item = TypeVar("Item")
Each: TypeAlias = Option | Sequence[Option]
# What the members of a class, which are computed together, have in common; None for what is computed by itself.
Class: TypeAlias = tuple[Any, ...] | None


@ranged("n,r", "n,k")
def eigh_update(
    eighs: Sequence[EighFactor],
    columns: Sequence[Tensor],
    *,
    decay: Each[float | Tensor] = 1.0,
    weight: Each[float | Tensor] = 1.0,
    rank: Each[int | Rank | None] = None,
) -> list[EighFactor]:
    """`brandla.eigh_update` of each factor."""
    function = "eigh_update"
    calls = _calls(function, (eighs, columns), decay=decay, weight=weight, rank=rank)
    updates = [brand.check_eigh_update(function, *lists, **options) for lists, options in calls]
    return _in_classes(
        updates,
        _class_of_update,
        lambda update: brand.eigh_step(update).as_new(LowRankEigh),
        lambda members: brand.eigh_step(stack(members)).as_list(LowRankEigh),
    )


@ranged("n,r", "n,k")
def root_update(
    roots: Sequence[RootFactor],
    columns: Sequence[Tensor],
    *,
    decay: Each[float | Tensor] = 1.0,
    weight: Each[float | Tensor] = 1.0,
    rank: Each[int | Rank | None] = None,
    compress: Each[Compress] = "eigh",
) -> list[RootFactor]:
    """`brandla.root_update` of each factor."""
    function = "root_update"
    calls = _calls(function, (roots, columns), decay=decay, weight=weight, rank=rank, compress=compress)
    updates = [root.check_root_update(function, *lists, **options) for lists, options in calls]
    return _in_classes(
        list(zip(updates, [options["compress"] for _, options in calls], strict=True)),
        lambda item: _with_option(_class_of_update(item[0]), item[1]),
        lambda item: root.root_step(*item).as_new(LowRankRoot),
        lambda members: root.root_step(stack([update for update, _ in members]), members[0][1]).as_list(LowRankRoot),
    )


@ranged("m,r,n", "m,k", "n,k")
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


@ranged("m,r,n", "m,k")
def svd_append(
    svds: Sequence[LowRankSVD],
    columns: Sequence[Tensor],
    *,
    decay: Each[float | Tensor] = 1.0,
    rank: Each[int | None] = None,
) -> list[LowRankSVD]:
    """`brandla.svd_append` of each factor."""
    return _each("svd_append", brand.svd_append, (svds, columns), decay=decay, rank=rank)


@ranged("n,n", "r")
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


@ranged("m,n", "r")
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


@ranged("n,r", "n,m")
def damped_solve(
    lowranks: Sequence[LowRank],
    rhs: Sequence[Tensor],
    damping: Each[float | Tensor],
    *,
    tail: Each[Tail] = 0.0,
) -> list[Tensor]:
    """`brandla.damped_solve` with each factor."""
    function = "damped_solve"
    calls = _calls(function, (lowranks, rhs), damping=damping, tail=tail)
    problems = [damped.check_solve(function, *lists, **options) for lists, options in calls]
    return _in_classes(
        problems,
        _class_of_solve,
        lambda problem: problem.solution(damped.inverse(*_operator_of(problem))),
        lambda members: _solve_together(members, damped.inverse(*_stacked_operator(members))),
    )


@ranged("n,r", "n,m")
def damped_power(
    lowranks: Sequence[LowRank],
    rhs: Sequence[Tensor],
    damping: Each[float | Tensor],
    exponent: Each[float],
    *,
    tail: Each[Tail] = 0.0,
) -> list[Tensor]:
    """`brandla.damped_power` with each factor."""
    function = "damped_power"
    calls = _calls(function, (lowranks, rhs), damping=damping, tail=tail)
    problems = [damped.check_solve(function, *lists, **options) for lists, options in calls]
    exponents = _spread(function, "exponent", exponent, len(problems))
    for each in exponents:
        damped.check_exponent(each)
    return _in_classes(
        list(zip(problems, map(float, exponents), strict=True)),
        lambda item: _with_option(_class_of_solve(item[0]), item[1]),
        lambda item: item[0].solution(damped.power(*_operator_of(item[0]), item[1])),
        lambda members: _solve_together(
            [problem for problem, _ in members],
            damped.power(*_stacked_operator([problem for problem, _ in members]), members[0][1]),
        ),
    )


@ranged("p,a", "q,b", "p,q")
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
    sides = {"left_damping": left_damping, "left_tail": left_tail}
    sides |= {"right_damping": right_damping, "right_tail": right_tail}
    problems = [
        damped.check_kron(
            left,
            right,
            matrix,
            (options["left_damping"], options["left_tail"]),
            (options["right_damping"], options["right_tail"]),
        )
        for (left, right, matrix), options in _calls("kron_damped_solve", (lefts, rights, matrices), **sides)
    ]
    return _in_classes(
        problems,
        _class_of_kron,
        lambda problem: problem.solution(damped.inverse(*problem.left), damped.inverse(*problem.right)),
        _kron_together,
    )


def _each(name: str, function: Callable[..., Any], lists: tuple[Sequence[Any], ...], **options: Any) -> list[Any]:
    # Every factor is computed before any is returned: bad input anywhere changes nothing.
    return [function(*arguments, **chosen) for arguments, chosen in _calls(name, lists, **options)]


def _calls(name: str, lists: tuple[Sequence[Any], ...], **options: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments and options of each single call."""
    lengths = [len(items) for items in lists]
    if len(set(lengths)) != 1:
        _check.fail_value(f"grouped.{name}", f"all lists must have one length; got {lengths}")
    spread = {option: _spread(name, option, value, lengths[0]) for option, value in options.items()}
    return [
        (arguments, {option: values[index] for option, values in spread.items()})
        for index, arguments in enumerate(zip(*lists, strict=True))
    ]


def _in_classes(
    items: Sequence[Item],
    class_of: Callable[[Item], Class],
    alone: Callable[[Item], Any],
    together: Callable[[list[Item]], Sequence[Any]],
) -> list[Any]:
    """Compute the items of a class together; those of class None, and those alone in theirs, one by one."""
    members: dict[Class, list[int]] = {}
    for index, item in enumerate(items):
        members.setdefault(class_of(item), []).append(index)
    results: dict[int, Any] = {}
    for kind, indices in members.items():
        if kind is None or len(indices) == 1:
            results |= {index: alone(items[index]) for index in indices}
        else:
            results |= dict(zip(indices, together([items[index] for index in indices]), strict=True))
    return [results[index] for index in range(len(items))]


def _class_of_update(update: Update) -> Class:
    """Factors that one launch can update: of one r, k, rank and tolerance."""
    r, k = update.tall.shape[-1], update.columns.shape[-1]
    if update.tall.ndim != 2 or 0 in (r, k, update.rank):
        return None
    device = update.tall.device
    return (r, k, update.rank, update.tol, update.dtype, device, update.tracked is None, kind_of(update.rows))


def _class_of_solve(problem: damped.Solve) -> Class:
    factor, (_, tail) = problem.factor, problem.shift
    if problem.block.ndim != 2 or problem.rows is not WHOLE:
        return None
    return _with_option(_class_of_factor(factor), tail is None)


def _class_of_kron(problem: damped.Kron) -> Class:
    (left, _, left_tail), (right, _, right_tail), data, rows = problem
    pair = isinstance(data, tuple)
    if rows != (WHOLE, WHOLE) or any(part.ndim != 2 for part in (data if isinstance(data, tuple) else (data,))):
        return None
    kinds = (_class_of_factor(left), _class_of_factor(right))
    return None if None in kinds else (*kinds, left_tail is None, right_tail is None, pair)


def _class_of_factor(factor: damped.Factor) -> Class:
    basis = damped.basis_of(factor)
    if basis.ndim != 2 or basis.shape[-1] == 0:
        return None
    return (type(factor), basis.shape[-1], basis.dtype, basis.device)


def _with_option(kind: Class, option: Any) -> Class:
    return None if kind is None else (*kind, option)


def _operator_of(problem: damped.Solve) -> tuple[Any, Any, Any]:
    return problem.factor, *problem.shift


def _stacked_operator(problems: Sequence[damped.Solve]) -> tuple[Any, Any, Any]:
    return _stacked_factor([_operator_of(problem) for problem in problems])


def _stacked_factor(sides: Sequence[tuple[damped.Factor, Any, Any]]) -> tuple[Any, Any, Any]:
    """Join factors of one kind and rank, their λ and their τ: small parts stacked, bases in a list."""
    factors, dampings, tails = zip(*sides, strict=True)
    small = torch.stack([damped.small_of(factor) for factor in factors])
    joined = damped.of_parts(type(factors[0]), small, [damped.basis_of(factor) for factor in factors])
    tail = None if tails[0] is None else stack_numbers(tails, small)
    return joined, stack_numbers(dampings, small), tail


def _solve_together(problems: Sequence[damped.Solve], operator: damped.Shifted) -> list[Tensor]:
    blocks = operator @ [problem.block for problem in problems]
    return [problem.shaped(block) for problem, block in zip(problems, blocks, strict=True)]


def _kron_together(problems: Sequence[damped.Kron]) -> list[Any]:
    left = damped.inverse(*_stacked_factor([problem.left for problem in problems]))
    right = damped.inverse(*_stacked_factor([problem.right for problem in problems]))
    data = [problem.data for problem in problems]
    if isinstance(data[0], tuple):
        sides = tuple(list(side) for side in zip(*data, strict=True))
        return list(zip(*damped.kron_apply(left, right, sides), strict=True))
    return list(damped.kron_apply(left, right, data))


def _spread(name: str, option: str, value: Any, length: int) -> Sequence[Any]:
    """One value an item; a list or tuple is taken to hold them already."""
    if not isinstance(value, (list, tuple)):
        return [value] * length
    if len(value) != length:
        _check.fail_value(f"grouped.{name}", f"{option} must be one value or {length} of them; got {len(value)}")
    return value
