"""The small-SPD kernel: its definition, and the mask of the torch form, on panels that Cholesky QR has trouble with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracles
from brandla_kernels import OPS
from brandla_kernels._kernels import small_spd

CORE = OPS["cholesky_inverse_core"]
EPS = torch.finfo(torch.float64).eps

# Around the blocks of 16 columns, and the tiles of 32 and 128 rows.
ORDERS = (0, 1, 2, 15, 17, 33, 65)
FAMILIES = (
    *("gaussian", "graded", "columns of very different length", "half the rank", "every column repeated"),
    *("zero columns", "zero", "nearly repeated", "nearly cancelling", "noise, then its direction"),
)
# Of the larger orders, which the interpreter takes seconds for, the families that reach every branch.
OF_LARGE_ORDER = ("graded", "half the rank", "nearly cancelling")


def panel_of(family: str, k: int, seed: int = 0) -> Tensor:
    """Return a (2k + 5) × k panel."""
    return oracles.panels(2 * k + 5, k, seed)[family]


def problem_of(panel: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Gram matrix of a panel and the lengths of its columns."""
    gram = panel.mT @ panel
    return gram, gram.diagonal(dim1=-2, dim2=-1).sqrt()


def lowest_threshold(k: int) -> float:
    """Return θ just above the rounding of the Gram matrix: its δ is about sixteen times that."""
    return 64 * max(k, 1) * EPS


def solve(
    gram: Tensor, scale: Tensor, threshold: float, device: torch.device, whole_first: bool
) -> tuple[Tensor, Tensor]:
    transform, live = small_spd.cholesky_inverse_core(
        gram.to(device), scale.to(device), threshold, whole_first=whole_first
    )
    return transform.cpu(), live.cpu()


def growth(gram: Tensor, scale: Tensor, threshold: float) -> Tensor:
    """Return what is compared with 1/θ, times θ, by the definition: rows of the inverse of the shifted factor."""
    inverse_scale = torch.where(scale > 0, 1 / scale, 0)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype)
    shifted = gram * inverse_scale[..., :, None] * inverse_scale[..., None, :] + threshold / 4 * identity
    inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(shifted), identity, upper=False)
    return inverse.square().sum(-1) * threshold


def assert_definition(gram: Tensor, scale: Tensor, transform: Tensor, live: Tensor) -> None:
    """Check that TᵀGT is the identity on live columns and that T is upper triangular, and 0 in the others."""
    assert transform.isfinite().all()
    assert torch.equal(transform, transform.triu())
    assert (transform[~live[..., None, :].expand_as(transform)] == 0).all()
    assert (transform[~live[..., :, None].expand_as(transform)] == 0).all()
    # Cholesky factors are exact for a matrix k·ε away, k the length of its inner products, and so are the entries of
    # E = S⁻¹GS⁻¹, for S the scale; T̂ = S T multiplies that on both sides. The product that checks it does the same.
    k = gram.shape[-1]
    equilibrated = transform * scale[..., :, None]
    defect = transform.mT @ gram @ transform - torch.diag_embed(live.double())
    bound = 4 * k * EPS * torch.linalg.matrix_norm(equilibrated, "fro").square().clamp_min(1)
    assert (torch.linalg.matrix_norm(defect, "fro") <= bound).all()


@pytest.mark.parametrize(
    ("k", "whole_first"), [(k, False) for k in ORDERS] + [(2, True), (17, True), (65, True)], ids=str
)
def test_every_family_by_its_definition_with_the_mask_of_the_torch_form(
    k: int, whole_first: bool, device: torch.device
) -> None:
    panels = torch.stack([panel_of(family, k) for family in (FAMILIES if k < 64 else OF_LARGE_ORDER)])
    gram, scale = problem_of(panels)
    of_float32_data = 64 * max(k, 1) * torch.finfo(torch.float32).eps ** 2
    for threshold in (lowest_threshold(k), of_float32_data)[: 2 if k < 64 else 1]:
        transform, live = solve(gram, scale, threshold, device, whole_first)
        assert_definition(gram, scale, transform, live)
        expected = torch.stack(
            [CORE.torch_form(*problem, threshold)[1] for problem in zip(gram, scale, strict=True)]
        )  # one by one, so that one family does not decide which way another is factored
        # Rounding is a sixteenth of the lowest shift, and decides nothing further away from the threshold.
        near = (growth(gram, scale, threshold) - 1).abs() < 1 / 16
        assert torch.equal(live | near, expected | near)


@pytest.mark.parametrize("k", [2, 17, 129])
def test_transform_equals_that_of_the_torch_form(k: int, device: torch.device) -> None:
    gram, scale = problem_of(panel_of("gaussian", k))
    expected, _ = CORE.torch_form(gram, scale, 1e-12)
    for whole_first in (False, True):
        transform, _ = solve(gram, scale, 1e-12, device, whole_first)
        # Both are within k·ε·κ of the exact one; κ(G) of a Gaussian panel twice as tall as wide is below 40.
        torch.testing.assert_close(transform, expected, rtol=0, atol=40 * k * EPS * float(expected.abs().max()))


