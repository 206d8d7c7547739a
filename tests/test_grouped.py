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
from builders import SymmetricUpdate, dense, make_columns, make_eigh, make_root, make_svd
from oracles import THRESHOLD, generator, power_law, psd_matrix

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


def assert_same(actual: Any, expected: Any) -> None:
    """Check that two results are of one kind and equal bit for bit."""
    assert type(actual) is type(expected)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_grouped_call_equals_a_loop(name: str, unchanged: Callable[..., Any]) -> None:
    function, lists, options = CASES[name]
    with unchanged(lists, options):
        results = getattr(grouped, function)(*lists, **options)
    assert isinstance(results, list)
    assert len(results) == len(SIZES)
    for i, result in enumerate(results):
        arguments = [own_of(values, i) for values in lists]
        own = {key: own_of(value, i) for key, value in options.items()}
        assert_same(result, getattr(brandla, function)(*arguments, **own))


@pytest.mark.parametrize("function", ["randomized_eigh", "randomized_svd"])
@pytest.mark.parametrize("rank", [4, [4, 8, 2, 1]], ids=str)
def test_grouped_randomized_call_equals_a_loop_from_one_generator(function: str, rank: Any) -> None:
    results = getattr(grouped, function)(MATRICES, rank, power_iterations=1, generator=generator(3))
    source = generator(3)
    for i, matrix in enumerate(MATRICES):
        alone = getattr(brandla, function)(matrix, own_of(rank, i), power_iterations=1, generator=source)
        assert_same(results[i], alone)


ORDERS = (40, 64, 90)
# Which of the factors get columns that lie inside their own span.
INSIDE = {"none": (), "one": (64,), "all": ORDERS}


def assert_equal_factors(result: Any, expected: Any, dtype: torch.dtype) -> None:
    """Check that two factors stand for one matrix, to the rounding of two backward stable ways to it."""
    tracked = isinstance(expected, brandla.Tracked)
    if tracked:
        scale = oracles.tolerance(expected.lowrank.n, dtype, expected.trace)
        assert abs(result.trace - expected.trace) <= scale
        assert abs(result.error_bound - expected.error_bound) <= scale
        result, expected = result.lowrank, expected.lowrank
    assert type(result) is type(expected)
    assert [(part.shape, part.dtype) for part in result] == [(part.shape, part.dtype) for part in expected]
    assert oracles.difference_ratio(dense(result), dense(expected), dtype) <= THRESHOLD
    if isinstance(result, brandla.LowRankEigh):
        assert oracles.orthonormality_ratio(result.eigenvectors, result.eigenvalues) <= THRESHOLD
    else:
        gram = result.root.double().mT @ result.root.double()
        assert oracles.difference_ratio(result.gram, gram, dtype) <= THRESHOLD


@pytest.mark.parametrize("tracked", [False, True], ids=["plain", "tracked"])
@pytest.mark.parametrize("inside", INSIDE)
def test_factors_of_one_rank_are_updated_as_each_by_itself(
    update: SymmetricUpdate, inside: str, tracked: bool, dtype: torch.dtype
) -> None:
    r, k = 8, 5
    factors = [update.make(n, r, dtype=dtype, seed=n) for n in ORDERS]
    columns = [make_columns(n, k, dtype=dtype, seed=n) for n in ORDERS]
    for index, n in enumerate(ORDERS):
        if n in INSIDE[inside]:
            matrix = factors[index].dense()
            columns[index] = matrix @ columns[index] / n**0.5
    factors = [brandla.track(factor) for factor in factors] if tracked else factors
    for options in ({"rank": brandla.Rank(r + k, tol=1e-2)}, {"rank": 3}):
        results = update.grouped(factors, columns, decay=0.9, weight=[0.5, 1.0, 2.0], **options)
        for result, factor, own, weight in zip(results, factors, columns, [0.5, 1.0, 2.0], strict=True):
            assert_equal_factors(result, update(factor, own, decay=0.9, weight=weight, **options), dtype)


@pytest.mark.parametrize("k", [3, 30], ids=["one among them", "all"])
def test_lists_may_hold_factors_that_the_update_fills_whole(update: SymmetricUpdate, k: int) -> None:
    """With r + k ≥ n: of the first factor, or of all."""
    orders, dtype = (10, 20, 33), torch.float64
    factors = [update.make(n, 8, dtype=dtype, seed=n) for n in orders]
    columns = [make_columns(n, k, dtype=dtype, seed=n) for n in orders]
    results = update.grouped(factors, columns, decay=0.9, rank=8 + min(k, 2))
    for result, factor, own in zip(results, factors, columns, strict=True):
        assert_equal_factors(result, update(factor, own, decay=0.9, rank=8 + min(k, 2)), dtype)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_lists_of_half_precision_columns_equal_their_float32_values(update: SymmetricUpdate, half: torch.dtype) -> None:
    factors = [update.make(n, 8, dtype=torch.float32, seed=n) for n in ORDERS]
    columns = [make_columns(n, 5, dtype=half, seed=n) for n in ORDERS]
    from_half = update.grouped(factors, columns, decay=0.9)
    mixed = update.grouped(factors, [columns[0], columns[1].float(), columns[2]], decay=0.9)
    from_float = update.grouped(factors, [own.float() for own in columns], decay=0.9)
    for one, two, other in zip(from_half, mixed, from_float, strict=True):
        assert_same(one, other)
        assert_same(two, other)


