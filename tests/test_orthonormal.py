"""Rank-aware orthonormalisation of tall panels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import brandla
import oracles
from brandla import orthonormalize
from oracles import THRESHOLD

N, K = 90, 16


def panel_of(family: str) -> Tensor:
    """Return an N × K panel of a family that Gram–Schmidt or Cholesky QR has trouble with."""
    well = oracles.gaussian(N, K, seed=5)
    match family:
        case "gaussian":
            return well
        case "condition 1e3" | "condition 1e6" | "condition 1e12":
            exponent = {"condition 1e3": -3, "condition 1e6": -6, "condition 1e12": -12}[family]
            return oracles.rectangular_matrix(torch.logspace(0, exponent, K).double(), N, K, seed=5)
        case "columns of very different length":
            return well * torch.logspace(-12, 12, K).double()
        case "rank 5":
            return well[:, :5] @ oracles.gaussian(5, K, seed=6)
        case "two directions and noise near rounding":
            return well[:, :2] @ oracles.gaussian(2, K, seed=6) + 1e-13 * oracles.gaussian(N, K, seed=7)
        case "p, p + 1e-5 z, 0.9 z":
            return torch.cat([well[:, :1], well[:, :1] + 1e-5 * well[:, 1:2], 0.9 * well[:, 1:2], well[:, 2:-1]], dim=1)
        case "a weak column first":
            return torch.cat([1e-7 * well[:, :1], well[:, :1] + well[:, 1:]], dim=1)
        case "growing under elimination":
            # The inverse of this triangle has entries up to 2.2^14.
            triangle = torch.eye(K, dtype=torch.float64) - 1.2 * torch.ones(K, K, dtype=torch.float64).triu(1)
            return torch.linalg.qr(well).Q @ triangle
        case "growing under elimination, one repeated":
            return torch.cat([panel_of("growing under elimination")[:, :-1], well[:, :1], well[:, :1]], dim=1)[:, 1:]
        case "every column repeated":
            return well[:, : K // 2].repeat_interleave(2, dim=1)
        case "nearly repeated":
            return well[:, :1] + 1e-5 * well
        case "a zero column first and last":
            return torch.cat([torch.zeros(N, 1), well[:, 2:], torch.zeros(N, 1)], dim=1).double()
        case "zero":
            return torch.zeros_like(well)
        case "tiny":
            return 1e-18 * well
        case "huge":
            return 1e17 * well
    raise AssertionError(family)


FAMILIES = [
    "gaussian",
    "condition 1e3",
    "condition 1e6",
    "condition 1e12",
    "columns of very different length",
    "rank 5",
    "two directions and noise near rounding",
    "p, p + 1e-5 z, 0.9 z",
    "a weak column first",
    "growing under elimination",
    "growing under elimination, one repeated",
    "every column repeated",
    "nearly repeated",
    "a zero column first and last",
    "zero",
    "tiny",
    "huge",
]


def assert_orthonormal(q: Tensor, r: Tensor) -> None:
    """Check that the columns of Q are orthonormal, or zero where the rows of R are."""
    assert oracles.orthonormality_ratio(q, torch.linalg.vector_norm(r, dim=-1)) <= THRESHOLD


@pytest.fixture(params=[True, False], ids=["values read", "none read"])
def _reads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Branches on values, or none, as on a GPU."""
    with mock.patch("brandla.orthonormal.reads_are_free", return_value=request.param):
        yield


@pytest.mark.usefixtures("_reads")
@pytest.mark.parametrize("family", FAMILIES)
def test_panel_is_the_product_of_its_factors(family: str, dtype: torch.dtype) -> None:
    panel = panel_of(family).to(dtype)
    q, r = orthonormalize(panel)
    assert (q.dtype, r.dtype) == (dtype, dtype)
    assert_orthonormal(q, r)
    # By columns: each is right relative to its own length.
    lengths = torch.linalg.vector_norm(panel.double(), dim=0)
    errors = torch.linalg.vector_norm(panel.double() - q.double() @ r.double(), dim=0)
    assert (errors <= oracles.tolerance(N, dtype) * lengths).all()


