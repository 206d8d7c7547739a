"""The public functions over lists of factors of different n, r and k: one call for a whole network.

Each function takes lists where its namesake takes one factor and returns a list. An option is one value for all
factors, or a list or tuple with one value for each. The symmetric updates, `damped_*` and `kron_damped_*` take all
factors of equal rank (for the updates also of equal k) together, whatever their n: a GPU launches each kernel once, and
on a CPU the small matrices of all are stacked. `eigh_refresh` and `kron_damped_power` do so for wide matrices of about
one size: those whose sizes are below the same power of two. The other functions take turns.

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
from functools import partial
from itertools import chain, count
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from brandla import _check, brand, damped, kron, randomized, refresh, root, svd
from brandla._ranges import ranged
from brandla._sharded import WHOLE, Rows, placement_of
from brandla._shifted import LowRank, Side, Tail
from brandla.lowrank import LowRankEigh, LowRankRoot, LowRankSVD, Number, Rank, Tracked
from brandla.randomized import LinearOperator, is_dense
from brandla.root import Compress, Update, check_update, stack
from brandla_kernels import number_of

__all__ = [
    "damped_logdet",
    "damped_power",
    "damped_solve",
    "eigh_downdate",
    "eigh_refresh",
    "eigh_update",
    "kron_damped_logdet",
    "kron_damped_power",
    "kron_damped_solve",
    "randomized_eigh",
    "randomized_svd",
    "root_update",
    "svd_append",
    "svd_update",
]

Option = TypeVar("Option")
EighFactor = TypeVar("EighFactor", LowRankEigh, Tracked[LowRankEigh])
RootFactor = TypeVar("RootFactor", LowRankRoot, Tracked[LowRankRoot])
Item = TypeVar("Item")
Each: TypeAlias = Option | Sequence[Option]
Numbers: TypeAlias = Each[Number]
Tensors: TypeAlias = Sequence[Tensor]
LowRanks: TypeAlias = Sequence[LowRank]
# What the members of a class, which are computed together, have in common; None for what is computed by itself.
Class: TypeAlias = tuple[Any, ...] | None


@ranged("n,r", "n,k")
def eigh_update(
    eighs: Sequence[EighFactor],
    columns: Tensors,
    *,
    decay: Numbers = 1.0,
    weight: Numbers = 1.0,
    rank: Each[int | Rank | None] = None,
) -> list[EighFactor]:
    """`brandla.eigh_update` of each factor."""
    options = {"decay": decay, "weight": weight, "rank": rank}
    return _updated("eigh_update", LowRankEigh, brand.eigh_step, (eighs, columns), **options)


@ranged("n,r", "n,k")
def root_update(
    roots: Sequence[RootFactor],
    columns: Tensors,
    *,
    decay: Numbers = 1.0,
    weight: Numbers = 1.0,
    rank: Each[int | Rank | None] = None,
    compress: Each[Compress] = "eigh",
    shrink: Each[bool] = False,
) -> list[RootFactor]:
    """`brandla.root_update` of each factor."""
    options = {"decay": decay, "weight": weight, "rank": rank, "compress": compress, "shrink": shrink}
    return _updated("root_update", LowRankRoot, root.root_step, (roots, columns), **options)


@ranged("n,r", "n,k")
def eigh_downdate(eighs: Sequence[LowRankEigh], columns: Tensors, *, weight: Numbers = 1.0) -> list[LowRankEigh]:
    """`brandla.eigh_downdate` of each factor."""
    return _each(brand.eigh_downdate, (eighs, columns), weight=weight)


@ranged("n,r", "n,m")
def eigh_refresh(
    eighs: Sequence[LowRankEigh],
    matrices: Sequence[Tensor | LinearOperator],
    *,
    decay: Numbers = 1.0,
    weight: Numbers = 1.0,
    iterations: Each[int] = 1,
) -> list[tuple[LowRankEigh, Tensor]]:
    """`brandla.eigh_refresh` of each factor; those with operators or sparse matrices take turns."""
    ways = _class_of_refresh, refresh.Refresh.one, refresh.refreshed_together
    options = {"decay": decay, "weight": weight, "iterations": iterations}
    return _computed("eigh_refresh", refresh.check_refresh, ways, (eighs, matrices), **options)


@ranged("m,r,n", "m,k", "n,k")
def svd_update(
    svds: Sequence[LowRankSVD], left: Tensors, right: Tensors, *, decay: Numbers = 1.0, rank: Each[int | None] = None
) -> list[LowRankSVD]:
    """`brandla.svd_update` of each factor."""
    return _each(svd.svd_update, (svds, left, right), decay=decay, rank=rank)


@ranged("m,r,n", "m,k")
def svd_append(
    svds: Sequence[LowRankSVD], columns: Tensors, *, decay: Numbers = 1.0, rank: Each[int | None] = None
) -> list[LowRankSVD]:
    """`brandla.svd_append` of each factor."""
    return _each(svd.svd_append, (svds, columns), decay=decay, rank=rank)


@ranged("n,n", "r")
def randomized_eigh(
    matrices: Sequence[Tensor | LinearOperator],
    rank: Each[int],
    *,
    oversample: Each[int] = 10,
    power_iterations: Each[int] = 2,
    generator: torch.Generator | None = None,
    start: Each[Tensor | None] = None,
) -> list[LowRankEigh]:
    """`brandla.randomized_eigh` of each matrix, in order from one generator."""
    options = {"oversample": oversample, "power_iterations": power_iterations, "generator": generator, "start": start}
    return _each(randomized.randomized_eigh, (matrices,), rank=rank, **options)


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
    options = {"oversample": oversample, "power_iterations": power_iterations, "generator": generator}
    return _each(randomized.randomized_svd, (matrices,), rank=rank, **options)


@ranged("n,r", "n,m")
def damped_solve(
    lowranks: LowRanks, rhs: Tensors, damping: Numbers, *, tail: Each[Tail] = 0.0, diagonal: Each[Tensor | None] = None
) -> list[Tensor]:
    """`brandla.damped_solve` with each factor; those with a diagonal take turns."""
    return _solutions("damped_solve", lowranks, rhs, damping=damping, tail=tail, diagonal=diagonal)


@ranged("n,r", "n,m")
def damped_power(
    lowranks: LowRanks, rhs: Tensors, damping: Numbers, exponent: Each[float], *, tail: Each[Tail] = 0.0
) -> list[Tensor]:
    """`brandla.damped_power` with each factor."""
    return _solutions("damped_power", lowranks, rhs, damping=damping, exponent=exponent, tail=tail)


@ranged("n,r")
def damped_logdet(
    lowranks: LowRanks, damping: Numbers, *, tail: Each[Tail] = 0.0, diagonal: Each[Tensor | None] = None
) -> list[Tensor]:
    """`brandla.damped_logdet` of each factor."""
    ways = _class_of_side, Side.logdet, damped.logdets_together
    options = {"damping": damping, "tail": tail, "diagonal": diagonal}
    return _computed("damped_logdet", damped.check_logdet, ways, (lowranks,), **options)


@ranged("p,a", "q,b", "p,q")
def kron_damped_power(
    lefts: LowRanks,
    rights: LowRanks,
    matrices: Tensors,
    damping: Numbers,
    exponent: Each[float],
    *,
    left_tail: Each[Tail] = 0.0,
    right_tail: Each[Tail] = 0.0,
    values: Each[Tensor | None] = None,
) -> list[Tensor]:
    """`brandla.kron_damped_power` with each pair of factors."""
    options = {"damping": damping, "exponent": exponent, "left_tail": left_tail, "right_tail": right_tail}

    def class_of(problem: kron.Power) -> Class:
        joint, matrix = problem.joint, problem.matrix
        alike = joint.fitted is None, problem.exponent, matrix.shape[-1].bit_length()
        return _class_of_sides((joint.left, joint.right), (matrix,), alike)

    ways = class_of, kron.Power.result, kron.powers_together
    lists = (lefts, rights, matrices)
    return _computed("kron_damped_power", kron.check_power, ways, lists, **options, values=values)


@ranged("p,a", "q,b")
def kron_damped_logdet(
    lefts: LowRanks,
    rights: LowRanks,
    damping: Numbers,
    *,
    left_tail: Each[Tail] = 0.0,
    right_tail: Each[Tail] = 0.0,
    values: Each[Tensor | None] = None,
) -> list[Tensor]:
    """`brandla.kron_damped_logdet` of each pair of factors."""

    def class_of(joint: kron.Joint) -> Class:
        return _class_of_sides((joint.left, joint.right), (), (joint.fitted is None,))

    ways = class_of, kron.Joint.logdet, kron.logdets_together
    options = {"damping": damping, "left_tail": left_tail, "right_tail": right_tail, "values": values}
    return _computed("kron_damped_logdet", kron.check_joint, ways, (lefts, rights), **options)


@ranged("p,a", "q,b", "p,q")
def kron_damped_solve(
    lefts: LowRanks,
    rights: LowRanks,
    matrices: Sequence[Tensor | tuple[Tensor, Tensor]],
    left_damping: Numbers,
    right_damping: Numbers,
    *,
    left_tail: Each[Tail] = 0.0,
    right_tail: Each[Tail] = 0.0,
) -> list[Tensor | tuple[Tensor, Tensor]]:
    """`brandla.kron_damped_solve` with each pair of factors."""

    def class_of(problem: kron.Kron) -> Class:
        parts = problem.data if isinstance(problem.data, tuple) else (problem.data,)
        return _class_of_sides((problem.left, problem.right), parts, (len(parts),))

    ways = class_of, kron.Kron.solution, kron.kron_together
    shifts = {"left_damping": left_damping, "left_tail": left_tail}
    shifts |= {"right_damping": right_damping, "right_tail": right_tail}
    return _computed("kron_damped_solve", kron.check_kron, ways, (lefts, rights, matrices), **shifts)


def _updated(
    function: str, kind: type[Any], step: Callable[[Update], Any], lists: tuple[Sequence[Any], ...], **options: Any
) -> list[Any]:
    ways = _class_of_update, step, lambda updates: step(stack(updates))
    return _computed(function, partial(check_update, kind=kind), ways, lists, **options)


def _solutions(function: str, *lists: Sequence[Any], **options: Any) -> list[Tensor]:
    def class_of(problem: damped.Solve) -> Class:
        return _class_of_sides((problem.side,), (problem.block,), (problem.exponent,))

    ways = class_of, damped.Solve.solution, damped.solve_together
    return _computed(function, damped.check_solve, ways, lists, **options)


def _each(function: Callable[..., Any], lists: tuple[Sequence[Any], ...], **options: Any) -> list[Any]:
    # Every factor is computed before any is returned: bad input anywhere changes nothing.
    return [function(*arguments, **chosen) for arguments, chosen in _calls(function.__name__, lists, **options)]


def _calls(name: str, lists: tuple[Sequence[Any], ...], **options: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments and options of each single call."""
    lengths = [len(items) for items in lists]
    if len(set(lengths)) != 1:
        _check.fail_value(f"grouped.{name}", f"all lists must have one length; got {lengths}")
    chosen: list[dict[str, Any]] = [{} for _ in lists[0]]
    for option, value in options.items():
        # A list or tuple is taken to hold one value an item already.
        values = value if isinstance(value, (list, tuple)) else [value] * len(chosen)
        if len(values) != len(chosen):
            rule = f"{option} must be one value or {len(chosen)} of them"
            _check.fail_value(f"grouped.{name}", f"{rule}; got {len(values)}")
        for own, each in zip(chosen, values, strict=True):
            own[option] = each
    return list(zip(zip(*lists, strict=True), chosen, strict=True))


