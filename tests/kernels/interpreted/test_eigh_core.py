"""The kernels around an eigendecomposition: the torch forms' results, and what makes a core empty or not finite."""

import math

import pytest
import torch

import oracles
from brandla_kernels import OPS
from brandla_kernels._kernels import eigh_core as kernels
from brandla_kernels.eigh_core import EMPTY
from op_cases import eigh_core_operands

CORE, ROTATION = (OPS[name].torch_form for name in ("eigh_core", "eigh_rotation"))
# r and k: orders 0 and 1, without old or new columns, around the tiles of 32.
SIZES = [(0, 0), (1, 0), (0, 1), (1, 1), (5, 0), (0, 3), (20, 11), (20, 13), (40, 26)]


def products_of(r, k, dtype, *, diagonal, seed=0):
    """Return what `eigh_core` takes of F and A; of orthonormal U and d with ``diagonal``."""
    both = oracles.gaussian(2 * (r + k) + 1, r + k, seed=seed)
    root = torch.linalg.qr(both[:, :r]).Q if diagonal else both[:, :r]
    cross, own, gram, *numbers = eigh_core_operands(root.to(dtype), both[:, r:].to(dtype))
    return cross, own, torch.linspace(2, 1, r, dtype=dtype) if diagonal else gram, *numbers


def assert_same(results, expected, dtype):
    for got, wanted in zip(results, expected, strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        torch.testing.assert_close(got.cpu(), wanted, rtol=8 * torch.finfo(dtype).eps, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("diagonal", [False, True], ids=["root", "eigenvalues"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_core_is_that_of_the_torch_form(size, diagonal, dtype, device):
    several = [products_of(*size, dtype, diagonal=diagonal, seed=seed) for seed in range(2)]
    for arguments in (several[0], tuple(map(torch.stack, zip(*several, strict=True)))):
        results = kernels.eigh_core(*(part.to(device) for part in arguments))
        assert_same(results, CORE(*arguments), torch.float64)


@pytest.mark.usefixtures("_overflow_is_meant")
@pytest.mark.parametrize("diagonal", [False, True], ids=["root", "eigenvalues"])
def test_a_core_may_be_empty_in_part_or_vanish_or_not_be_finite(diagonal, device):
    arguments = [torch.stack([part] * 7) for part in products_of(6, 4, torch.float32, diagonal=diagonal)]
    cross, own, gram, _, weight = arguments
    # Of problem 1 an old and a new column are 0; 2 vanishes in float64, 3 is beyond float32; 4 and 5 are not finite.
    # All entries of 6 vanish, and their sum does not.
    gram[1, 2], gram[1, ..., 2], cross[1, 2], cross[1, :, 1], own[1, 1], own[1, :, 1] = 0, 0, 0, 0, 0, 0
    for part, factor in ((gram, 0), (cross, 1e-320), (own, 1e-320)):
        part[2] *= factor
    own[3] *= 1e40
    cross[4, 0, 0] = math.nan
    weight[5] = math.inf
    gram[6], cross[6], own[6] = 0, 0, 0.4 * torch.finfo(torch.float64).tiny / weight[6] * torch.eye(4).double()
    results = kernels.eigh_core(*(part.to(device) for part in arguments))
    assert_same(results, CORE(*arguments), torch.float64)
    core, rows, scale = (part.cpu() for part in results)
    assert (core.diagonal(dim1=-2, dim2=-1) == EMPTY).sum(-1).tolist() == [0, 2, 10, 10, 10, 10, 10]
    assert scale.isnan().tolist() == rows.isnan().all(-1).tolist() == [False] * 3 + [True] * 3 + [False]


@pytest.mark.parametrize("unit", [False, True], ids=["root", "unit"])
@pytest.mark.parametrize("tol", [0.0, 0.2])
@pytest.mark.parametrize(("m", "rank"), [(0, 0), (1, 1), (5, 0), (9, 9), (33, 20), (65, 40)])
def test_rotation_is_that_of_the_torch_form(m, rank, tol, unit, dtype, device):
    several = []
    for seed in range(3):
        panel = oracles.gaussian(m + 3, m, seed=seed)
        core = panel.mT @ panel / max(m, 1)
        # The second has empty coordinates, the third is not finite.
        if seed == 1:
            core[: m // 2], core[:, : m // 2] = 0, 0
            core.diagonal()[: m // 2] = EMPTY
        levels, vectors = torch.linalg.eigh(core.to(dtype))
        rows, scale = panel[0].abs(), torch.tensor(math.nan if seed == 2 else 3.0, dtype=torch.float64)
        several.append((levels, vectors, rows * (scale / scale), scale))
    for arguments in (several[0], tuple(map(torch.stack, zip(*several, strict=True)))):
        results = kernels.eigh_rotation(*(part.to(device) for part in arguments), rank, tol, unit)
        assert_same(results, ROTATION(*arguments, rank, tol, unit), dtype)
    values, rotation, left_out = (part.cpu() for part in results)
    assert all(part[2].isnan().all() for part in (values, rotation, left_out))
    assert torch.equal(values[1] > 0, (rotation[1] != 0).any(-2))
