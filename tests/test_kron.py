"""kron_damped_solve against two dense float64 solves, and what has one damping against the dense product."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import brandla
import oracles
from builders import Symmetric, dense_operator, make_columns, make_eigh, make_root, padded, tracked
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


def kron_ratio(
    left: Any, right: Any, matrix: Tensor, solution: Tensor, dtype: torch.dtype, tails: tuple[Any, Any] = (0.0, 0.0)
) -> float:
    """Return ‖W − (G + λ_G I) X (A + λ_A I)‖ over the norms of all three and n·ε."""
    g, a = dense_operator(left, LEFT_DAMPING, tails[0]), dense_operator(right, RIGHT_DAMPING, tails[1])
    norms = [oracles.spectral_norm(factor) for factor in (g, solution, a)]
    residual = g @ solution.double() @ a - matrix.double()
    return oracles.quotient(oracles.spectral_norm(residual), math.prod(norms) * max(P, Q) * oracles.epsilon(dtype))


def solve(left: Symmetric, right: Symmetric, matrix: Any, **options: Any) -> Any:
    """Call the function with the dampings of this file."""
    return brandla.kron_damped_solve(left, right, matrix, LEFT_DAMPING, RIGHT_DAMPING, **options)


def operands(
    makers: Makers, left: tuple[int, int] = (P, 6), right: tuple[int, int] = (Q, 9), **options: Any
) -> tuple[brandla.Tracked, brandla.Tracked]:
    """Return two factors of matrices whose traces are larger by 3 and by 5."""
    return tracked(makers[0](*left, **options), 3), tracked(makers[1](*right, "slow", seed=4, **options), 5)


@PAIRS_OF_KINDS
@TAILS
def test_solve_equals_two_dense_solves_and_that_of_a_pair(makers: Makers, tails: Any, dtype: torch.dtype) -> None:
    factors, matrix = operands(makers, dtype=dtype), make_columns(P, Q, dtype=dtype)
    options = dict(zip(SIDES, tails, strict=True))
    solution = solve(*factors, matrix, **options)
    assert (solution.shape, solution.dtype) == ((P, Q), dtype)
    assert kron_ratio(*factors, matrix, solution, dtype, tails) <= THRESHOLD
    for k in (0, 1, K, 40):
        pair = make_columns(P, k, dtype=dtype), make_columns(Q, k, dtype=dtype, seed=3)
        solved = solve(*factors, pair, **options)
        assert isinstance(solved, tuple)
        assert [part.shape for part in solved] == [(P, k), (Q, k)]
        expected = solve(*factors, pair[0] @ pair[1].mT, **options)
        assert oracles.difference_ratio(solved[0] @ solved[1].mT, expected, dtype) <= THRESHOLD


@PAIRS_OF_KINDS
@pytest.mark.parametrize(("left_rank", "right_rank"), [(0, 0), (0, 9), (6, 0), (P, Q)], ids=str)
def test_every_rank_from_none_to_full(makers: Makers, left_rank: int, right_rank: int, dtype: torch.dtype) -> None:
    left, right = makers[0](P, left_rank, dtype=dtype), makers[1](Q, right_rank, dtype=dtype, seed=4)
    matrix = make_columns(P, Q, dtype=dtype)
    assert kron_ratio(left, right, matrix, solve(left, right, matrix), dtype) <= THRESHOLD


@PAIRS_OF_KINDS
@pytest.mark.parametrize("is_pair", [False, True], ids=["matrix", "pair"])
def test_batch_equals_a_loop(makers: Makers, *, is_pair: bool, dtype: torch.dtype) -> None:
    left = makers[0](P, 6, dtype=dtype, batch_shape=(3,))
    right = makers[1](Q, 9, dtype=dtype, batch_shape=(3,), seed=4)
    dampings = torch.tensor([[0.1, 0.5, 2.0], [1.0, 0.3, 0.2]], dtype=dtype)
    p, q = (make_columns(n, K, dtype=dtype, batch_shape=(3,), seed=n) for n in (P, Q))
    data = (p, q) if is_pair else p @ q.mT
    batched = brandla.kron_damped_solve(left, right, data, *dampings)
    product = batched[0] @ batched[1].mT if is_pair else batched
    for i in range(3):
        factors = (type(factor)(*(part[i] for part in factor)) for factor in (left, right))
        alone = brandla.kron_damped_solve(*factors, p[i] @ q[i].mT, *dampings[:, i].tolist())
        assert oracles.difference_ratio(product[i], alone, dtype) <= THRESHOLD


def test_layout_of_the_matrix_and_tracking_do_not_matter(dtype: torch.dtype, unchanged: Callable[..., Any]) -> None:
    left, right = make_eigh(P, 6, dtype=dtype), make_root(Q, 9, dtype=dtype)
    matrix = make_columns(P, Q, dtype=dtype)
    expected = solve(left, right, matrix)
    assert torch.equal(solve(brandla.track(left), brandla.track(right), matrix), expected)
    for view in (matrix.mT.contiguous().mT, matrix.repeat_interleave(2, dim=1)[:, ::2]):
        with unchanged(left, right, view):
            solution = solve(left, right, view)
        assert oracles.difference_ratio(solution, expected, dtype) <= THRESHOLD


@pytest.mark.parametrize("rank", [0, 5])
def test_inputs_are_neither_changed_nor_shared(rank: int, unchanged: Any, shares_memory: Any) -> None:
    left, right = make_eigh(P, rank), make_root(Q, rank)
    pair, matrix = (make_columns(P, K), make_columns(Q, K)), make_columns(P, Q)
    one = torch.tensor(1.0, dtype=torch.float64)
    with unchanged(left, right, pair, matrix):
        results = [brandla.kron_damped_solve(left, right, data, one, one) for data in (pair, matrix)]
    assert not shares_memory((left, right, pair, matrix), results)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_data_are_solved_in_float32(half: torch.dtype) -> None:
    left, right = make_eigh(P, 6, dtype=torch.float32), make_root(Q, 9, dtype=torch.float32)
    matrix, pair = make_columns(P, Q).to(half), (make_columns(P, K).to(half), make_columns(Q, K).to(half))
    assert torch.equal(solve(left, right, matrix), solve(left, right, matrix.float()))
    for actual, expected in zip(
        solve(left, right, pair), solve(left, right, tuple(part.float() for part in pair)), strict=True
    ):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


@PAIRS_OF_KINDS
@pytest.mark.parametrize("is_pair", [False, True], ids=["matrix", "pair"])
def test_solve_is_differentiable_in_every_tensor(makers: Makers, *, is_pair: bool) -> None:
    left, right = makers[0](6, 2, "slow"), makers[1](5, 3, "slow", seed=4)
    data = (make_columns(6, 2), make_columns(5, 2)) if is_pair else (make_columns(6, 5),)
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (0.3, 0.4, 0.1, 0.2)]

    def symmetric_factor(kind: type[Symmetric], first: Tensor, second: Tensor) -> Symmetric:
        return kind(first, second if kind is brandla.LowRankEigh else oracles.symmetrised(second))

    def solve_parts(*tensors: Tensor) -> Any:
        a, b, c, d, *rest = tensors
        data, (left_damping, right_damping, left_tail, right_tail) = rest[:-4], rest[-4:]
        factors = symmetric_factor(type(left), a, b), symmetric_factor(type(right), c, d)
        matrix, tails = tuple(data) if is_pair else data[0], {"left_tail": left_tail, "right_tail": right_tail}
        return brandla.kron_damped_solve(*factors, matrix, left_damping, right_damping, **tails)

    assert gradcheck(
        solve_parts, [part.clone().requires_grad_() for part in (*left, *right, *data, *scalars)], fast_mode=True
    )


# ---------------------------------------------------------------------------------------------------------------------
# One damping of the whole product
# ---------------------------------------------------------------------------------------------------------------------

JOINT = 0.07
SMALL = (7, 3), (9, 4)


def dense_product(left: Any, right: Any, tails: tuple[Any, Any], damping: float = JOINT) -> oracles.Eigh:
    """Return the eigendecomposition of A ⊗ G + δI, for vec(W) by columns."""
    g, a = (dense_operator(factor, 0.0, tail) for factor, tail in zip((left, right), tails, strict=True))
    return oracles.eigh(torch.kron(a, g) + damping * torch.eye(len(g) * len(a), dtype=torch.float64))


def dense_function(spectrum: oracles.Eigh, matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = spectrum
    column = matrix.double().mT.reshape(-1)
    return ((vectors * values.pow(exponent)) @ (vectors.mT @ column)).reshape(matrix.mT.shape).mT


@PAIRS_OF_KINDS
@TAILS
def test_power_and_logdet_of_the_product_equal_the_dense_ones(makers: Makers, tails: Any, dtype: torch.dtype) -> None:
    left, right = operands(makers, *SMALL, dtype=dtype)
    matrix, options = make_columns(left.lowrank.n, right.lowrank.n, dtype=dtype), dict(zip(SIDES, tails, strict=True))
    spectrum = dense_product(left, right, tails)
    for exponent in (-1, -0.5, 0, 0.5, 1):
        applied = brandla.kron_damped_power(left, right, matrix, JOINT, exponent, **options)
        expected = dense_function(spectrum, matrix, exponent)
        scale = float(spectrum.eigenvalues.pow(exponent).max()) * oracles.spectral_norm(matrix)
        assert applied.dtype == dtype
        assert oracles.difference_ratio(applied, expected, dtype, scale) <= THRESHOLD
    logdet = brandla.kron_damped_logdet(left, right, JOINT, **options)
    assert (logdet.shape, logdet.dtype) == ((), dtype)
    assert abs(logdet - spectrum.eigenvalues.log().sum()) <= oracles.tolerance(matrix.numel(), dtype)


@PAIRS_OF_KINDS
@pytest.mark.parametrize(("left_rank", "right_rank"), [(0, 0), (0, 4), (3, 0), (7, 9)], ids=str)
def test_the_product_at_every_rank(makers: Makers, left_rank: int, right_rank: int) -> None:
    left, right = makers[0](7, left_rank), makers[1](9, right_rank, seed=4)
    matrix, spectrum = make_columns(7, 9), dense_product(left, right, (0.2, 0.1))
    options = dict(zip(SIDES, (0.2, 0.1), strict=True))
    applied = brandla.kron_damped_power(left, right, matrix, JOINT, -0.5, **options)
    assert oracles.difference_ratio(applied, dense_function(spectrum, matrix, -0.5), torch.float64) <= THRESHOLD
    logdet = brandla.kron_damped_logdet(left, right, JOINT, **options)
    assert abs(logdet - spectrum.eigenvalues.log().sum()) <= oracles.tolerance(63, torch.float64)


@PAIRS_OF_KINDS
def test_directions_that_a_factor_does_not_hold_count_as_its_tail(makers: Makers) -> None:
    """Zero columns, and of a root columns of which S says nothing that is not rounding."""
    left, right, matrix = makers[0](7, 3), makers[1](9, 4), make_columns(7, 9)
    options = {"left_tail": 0.2, "right_tail": 0.1}
    expected = brandla.kron_damped_power(left, right, matrix, JOINT, -0.5, **options)
    large = padded(left, 2), padded(right, 2)
    applied = brandla.kron_damped_power(*large, matrix, JOINT, -0.5, **options)
    assert oracles.difference_ratio(applied, expected, torch.float64) <= THRESHOLD
    logdets = [brandla.kron_damped_logdet(*sides, JOINT, **options) for sides in (large, (left, right))]
    assert abs(logdets[0] - logdets[1]) <= oracles.tolerance(63, torch.float64)


def test_values_stand_for_the_products_where_both_spans_meet() -> None:
    (left, right), matrix = operands((make_eigh, make_eigh), *SMALL), make_columns(7, 9)
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
def test_a_batch_of_products_equals_a_loop(makers: Makers, unchanged: Any, dtype: torch.dtype) -> None:
    batch = {"dtype": dtype, "batch_shape": (3,)}
    left, right, matrix = makers[0](7, 3, **batch), makers[1](9, 4, dtype=dtype), make_columns(7, 9, **batch)
    dampings = torch.tensor([0.1, 0.5, 2.0], dtype=dtype)
    with unchanged(left, right, matrix, dampings):
        applied = brandla.kron_damped_power(left, right, matrix, dampings, -1, left_tail="smallest")
        logdets = brandla.kron_damped_logdet(left, right, dampings, left_tail="smallest")
    for index, damping in enumerate(dampings.tolist()):
        own = type(left)(*(part[index] for part in left))
        spectrum = dense_product(own, right, ("smallest", 0.0), damping)
        expected = dense_function(spectrum, matrix[index], -1)
        scale = oracles.spectral_norm(matrix[index]) / damping
        assert oracles.difference_ratio(applied[index], expected, dtype, scale) <= THRESHOLD
        tolerance = oracles.tolerance(63, dtype)
        assert abs(logdets[index] - spectrum.eigenvalues.log().sum()) <= tolerance


@PAIRS_OF_KINDS
def test_the_product_is_differentiable_in_every_tensor(makers: Makers) -> None:
    left, right = makers[0](5, 2, "slow"), makers[1](4, 3, "slow", seed=4)
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (0.3, 0.1, 0.2)]

    def factor_of(kind: type[Symmetric], first: Tensor, second: Tensor) -> Symmetric:
        return kind(first, second if kind is brandla.LowRankEigh else oracles.symmetrised(second))

    def apply(*tensors: Tensor) -> Any:
        a, b, c, d, matrix, values, damping, left_tail, right_tail = tensors
        factors = factor_of(type(left), a, b), factor_of(type(right), c, d)
        tails = {"left_tail": left_tail, "right_tail": right_tail}
        logdets = brandla.kron_damped_logdet(*factors, damping, **tails)
        fitted = brandla.kron_damped_logdet(*factors, damping, left_tail="smallest", values=values.square())
        return brandla.kron_damped_power(*factors, matrix, damping, -0.5, **tails), logdets, fitted

    inputs = (*left, *right, make_columns(5, 4), make_columns(2, 3), *scalars)
    assert gradcheck(apply, [part.clone().requires_grad_() for part in inputs], fast_mode=True)


@pytest.mark.parametrize("kind", [brandla.LowRankEigh, brandla.LowRankRoot])
def test_the_derivative_of_a_product_of_zeros_is_finite(kind: Any) -> None:
    right = make_eigh(4, 3, seed=4)
    start = [part.requires_grad_() for part in kind.zeros(5, 2, dtype=torch.float64)]
    damping = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    applied = brandla.kron_damped_power(kind(*start), right, make_columns(5, 4), damping, -0.5, right_tail=0.1)
    (applied.sum() + brandla.kron_damped_logdet(kind(*start), right, damping)).backward()
    assert all(part.grad is None or part.grad.isfinite().all() for part in (*start, damping))
