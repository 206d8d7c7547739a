"""randomized_eigh and randomized_svd: exact at low rank, within the theory's bounds elsewhere."""

from itertools import product
from unittest import mock

import pytest
import torch
from torch import Tensor

import brandla
import oracles
from builders import Operator, OperatorWithTranspose, assert_equals, assert_factor, dense, values_of
from oracles import THRESHOLD

FUNCTIONS = {"eigh": brandla.randomized_eigh, "svd": brandla.randomized_svd}
BOTH = pytest.mark.parametrize("kind", FUNCTIONS)
# The spectrum of a 60 × 60 matrix of rank 5.
RANK_5 = torch.cat([torch.linspace(3, 1, 5), torch.zeros(55)]).double()


def matrix_for(kind, spectrum, seed=3):
    """Return a semi-definite matrix, or a wide one, with these eigenvalues or singular values."""
    n = spectrum.numel()
    if kind == "eigh":
        return oracles.psd_matrix(spectrum, seed)
    return oracles.rectangular_matrix(spectrum, n, n + 13, seed)


def decomposed(kind, matrix, rank, seed=0, **options):
    """Return the decomposition of a matrix by the function of this kind, from a generator with this seed."""
    return FUNCTIONS[kind](matrix, rank, generator=oracles.generator(seed), **options)


# Spectra, and ranks at which nothing of them is lost.
RECOVERED = {
    "rank 5": (RANK_5, (5, 8, 16)),
    **{f"whole, {n}": (oracles.SPECTRA["slow"](n), (n,)) for n in (1, 5, 30)},
    "zero": (torch.zeros(20).double(), (4,)),
}


@BOTH
@pytest.mark.parametrize("case", RECOVERED)
def test_a_matrix_of_low_enough_rank_is_recovered(kind, case, dtype):
    values, ranks = RECOVERED[case]
    wide = matrix_for(kind, values).to(dtype)
    for matrix in (wide, wide.mT):
        for rank, power_iterations in product(ranks, (0, 1, 4)):
            assert_equals(decomposed(kind, matrix, rank, power_iterations=power_iterations), matrix)


@BOTH
def test_values_beyond_the_rank_of_the_matrix_vanish(kind, dtype):
    matrix = matrix_for(kind, oracles.SPECTRA["rank-16"](100)).to(dtype)
    assert values_of(decomposed(kind, matrix, 20))[16:].max() <= 4 * oracles.epsilon(dtype)


def test_the_shift_that_stabilises_nystrom_is_subtracted_again(dtype):
    # The shift is √n·ε·‖Y‖_F: 55·ε here, which the ratios of the other tests cannot show.
    values = decomposed("eigh", torch.eye(100, dtype=dtype), 20).eigenvalues
    assert (values - 1).abs().max() <= 30 * oracles.epsilon(dtype)


@BOTH
@pytest.mark.parametrize("spectrum", oracles.SPECTRA)
def test_values_are_near_the_leading_ones_and_never_above(kind, spectrum, dtype):
    values, slack = oracles.SPECTRA[spectrum](60), oracles.tolerance(60, dtype)
    matrix = matrix_for(kind, values).to(dtype)
    result = decomposed(kind, matrix, 10, power_iterations=3)
    assert_factor(result, 60, 10)
    leading, least = values_of(result).double(), 0.9 if spectrum == "slow" else 0.98
    assert (leading <= values[:10] + slack).all()
    assert (leading >= least * values[:10] - slack).all()
    if kind == "eigh":
        # Nyström's approximation lies between 0 and the matrix.
        remainder = oracles.symmetrised(matrix.double()) - dense(result)
        assert oracles.eigh(remainder).eigenvalues[-1] >= -slack


# --- Error bounds


