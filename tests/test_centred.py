"""svd_append on a centred stream: principal component analysis of columns that keep arriving."""

import pytest
import torch

import brandla
import oracles
from oracles import THRESHOLD


def shifted_columns(m, k, offset):
    """Return float32 columns with standard deviations from 1 to 3 about ``offset``."""
    scales = torch.linspace(1, 3, m, dtype=torch.float64)[:, None]
    return (oracles.gaussian(m, k, seed=5) * scales + offset).float()


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("k", [1, 4, 50, 200])
def test_centred_stream_equals_the_svd_of_centred_columns_at_any_offset(k, decay, offset, dtype):
    m, count = 12, 200 // k
    columns = shifted_columns(m, 200, offset).to(dtype)
    value = brandla.centre(brandla.LowRankSVD.zeros(m, 0, 0, dtype=dtype))
    for batch in columns.split(k, dim=1):
        value = brandla.svd_append(value, batch, decay=decay, rank=min(m, value.svd.rank + k))
    # A column scaled by ρ has the weight ρ² in every mean and every product.
    weights = torch.cat([torch.full((k,), decay ** (2 * age)).double() for age in reversed(range(count))])
    columns = columns.double()
    mean = (columns * weights).sum(dim=1) / weights.sum()
    residual = (columns - mean[:, None]) * weights.sqrt()
    gram = (value.svd.U.double() * value.svd.S.double().square()) @ value.svd.U.double().mT
    torch.testing.assert_close(value.weight, weights.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(value.scatter, residual.square().sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(value.mean, mean, rtol=1e-13, atol=1e-13)
    assert oracles.orthonormality_ratio(value.svd.U, value.svd.S) <= THRESHOLD
    # The mean is rounded in float64 too.
    size, uncentred = (oracles.spectral_norm(part) for part in (residual, columns))
    scale = size * (size + oracles.epsilon(torch.float64) / oracles.epsilon(dtype) * uncentred)
    assert oracles.difference_ratio(gram, residual @ residual.mT, dtype, scale) <= THRESHOLD


def test_truncated_stream_keeps_the_leading_axes(dtype):
    m, k, rank = 40, 8, 6
    strong = oracles.orthonormal(m, 4, seed=2) * torch.tensor([8.0, 6.0, 4.0, 3.0], dtype=torch.float64)
    columns = strong @ oracles.gaussian(4, 160, seed=3) + 0.01 * oracles.gaussian(m, 160, seed=4)
    columns = (columns + 5 * oracles.gaussian(m, 1, seed=11)).to(dtype)
    value = brandla.centre(brandla.LowRankSVD.zeros(m, 0, rank, dtype=dtype))
    for batch in columns.split(k, dim=1):
        value = brandla.svd_append(value, batch)
    residual = columns.double() - columns.double().mean(dim=1, keepdim=True)
    reference = oracles.eigh(residual @ residual.mT)
    ours, axes = value.svd.U[:, :4].double(), reference.eigenvectors[:, :4]
    assert oracles.spectral_norm(ours @ ours.mT - axes @ axes.mT) < 1e-3
    variances = reference.eigenvalues[:4]
    for correction in (0, 1):
        explained = value.explained_variance(correction=correction)[:4].double()
        torch.testing.assert_close(explained, variances / (160 - correction), rtol=1e-3, atol=0)
    ratio = value.explained_variance_ratio()[:4].double()
    torch.testing.assert_close(ratio, variances / residual.square().sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_transform_and_its_inverse(offset, dtype):
    columns = shifted_columns(12, 40, offset).to(dtype)
    value = brandla.svd_append(brandla.centre(brandla.LowRankSVD.zeros(12, 0, 12, dtype=dtype)), columns)
    coordinates = value.transform(columns)
    expected = value.svd.U.double().mT @ (columns.double() - columns.double().mean(1, keepdim=True))
    torch.testing.assert_close(coordinates, expected.to(dtype), rtol=1e-5, atol=1e-5)
    assert coordinates.mean(1).abs().max() < 1e-5
    torch.testing.assert_close(value.inverse_transform(coordinates), columns, rtol=1e-6, atol=1e-5)
    with pytest.raises(ValueError, match=r"^Centred.transform: columns .* pass columns.mT if samples are rows"):
        value.transform(columns.mT)
    with pytest.raises(ValueError, match=r"^Centred.inverse_transform: coordinates must have n = 12 rows"):
        value.inverse_transform(coordinates[:3])


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_merged_streams_equal_one_stream_of_both(offset, dtype):
    m, start = 12, brandla.centre(brandla.LowRankSVD.zeros(12, 0, 0, dtype=dtype))
    first, second = shifted_columns(m, 60, offset).to(dtype).split([20, 40], dim=-1)
    parts = [brandla.svd_append(start, part, rank=m) for part in (first, 3 + second)]
    merged = brandla.merge(*parts, rank=m)
    both = torch.cat([first, 3 + second], -1).double()
    residual = both - both.mean(-1, keepdim=True)
    torch.testing.assert_close(merged.svd.S.double(), torch.linalg.svdvals(residual), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.mean, both.mean(-1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(merged.scatter, residual.square().sum(), rtol=1e-5, atol=0)
    assert merged.weight == 60
    assert merged.svd.Vh.shape == (m, 0)
    # A stream without columns adds nothing.
    same = brandla.merge(parts[0], start)
    torch.testing.assert_close(same.svd.S, parts[0].svd.S)
    assert torch.equal(same.mean, parts[0].mean)
    assert not brandla.merge(start, start).weight.any()