@pytest.mark.parametrize("family", ["gaussian", "condition 1e3", "columns of very different length"])
def test_full_rank_panels_keep_all_columns_and_a_triangular_factor(family: str, dtype: torch.dtype) -> None:
    q, r = orthonormalize(panel_of(family).to(dtype))
    assert oracles.orthonormality_ratio(q, torch.ones(K)) <= THRESHOLD
    below = r.double().tril(-1) / torch.linalg.vector_norm(r.double(), dim=0)
    assert below.abs().max() <= oracles.tolerance(K, dtype)


@pytest.mark.parametrize(("family", "rank"), [("rank 5", 5), ("every column repeated", K // 2), ("zero", 0)])
def test_dependent_columns_become_zero_columns(family: str, rank: int, dtype: torch.dtype) -> None:
    q, _ = orthonormalize(panel_of(family).to(dtype))
    assert int(q.any(dim=0).sum()) == rank


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 5), (5, 9), (1, 4), (7, 0), (0, 0)], ids=str)
def test_panels_of_every_shape(n: int, k: int, dtype: torch.dtype) -> None:
    panel = oracles.gaussian(n, k, seed=2).to(dtype)
    q, r = orthonormalize(panel)
    assert (q.shape, r.shape) == ((n, k), (k, k))
    assert_orthonormal(q, r)
    assert oracles.difference_ratio(q.double() @ r.double(), panel, dtype) <= THRESHOLD


def test_batch_of_panels_equals_a_loop(dtype: torch.dtype) -> None:
    panels = torch.stack([panel_of(family) for family in FAMILIES if family not in ("tiny", "huge")]).to(dtype)
    q, r = orthonormalize(panels)
    for i, panel in enumerate(panels):
        alone_q, alone_r = orthonormalize(panel)
        assert oracles.difference_ratio(q[i] @ r[i], alone_q @ alone_r, dtype) <= THRESHOLD
        assert_orthonormal(q[i], r[i])


def panel_with_a_weak_column(case: str, weak: float, k: int) -> Tensor:
    """Return a panel whose other columns hold much of a direction of which one column, of two, holds little."""
    directions = oracles.orthonormal(N, 2, seed=3)
    rest = oracles.gaussian(2, k, seed=4)
    match case:
        case "first":
            rest[0, 0], rest[1] = weak, 0
        case "difference":
            rest[:, 0] = torch.tensor([1.0, 0.0])
            rest[:, 1] = torch.tensor([1.0, weak])
            rest[0, 2:] = 0
            rest[1, 2:] *= 0.1
        case _:
            raise AssertionError(case)
    return directions @ rest


@pytest.mark.usefixtures("_reads")
@pytest.mark.parametrize("exponent", range(0, 17, 2))
@pytest.mark.parametrize("case", ["first", "difference"])
def test_strong_columns_lose_nothing_to_a_weak_one_before_them(case: str, exponent: int, dtype: torch.dtype) -> None:
    """A weak column is mostly rounding of what it depends on; as a basis vector it would take that to all others."""
    panel = panel_with_a_weak_column(case, 10.0**-exponent, 50).to(dtype)
    q, r = orthonormalize(panel)
    assert_orthonormal(q, r)
    error = oracles.spectral_norm(panel.double() - q.double() @ r.double())
    assert error <= 8 * N * torch.finfo(dtype).eps * oracles.spectral_norm(panel), error


def test_dependent_columns_are_orthonormalised_where_lapack_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Tensor) -> None:
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    q, r = orthonormalize(panel_of("rank 5"))
    assert_orthonormal(q, r)
    assert oracles.difference_ratio(q @ r, panel_of("rank 5"), torch.float64) <= THRESHOLD


