"""brandla.grouped: the same functions over lists of factors of different sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import brandla
import oracles
from brandla import grouped
from builders import (
    SymmetricUpdate,
    assert_agree,
    assert_same,
    defect,
    make_columns,
    make_eigh,
    make_root,
    make_svd,
    unchanged,
)
from oracles import generator, power_law, psd_matrix

SIZES = [(20, 5, 3), (33, 8, 40), (7, 0, 1), (12, 12, 0)]


def _all(make: Callable[[int, int, int], Any]) -> list[Any]:
    return [make(*size) for size in SIZES]


EIGHS = _all(lambda n, r, _: make_eigh(n, r))
ROOTS = _all(lambda n, r, _: make_root(n, r))
SVDS = _all(lambda n, r, _: make_svd(n, n + 2, r))
COLUMNS = _all(lambda n, _, k: make_columns(n, k))
RIGHTS = _all(lambda n, _, k: make_columns(n + 2, k, seed=7))
RHS = _all(lambda n, *_: make_columns(n, 2))
MATRICES = _all(lambda n, *_: psd_matrix(power_law(1.0)(n), seed=n))
BLOCKS = _all(lambda n, *_: make_columns(n, n))
DAMPINGS = [0.1, torch.tensor(0.2), 0.3, 0.4]

CASES: dict[str, tuple[str, list[list[Any]], dict[str, Any]]] = {
    "eigh_update": ("eigh_update", [EIGHS, COLUMNS], {}),
    "eigh_update, one value for all": ("eigh_update", [EIGHS, COLUMNS], {"decay": 0.9, "weight": torch.tensor(0.1)}),
    "eigh_update, one value each": (
        *("eigh_update", [EIGHS, COLUMNS]),
        {"decay": [0.9, 0.5, 0.1, 1.0], "weight": (0.1, 0.2, 0.3, 0.4), "rank": [8, None, 1, 5]},
    ),
    "eigh_update, tracked": ("eigh_update", [list(map(brandla.track, EIGHS)), COLUMNS], {"decay": 0.9}),
    "root_update": ("root_update", [ROOTS, COLUMNS], {"decay": [0.9, 0.5, 0.1, 1.0]}),
    "root_update, one value each": (
        *("root_update", [ROOTS, COLUMNS]),
        {"rank": [8, brandla.Rank(33, tol=1e-3), 1, 5], "compress": ["eigh", "cholesky", "eigh", "cholesky"]},
    ),
    "root_update, tracked": ("root_update", [list(map(brandla.track, ROOTS)), COLUMNS], {"compress": "cholesky"}),
    "eigh_downdate": ("eigh_downdate", [EIGHS, COLUMNS], {"weight": [0.1, 0.2, 0.3, 0.4]}),
    "eigh_refresh": ("eigh_refresh", [EIGHS, BLOCKS], {"decay": 0.9, "iterations": [1, 2, 1, 1]}),
    "root_update, shrink": ("root_update", [ROOTS, COLUMNS], {"shrink": [True, False, True, True], "decay": 0.9}),
    "svd_update": ("svd_update", [SVDS, COLUMNS, RIGHTS], {"decay": 0.5, "rank": [8, 8, 1, 5]}),
    "svd_append": ("svd_append", [SVDS, COLUMNS], {"decay": [0.9, 0.5, 0.1, 1.0]}),
    "damped_solve": ("damped_solve", [EIGHS, RHS, DAMPINGS], {"tail": [0.0, "smallest", 0.5, torch.tensor(0.1)]}),
    "damped_solve, both kinds": ("damped_solve", [[*EIGHS[:2], *ROOTS[2:]], RHS, DAMPINGS], {"tail": "smallest"}),
    "damped_solve, one value": ("damped_solve", [EIGHS, RHS, 0.1], {}),
    "damped_power": ("damped_power", [ROOTS, RHS, DAMPINGS, [-1, -0.5, -0.25, 2]], {}),
    "damped_power, one value": ("damped_power", [EIGHS, RHS, 0.1, -0.5], {}),
    "damped_solve, diagonal": (
        *("damped_solve", [EIGHS, RHS, DAMPINGS]),
        {"tail": "smallest", "diagonal": [torch.ones(20).double(), None, None, torch.arange(12).double()]},
    ),
    "damped_logdet": ("damped_logdet", [[*EIGHS[:2], *ROOTS[2:]], DAMPINGS], {"tail": [0.0, "smallest", 0.5, 0.1]}),
    "kron_damped_power": (
        *("kron_damped_power", [EIGHS, ROOTS, BLOCKS, DAMPINGS, [-1, -0.5, 0.5, 1]]),
        {"left_tail": "smallest", "values": [None, torch.ones(8, 8).double(), None, None]},
    ),
    "kron_damped_logdet": ("kron_damped_logdet", [EIGHS, ROOTS, 0.3], {"right_tail": [0.0, 0.1, 0.2, 0.3]}),
    "kron_damped_solve": (
        *("kron_damped_solve", [EIGHS, ROOTS, [*BLOCKS[:2], *zip(RHS[2:], RHS[2:], strict=True)], DAMPINGS, DAMPINGS]),
        {"left_tail": "smallest", "right_tail": [0.0, 0.1, 0.2, 0.3]},
    ),
}


def own_of(values: Any, index: int) -> Any:
    """Return what belongs to one factor of a list, or what is one for all."""
    return values[index] if isinstance(values, (list, tuple)) else values


def both(function: str, lists: list[Any], options: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Return the results of a grouped call, and those of the calls one by one."""
    alone = [
        getattr(brandla, function)(
            *(own_of(values, index) for values in lists),
            **{key: own_of(value, index) for key, value in options.items()},
        )
        for index in range(len(lists[0]))
    ]
    return getattr(grouped, function)(*lists, **options), alone


