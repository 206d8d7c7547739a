"""Every system at small sizes, and the reference for systems: gradients of single samples by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from brandla import Rank
from brandla.kfac import (
    EKFAC,
    KBFGS,
    KFAC,
    Brand,
    BrandCorrected,
    BrandRandomized,
    ConjugateGradient,
    Exact,
    Foof,
    InverseFree,
    Randomized,
    Strategy,
    TwoLevel,
    Woodbury,
)
from brandla.kfac.systems.factor import Factor
from brandla.kfac.systems.kronecker import FactorStrategy
from brandla.kfac.systems.structures import STRUCTURES
from kfac.networks import layer_gradient

SYSTEMS: dict[str, Strategy] = {
    "exact": Exact(inverse_every=3),
    "cholesky": Exact(inverse_every=3, method="cholesky"),
    "randomized-svd": Randomized(6, method="svd", oversample=4, inverse_every=3),
    "randomized-eigh": Randomized(6, oversample=4, inverse_every=3),
    "brand": Brand(6),
    "brand-sketched": Brand(6, sketch=3),
    "brand-cholesky": Brand(6, compress="cholesky"),
    "brand-eigh": Brand(6, form="eigh"),
    "brand-randomized": BrandRandomized(6, overwrite_every=2, oversample=4),
    "brand-corrected": BrandCorrected(6, correct_every=2),
    "ekfac": EKFAC(inverse_every=3),
    "singd": InverseFree(preconditioner_every=2),
    "ikfac": InverseFree(variant="ikfac"),
    "foof": Foof(Brand(6)),
    "conjugate-gradient": ConjugateGradient(batches=2, warm_start=True),
    "two-level": TwoLevel(Brand(6)),
    "residual": TwoLevel(Exact(inverse_every=3, method="cholesky"), "residual"),
    "k-bfgs": KBFGS(),
    "woodbury": Woodbury(),
    "seng": Woodbury(every=3, features=6, positions=2),
    "fngd": Woodbury(fixed_after=3),
}
STRUCTURED: dict[str, Strategy] = {name: InverseFree(name, preconditioner_every=1) for name in STRUCTURES}
# Options of Brand.
FORMS: dict[str, dict[str, str]] = {"root": {}, "cholesky": {"compress": "cholesky"}, "eigh": {"form": "eigh"}}

every_system = pytest.mark.parametrize("strategy", SYSTEMS.values(), ids=SYSTEMS)


def some_systems(*systems: str | Strategy) -> pytest.MarkDecorator:
    """Run a test with a few systems, given by name or as strategies."""
    return pytest.mark.parametrize("strategy", [SYSTEMS[s] if isinstance(s, str) else s for s in systems], ids=str)


def growing(step: int) -> int:
    """Return 4, 6, 8, ..., 12."""
    return min(4 + 2 * step, 12)


def falling(step: int) -> int:
    """Return 12 for three steps, then 5."""
    return 12 if step < 3 else 5


def rule(step: int) -> Rank:
    """Return a rank rule that grows."""
    return Rank(growing(step), 1e-3)


def seldom(step: int) -> int:
    """Return a period of 1 for two steps, then of 3."""
    return 1 if step < 2 else 3


def full_rank(rank: int) -> dict[str, FactorStrategy]:
    """Return systems of factors that lose no data of a few batches, so their steps equal the dense steps."""
    return {
        "exact": Exact(inverse_every=1),
        "cholesky": Exact(inverse_every=1, method="cholesky"),
        "randomized-svd": Randomized(60, method="svd", inverse_every=1),
        "randomized-eigh": Randomized(60, inverse_every=1),
        "brand": Brand(rank),
        "brand-cholesky": Brand(rank, compress="cholesky"),
        "brand-eigh": Brand(rank, form="eigh"),
        "brand-randomized": BrandRandomized(rank, overwrite_every=2),
        "brand-corrected": BrandCorrected(rank, correct_every=2),
    }


def tensors(preconditioner: KFAC) -> list[Tensor]:
    """Return copies of all tensors of a preconditioner's curvatures."""
    return [part.clone() for layer in preconditioner._layers for part in layer.curvature.tensors()]


def factors_of(preconditioner: KFAC) -> list[Factor]:
    """Return the factors of the first layer."""
    return [factor for _, factor in preconditioner._layers[0].curvature.factors()]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules that have parameters of their own."""
    return [module for module in model.modules() if list(module.parameters(recurse=False))]


def sample_gradients(model: nn.Module, loss: Callable[[slice], Tensor], samples: int) -> list[Tensor]:
    """Return the gradient of each sample's part of a mean loss, per layer (samples, d_out, d_in), the bias last."""
    parts = []
    for index in range(samples):
        model.zero_grad()
        (loss(slice(index, index + 1)) / samples).backward()
        parts.append([layer_gradient(layer) for layer in layers_of(model)])
    model.zero_grad()
    return list(map(torch.stack, zip(*parts, strict=True)))


def damped_solve(F: Tensor, gradient: Tensor, damping: float = 0.0) -> Tensor:
    """Return (F + λI)⁻¹ times a gradient, taken as a vector."""
    eye = torch.eye(len(F), dtype=F.dtype)
    return torch.linalg.solve(F + damping * eye, gradient.reshape(-1)).reshape(gradient.shape)


def layer_steps(model: nn.Module, preconditioner: KFAC, loss: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of the layers as matrices, after a backward pass and after a step."""
    model.zero_grad()
    loss.backward()
    before = [layer_gradient(layer) for layer in layers_of(model)]
    preconditioner.step()
    return before, [layer_gradient(layer) for layer in layers_of(model)]
