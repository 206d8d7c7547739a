"""The public functions over lists of factors of different n, r and k: one call for a whole network.

Each function takes lists where its namesake takes one factor, and returns a list. An option is one value for all
factors, or a list or tuple with one value for each. The symmetric updates, `damped_*` and `kron_damped_*` compute
factors of equal rank together, whatever their n; the updates need equal k too. Then a GPU launches each kernel once,
and a CPU stacks the small matrices. `eigh_refresh` and `kron_damped_power` group only matrices of similar width:
between the same two powers of two. The other functions compute the factors one by one.

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
from brandla._sharded import UNSHARDED, Sharding, placement_of
from brandla._shifted import DampedFactor, LowRank, Tail, check_damped_factor
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
# Calls with the same key are computed together; a call with key None is computed by itself.
GroupKey: TypeAlias = tuple[Any, ...] | None


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
    return _updates("eigh_update", LowRankEigh, brand.eigh_step, (eighs, columns), **options)


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
    return _updates("root_update", LowRankRoot, root.root_step, (roots, columns), **options)


@ranged("n,r", "n,k")
def eigh_downdate(eighs: Sequence[LowRankEigh], columns: Tensors, *, weight: Numbers = 1.0) -> list[LowRankEigh]:
    """`brandla.eigh_downdate` of each factor."""
    return _one_by_one(brand.eigh_downdate, (eighs, columns), weight=weight)


@ranged("n,r", "n,m")
def eigh_refresh(
    eighs: Sequence[LowRankEigh],
    matrices: Sequence[Tensor | LinearOperator],
    *,
    decay: Numbers = 1.0,
    weight: Numbers = 1.0,
    iterations: Each[int] = 1,
) -> list[tuple[LowRankEigh, Tensor]]:
    """`brandla.eigh_refresh` of each factor; operators and sparse matrices are taken one by one."""
    ways = _key_of_refresh, refresh.Refresh.result, refresh.refresh_together
    options = {"decay": decay, "weight": weight, "iterations": iterations}
    return _in_groups("eigh_refresh", refresh.check_refresh, ways, (eighs, matrices), **options)


@ranged("m,r,n", "m,k", "n,k")
def svd_update(
    svds: Sequence[LowRankSVD], left: Tensors, right: Tensors, *, decay: Numbers = 1.0, rank: Each[int | None] = None
) -> list[LowRankSVD]:
    """`brandla.svd_update` of each factor."""
    return _one_by_one(svd.svd_update, (svds, left, right), decay=decay, rank=rank)


@ranged("m,r,n", "m,k")
def svd_append(
    svds: Sequence[LowRankSVD], columns: Tensors, *, decay: Numbers = 1.0, rank: Each[int | None] = None
) -> list[LowRankSVD]:
    """`brandla.svd_append` of each factor."""
    return _one_by_one(svd.svd_append, (svds, columns), decay=decay, rank=rank)


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
    return _one_by_one(randomized.randomized_eigh, (matrices,), rank=rank, **options)


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
    return _one_by_one(randomized.randomized_svd, (matrices,), rank=rank, **options)


@ranged("n,r", "n,m")
def damped_solve(
    lowranks: LowRanks, rhs: Tensors, damping: Numbers, *, tail: Each[Tail] = 0.0, diagonal: Each[Tensor | None] = None
) -> list[Tensor]:
    """`brandla.damped_solve` with each factor; those with a diagonal are computed one by one."""
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
    ways = _key_of_factor, DampedFactor.logdet, damped.logdets_together
    options = {"damping": damping, "tail": tail, "diagonal": diagonal}
    return _in_groups("damped_logdet", check_damped_factor, ways, (lowranks,), **options)


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

    def key_of(problem: kron.Power) -> GroupKey:
        joint, matrix = problem.joint, problem.matrix
        shared = joint.fitted is None, problem.exponent, matrix.shape[-1].bit_length()
        return _key_of_factors((joint.left, joint.right), (matrix,), shared)

    ways = key_of, kron.Power.result, kron.powers_together
    lists = (lefts, rights, matrices)
    return _in_groups("kron_damped_power", kron.check_power, ways, lists, **options, values=values)


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

    def key_of(joint: kron.Joint) -> GroupKey:
        return _key_of_factors((joint.left, joint.right), (), (joint.fitted is None,))

    ways = key_of, kron.Joint.logdet, kron.logdets_together
    options = {"damping": damping, "left_tail": left_tail, "right_tail": right_tail, "values": values}
    return _in_groups("kron_damped_logdet", kron.check_joint, ways, (lefts, rights), **options)


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

    def key_of(problem: kron.Solve) -> GroupKey:
        parts = problem.data if isinstance(problem.data, tuple) else (problem.data,)
        return _key_of_factors((problem.left, problem.right), parts, (len(parts),))

    ways = key_of, kron.Solve.solution, kron.solve_together
    shifts = {"left_damping": left_damping, "left_tail": left_tail}
    shifts |= {"right_damping": right_damping, "right_tail": right_tail}
    return _in_groups("kron_damped_solve", kron.check_solve, ways, (lefts, rights, matrices), **shifts)


def _updates(
    function: str, kind: type[Any], step: Callable[[Update], Any], lists: tuple[Sequence[Any], ...], **options: Any
) -> list[Any]:
    ways = _key_of_update, step, lambda updates: step(stack(updates))
    return _in_groups(function, partial(check_update, kind=kind), ways, lists, **options)


def _solutions(function: str, *lists: Sequence[Any], **options: Any) -> list[Tensor]:
    def key_of(problem: damped.Solve) -> GroupKey:
        return _key_of_factors((problem.factor,), (problem.block,), (problem.exponent,))

    ways = key_of, damped.Solve.solution, damped.solve_together
    return _in_groups(function, damped.check_solve, ways, lists, **options)


def _one_by_one(function: Callable[..., Any], lists: tuple[Sequence[Any], ...], **options: Any) -> list[Any]:
    """Return the results of all calls. Bad input in any of them raises before anything is returned."""
    return [function(*arguments, **keywords) for arguments, keywords in _calls(function.__name__, lists, **options)]


def _calls(name: str, lists: tuple[Sequence[Any], ...], **options: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the positional and the keyword arguments of each single call."""
    lengths = [len(items) for items in lists]
    if len(set(lengths)) != 1:
        _check.fail_value(f"grouped.{name}", f"all lists must have the same length; got {lengths}")
    keywords: list[dict[str, Any]] = [{} for _ in lists[0]]
    for option, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value] * len(keywords)
        if len(values) != len(keywords):
            rule = f"{option} must be one value or {len(keywords)} of them"
            _check.fail_value(f"grouped.{name}", f"{rule}; got {len(values)}")
        for of_call, value_of_call in zip(keywords, values, strict=True):
            of_call[option] = value_of_call
    return list(zip(zip(*lists, strict=True), keywords, strict=True))