@pytest.mark.parametrize("name", CASES)
def test_grouped_call_equals_a_loop(name: str) -> None:
    function, lists, options = CASES[name]
    with unchanged(lists, options):
        results, expected = both(function, lists, options)
    assert_same(results, expected)


@pytest.mark.parametrize("function", ["randomized_eigh", "randomized_svd"])
@pytest.mark.parametrize("rank", [4, [4, 8, 2, 1]], ids=str)
def test_grouped_randomized_call_equals_a_loop_from_one_generator(function: str, rank: Any) -> None:
    results = getattr(grouped, function)(MATRICES, rank, power_iterations=1, generator=generator(3))
    options = {"power_iterations": 1, "generator": generator(3)}
    assert_same(
        results, [getattr(brandla, function)(each, own_of(rank, i), **options) for i, each in enumerate(MATRICES)]
    )


ORDERS = (40, 64, 90)
# Which of the factors get columns that lie inside their own span.
INSIDE = {"none": (), "one": (64,), "all": ORDERS}


def assert_equal_factors(results: list[Any], expected: list[Any], dtype: torch.dtype) -> None:
    """Check that the factors stand for the same matrices, to the rounding of two backward stable ways to them."""
    for result, wanted in zip(results, expected, strict=True):
        assert_agree(result, wanted, oracles.tolerance(90, dtype))
        assert [part.shape for part in tree_leaves(result)] == [part.shape for part in tree_leaves(wanted)]
        factor = result.lowrank if isinstance(result, brandla.Tracked) else result
        assert defect(factor) <= oracles.ORTHONORMAL * oracles.epsilon(dtype)


def factors_and_columns(update: SymmetricUpdate, k: int, orders: Any = ORDERS, **options: Any) -> tuple[Any, Any]:
    """Return factors of rank 8 and columns for them."""
    factors = [update.make(n, 8, seed=n, **options) for n in orders]
    return factors, [make_columns(n, k, seed=n, **options) for n in orders]


@pytest.mark.parametrize("tracked", [False, True], ids=["plain", "tracked"])
@pytest.mark.parametrize("inside", INSIDE)
def test_factors_of_one_rank_are_updated_as_each_by_itself(
    update: SymmetricUpdate, inside: str, tracked: bool, dtype: torch.dtype
) -> None:
    factors, columns = factors_and_columns(update, 5, dtype=dtype)
    for index, n in enumerate(ORDERS):
        if n in INSIDE[inside]:
            columns[index] = factors[index].dense() @ columns[index] / n**0.5
    factors = [brandla.track(factor) for factor in factors] if tracked else factors
    for options in ({"rank": brandla.Rank(13, tol=1e-2)}, {"rank": 3}):
        given = update.options | options | {"decay": 0.9, "weight": [0.5, 1.0, 2.0]}
        results, alone = both(update.name, [factors, columns], given)
        assert_equal_factors(results, alone, dtype)