@pytest.mark.usefixtures("_reads")
@pytest.mark.parametrize("k", [8, 48])
@pytest.mark.parametrize("length", [1e-18, 1e-22, 1e-30, 1e-36, 1e-40, 1e-44, 1e-150, 1e-200, 1e-310])
def test_a_column_too_short_to_be_scaled_is_left_out(length: float, k: int, dtype: torch.dtype) -> None:
    """The square of a float32 length of 1e−20 is no float32 number, and neither is the inverse of one of 1e−40."""
    panel = oracles.gaussian(N, k, seed=5)
    panel[:, 2] *= length
    panel = panel.to(dtype)
    q, r = orthonormalize(panel)
    assert_orthonormal(q, r)
    assert oracles.difference_ratio(q.double() @ r.double(), panel, dtype) <= THRESHOLD


# Nearly all of what the docstring promises for the lengths of columns.
SCALES = {torch.float32: (1e-30, 1e-18, 1e18, 1e36), torch.float64: (1e-145, 1e-100, 1e100, 1e152)}


@pytest.mark.usefixtures("_reads")
def test_result_scales_with_the_panel(dtype: torch.dtype) -> None:
    for scale in SCALES[dtype]:
        panel = (scale * panel_of("gaussian")).to(dtype)
        q, r = orthonormalize(panel)
        assert oracles.orthonormality_ratio(q, torch.ones(K)) <= THRESHOLD
        product = q.double() @ (r.double() / scale)
        assert oracles.difference_ratio(product, panel.double() / scale, dtype) <= THRESHOLD


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_panels_are_computed_in_float32(half: torch.dtype) -> None:
    panel = panel_of("gaussian").to(half)
    for from_half, from_float in zip(orthonormalize(panel), orthonormalize(panel.float()), strict=True):
        assert from_half.dtype == torch.float32
        assert torch.equal(from_half, from_float)


@pytest.mark.usefixtures("_reads")
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("family", ["gaussian", "rank 5", "zero"])
def test_non_finite_panels_give_nan_and_spoil_no_other(family: str, bad: float, dtype: torch.dtype) -> None:
    panels = torch.stack([panel_of(family), panel_of("gaussian"), panel_of("rank 5")]).to(dtype)
    panels[0, 3, 4] = bad
    q, r = orthonormalize(panels)
    assert q[0].isnan().all()
    assert r[0].isnan().all()
    for index in (1, 2):
        assert_orthonormal(q[index], r[index])
        assert oracles.difference_ratio(q[index] @ r[index], panels[index], dtype) <= THRESHOLD


@pytest.mark.parametrize("family", ["gaussian", "rank 5"])
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layout_of_the_panel_does_not_matter(family: str, layout: str, unchanged: Callable[..., Any]) -> None:
    panel = panel_of(family)
    view = {
        "transposed": panel.mT.contiguous().mT,
        "strided": panel.repeat_interleave(2, dim=1)[:, ::2],
        "expanded": panel.expand(2, N, K),
    }[layout]
    with unchanged(view):
        q, r = orthonormalize(view)
    for one, other in zip(q.reshape(-1, N, K), r.reshape(-1, K, K), strict=True):
        assert_orthonormal(one, other)
        assert oracles.difference_ratio(one @ other, panel, torch.float64) <= THRESHOLD


def test_one_column_is_scaled_and_its_length_returned(dtype: torch.dtype) -> None:
    q, r = orthonormalize(torch.tensor([[3.0], [4.0]], dtype=dtype))
    torch.testing.assert_close(q, torch.tensor([[0.6], [0.8]], dtype=dtype))
    torch.testing.assert_close(r, torch.tensor([[5.0]], dtype=dtype))


def test_full_rank_panels_give_the_factors_of_torch() -> None:
    panel = panel_of("gaussian")
    q, r = orthonormalize(panel)
    expected_q, expected_r = torch.linalg.qr(panel)
    signs = expected_r.diagonal().sign()
    torch.testing.assert_close(q, expected_q * signs)
    torch.testing.assert_close(r, expected_r * signs[:, None])


@pytest.mark.parametrize("batch_shape", [(), (2,)], ids=str)
def test_gradient_is_that_of_finite_differences(batch_shape: tuple[int, ...]) -> None:
    panel = oracles.gaussian(*batch_shape, 12, 4, seed=3).requires_grad_()
    torch.autograd.gradcheck(brandla.orthonormalize, (panel,))