@pytest.mark.parametrize(("spectrum", "oversample"), [("slow", 2), ("slow", 10), ("medium", 5), ("flat", 2)])
def test_mean_error_keeps_to_the_bound_of_halko_martinsson_and_tropp(spectrum, oversample):
    # Theorem 10.5 bounds the error of the projection on all rank + oversample columns. Truncation to the rank adds at
    # most the tail once more, since the singular values of a projection are no larger than those of the matrix.
    # Above n = 128 the sketch has exactly rank + oversample columns.
    n, rank = 160, 8
    values = oracles.SPECTRA[spectrum](n)
    matrix = matrix_for("svd", values)
    tail = float(values[rank:].square().sum())
    results = [decomposed("svd", matrix, rank, seed, oversample=oversample, power_iterations=0) for seed in range(20)]
    squares = [float((matrix - dense(result)).square().sum()) for result in results]
    assert sum(squares) / len(squares) <= (2 + rank / (oversample - 1)) * tail


@BOTH
def test_powers_are_orthonormalised_between_products(kind):
    # Bare powers keep only the directions above a root of ε. Nyström resolves √n·ε·‖M‖, and the SVD ε·‖X‖.
    values = torch.logspace(0, -5, 12).double()
    matrix = matrix_for(kind, torch.cat([values, torch.zeros(48).double()])).float()
    result = decomposed(kind, matrix, 12, power_iterations=4)
    errors = (values_of(result) - values).abs() / values
    assert errors[: {"eigh": 9, "svd": 11}[kind]].max() < 0.05


@pytest.mark.parametrize(("spectrum", "oversample"), [("slow", 0), ("slow", 4), ("fast", 4)])
def test_nystrom_is_better_than_the_projection_from_the_same_products(spectrum, oversample):
    n, rank, seeds = 160, 8, range(20)
    matrix = oracles.psd_matrix(oracles.SPECTRA[spectrum](n), seed=3)
    results = [decomposed("eigh", matrix, rank, seed, oversample=oversample, power_iterations=1) for seed in seeds]
    of_projections = 0.0
    for seed in seeds:
        # ‖M − [Q QᵀM Q Qᵀ]_r‖ in the nuclear norm, where Q spans the range of M Ω.
        q = torch.linalg.qr(matrix @ oracles.gaussian(n, rank + oversample, seed=seed)).Q
        projected = q @ oracles.eigh(oracles.symmetrised(q.mT @ matrix @ q)).truncation(rank) @ q.mT
        of_projections += float(torch.linalg.svdvals(matrix - projected).sum())
    assert sum(float((matrix - dense(result)).trace()) for result in results) < of_projections


@pytest.mark.parametrize("shape", [(500_000, 4), (20, 200_000)], ids=str)
def test_long_sums_lose_no_digits(shape):
    lengths = torch.logspace(0, -2, min(shape)).unsqueeze(-1 if shape[0] < shape[1] else 0)
    matrix = (torch.randn(*shape, generator=oracles.generator(0)) + 0.5) * lengths
    # A single float32 product of such a matrix has an error of some thousand ε.
    tall = (matrix if shape[0] > shape[1] else matrix.mT).double()
    exact = torch.linalg.eigvalsh(tall.mT @ tall).flip(0)
    values = decomposed("svd", matrix, 4).S.double()
    assert ((values - exact[:4].sqrt()) / exact[:4].sqrt()).abs().max() <= 20 * oracles.epsilon(torch.float32)


# --- A start


def test_a_start_near_the_eigenvectors_replaces_power_iterations(dtype):
    n, rank = 200, 10
    before = matrix_for("eigh", oracles.SPECTRA["slow"](n))
    start = decomposed("eigh", before, rank, power_iterations=8).eigenvectors.to(dtype)
    moved = before + 0.02 * oracles.psd_matrix(oracles.SPECTRA["medium"](n), seed=9)
    best = float(oracles.eigh(moved).eigenvalues[rank])
    for powers, most in ((0, 1.02), (1, 1.01)):
        options = {"power_iterations": powers, "oversample": 4}
        results = (decomposed("eigh", moved.to(dtype), rank, 1, start=basis, **options) for basis in (start, None))
        warm, cold = (oracles.spectral_norm(moved - dense(result)) for result in results)
        assert warm < most * best < cold