def test_a_factor_that_is_not_finite_spoils_no_other(update: SymmetricUpdate) -> None:
    factors = [update.make(n, 8, seed=n) for n in ORDERS]
    columns = [make_columns(n, 5, seed=n) for n in ORDERS]
    columns[1][3, 2] = float("nan")
    results = update.grouped(factors, columns, decay=0.9)
    assert [bool(result.is_finite()) for result in results] == [True, False, True]
    for index in (0, 2):
        assert_equal_factors(results[index], update(factors[index], columns[index], decay=0.9), torch.float64)


@pytest.mark.parametrize("make", [make_eigh, make_root])
def test_applications_of_one_rank_are_those_of_each_by_itself(make: Callable[..., Any], dtype: torch.dtype) -> None:
    factors = [make(n, 8, dtype=dtype, seed=n) for n in ORDERS]
    rhs = [make_columns(n, 3, dtype=dtype, seed=n) for n in ORDERS]
    blocks = [make_columns(n, n, dtype=dtype, seed=n) for n in ORDERS]
    for result, *arguments in zip(grouped.damped_solve(factors, rhs, 0.1), factors, rhs, strict=True):
        torch.testing.assert_close(result, brandla.damped_solve(*arguments, 0.1))
    for tail, damping in ((0.0, 0.1), (0.3, [0.1, 0.2, 0.4]), ("smallest", 0.1)):
        options = {"damping": damping, "tail": tail}
        sides = {"damping": damping, "left_tail": tail, "right_tail": 0.2}
        one, two = (
            grouped.damped_logdet(factors, **options),
            grouped.kron_damped_logdet(factors, factors[::-1], **sides),
        )
        for index, factor in enumerate(factors):
            own = {"damping": own_of(damping, index)}
            torch.testing.assert_close(one[index], brandla.damped_logdet(factor, **options | own))
            alone = brandla.kron_damped_logdet(factor, factors[-1 - index], **sides | own)
            torch.testing.assert_close(two[index], alone)
    pairs = list(zip(rhs, rhs, strict=True))
    for data in (blocks, pairs):
        results = grouped.kron_damped_solve(factors, factors, data, 0.1, 0.2)
        for result, factor, own in zip(results, factors, data, strict=True):
            torch.testing.assert_close(result, brandla.kron_damped_solve(factor, factor, own, 0.1, 0.2))


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
    eighs, matrices = wide_problems(dtype, orders)
    decays = [0.5, torch.tensor(0.9, dtype=dtype), 0.9]
    results = grouped.eigh_refresh(eighs, matrices, decay=decays, weight=0.1, iterations=iterations)
    for (new, order), eigh, matrix, decay in zip(results, eighs, matrices, decays, strict=True):
        alone, expected = brandla.eigh_refresh(eigh, matrix, decay=decay, weight=0.1, iterations=iterations)
        assert torch.equal(order, expected)
        assert_equal_factors(new, alone, dtype)


def test_a_wide_matrix_that_is_not_finite_spoils_no_other() -> None:
    eighs, matrices = wide_problems(torch.float64)
    matrices[1][3, 2] = float("nan")
    results = grouped.eigh_refresh(eighs, matrices)
    assert [bool(new.is_finite()) for new, _ in results] == [True, False, True]
    for index in (0, 2):
        assert_equal_factors(results[index][0], brandla.eigh_refresh(eighs[index], matrices[index])[0], torch.float64)


@pytest.mark.parametrize("orders", [ORDERS, (40, 40, 40)], ids=["different", "equal"])
@pytest.mark.parametrize("make", [make_eigh, make_root])
@pytest.mark.parametrize("exponent", [-1.0, -0.5])
def test_powers_of_products_are_those_of_each_by_itself(
    exponent: float, make: Callable[..., Any], orders: tuple[int, ...], dtype: torch.dtype
) -> None:
    lefts, matrices = wide_problems(dtype, orders)
    rights = [make(matrix.shape[1], 5, dtype=dtype, seed=1) for matrix in matrices]
    tails: dict[str, Any] = {"left_tail": 0.2, "right_tail": "smallest"}
    dampings = [0.1, torch.tensor(0.3, dtype=dtype), 0.2]
    for values in (None, torch.rand(8, 5, dtype=dtype)):
        options = {"exponent": exponent, "values": values, **tails}
        results = grouped.kron_damped_power(lefts, rights, matrices, dampings, **options)
        for result, left, right, matrix, damping in zip(results, lefts, rights, matrices, dampings, strict=True):
            alone = brandla.kron_damped_power(left, right, matrix, damping, **options)
            torch.testing.assert_close(result, alone, rtol=1e-3, atol=oracles.tolerance(90, dtype, alone.abs().max()))


def test_the_gradient_of_listed_powers_is_that_of_single_ones() -> None:
    lefts, matrices = wide_problems(torch.float64)
    given = [part.clone().requires_grad_() for part in (*matrices, *(left.eigenvalues for left in lefts))]
    factors = [left._replace(eigenvalues=own) for left, own in zip(lefts, given[3:], strict=True)]
    rights = [make_eigh(matrix.shape[1], 5, seed=1) for matrix in matrices]
    listed = grouped.kron_damped_power(factors, rights, given[:3], 0.1, -0.5)
    single = [brandla.kron_damped_power(*own, 0.1, -0.5) for own in zip(factors, rights, given[:3], strict=True)]
    of_listed, of_single = (
        torch.autograd.grad(sum(x.square().sum() for x in found), given) for found in (listed, single)
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


def test_every_public_function_has_a_grouped_form() -> None:
    """Except the in-place ones: bad input in one factor could no longer leave the others unchanged."""
    functions = {name for name in brandla.__all__ if "_" in name and not name.endswith("_")} - {"keep_dtype"}
    assert functions == set(grouped.__all__)