def _computed(
    function: str,
    check: Callable[..., Item],
    ways: tuple[Callable[[Item], Class], Callable[[Item], Any], Callable[[list[Item]], Sequence[Any]]],
    lists: tuple[Sequence[Any], ...],
    **options: Any,
) -> list[Any]:
    """Compute the calls of a class together; those of class None, and alone in theirs, one by one.

    All are checked first, unless a list of the same layout has passed.
    """
    class_of, alone, together = ways
    tensors, layout = _laid_out([*lists, *options.values()])
    passed = _passed.get((function, layout))
    if passed is not None:
        items, classes = passed.items(tensors), passed.classes
    else:
        items = [check(function, *arguments, **chosen) for arguments, chosen in _calls(function, lists, **options)]
        classes = {}
        for index, item in enumerate(items):
            classes.setdefault(class_of(item), []).append(index)
        if layout is not None:
            if len(_passed) == _MOST_LAYOUTS:
                _passed.clear()
            _passed[function, layout] = _Passed.of(items, tensors, classes)
    results: dict[int, Any] = {}
    for kind, indices in classes.items():
        if kind is None or len(indices) == 1:
            results |= {index: alone(items[index]) for index in indices}
        else:
            results |= dict(zip(indices, together([items[index] for index in indices]), strict=True))
    return [results[index] for index in range(len(items))]