@pytest.mark.parametrize("power_iterations", [0, 2])
def test_random_signs_replace_zero_columns_of_a_start(power_iterations, dtype):
    matrix = matrix_for("eigh", oracles.SPECTRA["slow"](150)).to(dtype)
    zeros = brandla.LowRankEigh.zeros(150, 8, dtype=dtype).eigenvectors
    result, expected = (
        decomposed("eigh", matrix, 8, power_iterations=power_iterations, start=start) for start in (zeros, None)
    )
    assert oracles.difference_ratio(dense(result), dense(expected), dtype) <= THRESHOLD


# --- Arguments


class OperatorFromTheRight(Operator):
    """An operator that also multiplies from the right of a tensor."""

    def __rmatmul__(self, block):
        return block @ self.matrix


@pytest.mark.parametrize(
    ("kind", "operator"),
    [("eigh", Operator), ("svd", OperatorWithTranspose), ("svd", OperatorFromTheRight)],
    ids=["eigh", "svd by mT", "svd by tensor @ operator"],
)
def test_a_linear_operator_gives_the_result_of_its_matrix(kind, operator, dtype):
    matrix = matrix_for(kind, oracles.SPECTRA["medium"](40)).to(dtype)
    wrapped = operator(matrix)
    from_operator, from_matrix = (decomposed(kind, source, 8) for source in (wrapped, matrix))
    assert 0 < wrapped.products <= 3
    assert oracles.difference_ratio(dense(from_operator), dense(from_matrix), dtype) <= THRESHOLD


@BOTH
@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=["COO", "CSR"])
def test_a_sparse_matrix_gives_the_result_of_the_dense_matrix(kind, layout, dtype):
    matrix = matrix_for(kind, oracles.SPECTRA["medium"](40)).to(dtype)
    with mock.patch.object(Tensor, "to_dense", side_effect=AssertionError):
        from_sparse = decomposed(kind, matrix.to_sparse(layout=layout), 8)
    assert oracles.difference_ratio(dense(from_sparse), dense(decomposed(kind, matrix, 8)), dtype) <= THRESHOLD
    with pytest.raises(ValueError, match=r"a sparse matrix must have shape \(m, n\); got \(2, 40"):
        decomposed(kind, torch.stack([matrix, matrix]).to_sparse(), 8)


@BOTH
def test_a_seed_of_the_generator_or_of_torch_repeats_the_result(kind):
    matrix = matrix_for(kind, oracles.SPECTRA["slow"](40))
    once, again, other = (decomposed(kind, matrix, 8, seed, power_iterations=0) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], other[0])
    with torch.random.fork_rng(devices=[]):
        once, again = (FUNCTIONS[kind](matrix, 8) for _ in range(2) if torch.manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


# Nearly the whole range of the dtype: sums of 60 entries must not overflow, and 25 bits of an entry not underflow.
SCALES = {torch.float32: (1e-30, 1e-18, 1e-9, 1e9, 1e20, 1e36), torch.float64: (1e-290, 1e-160, 1e160, 1e300)}


@BOTH
@pytest.mark.parametrize("power_iterations", [0, 1, 2])
def test_result_scales_with_the_matrix_alone_and_in_a_batch(kind, power_iterations, dtype):
    scales = torch.tensor([0.0, *SCALES[dtype]], dtype=torch.float64)
    matrices = (scales[:, None, None] * matrix_for(kind, RANK_5)).to(dtype)
    together = decomposed(kind, matrices, 6, power_iterations=power_iterations)
    assert not values_of(together)[0].any()
    for matrix, *parts in list(zip(matrices, *together, strict=True))[1:]:
        assert_equals(type(together)(*parts), matrix)
        assert_equals(decomposed(kind, matrix, 6, power_iterations=power_iterations), matrix)
