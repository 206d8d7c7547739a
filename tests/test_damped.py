"""damped_solve, damped_power and damped_logdet against dense float64 matrices, and their derivatives."""

import math
from functools import partial
from operator import ge, gt, le, lt

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import brandla
import oracles
from builders import assert_differentiable, dense_operator, make_columns, make_eigh, make_root, padded, tall_of, tracked
from oracles import THRESHOLD

N, R, M = 40, 8, 5
MAKERS = {
    "LowRankEigh": make_eigh,
    "LowRankRoot": make_root,
    "LowRankRoot, diagonal": partial(make_root, diagonal=True),
}
FACTORS = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
TAILS = (0.0, 0.3, "smallest", "mean")


def diagonal_of(n, dtype=torch.float64):
    """Return n numbers from 0 to 1."""
    return torch.linspace(0, 1, n, dtype=dtype).square()


def assert_inverts(lowrank, rhs, damping, tail, *diagonals, coupling=1.0):
    """Check the solve and the log-determinant against a dense operator, without and with each diagonal."""
    operator, dtype = dense_operator(lowrank, damping, tail), rhs.dtype
    for diagonal in (None, *diagonals):
        options = {"tail": tail, "diagonal": diagonal}
        matrix = operator if diagonal is None else operator + torch.diag(diagonal.double())
        solution = brandla.damped_solve(lowrank, rhs, damping, **options)
        assert (solution.shape, solution.dtype) == (rhs.shape, dtype)
        scale = oracles.spectral_norm(matrix) * oracles.spectral_norm(solution)
        assert oracles.difference_ratio(matrix @ solution.double(), rhs, dtype, scale) <= THRESHOLD * coupling
        vector = brandla.damped_solve(lowrank, rhs[:, 0], damping, **options)
        assert oracles.difference_ratio(vector[:, None], solution[:, :1], dtype) <= THRESHOLD
        logdet, expected = brandla.damped_logdet(lowrank, damping, **options), torch.linalg.slogdet(matrix).logabsdet
        assert (logdet.shape, logdet.dtype) == ((), dtype)
        assert abs(logdet - expected) <= oracles.tolerance(len(rhs), dtype, max(1, expected.abs()))


@FACTORS
@pytest.mark.parametrize(
    ("spectrum", "damping"),
    [
        *((spectrum, damping) for spectrum in oracles.SPECTRA for damping in (1e-3, 0.05)),
        *(("medium", damping) for damping in (1e-6, 1.0, 1e3)),
    ],
    ids=str,
)
def test_solve_and_logdet_equal_the_dense_ones(make, spectrum, damping, dtype):
    # A root in float32 is meant for λ of at least 1e-4 of the largest eigenvalue.
    damping = damping if make is make_eigh or dtype == torch.float64 else max(damping, 1e-4)
    lowrank, rhs = tracked(make(N, R, spectrum, dtype=dtype), 7), make_columns(N, M, dtype=dtype)
    # The largest eigenvalue is 1. An error ε of S couples it with an eigenvalue of the size of λ, by √(1/λ).
    coupling = 1 if make is make_eigh else max(1, damping**-0.5)
    for tail in TAILS:
        assert_inverts(lowrank, rhs, damping, tail, *[diagonal_of(N, dtype)] * (damping == 0.05), coupling=coupling)


@FACTORS
@pytest.mark.parametrize("tail", TAILS, ids=str)
def test_power_equals_the_dense_power(make, tail, dtype):
    lowrank, rhs = tracked(make(N, R, dtype=dtype), 7), make_columns(N, M, dtype=dtype)
    values, vectors = oracles.eigh(dense_operator(lowrank, 0.05, tail))
    for exponent in (-1, -0.5, 0, 0.5, 1, 2, -1.7):
        operator = (vectors * values.pow(exponent)) @ vectors.mT
        applied = brandla.damped_power(lowrank, rhs, 0.05, exponent, tail=tail)
        scale = oracles.spectral_norm(operator) * oracles.spectral_norm(rhs)
        assert applied.dtype == dtype
        assert oracles.difference_ratio(applied, operator @ rhs.double(), dtype, scale) <= THRESHOLD
        assert exponent or torch.equal(applied, rhs)


@FACTORS
@pytest.mark.parametrize("damping", [1e-30, 1e30], ids=str)
def test_a_determinant_may_be_out_of_range(make, damping):
    n, r = 2000, 3
    logdet = brandla.damped_logdet(make(n, r, "flat", dtype=torch.float32), damping, tail=0.0)
    expected = r * math.log(1 + damping) + (n - r) * math.log(damping)
    assert abs(logdet - expected) <= oracles.tolerance(1, torch.float32, abs(expected))


