"""Two-level K-FAC against the whole Fisher matrix, formed explicitly in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KFAC, Brand, ConjugateGradient, Exact, Foof, Strategy, TwoLevel
from brandla.kfac.values import Damping, Now
from kfac.networks import Batch, Words, batch, gradients, layer_gradient, loss_of, mlp, stepped
from kfac.systems import assert_near, damped_solve, fisher, flat, layer_steps, loss_on, sample_gradients

DAMPING = 0.03
EXACT = Exact(inverse_every=1)
INNER = {
    "exact": EXACT,
    "cholesky": Exact(inverse_every=1, method="cholesky"),
    "brand": Brand(3),
    "brand-cholesky": Brand(3, compress="cholesky"),
    "brand-eigh": Brand(3, form="eigh"),
    "foof": Foof(EXACT),
    "conjugate-gradient": ConjugateGradient(),
}
ABSOLUTE = {"damping": DAMPING, "damping_scale": "absolute", "clip": None}
NOW = Now(0, 0, 0.95, Damping(DAMPING, "absolute"), torch.tensor(True))
DATA = batch(9, 12, 5)

both_spaces = pytest.mark.parametrize("space", ["nicolaides", "residual"])
pytestmark = pytest.mark.filterwarnings("ignore:KFAC")


def small() -> nn.Module:
    return mlp(12, 14, 5)


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.children() if list(layer.parameters())]


def fisher_of(model: nn.Module, data: Batch, uses: Sequence[int] = ()) -> Tensor:
    """F = D (Σ v vᵀ) D, with √N of each layer on D's diagonal: N counts positions, as it does in A and G."""
    samples, layers = len(data[1]), layers_of(model)
    parts = sample_gradients(layers, loss_on(model, data), samples)
    uses = uses or [samples] * len(layers)
    return fisher([[v * count**0.5 for v, count in zip(own, uses, strict=True)] for own in parts], 1)


class Alone(NamedTuple):
    """The inner system's own step: v₁, the gradient before it, and its preconditioner."""

    first: list[Tensor]
    gradient: list[Tensor]
    preconditioner: KFAC


def steps_of(
    make: Callable[[], nn.Module], data: Batch, inner: Strategy, space: str, **options: object
) -> tuple[Tensor, Alone]:
    """The two-level step, and the inner system's."""
    model, plain = make(), make()
    within, alone = KFAC(model, TwoLevel(inner, space), **options), KFAC(plain, inner, **options)
    stepped(model, within, loss_of(model, data))
    loss_of(plain, data).backward()
    gradient = [layer_gradient(layer) for layer in layers_of(plain)]
    alone.step()
    first = [layer_gradient(layer) for layer in layers_of(plain)]
    return flat([layer_gradient(layer) for layer in layers_of(model)]), Alone(first, gradient, alone)


def dense_correction(
    inner: Alone, F: Tensor, space: str, damping: float = DAMPING, now: Now = NOW
) -> tuple[Tensor, Tensor]:
    """v₁ + R₀ᵀ (R₀ F R₀ᵀ + λI)⁻¹ R₀ (∇ − (F + λI) v₁) with every matrix formed, and R₀."""
    first, gradient, preconditioner = inner
    sizes = [part.numel() for part in first]
    v, g = flat(first), flat(gradient)
    if space == "nicolaides":
        vectors = [torch.ones(size, dtype=F.dtype) for size in sizes]
    else:
        residual = (g - F @ v).split(sizes)
        vectors = [
            layer.curvature.solve(part.reshape(matrix.shape), now).reshape(-1)
            for layer, part, matrix in zip(preconditioner._layers, residual, first, strict=True)
        ]
    R = torch.block_diag(*[(vector / vector.norm())[None] for vector in vectors])
    return v + R.T @ damped_solve(R @ F @ R.T, R @ (g - F @ v - damping * v), damping), R


@pytest.mark.parametrize("application", ["auto", "two-sided"])
@both_spaces
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_step_is_the_formula_with_the_whole_fisher_matrix(inner: Strategy, space: str, application: str):
    result, own = steps_of(small, DATA, inner, space, application=application, **ABSOLUTE)
    expected, _ = dense_correction(own, fisher_of(small(), DATA), space)
    # Condition (F + λ) about 1e2 on both levels.
    assert_near(result, expected, 1e-9)
    assert not torch.allclose(result, flat(own.first), rtol=0.01)


@both_spaces
def test_relative_damping_goes_by_the_largest_eigenvalue_of_the_coarse_matrix(space: str):
    result, own = steps_of(small, DATA, EXACT, space, damping=DAMPING, clip=None)
    F, now = fisher_of(small(), DATA), NOW._replace(damping=Damping(DAMPING, "relative"))
    _, R = dense_correction(own, F, space, 1.0, now)
    shift = DAMPING * torch.linalg.eigvalsh(R @ F @ R.T)[-1].item()
    # Two eigenvalues: four power iterations find the larger one up to (d₂/d₁)⁸.
    assert_near(result, dense_correction(own, F, space, shift, now)[0], 1e-3)


class Pooled(nn.Module):
    """A layer over positions, and one behind their mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 6, dtype=torch.float64)
        self.outer = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(inputs)).mean(1))


@pytest.mark.parametrize(("kind", "space"), [("linear", "nicolaides"), ("linear", "residual"), ("every", "nicolaides")])
def test_positions_are_summed_within_a_sample_and_blocks_have_the_scale_of_their_factors(kind: str, space: str):
    """Also in layers of every kind: indices, whole gradients, groups."""
    torch.manual_seed(1)
    labels = torch.randint(3, (8,))
    if kind == "linear":
        make, uses, inputs = Pooled, [8 * 5, 8], torch.randn(8, 5, 4, dtype=torch.float64)
    else:
        make, uses, inputs = (lambda: Words(9, 4, 3)), [8 * 5, 8, 8 * 4, 8], torch.randint(9, (8, 5))
    result, own = steps_of(make, (inputs, labels), EXACT, space, **ABSOLUTE)
    expected, _ = dense_correction(own, fisher_of(make(), (inputs, labels), uses), space)
    assert_near(result, expected, 1e-9)
    assert not own.preconditioner.report().unsupported


def test_a_step_without_rows_is_the_inner_step():
    results = []
    for system in (TwoLevel(EXACT), EXACT):
        model = small()
        preconditioner = KFAC(model, system, factor_every=2)
        for _ in range(2):
            stepped(model, preconditioner, loss_of(model, DATA))
        results.append(gradients(model))
    torch.testing.assert_close(results[0], results[1])


def test_a_layer_with_another_number_of_samples_takes_no_part():
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.third = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.second(torch.tanh(self.first(inputs)))
            return hidden.sum() + self.third(torch.tanh(hidden[:4])).square().sum()

    results = []
    for system in (TwoLevel(EXACT), EXACT):
        model = Halved()
        preconditioner = KFAC(model, system, clip=None)
        results.append(layer_steps(model, preconditioner, model(torch.ones(8, 6, dtype=torch.float64)) / 8))
    assert [torch.allclose(one, other) for one, other in zip(*results, strict=True)] == [False, False, True]
