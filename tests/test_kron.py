"""kron_damped_solve against two dense float64 solves; the functions of a joint damping against the dense product."""

import math
from functools import partial
from itertools import product

import pytest
import torch

import brandla
import oracles
from builders import dense_operator, make_columns, make_eigh, make_root, padded, tracked
from oracles import THRESHOLD

LEFT_DAMPING, RIGHT_DAMPING, JOINT = 0.2, 0.05, 0.07
KINDS = {"eigh": make_eigh, "root": make_root}
# The rank that each factor holds ("and zeros": with zero columns), and the tails.
HELD_AND_TAILS = [
    *((("some", "some"), tails) for tails in [(0.0, 0.0), (0.3, 0.0), (0.0, 0.1)]),
    *((("some", "some"), tails) for tails in [("smallest", "smallest"), ("smallest", 0.1), ("mean", "mean")]),
    *((held, (0.0, 0.0)) for held in [("none", "none"), ("none", "some"), ("some", "none"), ("all", "all")]),
    *((held, (0.2, 0.1)) for held in [("none", "some"), ("all", "all"), ("and zeros", "and zeros")]),
]


def operands(kinds, held, orders, **options):
    """Return two tracked factors. The traces of their matrices are larger than their own by 3 and by 5."""

    def factor(make, n, rank_name, *spectrum, **options):
        rank = {"none": 0, "all": n}.get(rank_name, n // 3)
        return padded(make(n, rank, *spectrum, **options), 2 if rank_name == "and zeros" else 0)

    left = factor(KINDS[kinds[0]], orders[0], held[0], **options)
    right = factor(KINDS[kinds[1]], orders[1], held[1], "slow", seed=4, **options)
    return tracked(left, 3), tracked(right, 5)


@pytest.mark.parametrize("kinds", [*product(KINDS, KINDS)], ids=", ".join)
@pytest.mark.parametrize(("held", "tails"), HELD_AND_TAILS, ids=str)
def test_solve_power_and_logdet_equal_the_dense_ones(kinds, held, tails, dtype):
    p, q = 9, 12
    (left, right), matrix = operands(kinds, held, (p, q), dtype=dtype), make_columns(p, q, dtype=dtype)
    options = dict(zip(("left_tail", "right_tail"), tails, strict=True))
    solve = partial(brandla.kron_damped_solve, left, right, **options)
    # The residual ‖W − (G + λ_G I) X (A + λ_A I)‖ is relative to the norms of all three. Pairs are compared with X.
    solution = solve(matrix, LEFT_DAMPING, RIGHT_DAMPING)
    g, a = dense_operator(left, LEFT_DAMPING, tails[0]), dense_operator(right, RIGHT_DAMPING, tails[1])
    scale = math.prod(map(oracles.spectral_norm, (g, solution, a)))
    assert oracles.difference_ratio(g @ solution.double() @ a, matrix, dtype, scale) <= THRESHOLD
    for k in (0, 1, 4, 40):
        pair = make_columns(p, k, dtype=dtype), make_columns(q, k, dtype=dtype, seed=3)
        solved = solve(pair, LEFT_DAMPING, RIGHT_DAMPING)
        assert isinstance(solved, tuple)
        assert [part.shape for part in solved] == [(p, k), (q, k)]
        expected = solve(pair[0] @ pair[1].mT, LEFT_DAMPING, RIGHT_DAMPING)
        assert oracles.difference_ratio(solved[0] @ solved[1].mT, expected, dtype) <= THRESHOLD
    # The dense product is (A ⊗ G + δI)^p vec(W), where vec stacks columns.
    g, a = (dense_operator(factor, 0.0, tail) for factor, tail in zip((left, right), tails, strict=True))
    values, vectors = oracles.eigh(torch.kron(a, g) + JOINT * torch.eye(p * q, dtype=torch.float64))
    for exponent in (-1, -0.5, 0, 0.5, 1):
        applied = brandla.kron_damped_power(left, right, matrix, JOINT, exponent, **options)
        column = (vectors * values.pow(exponent)) @ (vectors.mT @ matrix.double().mT.reshape(-1))
        scale = float(values.pow(exponent).max()) * oracles.spectral_norm(matrix)
        assert oracles.difference_ratio(applied, column.reshape(q, p).mT, dtype, scale) <= THRESHOLD
    logdet = brandla.kron_damped_logdet(left, right, JOINT, **options)
    assert {(part.shape, part.dtype) for part in (solution, applied)} == {((p, q), dtype)}
    assert (logdet.shape, logdet.dtype) == ((), dtype)
    assert abs(logdet - values.log().sum()) <= oracles.tolerance(p * q, dtype)


def test_values_replace_the_products_of_eigenvalues_in_both_spans():
    left, right = (factor.lowrank for factor in operands(("eigh", "eigh"), ("some", "some"), (9, 12)))
    u, v, matrix = left.eigenvectors, right.eigenvectors, make_columns(9, 12)
    products = left.eigenvalues[:, None] * right.eigenvalues
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


@pytest.mark.parametrize("kind", [brandla.LowRankEigh, brandla.LowRankRoot])
def test_derivatives_by_a_factor_of_zeros_are_finite(kind):
    right = make_eigh(4, 3, seed=4)
    start = [part.requires_grad_() for part in kind.zeros(5, 2, dtype=torch.float64)]
    damping = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    applied = brandla.kron_damped_power(kind(*start), right, make_columns(5, 4), damping, -0.5, right_tail=0.1)
    (applied.sum() + brandla.kron_damped_logdet(kind(*start), right, damping)).backward()
    assert all(part.grad is None or part.grad.isfinite().all() for part in (*start, damping))