@FACTORS
@pytest.mark.parametrize(("n", "r", "zeros"), [(6, 0, 0), (6, 6, 0), (1, 1, 0), (1, 0, 0), (N, R, 3)], ids=str)
def test_solve_and_power_at_every_rank_from_none_to_full_and_with_zero_columns(make, n, r, zeros, dtype):
    """Zero columns of the basis count as directions that the factor does not hold."""
    lowrank, rhs = tracked(padded(make(n, r, dtype=dtype), zeros), 7), make_columns(n, 2, dtype=dtype)
    for tail in (0.0, 0.3) if zeros else TAILS:
        assert_inverts(lowrank, rhs, 0.2, tail, diagonal_of(n, dtype))
        half = brandla.damped_power(lowrank, rhs, 0.2, -0.5, tail=tail)
        twice = brandla.damped_power(lowrank, half, 0.2, -0.5, tail=tail)
        assert oracles.difference_ratio(twice, brandla.damped_solve(lowrank, rhs, 0.2, tail=tail), dtype) <= THRESHOLD


@pytest.mark.parametrize("exponent", [-1, -0.5, -0.25])
@pytest.mark.parametrize("damping", [1e-7, 1e-9, 1e-20], ids=lambda damping: f"{damping:g}")
def test_power_far_below_the_tail_is_as_accurate_as_the_solve(exponent, damping, dtype):
    # Columns of the identity: every entry of the result is the power of one number.
    basis = torch.eye(7, 5, dtype=dtype)
    basis[4, 4] = 0
    factor = brandla.LowRankEigh(torch.tensor([2, 1, 0.5, damping, 0], dtype=dtype), basis)
    expected = (torch.tensor([2, 1, 0.5, damping, 1, 1, 1], dtype=torch.float64) + damping) ** exponent
    applied = brandla.damped_power(factor, torch.ones(7, dtype=dtype), damping, exponent, tail=1.0)
    # expm1 multiplies the few ε of the logarithm by the logarithm, which is at most 46.
    assert ((applied.double() - expected) / expected).abs().max() <= 2 * 46 * oracles.epsilon(dtype)


@pytest.mark.parametrize("make", [make_eigh, make_root], ids=["LowRankEigh", "LowRankRoot"])
def test_a_million_rows_lose_no_digits(make):
    n, r = 1_000_000, 3
    factor = make(n, r, "slow", dtype=torch.float32)
    # All entries of one sign: the longest sums there are.
    signs = tall_of(factor).sign()[:, :1]
    factor, rhs = type(factor)(*(part * signs if part.shape[0] == n else part for part in factor)), torch.ones(n, 1)
    damping = 0.1
    tall, solution = tall_of(factor).double(), brandla.damped_solve(factor, rhs, damping).double()
    core = torch.diag(factor.eigenvalues.double()) if make is make_eigh else torch.eye(r).double()
    residual = tall @ (core @ (tall.mT @ solution)) + damping * solution - rhs
    # A few ε of ‖M‖ ‖x‖, whatever n: eight for the sums, the divisions and the defect of the basis.
    assert residual.norm() <= 8 * torch.finfo(torch.float32).eps * (1 + damping) * solution.norm()


@FACTORS
@pytest.mark.parametrize("scale", [1e-18, 1e18], ids=lambda scale: f"{scale:g}")
def test_solution_scales_with_the_operator_and_the_right_hand_side(make, scale):
    lowrank, rhs = make(N, R, dtype=torch.float32), make_columns(N, M, dtype=torch.float32)
    # F scales with the root of the matrix, S and d scale with the matrix, and U does not change.
    powers = (1.0, 0.0) if make is make_eigh else (0.5, 1.0)
    large = type(lowrank)(*(part * scale**power for part, power in zip(lowrank, powers, strict=True)))
    solution = brandla.damped_solve(large, rhs * scale, 0.1 * scale)
    assert oracles.difference_ratio(solution, brandla.damped_solve(lowrank, rhs, 0.1), torch.float32) <= THRESHOLD


# --- Derivatives

