"""Rank-aware orthonormalisation of tall panels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch import Tensor

import oracles
from brandla._split import split
from brandla.orthonormal import orthonormalize
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["outside", "inside", "nearly inside", "both"])
def test_split_divides_columns_between_a_basis_and_the_rest(family: str, where: str, dtype: torch.dtype) -> None:
    basis = oracles.orthonormal(N, 20, seed=9).to(dtype)
    columns = panel_of(family).to(dtype)
    projected = basis @ (basis.mT @ columns)
    noise = {"inside": 0.0, "nearly inside": 1e-4}
    if where in noise:
        columns = projected + noise[where] * columns
    elif where == "outside":
        columns = columns - projected
    parts = split(basis, columns)
    r = basis.shape[1]
    both = parts.rotate(basis, torch.eye(r + K, dtype=torch.float64))
    extended = torch.cat([torch.ones(r), torch.linalg.vector_norm(parts.triangle, dim=-1)])
    assert oracles.orthonormality_ratio(both, extended) <= THRESHOLD
    rebuilt = both.double() @ torch.cat([parts.coefficients, parts.triangle])
    lengths = torch.linalg.vector_norm(columns.double(), dim=0)
    errors = torch.linalg.vector_norm(columns.double() - rebuilt, dim=0)
    assert (errors <= oracles.tolerance(N, dtype) * lengths).all()


@pytest.fixture(params=[True, False], ids=["values read", "none read"])
def _reads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Branches on values, or none, as on a GPU."""
    with ExitStack() as stack:
        for module in ("_split", "_ranked", "_drift"):
            stack.enter_context(mock.patch(f"brandla.{module}.reads_are_free", return_value=request.param))
        yield


def columns_with_a_weak_one(case: str, weak: float, outside: Tensor, k: int) -> Tensor:
    """Return what k columns hold outside of a span: one of them little, in a direction that others hold much of."""
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
    return outside @ rest


@pytest.mark.usefixtures("_reads")
@pytest.mark.parametrize("exponent", range(0, 17, 2))
@pytest.mark.parametrize("case", ["first", "difference"])
def test_strong_columns_lose_nothing_to_a_weak_one_before_them(case: str, exponent: int, dtype: torch.dtype) -> None:
    """A weak column is mostly rounding of its projection; as a basis vector it would take that to all others."""
    n, r, k = 60, 3, 50
    both = oracles.orthonormal(n, r + 2, seed=3)
    basis, outside = both[:, :r].to(dtype), both[:, r:]
    inside = basis.double() @ oracles.gaussian(r, k, seed=6)
    columns = (inside + columns_with_a_weak_one(case, 10.0**-exponent, outside, k)).to(dtype)
    parts = split(basis, columns)
    both = parts.rotate(basis, torch.eye(r + k, dtype=torch.float64))
    extended = torch.cat([torch.ones(r), torch.linalg.vector_norm(parts.triangle, dim=-1)])
    assert oracles.orthonormality_ratio(both, extended) <= THRESHOLD
    error = oracles.spectral_norm(columns.double() - both.double() @ torch.cat([parts.coefficients, parts.triangle]))
    assert error <= 8 * n * torch.finfo(dtype).eps * oracles.spectral_norm(columns), error


def test_dependent_columns_are_split_where_lapack_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
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
    basis = oracles.orthonormal(N, 10, seed=9).to(dtype)
    columns = oracles.gaussian(N, k, seed=5)
    columns[:, 2] *= length
    columns = columns.to(dtype)
    parts = split(basis, columns)
    both = parts.rotate(basis, torch.eye(10 + k, dtype=torch.float64))
    extended = torch.cat([torch.ones(10), torch.linalg.vector_norm(parts.triangle, dim=-1)])
    assert oracles.orthonormality_ratio(both, extended) <= THRESHOLD
    rebuilt = both.double() @ torch.cat([parts.coefficients, parts.triangle])
    assert oracles.difference_ratio(rebuilt, columns, dtype) <= THRESHOLD
