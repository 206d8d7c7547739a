"""svd_append on a centred stream: principal component analysis of columns that keep arriving."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import brandla
import oracles
from oracles import THRESHOLD


def stream(m: int, k: int, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Return batches of columns about a mean that is far from zero."""
    offset = 5 * oracles.gaussian(m, 1, seed=11)
    return [(columns + offset).to(dtype) for columns in oracles.batches("slow", m, k, count)]


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("k", [1, 4, 7])
def test_centred_stream_equals_the_svd_of_centred_columns(k: int, decay: float, dtype: torch.dtype) -> None:
    m, count = 20, 6
    batches = stream(m, k, count, dtype)
    value = brandla.centre(brandla.LowRankSVD.zeros(m, 0, 0, dtype=dtype))
    for columns in batches:
        value = brandla.svd_append(value, columns, decay=decay, rank=min(m, value.svd.rank + k))
    # A column that is scaled by ρ counts ρ² in every mean and every product.
    weights = torch.cat([torch.full((k,), decay ** (2 * age)).double() for age in reversed(range(count))])
    columns = torch.cat(batches, dim=1).double()
    mean = (columns * weights).sum(dim=1) / weights.sum()
    residual = (columns - mean[:, None]) * weights.sqrt()
    gram = (value.svd.U.double() * value.svd.S.double().square()) @ value.svd.U.double().mT
    scale = oracles.spectral_norm(columns)
    torch.testing.assert_close(value.weight.double(), weights.sum(), rtol=1e-6, atol=0)
    assert (value.mean - mean).abs().max() <= oracles.tolerance(m, dtype, scale)
    assert oracles.orthonormality_ratio(value.svd.U, value.svd.S) <= THRESHOLD
    assert oracles.difference_ratio(gram, residual @ residual.mT, dtype, scale**2) <= THRESHOLD


def test_truncated_stream_keeps_the_leading_axes(dtype: torch.dtype) -> None:
    m, k, rank = 40, 8, 6
    strong = oracles.orthonormal(m, 4, seed=2) * torch.tensor([8.0, 6.0, 4.0, 3.0], dtype=torch.float64)
    offset = 5 * oracles.gaussian(m, 1, seed=11)
    columns = strong @ oracles.gaussian(4, 160, seed=3) + 0.01 * oracles.gaussian(m, 160, seed=4) + offset
    columns = columns.to(dtype)
    value = brandla.centre(brandla.LowRankSVD.zeros(m, 0, rank, dtype=dtype))
    for batch in columns.split(k, dim=1):
        value = brandla.svd_append(value, batch)
    residual = columns.double() - columns.double().mean(dim=1, keepdim=True)
    reference = oracles.eigh(residual @ residual.mT)
    ours, axes = value.svd.U[:, :4].double(), reference.eigenvectors[:, :4]
    assert oracles.spectral_norm(ours @ ours.mT - axes @ axes.mT) < 1e-3
    variances = value.svd.S[:4].double().square() / value.weight
    torch.testing.assert_close(variances, reference.eigenvalues[:4] / 160, rtol=1e-3, atol=0)


def test_a_decomposition_that_has_seen_columns_cannot_be_centred() -> None:
    with pytest.raises(ValueError, match=r"^centre: .*4.*LowRankSVD.zeros\(m, 0, rank\)"):
        brandla.centre(brandla.LowRankSVD.zeros(10, 4, 3))
