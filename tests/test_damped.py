"""damped_solve, damped_power and damped_logdet against dense float64 matrices, and their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._pytree import tree_map

import brandla
import oracles
from builders import Symmetric, dense_operator, make_columns, make_eigh, make_root, padded, tall_of, tracked, unbound
from oracles import THRESHOLD

N, R, M = 40, 8, 5
MAKERS: dict[str, Callable[..., Any]] = {
    "LowRankEigh": make_eigh,
    "LowRankRoot": make_root,
    "LowRankRoot, diagonal": partial(make_root, diagonal=True),
}
FACTORS = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
TAILS = pytest.mark.parametrize("tail", [0.0, 0.3, "smallest", "mean"], ids=str)
Tail = float | Tensor | str


def dense_power(operator: Tensor, exponent: float) -> Tensor:
    """Return a power of a positive definite matrix by its eigendecomposition."""
    values, vectors = oracles.eigh(operator)
    return (vectors * values.pow(exponent)) @ vectors.mT


@FACTORS
@TAILS
@pytest.mark.parametrize(
    ("spectrum", "damping"),
    [*((spectrum, 1e-3) for spectrum in oracles.SPECTRA), *(("medium", damping) for damping in (1e-6, 1.0, 1e3))],
    ids=str,
)
def test_solve_equals_the_dense_solve(make: Any, spectrum: str, damping: float, tail: Tail, dtype: torch.dtype) -> None:
    # What a root in float32 is for: λ is at least 1e-4 of the largest eigenvalue.
    damping = damping if make is make_eigh or dtype == torch.float64 else max(damping, 1e-4)
    lowrank, rhs = tracked(make(N, R, spectrum, dtype=dtype), 7), make_columns(N, M, dtype=dtype)
    solution = brandla.damped_solve(lowrank, rhs, damping, tail=tail)
    assert (solution.shape, solution.dtype) == (rhs.shape, dtype)
    # The largest value is 1. An error ε of S couples it with a value of the size of λ, by √(1/λ).
    coupling = 1 if make is make_eigh else max(1, damping**-0.5)
    operator = dense_operator(lowrank, damping, tail)
    assert oracles.solve_ratio(operator, solution, rhs, dtype) <= THRESHOLD * coupling


@FACTORS
@TAILS
@pytest.mark.parametrize("exponent", [-1, -0.5, 0, 1, 2, -1.7])
def test_power_equals_the_dense_power(make: Any, exponent: float, tail: Tail, dtype: torch.dtype) -> None:
    damping = 0.05
    lowrank, rhs = tracked(make(N, R, dtype=dtype), 7), make_columns(N, M, dtype=dtype)
    operator = dense_power(dense_operator(lowrank, damping, tail), exponent)
    applied = brandla.damped_power(lowrank, rhs, damping, exponent, tail=tail)
    scale = oracles.spectral_norm(operator) * oracles.spectral_norm(rhs)
    assert applied.dtype == dtype
    assert oracles.difference_ratio(applied, operator @ rhs.double(), dtype, scale) <= THRESHOLD
    assert exponent or torch.equal(applied, rhs)


def diagonal_of(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return n numbers between 0 and 1, the first of them 0."""
    return torch.linspace(0, 1, n, dtype=dtype).square()


@FACTORS
@TAILS
@pytest.mark.parametrize("spectrum", ["slow", "clustered", "rank-16", "zero"])
def test_logdet_and_solve_beside_a_diagonal_equal_the_dense_ones(
    make: Any, spectrum: str, tail: Tail, dtype: torch.dtype
) -> None:
    damping = 0.05
    lowrank, rhs = tracked(make(N, R, spectrum, dtype=dtype), 7), make_columns(N, M, dtype=dtype)
    diagonal = diagonal_of(N, dtype=dtype)
    operator = dense_operator(lowrank, damping, tail)
    for beside, dense in ((None, operator), (diagonal, operator + torch.diag(diagonal.double()))):
        logdet = brandla.damped_logdet(lowrank, damping, tail=tail, diagonal=beside)
        assert (logdet.shape, logdet.dtype) == ((), dtype)
        expected = torch.linalg.slogdet(dense).logabsdet
        assert abs(logdet - expected) <= oracles.tolerance(N, dtype, max(1, expected.abs()))
    solution = brandla.damped_solve(lowrank, rhs, damping, tail=tail, diagonal=diagonal)
    assert solution.dtype == dtype
    assert oracles.solve_ratio(dense, solution, rhs, dtype) <= THRESHOLD
    vector = brandla.damped_solve(lowrank, rhs[:, 0], damping, tail=tail, diagonal=diagonal)
    assert oracles.difference_ratio(vector[:, None], solution[:, :1], dtype) <= THRESHOLD


