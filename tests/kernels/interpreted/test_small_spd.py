"""The small-SPD kernel meets its definition, and has the torch form's mask, on panels that are hard for Cholesky QR."""

import pytest
import torch

import oracles
from brandla_kernels import OPS

CORE = OPS["cholesky_inverse_core"]
EPS = torch.finfo(torch.float64).eps
FAMILIES = (
    *("gaussian", "graded", "columns of very different length", "half the rank", "every column repeated"),
    *("zero columns", "zero", "nearly repeated", "nearly cancelling", "noise, then its direction"),
)
# Families that together reach every branch, for orders that take the interpreter long.
OF_EVERY_BRANCH = ("graded", "half the rank", "nearly cancelling")
# Orders around the blocks of 16 columns and the tiles of 32 and 128 rows.
ORDERS = dict.fromkeys((0, 1, 2, 17), FAMILIES) | dict.fromkeys((15, 33, 65), OF_EVERY_BRANCH) | {129: ("gaussian",)}


def problem_of(k, *families):
    """Return the Gram matrices of (2k + 5) × k panels, stacked unless it is one, and the lengths of their columns."""
    panels = oracles.panels(2 * k + 5, k, 0)
    panel = torch.stack([panels[family] for family in families]).squeeze(0)
    gram = panel.mT @ panel
    return gram, gram.diagonal(dim1=-2, dim2=-1).sqrt()


def solve(gram, scale, threshold, device):
    transform, live = CORE(gram.to(device), scale.to(device), threshold)
    return transform.cpu(), live.cpu()


def growth(gram, scale, threshold):
    """Return θ times the squared row norms of the shifted factor's inverse, by definition; live columns are below 1."""
    inverse_scale = torch.where(scale > 0, 1 / scale, 0)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype)
    shifted = gram * inverse_scale[..., :, None] * inverse_scale[..., None, :] + threshold / 4 * identity
    inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(shifted), identity, upper=False)
    return inverse.square().sum(-1) * threshold


def assert_definition(gram, scale, transform, live):
    """Check that TᵀGT is the identity on live columns, T upper triangular with a positive diagonal, and 0 elsewhere."""
    assert transform.isfinite().all()
    assert torch.equal(transform.diagonal(dim1=-2, dim2=-1) > 0, live)
    assert torch.equal(transform, transform.triu())
    assert (transform[~live[..., None, :].expand_as(transform)] == 0).all()
    assert (transform[~live[..., :, None].expand_as(transform)] == 0).all()
    # Cholesky factors are exact for a matrix k·ε away, k the length of its inner products. The entries of E = S⁻¹GS⁻¹,
    # S the scale, are as exact. T̂ = S T multiplies this error on both sides; the product that checks it does the same.
    k = gram.shape[-1]
    equilibrated = transform * scale[..., :, None]
    defect = transform.mT @ gram @ transform - torch.diag_embed(live.double())
    bound = 4 * k * EPS * torch.linalg.matrix_norm(equilibrated, "fro").square().clamp_min(1)
    assert (torch.linalg.matrix_norm(defect, "fro") <= bound).all()


@pytest.mark.parametrize("k", ORDERS)
def test_every_family_meets_its_definition_with_the_mask_of_the_torch_form(k, device):
    gram, scale = problem_of(k, *ORDERS[k])
    # δ of the first θ is about sixteen times the rounding of the Gram matrix; the second is the same for float32 data.
    lowest, of_float32_data = (64 * max(k, 1) * noise for noise in (EPS, torch.finfo(torch.float32).eps ** 2))
    for threshold in (lowest, of_float32_data)[: 2 if k == 17 else 1]:
        transform, live = solve(gram, scale, threshold, device)
        assert_definition(gram, scale, transform, live)
        expected = CORE.torch_form(gram, scale, threshold)[1]
        # Only close to the threshold may rounding decide.
        near = (growth(gram, scale, threshold) - 1).abs() < 1 / 16
        assert torch.equal(live | near, expected | near)


@pytest.mark.parametrize("k", [8, 40])
def test_the_shifted_factor_serves_if_the_live_columns_break_down(k, device):
    threshold = 1e-6
    # L⁻¹ of the shifted matrix. No row is longer than 1/√θ, but all rows lie in one direction. For k > 4 the matrix is
    # smaller than the shift in this direction.
    inverse = torch.eye(k, dtype=torch.float64)
    inverse[:, 0] = (0.9 / threshold) ** 0.5
    factor = torch.linalg.solve_triangular(inverse, torch.eye(k, dtype=torch.float64), upper=False)
    gram = factor @ factor.mT - threshold / 4 * torch.eye(k, dtype=torch.float64)
    scale = torch.ones(k, dtype=torch.float64)
    assert torch.linalg.cholesky_ex(gram).info > 0
    expected, mask = CORE.torch_form(gram, scale, threshold)
    transform, live = solve(gram, scale, threshold, device)
    assert mask.all()
    assert live.all()
    # κ of the shifted matrix is at most its trace, 2k, times ‖L⁻¹‖², 0.9k/θ and a little.
    error = k * EPS * 2 * k * k / threshold * float(expected.abs().max())
    torch.testing.assert_close(transform, expected, rtol=0, atol=error)
    torch.testing.assert_close(transform, inverse.mT, rtol=0, atol=error)


@pytest.mark.parametrize(("k", "spoilt"), [(5, "pivot"), (40, "pivot"), (5, "scale")])
def test_a_column_whose_shifted_pivot_is_not_positive_or_whose_scale_is_infinite_is_taken_out(k, spoilt, device):
    gram, scale = problem_of(k, "gaussian")
    if spoilt == "pivot":
        gram[2, 2] = -1.0
    else:
        scale[2] = torch.inf
    others = torch.arange(k) != 2
    transform, live = solve(gram, scale, 1e-12, device)
    assert torch.equal(live, others)
    expected, _ = CORE.torch_form(gram[others][:, others], scale[others], 1e-12)
    torch.testing.assert_close(transform[others][:, others], expected, rtol=1e-11, atol=1e-13)


def test_only_the_lower_triangle_is_read(device):
    gram, scale = problem_of(33, "half the rank")
    poisoned = gram.tril() + torch.full_like(gram, torch.nan).triu(1)
    assert all(map(torch.equal, *(solve(matrix, scale, 1e-12, device) for matrix in (gram, poisoned))))


def test_nan_stays_in_its_own_problem_and_does_not_vanish(device):
    gram, scale = problem_of(33, *["gaussian"] * 4)
    spoilt = {1: (0, 0), 2: (32, 3), 3: (32, 32)}
    for problem, (i, j) in spoilt.items():
        gram[problem, i, j] = gram[problem, j, i] = torch.nan
    transform, live = solve(gram, scale, 1e-12, device)
    assert torch.equal(transform[0], solve(gram[0], scale[0], 1e-12, device)[0])
    assert live[0].all()
    for problem, (i, _) in spoilt.items():
        assert transform[problem, :, i].isnan().any()
        assert not live[problem, i]


def test_a_tiny_threshold_is_not_rounded_to_float32(device):
    """θ = 1e-50 is 0 in float32, and with it no column would ever be left out."""
    gram = torch.diag(torch.tensor([1.0, 1e-60, 1e-40], dtype=torch.float64))
    scale = torch.ones(3, dtype=torch.float64)
    transform, live = solve(gram, scale, 1e-50, device)
    assert live.tolist() == [True, False, True]
    assert transform.diagonal().tolist() == pytest.approx([1, 0, 1e20])