class _Passed(NamedTuple):
    """How the checked arguments of a list are made of its tensors, as those of another list of its layout were."""

    # What comes after the tensors: constants, of kind None, and tuples by the places of their parts.
    values: list[tuple[type[Any] | None, Any]]
    places: list[int]  # of the items
    classes: dict[Class, list[int]]

    @classmethod
    def of(cls, items: Sequence[Any], tensors: list[Tensor], classes: dict[Class, list[int]]) -> _Passed | None:
        """Return it for items that hold nothing but tensors of the list, and words and numbers; else None."""
        values: list[tuple[type[Any] | None, Any]] = []
        known = {id(tensor): place for place, tensor in enumerate(tensors)}

        def place_of(part: Any) -> int:
            if id(part) not in known:
                if not isinstance(part, (tuple, str, int, float, type, Rows, type(None))):
                    raise KeyError  # such as a tensor that was converted
                value = (type(part), list(map(place_of, part))) if isinstance(part, tuple) else (None, part)
                known[id(part)] = len(tensors) + len(values)
                values.append(value)
            return known[id(part)]

        try:
            return cls(values, list(map(place_of, items)), classes)
        except KeyError:
            return None

    def items(self, tensors: list[Tensor]) -> list[Any]:
        """Return the checked arguments of a list of this layout."""
        found: list[Any] = [*tensors]
        for kind, value in self.values:
            found.append(value if kind is None else tuple.__new__(kind, map(found.__getitem__, value)))
        return [found[place] for place in self.places]