def _in_groups(
    function: str,
    check: Callable[..., Item],
    ways: tuple[Callable[[Item], GroupKey], Callable[[Item], Any], Callable[[list[Item]], Sequence[Any]]],
    lists: tuple[Sequence[Any], ...],
    **options: Any,
) -> list[Any]:
    """Compute the calls of each group together. Calls with key None, or alone in a group, are computed singly.

    All calls are checked first, unless lists of the same layout have passed the check before.
    """
    key_of, alone, together = ways
    tensors, layout = _layout_of([*lists, *options.values()])
    recipe = _recipes.get((function, layout))
    if recipe is not None:
        items, groups = recipe.items(tensors), recipe.groups
    else:
        items = [check(function, *arguments, **keywords) for arguments, keywords in _calls(function, lists, **options)]
        groups = {}
        for index, item in enumerate(items):
            groups.setdefault(key_of(item), []).append(index)
        if layout is not None:
            if len(_recipes) == _MOST_RECIPES:
                _recipes.clear()
            _recipes[function, layout] = _Recipe.of(items, tensors, groups)
    results: dict[int, Any] = {}
    for key, indices in groups.items():
        if key is None or len(indices) == 1:
            results |= {index: alone(items[index]) for index in indices}
        else:
            results |= dict(zip(indices, together([items[index] for index in indices]), strict=True))
    return [results[index] for index in range(len(items))]


