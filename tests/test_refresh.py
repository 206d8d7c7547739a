"""eigh_refresh: subspace iteration with a stream of wide matrices, and the permutation of the vectors."""

import pytest
import torch
from torch import Tensor

import brandla
import oracles
from builders import OperatorWithTranspose, assert_agree, assert_factor, dense, make_eigh
from oracles import ORTHONORMAL, THRESHOLD

N, M, R = 40, 70, 6


def wide(dtype):
    """Return a matrix G such that G Gᵀ has the eigenvalues i^−3/2."""
    u, _, vh = torch.linalg.svd(oracles.gaussian(N, M, seed=9), full_matrices=False)
    return ((u * oracles.power_law(0.75)(N)) @ vh).to(dtype)


@pytest.mark.parametrize("iterations", [1, 3])
def test_refresh_is_subspace_iteration_with_the_whole_average(iterations, dtype):
    old, matrix = make_eigh(N, R, dtype=dtype), wide(dtype)
    whole, basis = oracles.updated(dense(old), matrix, 0.9, 0.3), old.eigenvectors.double()
    for _ in range(iterations):
        basis, triangle = torch.linalg.qr(whole @ basis)
        basis = basis * triangle.diagonal().sign()
    values, order = (basis.mT @ whole @ basis).diagonal().sort(descending=True, stable=True)
    new, permutation = brandla.eigh_refresh(old, matrix, decay=0.9, weight=0.3, iterations=iterations)
    assert torch.equal(permutation, order)
    assert_factor(new, N, R)
    scale = float(values[0] / values[-1])
    assert oracles.difference_ratio(new.eigenvectors, basis[:, order], dtype, scale) <= THRESHOLD
    assert (new.eigenvalues - values).abs().max() <= oracles.tolerance(N, dtype, values[0])


def test_permuted_labels_stay_with_their_vectors(dtype):
    basis = oracles.orthonormal(N, R, seed=2).to(dtype)
    old = brandla.LowRankEigh(torch.linspace(6, 1, R, dtype=dtype), basis)
    labels = torch.arange(R)
    for _ in range(3):
        # The strengths put the vectors in a new order, and the noise turns none of them far.
        strengths = oracles.gaussian(R, seed=int(labels[0])).abs().argsort() + 1.0
        matrix = (basis.double() * strengths) @ torch.eye(R, M).double() + 1e-3 * oracles.gaussian(N, M, seed=5)
        new, permutation = brandla.eigh_refresh(old, matrix.to(dtype), decay=0.0)
        labels = labels[permutation]
        assert ((new.eigenvectors * basis[:, labels]).sum(0) > 0.99).all()
        assert torch.equal(labels, strengths.argsort(descending=True))
        old = new


def test_fresh_columns_replace_zero_columns_and_missing_rank_leaves_zero_values(dtype):
    span = oracles.orthonormal(N, 3, seed=3)
    low = span @ oracles.gaussian(3, M, seed=4)
    eigh, permutation = brandla.eigh_refresh(brandla.LowRankEigh.zeros(N, R, dtype=dtype), low.to(dtype))
    vectors, trace = eigh.eigenvectors[:, :3].double(), low.square().sum()
    assert oracles.difference_ratio(vectors @ vectors.mT, span @ span.mT, dtype) <= THRESHOLD
    assert abs(eigh.eigenvalues.sum() - trace) <= oracles.tolerance(N, dtype, trace)
    assert (eigh.eigenvalues[3:] <= oracles.tolerance(N, dtype, trace)).all()
    assert torch.equal(permutation.sort().values, torch.arange(R))
    eigh, _ = brandla.eigh_refresh(eigh, wide(dtype))
    assert (eigh.eigenvalues > 1e-3).all()
    assert oracles.orthonormality_defect(eigh.eigenvectors, torch.ones(R)) <= ORTHONORMAL * oracles.epsilon(dtype)


def test_vectors_below_the_rounding_leave_the_leading_vectors_in_their_places(dtype):
    # A whole basis of a graded stream: in float32 most columns of M U are rounding, and fresh columns replace some.
    root, order = oracles.orthonormal(30, 30, seed=1) * oracles.SPECTRA["graded"](30).sqrt(), torch.arange(10)
    eigh = brandla.LowRankEigh.zeros(30, 30, dtype=dtype)
    for step in range(25):
        old, (eigh, permutation) = eigh, brandla.eigh_refresh(eigh, root.to(dtype), decay=0.9, weight=0.1)
        if step > 20:
            assert torch.equal(permutation[:10], order)
            assert ((eigh.eigenvectors * old.eigenvectors).sum(0)[:10] > 0.99).all()


@pytest.mark.parametrize("kind", [OperatorWithTranspose, Tensor.to_sparse], ids=["operator", "sparse"])
def test_operators_and_sparse_matrices_give_the_result_of_dense_matrices(kind):
    old = make_eigh(N, R, dtype=torch.float32)
    matrix = wide(torch.float32)
    result, expected = brandla.eigh_refresh(old, kind(matrix)), brandla.eigh_refresh(old, matrix)
    assert_agree(result, expected, oracles.tolerance(N, torch.float32))