@pytest.mark.parametrize("k", [8, 40])
def test_where_the_live_columns_break_down_the_shifted_factor_serves(k: int, device: torch.device) -> None:
    threshold = 1e-6
    # L⁻¹ of the shifted matrix: no row is longer than 1/√θ, but all lie in one direction, in which the matrix is
    # smaller than the shift, for k > 4.
    inverse = torch.eye(k, dtype=torch.float64)
    inverse[:, 0] = (0.9 / threshold) ** 0.5
    factor = torch.linalg.solve_triangular(inverse, torch.eye(k, dtype=torch.float64), upper=False)
    gram = factor @ factor.mT - threshold / 4 * torch.eye(k, dtype=torch.float64)
    scale = torch.ones(k, dtype=torch.float64)
    assert torch.linalg.cholesky_ex(gram).info > 0
    expected, mask = CORE.torch_form(gram, scale, threshold)
    assert mask.all()
    for whole_first in (False, True):
        transform, live = solve(gram, scale, threshold, device, whole_first)
        assert live.all()
        # κ of the shifted matrix is at most its trace, 2k, times ‖L⁻¹‖², 0.9k/θ and a little.
        error = k * EPS * 2 * k * k / threshold
        torch.testing.assert_close(transform, expected, rtol=0, atol=error * float(expected.abs().max()))
        torch.testing.assert_close(transform, inverse.mT, rtol=0, atol=error * float(expected.abs().max()))


@pytest.mark.parametrize("k", [5, 40])
def test_a_column_whose_shifted_pivot_is_not_positive_is_taken_out(k: int, device: torch.device) -> None:
    gram, scale = problem_of(panel_of("gaussian", k))
    gram[2, 2] = -1.0
    others = torch.arange(k) != 2
    transform, live = solve(gram, scale, 1e-12, device, False)
    assert torch.equal(live, others)
    expected, _ = CORE.torch_form(gram[others][:, others], scale[others], 1e-12)
    torch.testing.assert_close(transform[others][:, others], expected, rtol=1e-11, atol=1e-13)


LAYOUTS = {
    "every other row, every third column": lambda tensor: torch.nn.functional.pad(
        tensor.repeat_interleave(2, -2).repeat_interleave(3, -1), (0, 1)
    )[..., ::2, :-1:3],
    "batch last": lambda tensor: tensor.movedim((0, 1), (-1, -2)).contiguous().movedim((-1, -2), (0, 1)),
    "irregular batch": lambda tensor: torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, 1))[:, :-1],
}


def test_strides_and_batch_change_no_bit(device: torch.device) -> None:
    gram, scale = problem_of(torch.stack([panel_of(family, 17) for family in FAMILIES[:6]]))
    alone = [solve(*problem, 1e-12, device, False) for problem in zip(gram, scale, strict=True)]
    scale = scale.unflatten(0, (2, 3)).to(device).repeat_interleave(2, -1)[..., ::2]
    for layout in LAYOUTS.values():
        strided = layout(gram.unflatten(0, (2, 3)).to(device))
        assert torch.equal(strided.flatten(0, 1).cpu(), gram)
        together = small_spd.cholesky_inverse_core(strided, scale, 1e-12)
        for *parts, expected in zip(*(part.flatten(0, 1).cpu() for part in together), alone, strict=True):
            assert all(map(torch.equal, parts, expected))


def test_one_scale_serves_a_batch(device: torch.device) -> None:
    gram, _ = problem_of(torch.stack([panel_of("gaussian", 20, seed) for seed in range(3)]))
    scale = torch.linspace(1, 2, 20, dtype=torch.float64)
    transform, _ = solve(gram, scale, 1e-12, device, False)
    assert_definition(gram, scale.expand(3, 20), transform, torch.ones(3, 20, dtype=torch.bool))


def test_only_the_lower_triangle_is_read_and_runs_repeat_to_the_bit(device: torch.device) -> None:
    gram, scale = problem_of(panel_of("half the rank", 40))
    poisoned = gram.tril() + torch.full_like(gram, torch.nan).triu(1)
    once, again, lower = (solve(matrix, scale, 1e-12, device, False) for matrix in (gram, gram, poisoned))
    assert all(map(torch.equal, once, again))
    assert all(map(torch.equal, once, lower))


@pytest.mark.parametrize("whole_first", [False, True], ids=["shifted first", "whole first"])
def test_nan_stays_in_its_own_problem_and_does_not_vanish(whole_first: bool, device: torch.device) -> None:
    gram, scale = problem_of(torch.stack([panel_of("gaussian", 40, seed) for seed in range(3)]))
    clean, _ = solve(gram, scale, 1e-12, device, whole_first)
    for i, j in ((0, 0), (35, 3), (39, 39)):
        spoilt = gram.clone()
        spoilt[1, i, j] = spoilt[1, j, i] = torch.nan
        transform, live = solve(spoilt, scale, 1e-12, device, whole_first)
        assert torch.equal(transform[[0, 2]], clean[[0, 2]])
        assert transform[1, :, i].isnan().any()
        assert not live[1, i]


def test_infinite_scale_takes_a_column_out(device: torch.device) -> None:
    gram, scale = problem_of(panel_of("gaussian", 5))
    scale[3] = torch.inf
    _, live = solve(gram, scale, 1e-12, device, False)
    assert live.tolist() == [True, True, True, False, True]


def test_a_tiny_threshold_is_not_rounded_to_float32(device: torch.device) -> None:
    """θ = 1e-50 is 0 in float32, and with it no column would ever be left out."""
    gram = torch.diag(torch.tensor([1.0, 1e-60, 1e-40], dtype=torch.float64))
    scale = torch.ones(3, dtype=torch.float64)
    transform, live = solve(gram, scale, 1e-50, device, False)
    assert live.tolist() == [True, False, True]
    assert transform.diagonal().tolist() == pytest.approx([1, 0, 1e20])
