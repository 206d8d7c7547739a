"""kron_damped_solve against two dense float64 solves, and what has one damping against the dense product."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import brandla
import oracles
from builders import assert_differentiable, dense_operator, make_columns, make_eigh, make_root, padded, tracked
from oracles import THRESHOLD

P, Q, K = 24, 33, 4
LEFT_DAMPING, RIGHT_DAMPING = 0.2, 0.05
KINDS = {"eigh": make_eigh, "root": make_root}
PAIRS_OF_KINDS = pytest.mark.parametrize(
    "makers", [(KINDS[a], KINDS[b]) for a in KINDS for b in KINDS], ids=[f"{a}, {b}" for a in KINDS for b in KINDS]
)
TAILS = pytest.mark.parametrize(
    "tails",
    [(0.0, 0.0), (0.3, 0.0), (0.0, 0.1), ("smallest", "smallest"), ("smallest", 0.1), ("mean", "mean")],
    ids=str,
)
SIDES = ("left_tail", "right_tail")
Makers = tuple[Callable[..., Any], Callable[..., Any]]


def operands(
    makers: Makers, left: tuple[int, int] = (P, 6), right: tuple[int, int] = (Q, 9), **options: Any
) -> tuple[brandla.Tracked, brandla.Tracked]:
    """Return two factors of matrices whose traces are larger by 3 and by 5."""
    return tracked(makers[0](*left, **options), 3), tracked(makers[1](*right, "slow", seed=4, **options), 5)


def solve(left: Any, right: Any, matrix: Any, **options: Any) -> Any:
    """Call the function with the dampings of this file."""
    return brandla.kron_damped_solve(left, right, matrix, LEFT_DAMPING, RIGHT_DAMPING, **options)


def assert_inverts(left: Any, right: Any, tails: tuple[Any, Any], dtype: torch.dtype) -> None:
    """Check ‖W − (G + λ_G I) X (A + λ_A I)‖ over the norms of all three and n·ε, and the solves of pairs by it."""
    matrix, options = make_columns(P, Q, dtype=dtype), dict(zip(SIDES, tails, strict=True))
    solution = solve(left, right, matrix, **options)
    assert (solution.shape, solution.dtype) == ((P, Q), dtype)
    g, a = dense_operator(left, LEFT_DAMPING, tails[0]), dense_operator(right, RIGHT_DAMPING, tails[1])
    scale = math.prod(map(oracles.spectral_norm, (g, solution, a)))
    assert oracles.difference_ratio(g @ solution.double() @ a, matrix, dtype, scale) <= THRESHOLD
    for k in (0, 1, K, 40):
        pair = make_columns(P, k, dtype=dtype), make_columns(Q, k, dtype=dtype, seed=3)
        solved = solve(left, right, pair, **options)
        assert isinstance(solved, tuple)
        assert [part.shape for part in solved] == [(P, k), (Q, k)]
        expected = solve(left, right, pair[0] @ pair[1].mT, **options)
        assert oracles.difference_ratio(solved[0] @ solved[1].mT, expected, dtype) <= THRESHOLD


@PAIRS_OF_KINDS
@TAILS
def test_solve_equals_two_dense_solves_and_that_of_a_pair(makers: Makers, tails: Any, dtype: torch.dtype) -> None:
    assert_inverts(*operands(makers, dtype=dtype), tails, dtype)


@PAIRS_OF_KINDS
@pytest.mark.parametrize(("left_rank", "right_rank"), [(0, 0), (0, 9), (6, 0), (P, Q)], ids=str)
def test_every_rank_from_none_to_full(makers: Makers, left_rank: int, right_rank: int, dtype: torch.dtype) -> None:
    left, right = makers[0](P, left_rank, dtype=dtype), makers[1](Q, right_rank, dtype=dtype, seed=4)
    assert_inverts(left, right, (0.0, 0.0), dtype)


@PAIRS_OF_KINDS
@pytest.mark.parametrize("is_pair", [False, True], ids=["matrix", "pair"])
def test_solve_is_differentiable_in_every_tensor(makers: Makers, *, is_pair: bool) -> None:
    data = (make_columns(6, 2), make_columns(5, 2)) if is_pair else make_columns(6, 5)

    def call(left: Any, right: Any, data: Any, *numbers: Tensor) -> Any:
        return brandla.kron_damped_solve(left, right, data, *numbers[:2], left_tail=numbers[2], right_tail=numbers[3])

    numbers = torch.tensor([0.3, 0.4, 0.1, 0.2], dtype=torch.float64)
    assert_differentiable(call, makers[0](6, 2, "slow"), makers[1](5, 3, "slow", seed=4), data, *numbers)


# ---------------------------------------------------------------------------------------------------------------------
# One damping of the whole product
# ---------------------------------------------------------------------------------------------------------------------

JOINT = 0.07


def assert_power_and_logdet(left: Any, right: Any, tails: tuple[Any, Any], dtype: torch.dtype) -> None:
    """Check (A ⊗ G + δI)^p vec(W), for W of 7 × 9 by columns, and the log-determinant, against the dense matrix."""
    g, a = (dense_operator(factor, 0.0, tail) for factor, tail in zip((left, right), tails, strict=True))
    values, vectors = oracles.eigh(torch.kron(a, g) + JOINT * torch.eye(63, dtype=torch.float64))
    matrix, options = make_columns(7, 9, dtype=dtype), dict(zip(SIDES, tails, strict=True))
    for exponent in (-1, -0.5, 0, 0.5, 1):
        applied = brandla.kron_damped_power(left, right, matrix, JOINT, exponent, **options)
        column = (vectors * values.pow(exponent)) @ (vectors.mT @ matrix.double().mT.reshape(-1))
        scale = float(values.pow(exponent).max()) * oracles.spectral_norm(matrix)
        assert applied.dtype == dtype
        assert oracles.difference_ratio(applied, column.reshape(9, 7).mT, dtype, scale) <= THRESHOLD
    logdet = brandla.kron_damped_logdet(left, right, JOINT, **options)
    assert (logdet.shape, logdet.dtype) == ((), dtype)
    assert abs(logdet - values.log().sum()) <= oracles.tolerance(63, dtype)


@PAIRS_OF_KINDS
@TAILS
def test_power_and_logdet_of_the_product_equal_the_dense_ones(makers: Makers, tails: Any, dtype: torch.dtype) -> None:
    assert_power_and_logdet(*operands(makers, (7, 3), (9, 4), dtype=dtype), tails, dtype)


@PAIRS_OF_KINDS
@pytest.mark.parametrize(("left_rank", "right_rank"), [(0, 0), (0, 4), (3, 0), (7, 9)], ids=str)
def test_the_product_at_every_rank(makers: Makers, left_rank: int, right_rank: int) -> None:
    left, right = makers[0](7, left_rank), makers[1](9, right_rank, seed=4)
    assert_power_and_logdet(left, right, (0.2, 0.1), torch.float64)


@PAIRS_OF_KINDS
def test_directions_that_a_factor_does_not_hold_count_as_its_tail(makers: Makers) -> None:
    """Zero columns, and of a root columns of which S says nothing that is not rounding."""
    assert_power_and_logdet(padded(makers[0](7, 3), 2), padded(makers[1](9, 4), 2), (0.2, 0.1), torch.float64)


def test_values_stand_for_the_products_where_both_spans_meet() -> None:
    (left, right), matrix = operands((make_eigh, make_eigh), (7, 3), (9, 4)), make_columns(7, 9)
    u, v = left.lowrank.eigenvectors, right.lowrank.eigenvectors
    products = left.lowrank.eigenvalues[:, None] * right.lowrank.eigenvalues
    fitted = products * oracles.gaussian(3, 4, seed=8).exp()
    plain, same, other = (
        brandla.kron_damped_power(left, right, matrix, JOINT, -0.5, left_tail=0.2, right_tail=0.1, values=values)
        for values in (None, products, fitted)
    )
    assert oracles.difference_ratio(plain, same, torch.float64) <= THRESHOLD
    moved = (fitted + JOINT).rsqrt() - (products + JOINT).rsqrt()
    expected = u @ (moved * (u.mT @ matrix @ v)) @ v.mT
    assert oracles.difference_ratio(other - plain, expected, torch.float64) <= THRESHOLD
    plain, other = (brandla.kron_damped_logdet(left, right, JOINT, values=values) for values in (None, fitted))
    expected = ((fitted + JOINT) / (products + JOINT)).log().sum()
    assert abs(other - plain - expected) <= oracles.tolerance(63, torch.float64)


@PAIRS_OF_KINDS
def test_the_product_is_differentiable_in_every_tensor(makers: Makers) -> None:
    def call(left: Any, right: Any, matrix: Tensor, values: Tensor, damping: Tensor, *tails: Tensor) -> Any:
        options = dict(zip(SIDES, tails, strict=True))
        logdet = brandla.kron_damped_logdet(left, right, damping, **options)
        fitted = brandla.kron_damped_logdet(left, right, damping, left_tail="smallest", values=values.square())
        return brandla.kron_damped_power(left, right, matrix, damping, -0.5, **options), logdet, fitted

    left, right = makers[0](5, 2, "slow"), makers[1](4, 3, "slow", seed=4)
    numbers = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64)
    assert_differentiable(call, left, right, make_columns(5, 4), make_columns(2, 3), *numbers)


@pytest.mark.parametrize("kind", [brandla.LowRankEigh, brandla.LowRankRoot])
def test_the_derivative_of_a_product_of_zeros_is_finite(kind: Any) -> None:
    right = make_eigh(4, 3, seed=4)
    start = [part.requires_grad_() for part in kind.zeros(5, 2, dtype=torch.float64)]
    damping = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    applied = brandla.kron_damped_power(kind(*start), right, make_columns(5, 4), damping, -0.5, right_tail=0.1)
    (applied.sum() + brandla.kron_damped_logdet(kind(*start), right, damping)).backward()
    assert all(part.grad is None or part.grad.isfinite().all() for part in (*start, damping))