def test_a_diagonal_that_is_constant_is_more_damping() -> None:
    """Beside no tail and beside one above an eigenvalue, where C has both signs."""
    factor, rhs = make_eigh(N, R), make_columns(N, M)
    for tail in (0.0, 0.1, torch.tensor(0.2)):
        beside = brandla.damped_solve(factor, rhs, 0.1, tail=tail, diagonal=torch.full((N,), 0.3, dtype=torch.float64))
        more = brandla.damped_solve(factor, rhs, 0.4, tail=tail)
        assert oracles.difference_ratio(beside, more, torch.float64) <= THRESHOLD


@FACTORS
@TAILS
def test_samples_have_the_covariance_of_the_operator_or_of_its_inverse(make: Any, tail: Tail) -> None:
    lowrank, identity = tracked(make(N, R), 7), torch.eye(N, dtype=torch.float64)
    operator = dense_operator(lowrank, 0.1, tail)
    for exponent, covariance in ((0.5, operator), (-0.5, torch.linalg.inv(operator))):
        # What standard normal columns are multiplied by.
        transform = brandla.damped_power(lowrank, identity, 0.1, exponent, tail=tail)
        assert oracles.difference_ratio(transform @ transform.mT, covariance, torch.float64) <= THRESHOLD
    # And as drawn: 4 · 10⁵ of them, whose covariance is right to some times 1/√(4 · 10⁵).
    few = make(5, 2)
    drawn = brandla.damped_power(few, oracles.gaussian(5, 400_000, seed=3), 0.1, 0.5)
    assert (torch.cov(drawn) - dense_operator(few, 0.1)).abs().max() <= 5 * 2**0.5 * 1.1 / 400_000**0.5


@FACTORS
@pytest.mark.parametrize("damping", [1e-30, 1e30], ids=str)
def test_a_determinant_may_be_out_of_range(make: Any, damping: float) -> None:
    n, r = 2000, 3
    logdet = brandla.damped_logdet(make(n, r, "flat", dtype=torch.float32), damping, tail=0.0)
    expected = r * math.log(1 + damping) + (n - r) * math.log(damping)
    assert abs(logdet - expected) <= oracles.tolerance(1, torch.float32, abs(expected))


@FACTORS
@pytest.mark.parametrize(("n", "r"), [(6, 0), (6, 6), (1, 1), (1, 0)], ids=str)
@TAILS
def test_every_rank_from_none_to_full(make: Callable[..., Any], n: int, r: int, tail: Tail, dtype: torch.dtype) -> None:
    lowrank, rhs = tracked(make(n, r, dtype=dtype), 7), make_columns(n, 2, dtype=dtype)
    operator = dense_operator(lowrank, 0.2, tail)
    solution = brandla.damped_solve(lowrank, rhs, 0.2, tail=tail)
    root = brandla.damped_power(lowrank, brandla.damped_power(lowrank, rhs, 0.2, -0.5, tail=tail), 0.2, -0.5, tail=tail)
    assert oracles.solve_ratio(operator, solution, rhs, dtype) <= THRESHOLD
    assert oracles.difference_ratio(root, solution, dtype) <= THRESHOLD
    diagonal = diagonal_of(n, dtype=dtype)
    solution = brandla.damped_solve(lowrank, rhs, 0.2, tail=tail, diagonal=diagonal)
    assert oracles.solve_ratio(operator + torch.diag(diagonal.double()), solution, rhs, dtype) <= THRESHOLD
    logdet, expected = brandla.damped_logdet(lowrank, 0.2, tail=tail), torch.linalg.slogdet(operator).logabsdet
    assert abs(logdet - expected) <= oracles.tolerance(n, dtype, max(1, expected.abs()))


@FACTORS
def test_zero_columns_of_the_basis_count_as_unseen_directions(make: Callable[..., Any], dtype: torch.dtype) -> None:
    small = make(N, R, dtype=dtype)
    large, rhs = padded(small, 3), make_columns(N, M, dtype=dtype)
    delta = diagonal_of(N, dtype=dtype)
    for options in ({}, {"tail": 0.3}, {"tail": 0.3, "diagonal": delta}):
        with_zeros, without = (brandla.damped_solve(value, rhs, 0.1, **options) for value in (large, small))
        assert oracles.difference_ratio(with_zeros, without, dtype) <= THRESHOLD
        with_zeros, without = (brandla.damped_logdet(value, 0.1, **options) for value in (large, small))
        assert abs(with_zeros - without) <= oracles.tolerance(N, dtype, without.abs())


