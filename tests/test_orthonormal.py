"""orthonormalize: rank-aware orthonormalisation of tall panels."""

import math
from unittest import mock

import pytest
import torch

import oracles
from brandla import orthonormalize
from oracles import THRESHOLD

N, K = 90, 16


def assert_factors(q, r, panel):
    """Check QR = P, relative to the largest columns, and that columns of Q are orthonormal, or zero like rows of R."""
    assert oracles.orthonormality_ratio(q, torch.linalg.vector_norm(r, dim=-1)) <= THRESHOLD
    assert oracles.difference_ratio(q.double() @ r.double(), panel, panel.dtype) <= THRESHOLD


@pytest.fixture(params=[True, False], ids=["values read", "none read"])
def reads(request):
    """Run a test with branches on values, and without them, as on a GPU."""
    with mock.patch("brandla_kernels.reads_are_free", return_value=request.param):
        yield request.param


# The rank, unless rounding decides it. A panel of full rank has a triangular R if its columns keep their order.
RANKS = {
    **dict.fromkeys(["gaussian", "condition 1e3", "columns of very different length"], K),
    **{"half the rank": K // 2, "every column repeated": K // 2, "zero": 0},
}


@pytest.mark.parametrize("family", oracles.PANELS)
def test_a_panel_is_the_product_of_its_factors(family, reads, dtype):
    panel = oracles.panels(N, K)[family].to(dtype)
    q, r = orthonormalize(panel)
    assert (q.dtype, r.dtype) == (dtype, dtype)
    assert oracles.orthonormality_ratio(q, torch.linalg.vector_norm(r, dim=-1)) <= THRESHOLD
    # The error of each column is relative to its own length.
    lengths = torch.linalg.vector_norm(panel.double(), dim=0)
    errors = torch.linalg.vector_norm(panel.double() - q.double() @ r.double(), dim=0)
    assert (errors <= oracles.tolerance(N, dtype) * lengths).all()
    rank = RANKS.get(family)
    assert rank is None or int(q.any(dim=0).sum()) == rank
    if rank == K and reads:
        assert (r.diagonal() > 0).all()
        below = r.double().tril(-1) / torch.linalg.vector_norm(r.double(), dim=0)
        assert below.abs().max() <= oracles.tolerance(K, dtype)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 5), (5, 9), (1, 4), (7, 0), (0, 0)], ids=str)
def test_panels_of_every_shape(n, k, dtype):
    panel = oracles.gaussian(n, k, seed=2).to(dtype)
    q, r = orthonormalize(panel)
    assert (q.shape, r.shape) == ((n, k), (k, k))
    assert_factors(q, r, panel)


@pytest.mark.usefixtures("reads")
def test_a_column_of_q_comes_from_the_column_of_the_panel_in_its_place(dtype):
    # The first column is a weak copy of the fifth, and is zero in Q. The others keep their directions and places.
    panel = oracles.orthonormal(N, 6, seed=1) * torch.tensor([1e-2, 1.0, 10.0, 0.3, 1.0, 1e2]).double()
    panel[:, 0] = 1e-2 * panel[:, 4]
    q, _ = orthonormalize(panel.to(dtype))
    agreement = (q.double() * panel).sum(0) / torch.linalg.vector_norm(panel, dim=0)
    torch.testing.assert_close(agreement, torch.tensor([0.0, 1, 1, 1, 1, 1]).double())


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("case", ["first", "difference"])
def test_strong_columns_lose_nothing_to_a_weak_one_before_them(case, dtype):
    """A weak column is mostly rounding noise. As a basis vector, it would carry the noise to all other columns.

    The weak direction is the first column, or the difference of the first two. The other columns hold much of it.
    """
    for exponent in range(0, 17, 4):
        weak, coefficients = 10.0**-exponent, oracles.gaussian(2, 50, seed=4)
        if case == "first":
            coefficients[0, 0], coefficients[1] = weak, 0
        else:
            coefficients[:, :2] = torch.tensor([[1.0, 1.0], [0.0, weak]])
            coefficients[0, 2:] = 0
            coefficients[1, 2:] *= 0.1
        panel = (oracles.orthonormal(N, 2, seed=3) @ coefficients).to(dtype)
        q, r = orthonormalize(panel)
        assert oracles.orthonormality_ratio(q, torch.linalg.vector_norm(r, dim=-1)) <= THRESHOLD
        error = oracles.spectral_norm(panel.double() - q.double() @ r.double())
        assert error <= 8 * N * torch.finfo(dtype).eps * oracles.spectral_norm(panel), exponent


def test_dependent_columns_are_orthonormalised_if_lapack_fails():
    panel = oracles.panels(N, K)["half the rank"]
    with mock.patch("torch.linalg.eigh", side_effect=torch.linalg.LinAlgError):
        assert_factors(*orthonormalize(panel), panel)


# The square of a float32 length of 1e−20 is no float32 number, and neither is the inverse of one of 1e−40.
LENGTHS = {torch.float32: (1e-18, 1e-22, 1e-30, 1e-36, 1e-40, 1e-44), torch.float64: (1e-18, 1e-150, 1e-200, 1e-310)}
# Nearly the whole range of lengths that the docstring promises.
SCALES = {torch.float32: (1e-30, 1e-18, 1e18, 1e36), torch.float64: (1e-145, 1e-100, 1e100, 1e152)}


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("k", [8, 48])
def test_the_result_scales_with_the_panel_and_a_column_may_be_very_short(k, dtype):
    for place, lengths in ((slice(None), SCALES[dtype]), (2, LENGTHS[dtype])):
        for length in lengths:
            panel = oracles.gaussian(N, k, seed=5)
            panel[:, place] *= length
            assert_factors(*orthonormalize(panel.to(dtype)), panel.to(dtype))


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize(("family", "bad"), [("gaussian", math.nan), ("half the rank", math.inf), ("zero", math.nan)])
def test_non_finite_panels_give_nan_and_spoil_no_other_of_a_batch(family, bad, dtype):
    families = oracles.panels(N, K)
    others = [panel for name, panel in families.items() if name not in ("tiny", "huge")]
    panels = torch.stack([families[family], *others]).to(dtype)
    panels[0, 3, 4] = bad
    q, r = orthonormalize(panels)
    assert q[0].isnan().all()
    assert r[0].isnan().all()
    for index in range(1, len(panels)):
        assert_factors(q[index], r[index], panels[index])