# Functions of a factor, a right-hand side and λ.
DERIVED = {
    "solve": brandla.damped_solve,
    "solve, diagonal": lambda factor, rhs, damping: brandla.damped_solve(
        factor, rhs, damping, diagonal=damping * diagonal_of(7)
    ),
    "logdet": lambda factor, _, damping: brandla.damped_logdet(factor, damping),
    "logdet, diagonal": lambda factor, rhs, damping: brandla.damped_logdet(
        factor, damping, diagonal=rhs[..., 0].square()
    ),
    **{f"power {exponent}": partial(brandla.damped_power, exponent=exponent) for exponent in (-1, -0.5, 0.25)},
}


@pytest.mark.parametrize("function", DERIVED.values(), ids=DERIVED)
@pytest.mark.parametrize("values", [[2, 2, 2], [2, 2, 0.5], [1, 0, 0], [0, 0, 0]], ids=str)
def test_derivatives_are_right_where_eigenvalues_coincide_or_are_zero(function, values):
    basis, values = oracles.orthonormal(7, 3, seed=1), torch.tensor(values, dtype=torch.float64)
    rhs, damping = make_columns(7, 2), torch.tensor(0.3, dtype=torch.float64)
    assert_differentiable(function, brandla.LowRankEigh(values, basis), rhs, damping)
    assert_differentiable(
        lambda root, *given: function(brandla.LowRankRoot(root, root.mT @ root), *given),
        *(basis * values.sqrt() @ oracles.orthonormal(3, 3, seed=2), rhs, damping),
    )
    for kind in (brandla.LowRankEigh, brandla.LowRankRoot):
        start = kind(*(part.requires_grad_() for part in kind.zeros(7, 3, dtype=torch.float64)))
        function(start, rhs, damping).sum().backward()
        assert all(part.grad is None or part.grad.isfinite().all() for part in start)


def test_second_derivatives_through_the_spectrum_of_a_root_are_refused():
    root = make_root(7, 3)
    gram = root.gram.requires_grad_()
    applied = brandla.damped_power(root, make_columns(7, 2), 0.1, -0.5)
    (gradient,) = torch.autograd.grad(applied.square().sum(), gram, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def clamped(values, bound, below):
    """Return the bound where ``below`` is true, and the values elsewhere, with the derivatives of the two."""
    return torch.where(below(values, bound), torch.as_tensor(bound, dtype=values.dtype), values)


# A diagonal S that requires a gradient is treated as any other S.
@pytest.mark.parametrize("make", [make_eigh, make_root], ids=["LowRankEigh", "LowRankRoot"])
# At their bound, clamps pass on the derivative by the values, or nothing in other versions of torch.
@pytest.mark.parametrize(("below", "above"), [(lt, gt), (le, ge)], ids=["values", "bound"])
@pytest.mark.parametrize("tail", ["smallest", 0.5, "mean"], ids=str)
@pytest.mark.parametrize("exponent", [-1, -0.5])
def test_derivatives_at_the_tail_do_not_depend_on_the_clamps_of_torch(make, below, above, tail, exponent, monkeypatch):
    monkeypatch.setattr(Tensor, "clamp_min", lambda x, bound: clamped(x, bound, below))
    monkeypatch.setattr(Tensor, "clamp_max", lambda x, bound: clamped(x, bound, above))
    monkeypatch.setattr(Tensor, "relu", lambda x: clamped(x, 0, below))
    rhs, is_eigh = make_columns(7, 2), make is make_eigh
    # τ is one of the values, except for a root. A root has no derivative at τ unless τ is its smallest value.
    values = torch.tensor([3, 2, 0.5 if is_eigh or tail == "smallest" else 0.25], dtype=torch.float64)
    basis = oracles.orthonormal(7, 3, seed=1)
    root = basis * values.sqrt()

    def power(values):
        factor = brandla.LowRankEigh(values, basis) if is_eigh else brandla.LowRankRoot(root, torch.diag(values))
        # The trace moves with the values, so the mean of the values left out stays 0.
        return brandla.damped_power(brandla.track(factor), rhs, 0.05, exponent, tail=tail)

    assert gradcheck(power, [values.requires_grad_()])


@pytest.mark.parametrize("exponent", [-1, -0.5, 0.25])
def test_power_is_differentiable_above_at_and_far_below_the_tail(exponent):
    basis, rhs = oracles.orthonormal(7, 4, seed=1), make_columns(7, 2)

    def power(values, damping, tail):
        return brandla.damped_power(brandla.LowRankEigh(values, basis), rhs, damping, exponent, tail=tail)

    assert_differentiable(power, *(torch.tensor(number).double() for number in ([3, 2, 0.02, 0], 0.05, 2)))
