"""Damped inverses on the kernels: the small problem beside the projection, and what must not spread."""

import pytest
import torch

import oracles
from brandla_kernels import OPS


def negative_inverse(gram, damping, device):
    """Return Z for S, as Y − V of U = V = I and β = 1."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=device).expand_as(gram)
    shift = (torch.full(gram.shape[:-2], number, dtype=gram.dtype, device=device) for number in (damping, 1 - damping))
    return (OPS["damped_inverse"](identity, gram.to(device), *shift, identity) - identity).cpu()


# Around the blocks of 16 columns, and the tiles of 64 rows.
@pytest.mark.parametrize(
    ("order", "damping", "dtype"),
    [(order, 1e-7, torch.float64) for order in (1, 15, 17, 65)] + [(40, each, torch.float32) for each in (3e-2, 1e-4)],
)
@pytest.mark.usefixtures("_weak_float64")
def test_sweeps_invert_as_well_as_a_factorisation(order, damping, dtype, device):
    """Eigenvalues from 1 to 10⁻⁹, then the damping: the error of an inverse is κ ε of its own size."""
    eps, generator = torch.finfo(dtype).eps, torch.Generator().manual_seed(order)
    turn = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64)).Q
    gram = oracles.symmetrised((turn * torch.logspace(0, -9, order, dtype=torch.float64)) @ turn.mT).to(dtype)
    damped = gram + damping * torch.eye(order, dtype=torch.float64)
    expected = -torch.cholesky_inverse(torch.linalg.cholesky(damped))
    found = negative_inverse(gram, damping, device).double()
    allowed = 8 * order**0.5 * eps * float(torch.linalg.cond(damped)) * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed)
    # The residual is that of a backward stable method, not κ times it.
    residual = torch.linalg.matrix_norm(damped @ found + torch.eye(order, dtype=torch.float64), 2)
    sizes = torch.linalg.matrix_norm(damped, 2) * torch.linalg.matrix_norm(found, 2)
    assert residual <= 8 * order**0.5 * eps * sizes


def test_a_problem_that_is_not_definite_is_nan_and_alone(device):
    basis, rhs = (torch.ones(5, 20, k, dtype=torch.float64, device=device) for k in (17, 2))
    gram, shift = torch.eye(17).to(basis).repeat(5, 1, 1), (basis.new_full((5,), 0.5), basis.new_zeros(5))
    gram[1:4, 16, 16] = torch.tensor([-0.5, -3.0, torch.nan]).to(basis)
    found = OPS["damped_inverse"](basis, gram, *shift, rhs)
    assert found.isnan().flatten(1).all(1).tolist() == [False, True, True, True, False]
    assert torch.equal(found[0], found[4])