@pytest.mark.parametrize("exponent", [-1, -0.5, -0.25])
@pytest.mark.parametrize("damping", [1e-7, 1e-9, 1e-20], ids=lambda damping: f"{damping:g}")
def test_power_far_below_the_tail_is_as_accurate_as_the_solve(
    exponent: float, damping: float, dtype: torch.dtype
) -> None:
    # Columns of the identity: every entry of the result is the power of one number.
    basis = torch.eye(7, 5, dtype=dtype)
    basis[4, 4] = 0
    values = torch.tensor([2, 1, 0.5, damping, 0], dtype=dtype)
    factor = brandla.LowRankEigh(values, basis)
    expected = (torch.tensor([2, 1, 0.5, damping, 1, 1, 1], dtype=torch.float64) + damping) ** exponent
    applied = brandla.damped_power(factor, torch.ones(7, dtype=dtype), damping, exponent, tail=1.0)
    # expm1 multiplies the few ε of the logarithm, which is at most 46, by it.
    assert ((applied.double() - expected) / expected).abs().max() <= 2 * 46 * oracles.epsilon(dtype)


@FACTORS
def test_mean_of_the_values_left_out_is_zero_where_all_are_held(make: Callable[..., Any], dtype: torch.dtype) -> None:
    lowrank, rhs = tracked(make(N, N, dtype=dtype), 7), make_columns(N, M, dtype=dtype)
    by_mean, by_zero = brandla.damped_solve(lowrank, rhs, 0.1, tail="mean"), brandla.damped_solve(lowrank, rhs, 0.1)
    assert oracles.difference_ratio(by_mean, by_zero, dtype) <= THRESHOLD


@pytest.mark.parametrize("make", [make_eigh, make_root], ids=["LowRankEigh", "LowRankRoot"])
def test_a_million_rows_lose_no_digits(make: Callable[..., Any]) -> None:
    n, r = 1_000_000, 3
    factor = make(n, r, "slow", dtype=torch.float32)
    # All entries of one sign: the longest sums there are.
    signs = factor[0 if make is make_root else 1].sign()[:, :1]
    factor, rhs = type(factor)(*(part * signs if part.shape[0] == n else part for part in factor)), torch.ones(n, 1)
    damping = 0.1
    tall, solution = tall_of(factor).double(), brandla.damped_solve(factor, rhs, damping).double()
    core = torch.diag(factor.eigenvalues.double()) if make is make_eigh else torch.eye(r).double()
    residual = tall @ (core @ (tall.mT @ solution)) + damping * solution - rhs
    # By the products in ε of ‖M‖ ‖x‖, whatever n: eight for the sums, the divisions and the defect of the basis.
    assert residual.norm() <= 8 * torch.finfo(torch.float32).eps * (1 + damping) * solution.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Vectors, batches, kinds of arguments
# ---------------------------------------------------------------------------------------------------------------------


# Each function of a factor, a right-hand side, a damping and options.
FUNCTIONS = pytest.mark.parametrize(
    "apply",
    [brandla.damped_solve, lambda *given, **options: brandla.damped_power(*given, -0.5, **options)],
    ids=["damped_solve", "damped_power"],
)
Apply = Callable[..., Tensor]


@FACTORS
@FUNCTIONS
def test_a_vector_is_a_block_of_one_column(make: Callable[..., Any], apply: Apply, dtype: torch.dtype) -> None:
    single, vector = make(N, R, dtype=dtype), make_columns(N, 1, dtype=dtype)[:, 0]
    assert torch.equal(apply(single, vector, 0.1), apply(single, vector[:, None], 0.1)[:, 0])
    batch, vectors = make(N, R, dtype=dtype, batch_shape=(3,)), make_columns(3, N, dtype=dtype)
    assert torch.equal(apply(batch, vectors, 0.1), apply(batch, vectors[..., None], 0.1)[..., 0])