@pytest.mark.parametrize("k", [3, 30], ids=["one among them", "all"])
def test_lists_may_hold_factors_that_the_update_fills_whole(update: SymmetricUpdate, k: int) -> None:
    """With r + k ≥ n: of the first factor, or of all."""
    given = factors_and_columns(update, k, (10, 20, 33))
    results, alone = both(update.name, [*given], update.options | {"decay": 0.9, "rank": 8 + min(k, 2)})
    assert_equal_factors(results, alone, torch.float64)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_lists_of_half_precision_columns_equal_their_float32_values(update: SymmetricUpdate, half: torch.dtype) -> None:
    factors, columns = factors_and_columns(update, 5, dtype=torch.float32)
    columns = [own.to(half) for own in columns]
    expected = update.grouped(factors, [own.float() for own in columns], decay=0.9)
    for given in (columns, [columns[0], columns[1].float(), columns[2]]):
        assert_same(update.grouped(factors, given, decay=0.9), expected)


def test_a_factor_that_is_not_finite_spoils_no_other(update: SymmetricUpdate) -> None:
    factors, columns = factors_and_columns(update, 5)
    columns[1][3, 2] = float("nan")
    results, alone = both(update.name, [factors, columns], update.options | {"decay": 0.9})
    assert [bool(result.is_finite()) for result in results] == [True, False, True]
    assert_equal_factors(results[::2], alone[::2], torch.float64)


@pytest.mark.parametrize("make", [make_eigh, make_root])
def test_applications_of_one_rank_are_those_of_each_by_itself(make: Callable[..., Any], dtype: torch.dtype) -> None:
    factors = [make(n, 8, dtype=dtype, seed=n) for n in ORDERS]
    rhs = [make_columns(n, 3, dtype=dtype, seed=n) for n in ORDERS]
    blocks = [make_columns(n, n, dtype=dtype, seed=n) for n in ORDERS]
    calls: list[Any] = [
        ("damped_solve", [factors, rhs, 0.1], {}),
        ("kron_damped_solve", [factors, factors, blocks, 0.1, 0.2], {}),
        ("kron_damped_solve", [factors, factors, list(zip(rhs, rhs, strict=True)), 0.1, 0.2], {}),
    ]
    for tail, damping in ((0.0, 0.1), (0.3, [0.1, 0.2, 0.4]), ("smallest", 0.1)):
        calls.append(("damped_logdet", [factors, damping], {"tail": tail}))
        sides = {"left_tail": tail, "right_tail": 0.2}
        calls.append(("kron_damped_logdet", [factors, factors[::-1], damping], sides))
    for call in calls:
        assert_agree(*both(*call), oracles.tolerance(90, dtype))