class _Recipe(NamedTuple):
    """How to build checked arguments from the tensors of lists, learned from other lists of the same layout."""

    # Entries that follow the tensors: (None, a constant), or (type of a tuple, the places of its parts).
    entries: list[tuple[type[Any] | None, Any]]
    places: list[int]  # of the items, among tensors and entries
    groups: dict[GroupKey, list[int]]

    @classmethod
    def of(cls, items: Sequence[Any], tensors: list[Tensor], groups: dict[GroupKey, list[int]]) -> _Recipe | None:
        """Return the recipe of items that hold only tensors of the lists and constants; None for other items."""
        entries: list[tuple[type[Any] | None, Any]] = []
        place_by_id = {id(tensor): place for place, tensor in enumerate(tensors)}

        def place_of(part: Any) -> int:
            if id(part) not in place_by_id:
                if not isinstance(part, (tuple, str, int, float, type, Sharding, type(None))):
                    raise KeyError  # such as a tensor that was converted
                entry = (type(part), list(map(place_of, part))) if isinstance(part, tuple) else (None, part)
                place_by_id[id(part)] = len(tensors) + len(entries)
                entries.append(entry)
            return place_by_id[id(part)]

        try:
            return cls(entries, list(map(place_of, items)), groups)
        except KeyError:
            return None

    def items(self, tensors: list[Tensor]) -> list[Any]:
        """Return the checked arguments of lists that have this layout and these tensors."""
        parts: list[Any] = [*tensors]
        for kind, entry in self.entries:
            parts.append(entry if kind is None else tuple.__new__(kind, map(parts.__getitem__, entry)))
        return [parts[place] for place in self.places]


# Keys are function and layout. None: lists of this layout have to be checked each time.
_recipes: dict[tuple[str, Any], _Recipe | None] = {}
_MOST_RECIPES = 256


def _layout_of(parts: Sequence[Any]) -> tuple[list[Tensor], tuple[Any, ...] | None]:
    """Return the distinct tensors in the arguments, and the layout: all that a check reads outside checked mode.

    The layout is None in checked mode, under torch.compile, and for anything besides plain tensors, numbers and words.
    """
    if _check.reads_values() or torch.compiler.is_compiling():
        return [], None
    tensors: list[Tensor] = []
    layout: list[Any] = []
    # Breadth first: the contents of lists and factors come after everything on their own level.
    while parts:
        tensors += [part for part in parts if type(part) is Tensor]
        others = [part for part in parts if type(part) is not Tensor]
        containers = [part for part in others if isinstance(part, (tuple, list))]
        constants = [part for part in others if not isinstance(part, (tuple, list))]
        if not all(issubclass(kind, (str, int, float, Rank, type(None))) for kind in set(map(type, constants))):
            return [], None
        layout += [*map(type, parts), *map(len, containers), *constants]
        parts = list(chain.from_iterable(containers))
    identities = list(map(id, tensors))
    distinct = dict(zip(identities, tensors, strict=True))
    places = dict(zip(distinct, count(), strict=False))
    layout += map(places.__getitem__, identities)
    tensors = list(distinct.values())
    layout += [number_of((tensor.shape, tensor.dtype, tensor.device, tensor.layout)) for tensor in tensors]
    return tensors, tuple(layout)


def _key_of_update(update: Update) -> GroupKey:
    """Group the factors that one launch can update: those of equal r, k, rank and tolerance."""
    r, k = update.tall.shape[-1], update.columns.shape[-1]
    if update.tall.ndim != 2 or 0 in (r, k, update.rank) or update.sparse:
        return None
    basis, sharding = update.tall, update.sharding
    options = (update.rank, update.tol, update.compress, update.shrink, update.tracked is None)
    return (r, k, *options, basis.dtype, basis.device, None if sharding is UNSHARDED else placement_of(sharding))


def _key_of_refresh(problem: refresh.Refresh) -> GroupKey:
    vectors, (r, m) = problem.vectors, (problem.vectors.shape[-1], problem.matrix.shape[-1])
    if not is_dense(problem.matrix) or vectors.ndim != 2 or 0 in (r, m):
        return None
    # A stack pads all matrices to the widest, which is less than twice as wide as the narrowest.
    return (r, m.bit_length(), problem.iterations, vectors.dtype, vectors.device)


def _key_of_factors(
    factors: tuple[DampedFactor, ...], matrices: tuple[Tensor, ...], shared: tuple[Any, ...]
) -> GroupKey:
    """Group applications to matrices without batch dimensions by the keys of their sides and by ``shared``."""
    keys = tuple(map(_key_of_factor, factors))
    return None if None in keys or any(matrix.ndim != 2 for matrix in matrices) else (*keys, *shared)


def _key_of_factor(factor: DampedFactor) -> GroupKey:
    """Group the factors that one launch can apply: those of one kind and rank, with τ given or not."""
    basis = factor.basis
    if factor.sharding is not UNSHARDED or factor.diagonal is not None or basis.ndim != 2 or basis.shape[-1] == 0:
        return None
    return (factor.kind, basis.shape[-1], basis.dtype, basis.device, factor.tail is None)