@FACTORS
@TAILS
@pytest.mark.parametrize("batch_shape", [(2, 2), (1,)], ids=str)
def test_batch_equals_a_loop(make: Any, tail: Tail, batch_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    lowrank = tracked(make(N, R, dtype=dtype, batch_shape=batch_shape), 7)
    rhs = make_columns(N, M, dtype=dtype, batch_shape=batch_shape)
    dampings = torch.linspace(0.1, 2, math.prod(batch_shape), dtype=dtype)
    diagonal = diagonal_of(N, dtype=dtype)
    given: Any = lowrank, rhs, dampings.reshape(batch_shape)
    solved = brandla.damped_solve(*given, tail=tail)
    beside = brandla.damped_solve(*given, tail=tail, diagonal=diagonal.expand(*batch_shape, N))
    assert torch.equal(beside, brandla.damped_solve(*given, tail=tail, diagonal=diagonal))
    logdets = brandla.damped_logdet(lowrank, given[2], tail=tail)
    results = lowrank, rhs, solved, beside, logdets
    flat = tree_map(lambda part: part.flatten(0, len(batch_shape) - 1), results)
    for (factor, one_rhs, actual, other, logdet), damping in zip(unbound(flat), dampings.tolist(), strict=True):
        operator = dense_operator(factor, damping, tail)
        assert oracles.solve_ratio(operator, actual, one_rhs, dtype) <= THRESHOLD
        assert oracles.solve_ratio(operator + torch.diag(diagonal.double()), other, one_rhs, dtype) <= THRESHOLD
        expected = torch.linalg.slogdet(operator).logabsdet
        assert abs(logdet - expected) <= oracles.tolerance(N, dtype, max(1, expected.abs()))


@FACTORS
@pytest.mark.parametrize("columns", [M, 0])
def test_one_factor_serves_a_batch_of_right_hand_sides(make: Callable[..., Any], columns: int) -> None:
    lowrank, rhs = make(N, R), make_columns(N, columns, batch_shape=(3,))
    for one, actual in zip(rhs, brandla.damped_solve(lowrank, rhs, 0.1), strict=True):
        assert actual.shape == one.shape
        assert oracles.solve_ratio(dense_operator(lowrank, 0.1), actual, one, torch.float64) <= THRESHOLD


@FACTORS
@FUNCTIONS
def test_numbers_and_tensors_mean_the_same(make: Callable[..., Any], apply: Apply, dtype: torch.dtype) -> None:
    lowrank, rhs = make(N, R, dtype=dtype), make_columns(N, M, dtype=dtype)
    from_numbers = apply(lowrank, rhs, 0.125, tail=0.25)
    from_tensors = apply(lowrank, rhs, torch.tensor(0.125), tail=torch.tensor(0.25, dtype=dtype))
    assert from_tensors.dtype == dtype
    assert torch.equal(from_numbers, from_tensors)
    assert torch.equal(from_numbers, apply(brandla.track(lowrank), rhs, 0.125, tail=0.25))


@FACTORS
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_right_hand_sides_are_solved_in_float32(make: Callable[..., Any], half: torch.dtype) -> None:
    lowrank, rhs = make(N, R, dtype=torch.float32), make_columns(N, M).to(half)
    from_half, from_float = (brandla.damped_solve(lowrank, block, 0.1) for block in (rhs, rhs.float()))
    assert from_half.dtype == torch.float32
    assert torch.equal(from_half, from_float)


@FACTORS
def test_layout_of_the_arguments_does_not_matter(make: Any, dtype: torch.dtype, unchanged: Any) -> None:
    lowrank, rhs = make(N, R, dtype=dtype), make_columns(N, 1, dtype=dtype)
    transposed = type(lowrank)(*(part.mT.contiguous().mT if part.ndim > 1 else part for part in lowrank))
    expanded = rhs.expand(N, 4)
    with unchanged(transposed, expanded):
        from_views = brandla.damped_solve(transposed, expanded, 0.1)
    expected = brandla.damped_solve(lowrank, rhs.repeat(1, 4), 0.1)
    assert oracles.difference_ratio(from_views, expected, dtype) <= THRESHOLD


@FACTORS
@pytest.mark.parametrize("rank", [0, R])
@pytest.mark.parametrize("exponent", [0, 1, -1])
def test_inputs_are_neither_changed_nor_shared(
    make: Callable[..., Any], rank: int, exponent: int, unchanged: Any, shares_memory: Any
) -> None:
    lowrank, rhs, damping = make(N, rank), make_columns(N, M), torch.tensor(1.0, dtype=torch.float64)
    with unchanged(lowrank, rhs, damping):
        results = brandla.damped_solve(lowrank, rhs, damping), brandla.damped_power(lowrank, rhs, damping, exponent)
    assert not shares_memory((lowrank, rhs, damping), results)


@FACTORS
@FUNCTIONS
@pytest.mark.parametrize("part", [0, 1])
def test_a_poisoned_factor_gives_no_finite_number(make: Callable[..., Any], apply: Apply, part: int) -> None:
    lowrank, rhs = make(N, R, batch_shape=(2,)), make_columns(N, M, batch_shape=(2,))
    lowrank[part][1] = math.nan
    for tail in (0.0, 0.3, "smallest"):
        result = apply(lowrank, rhs, 0.1, tail=tail)
        assert result[0].isfinite().all()
        assert not result[1].isfinite().any()


@FACTORS
@pytest.mark.parametrize("scale", [1e-18, 1e18], ids=lambda scale: f"{scale:g}")
def test_solution_scales_with_the_operator_and_the_right_hand_side(make: Callable[..., Any], scale: float) -> None:
    lowrank, rhs = make(N, R, dtype=torch.float32), make_columns(N, M, dtype=torch.float32)
    # F goes with the root of its matrix, S and d with the matrix, U stays.
    powers = (1.0, 0.0) if make is make_eigh else (0.5, 1.0)
    large = type(lowrank)(*(part * scale**power for part, power in zip(lowrank, powers, strict=True)))
    solution = brandla.damped_solve(large, rhs * scale, 0.1 * scale)
    assert oracles.difference_ratio(solution, brandla.damped_solve(lowrank, rhs, 0.1), torch.float32) <= THRESHOLD


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives
# ---------------------------------------------------------------------------------------------------------------------


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


Function = Callable[..., Tensor]
DERIVED: dict[str, Function] = {
    "solve": brandla.damped_solve,
    "solve, diagonal": lambda *given, **options: brandla.damped_solve(
        *given, **options, diagonal=given[2].unsqueeze(-1) * diagonal_of(7)
    ),
    "logdet": lambda factor, _, *given, **options: brandla.damped_logdet(factor, *given, **options),
    "logdet, diagonal": lambda factor, rhs, *given, **options: brandla.damped_logdet(
        factor, *given, **options, diagonal=rhs[..., 0].square()
    ),
    **{
        f"power {exponent}": partial(
            lambda *given, exponent, **options: brandla.damped_power(*given, exponent, **options), exponent=exponent
        )
        for exponent in (-1, -0.5, 0.25)
    },
}
# A diagonal S that requires a gradient is treated as any other.
KINDS = pytest.mark.parametrize("make", [make_eigh, make_root], ids=["LowRankEigh", "LowRankRoot"])
DERIVATIVES = pytest.mark.parametrize("function", DERIVED.values(), ids=DERIVED)


def differentiable(function: Function, kind: type[Symmetric], tail: Any) -> Callable[..., Tensor]:
    """Return a function of the parts of a factor, a block, λ and τ; S is symmetric: gradcheck may only move it so."""

    def call(first: Tensor, second: Tensor, rhs: Tensor, damping: Tensor, tail_value: Tensor) -> Tensor:
        second = oracles.symmetrised(second) if kind is brandla.LowRankRoot else second
        return function(kind(first, second), rhs, damping, tail=tail_value if tail == "tensor" else tail)

    return call


@KINDS
@DERIVATIVES
@pytest.mark.parametrize("tail", [0.2, "tensor", "smallest"], ids=str)
def test_derivatives_by_every_tensor(make: Callable[..., Any], function: Function, tail: Any) -> None:
    batch_shape = (2,)
    damping, tail_value = (torch.full(batch_shape, value, dtype=torch.float64) for value in (0.3, 0.2))
    factor, rhs = make(7, 3, "slow", batch_shape=batch_shape), make_columns(7, 2, batch_shape=batch_shape)
    inputs = [_leaf(tensor) for tensor in (*factor, rhs, damping, tail_value)]
    assert gradcheck(differentiable(function, type(factor), tail), inputs, fast_mode=True)


@DERIVATIVES
@pytest.mark.parametrize("values", [[2, 2, 2], [2, 2, 0.5], [1, 0, 0], [0, 0, 0]], ids=str)
def test_derivatives_of_a_root_are_right_where_eigenvalues_coincide_or_are_zero(
    function: Function, values: list[float]
) -> None:
    root = oracles.orthonormal(7, 3, seed=1) * torch.tensor(values).double().sqrt()
    root = root @ oracles.orthonormal(3, 3, seed=2)
    rhs, damping = make_columns(7, 2), torch.tensor(0.3, dtype=torch.float64)

    def of_root(root: Tensor, rhs: Tensor, damping: Tensor) -> Tensor:
        return function(brandla.LowRankRoot(root, root.mT @ root), rhs, damping)

    assert gradcheck(of_root, [_leaf(tensor) for tensor in (root, rhs, damping)], fast_mode=True)


@DERIVATIVES
def test_derivatives_of_a_start_from_zeros_are_right(function: Function) -> None:
    eigh, rhs = brandla.LowRankEigh(torch.zeros(3).double(), oracles.orthonormal(7, 3, seed=1)), make_columns(7, 2)
    one = torch.ones((), dtype=torch.float64)
    assert gradcheck(differentiable(function, type(eigh), 0.0), [*map(_leaf, (*eigh, rhs, one, one))], fast_mode=True)
    for kind in (brandla.LowRankEigh, brandla.LowRankRoot):
        start = kind(*map(_leaf, kind.zeros(7, 3, dtype=torch.float64)))
        function(start, rhs, one).sum().backward()
        assert all(part.grad is None or part.grad.isfinite().all() for part in start)


def test_second_derivatives_through_the_spectrum_of_a_root_are_refused() -> None:
    root = make_root(7, 3)
    gram = _leaf(root.gram)
    applied = brandla.damped_power(brandla.LowRankRoot(root.root, gram), make_columns(7, 2), 0.1, -0.5)
    (gradient,) = torch.autograd.grad(applied.square().sum(), gram, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def clamped(values: Tensor, bound: Any, below: Any) -> Tensor:
    """Return a bound where ``below`` says so, values elsewhere, and so their derivatives."""
    return torch.where(below, torch.as_tensor(bound, dtype=values.dtype), values)


# What clamps have passed on at their bound: the derivative by the values, and, in other versions of torch, nothing.
AT_THE_BOUND: dict[str, dict[str, Callable[..., Tensor]]] = {
    "values": {
        "clamp_min": lambda x, bound: clamped(x, bound, x < bound),
        "clamp_max": lambda x, bound: clamped(x, bound, x > bound),
        "relu": lambda x: clamped(x, 0, x < 0),
    },
    "bound": {
        "clamp_min": lambda x, bound: clamped(x, bound, x <= bound),
        "clamp_max": lambda x, bound: clamped(x, bound, x >= bound),
        "relu": lambda x: clamped(x, 0, x <= 0),
    },
}


@KINDS
@pytest.mark.parametrize("convention", AT_THE_BOUND)
@pytest.mark.parametrize("tail", ["smallest", 0.5, "mean"], ids=str)
@pytest.mark.parametrize("exponent", [-1, -0.5])
def test_derivatives_at_the_tail_count_on_no_convention_of_clamps(
    make: Any, convention: str, tail: Any, exponent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, replacement in AT_THE_BOUND[convention].items():
        monkeypatch.setattr(Tensor, name, replacement)
    rhs, is_eigh = make_columns(7, 2), make is make_eigh
    # τ is a value itself, but of a root, which has no derivative there unless τ is the smallest one.
    values = torch.tensor([3, 2, 0.5 if is_eigh or tail == "smallest" else 0.25], dtype=torch.float64)
    basis = oracles.orthonormal(7, 3, seed=1)
    root = basis * values.sqrt()

    def power(values: Tensor) -> Tensor:
        factor = brandla.LowRankEigh(values, basis) if is_eigh else brandla.LowRankRoot(root, torch.diag(values))
        # A trace that moves with the values leaves τ = 0.
        return brandla.damped_power(brandla.track(factor), rhs, 0.05, exponent, tail=tail)

    assert gradcheck(power, [_leaf(values)])


@pytest.mark.parametrize("exponent", [-1, -0.5, 0.25])
def test_power_is_differentiable_above_at_and_far_below_the_tail(exponent: float) -> None:
    values, damping, tail = torch.tensor([3, 2, 0.02, 0]).double(), torch.tensor(0.05).double(), torch.tensor(2.0)
    basis, rhs = oracles.orthonormal(7, 4, seed=1), make_columns(7, 2)

    def power(values: Tensor, damping: Tensor, tail: Tensor) -> Tensor:
        return brandla.damped_power(brandla.LowRankEigh(values, basis), rhs, damping, exponent, tail=tail)

    assert gradcheck(power, [_leaf(tensor.double()) for tensor in (values, damping, tail)])