def wide_problems(
    dtype: torch.dtype, orders: tuple[int, ...] = ORDERS
) -> tuple[list[brandla.LowRankEigh], list[Tensor]]:
    """Factors of one rank, the first with a zero column, and matrices of widths of one class: 50 to 62."""
    eighs = [make_eigh(n, 8, dtype=dtype, seed=n) for n in orders]
    eighs[0].eigenvectors[:, 7] = 0
    eighs[0].eigenvalues[7] = 0
    return eighs, [make_columns(n, 40 + n // 4, dtype=dtype, seed=n) for n in orders]


@pytest.mark.parametrize("orders", [ORDERS, (40, 40, 40)], ids=["different", "equal"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_factors_of_one_rank_are_refreshed_as_each_by_itself(
    iterations: int, orders: tuple[int, ...], dtype: torch.dtype
) -> None:
    decays = [0.5, torch.tensor(0.9, dtype=dtype), 0.9]
    options = {"decay": decays, "weight": 0.1, "iterations": iterations}
    results, alone = both("eigh_refresh", [*wide_problems(dtype, orders)], options)
    assert_same([order for _, order in results], [order for _, order in alone])
    assert_equal_factors([new for new, _ in results], [new for new, _ in alone], dtype)


def test_a_wide_matrix_that_is_not_finite_spoils_no_other() -> None:
    eighs, matrices = wide_problems(torch.float64)
    matrices[1][3, 2] = float("nan")
    results, alone = ([new for new, _ in each] for each in both("eigh_refresh", [eighs, matrices], {}))
    assert [bool(new.is_finite()) for new in results] == [True, False, True]
    assert_equal_factors(results[::2], alone[::2], torch.float64)


@pytest.mark.parametrize("orders", [ORDERS, (40, 40, 40)], ids=["different", "equal"])
@pytest.mark.parametrize("make", [make_eigh, make_root])
@pytest.mark.parametrize("exponent", [-1.0, -0.5])
def test_powers_of_products_are_those_of_each_by_itself(
    exponent: float, make: Callable[..., Any], orders: tuple[int, ...], dtype: torch.dtype
) -> None:
    lefts, matrices = wide_problems(dtype, orders)
    rights = [make(matrix.shape[1], 5, dtype=dtype, seed=1) for matrix in matrices]
    lists = [lefts, rights, matrices, [0.1, torch.tensor(0.3, dtype=dtype), 0.2], exponent]
    for values in (None, torch.rand(8, 5, dtype=dtype)):
        options = {"left_tail": 0.2, "right_tail": "smallest", "values": values}
        assert_agree(*both("kron_damped_power", lists, options), oracles.tolerance(90, dtype))


def test_the_gradient_of_listed_powers_is_that_of_single_ones() -> None:
    lefts, matrices = wide_problems(torch.float64)
    given = [part.clone().requires_grad_() for part in (*matrices, *(left.eigenvalues for left in lefts))]
    factors = [left._replace(eigenvalues=own) for left, own in zip(lefts, given[3:], strict=True)]
    rights = [make_eigh(matrix.shape[1], 5, seed=1) for matrix in matrices]
    of_listed, of_single = (
        torch.autograd.grad(sum(x.square().sum() for x in found), given)
        for found in both("kron_damped_power", [factors, rights, given[:3], 0.1, -0.5], {})
    )
    torch.testing.assert_close(of_listed, of_single)


def test_an_empty_group_gives_an_empty_list() -> None:
    assert grouped.eigh_update([], []) == []
    assert grouped.damped_solve([], [], 0.1) == []


@pytest.mark.parametrize(
    ("function", "lists", "options", "words"),
    [
        ("eigh_update", (EIGHS, COLUMNS[:3]), {}, ["4", "3"]),
        ("eigh_update", (EIGHS, COLUMNS), {"decay": [0.9, 0.5]}, ["decay", "4", "2"]),
        ("root_update", (ROOTS, COLUMNS), {"compress": ["eigh"] * 3}, ["compress", "4", "3"]),
        ("damped_solve", (EIGHS, RHS, [0.1]), {}, ["damping", "4", "1"]),
        ("randomized_eigh", (MATRICES, [1, 2]), {}, ["rank", "4", "2"]),
    ],
    ids=["lists", "option", "compress", "damping", "rank"],
)
def test_lists_of_different_lengths_are_refused(function: str, lists: Any, options: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=f"grouped.{function}") as caught:
        getattr(grouped, function)(*lists, **options)
    assert all(word in str(caught.value) for word in words)


def test_bad_input_anywhere_is_refused() -> None:
    with pytest.raises(ValueError, match="eigh_update: columns must have n = 12 rows"):
        grouped.eigh_update(EIGHS, [*COLUMNS[:3], torch.zeros(5, 2, dtype=torch.float64)])


def test_a_list_whose_layout_has_passed_is_computed_from_its_own_tensors_and_numbers() -> None:
    """What a check has found of one list holds for another only where nothing that it looks at has changed."""
    one, other = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64)
    second = [2 * part for part in COLUMNS]
    lists = [(COLUMNS, one, one), (second, one, one), (COLUMNS, one, other), (second, other, one), (second, 0.5, 1.0)]
    for columns, decay, weight in [*lists, *lists]:
        for rank in ([5, 8, 1, 12], [4, 8, 1, 12]):
            options = {"decay": decay, "weight": weight, "rank": rank}
            found = grouped.root_update(ROOTS, columns, **options)
            alone = [
                brandla.root_update(root, own, decay=decay, weight=weight, rank=most)
                for root, own, most in zip(ROOTS, columns, rank, strict=True)
            ]
            assert_same(found, alone)
    with pytest.raises(TypeError, match="weight must be a number"):
        grouped.root_update(ROOTS, second, decay=0.5, weight=True)
    with brandla.checked(), pytest.raises(ValueError, match="columns must be finite"):
        grouped.root_update(ROOTS, [part * torch.nan for part in second], decay=0.5, weight=1.0)


def test_every_public_function_has_a_grouped_form() -> None:
    """Except the in-place ones: bad input in one factor could no longer leave the others unchanged."""
    functions = {name for name in brandla.__all__ if "_" in name and not name.endswith("_")} - {"keep_dtype"}
    assert functions == set(grouped.__all__)