# By function and layout; None where each list has to be checked.
_passed: dict[tuple[str, Any], _Passed | None] = {}
_MOST_LAYOUTS = 256


def _laid_out(parts: Sequence[Any]) -> tuple[list[Tensor], tuple[Any, ...] | None]:
    """Return the different tensors in arguments, and their layout: all that a check looks at outside checked mode.

    None where there is more to look at than plain tensors, numbers and words.
    """
    if _check.reads_values() or torch.compiler.is_compiling():
        return [], None
    tensors: list[Tensor] = []
    layout: list[Any] = []
    # What is inside a list or a factor comes after all that is beside it.
    while parts:
        tensors += [part for part in parts if type(part) is Tensor]
        others = [part for part in parts if type(part) is not Tensor]
        held = [part for part in others if isinstance(part, (tuple, list))]
        words = [part for part in others if not isinstance(part, (tuple, list))]
        if not all(issubclass(kind, (str, int, float, Rank, type(None))) for kind in set(map(type, words))):
            return [], None
        layout += [*map(type, parts), *map(len, held), *words]
        parts = list(chain.from_iterable(held))
    identities = list(map(id, tensors))
    different = dict(zip(identities, tensors, strict=True))
    places = dict(zip(different, count(), strict=False))
    layout += map(places.__getitem__, identities)
    tensors = list(different.values())
    layout += [number_of((tensor.shape, tensor.dtype, tensor.device, tensor.layout)) for tensor in tensors]
    return tensors, tuple(layout)


def _class_of_update(update: Update) -> Class:
    """Factors that one launch can update: of one r, k, rank and tolerance."""
    r, k = update.tall.shape[-1], update.columns.shape[-1]
    if update.tall.ndim != 2 or 0 in (r, k, update.rank) or update.sparse:
        return None
    basis, rows = update.tall, update.rows
    options = (update.rank, update.tol, update.compress, update.shrink, update.tracked is None)
    return (r, k, *options, basis.dtype, basis.device, None if rows is WHOLE else placement_of(rows))


def _class_of_refresh(problem: refresh.Refresh) -> Class:
    vectors, (r, m) = problem.vectors, (problem.vectors.shape[-1], problem.matrix.shape[-1])
    if not is_dense(problem.matrix) or vectors.ndim != 2 or 0 in (r, m):
        return None
    # A stack pads to the largest of them: that is less than twice the smallest.
    return (r, m.bit_length(), problem.iterations, vectors.dtype, vectors.device)


def _class_of_sides(sides: tuple[Side, ...], matrices: tuple[Tensor, ...], alike: tuple[Any, ...]) -> Class:
    """Applications to single matrices, of sides of a class each, that have something else in common besides."""
    classes = tuple(map(_class_of_side, sides))
    return None if None in classes or any(matrix.ndim != 2 for matrix in matrices) else (*classes, *alike)


def _class_of_side(side: Side) -> Class:
    """Factors that one launch can apply: of one kind and rank, with τ given or not."""
    basis = side.basis
    if side.rows is not WHOLE or side.diagonal is not None or basis.ndim != 2 or basis.shape[-1] == 0:
        return None
    return (side.kind, basis.shape[-1], basis.dtype, basis.device, side.tail is None)
