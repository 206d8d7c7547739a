"""Two-level K-FAC against the whole Fisher matrix, formed explicitly in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KFAC, Brand, ConjugateGradient, Exact, Foof, Strategy, TwoLevel
from brandla.kfac.values import Damping, Now
from kfac.networks import batch, gradients, layer_gradient, mlp
from kfac.systems import assert_near, fisher, flat, layer_steps, linears, sample_gradients

DAMPING = 0.03
SPACES = ["nicolaides", "residual"]
INNER = {
    "exact": Exact(inverse_every=1),
    "cholesky": Exact(inverse_every=1, method="cholesky"),
    "brand": Brand(3),
    "brand-cholesky": Brand(3, compress="cholesky"),
    "brand-eigh": Brand(3, form="eigh"),
    "foof": Foof(Exact(inverse_every=1)),
}
ABSOLUTE = {"damping": DAMPING, "damping_scale": "absolute", "clip": None}
ALL = slice(None)
Loss = Callable[[nn.Module, slice], Tensor]
NOW = Now(0, 0, 0.95, Damping(DAMPING, "absolute"), torch.tensor(True))

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")


def cross_entropy(inputs: Tensor, labels: Tensor) -> Loss:
    return lambda model, some: nn.functional.cross_entropy(model(inputs[some]), labels[some])


class Alone(NamedTuple):
    """The inner system's own step: v₁, the gradient before it, and its preconditioner."""

    first: list[Tensor]
    gradient: list[Tensor]
    preconditioner: KFAC


def alone(model: nn.Module, inner: Strategy, loss: Loss, **options: object) -> Alone:
    preconditioner = KFAC(model, inner, **options)
    loss(model, ALL).backward()
    gradient = [layer_gradient(layer) for layer in linears(model)]
    preconditioner.step()
    return Alone([layer_gradient(layer) for layer in linears(model)], gradient, preconditioner)


def dense_correction(inner: Alone, F: Tensor, space: str, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """v₁ + R₀ᵀ (R₀ F R₀ᵀ + λI)⁻¹ R₀ (∇ − (F + λI) v₁) with every matrix formed, and R₀."""
    first, gradient, preconditioner = inner
    sizes = [part.numel() for part in first]
    v, g = flat(first), flat(gradient)
    if space == "nicolaides":
        vectors = [torch.ones(size, dtype=F.dtype) for size in sizes]
    else:
        residual = (g - F @ v).split(sizes)
        vectors = [
            layer.curvature.solve(part.reshape(matrix.shape), NOW).reshape(-1)
            for layer, part, matrix in zip(preconditioner._layers, residual, first, strict=True)
        ]
    R = torch.block_diag(*[(vector / vector.norm())[None] for vector in vectors])
    damped = F + damping * torch.eye(len(F), dtype=F.dtype)
    return v + R.T @ torch.linalg.solve(R @ damped @ R.T, R @ (g - damped @ v)), R


@pytest.mark.parametrize("application", ["auto", "two-sided"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_step_is_the_formula_with_the_whole_fisher_matrix(inner: Strategy, space: str, application: str):
    model, plain = mlp(12, 14, 5), mlp(12, 14, 5)
    loss = cross_entropy(*batch(9, 12, 5))
    F = fisher(sample_gradients(linears(model), lambda n: loss(model, slice(n, n + 1)), 9), 9)
    options = {**ABSOLUTE, "application": application}
    within, own = KFAC(model, TwoLevel(inner, space), **options), alone(plain, inner, loss, **options)
    expected, _ = dense_correction(own, F, space)
    result = flat(layer_steps(model, within, loss(model, ALL)))
    # Condition (F + λ) about 1e2 on both levels.
    assert_near(result, expected, 1e-9)
    assert not torch.allclose(result, flat(own.first), rtol=0.01)


@pytest.mark.parametrize("space", SPACES)
def test_relative_damping_goes_by_the_largest_eigenvalue_of_the_coarse_matrix(space: str):
    model, plain = mlp(12, 14, 5), mlp(12, 14, 5)
    loss = cross_entropy(*batch(9, 12, 5))
    F = fisher(sample_gradients(linears(model), lambda n: loss(model, slice(n, n + 1)), 9), 9)
    within = KFAC(model, TwoLevel(Exact(), space), damping=DAMPING, clip=None)
    own = alone(plain, Exact(), loss, damping=DAMPING, clip=None)
    now = NOW._replace(damping=Damping(DAMPING, "relative"))
    for layer in own.preconditioner._layers:
        layer.curvature = _Relative(layer.curvature, now)
    _, R = dense_correction(own, F, space, 1.0)
    shift = DAMPING * torch.linalg.eigvalsh(R @ F @ R.T)[-1].item()
    expected, _ = dense_correction(own, F, space, shift)
    # Two eigenvalues: four power iterations find the larger one up to (d₂/d₁)⁸.
    assert_near(flat(layer_steps(model, within, loss(model, ALL))), expected, 1e-3)


class _Relative:
    """A curvature that solves with relative damping, whatever it is told."""

    def __init__(self, curvature: object, now: Now) -> None:
        self._curvature, self._now = curvature, now

    def solve(self, gradient: Tensor, _: Now) -> Tensor:
        return self._curvature.solve(gradient, self._now)


@pytest.mark.parametrize("space", SPACES)
def test_no_other_correction_in_the_coarse_space_is_nearer_to_the_damped_natural_gradient(space: str):
    """The error against (F + λI)⁻¹∇ is orthogonal to the coarse space in the metric of F + λI."""
    model = mlp(12, 14, 5)
    loss = cross_entropy(*batch(9, 12, 5))
    F = fisher(sample_gradients(linears(model), lambda n: loss(model, slice(n, n + 1)), 9), 9)
    damped = F + DAMPING * torch.eye(len(F), dtype=F.dtype)
    plain = copy.deepcopy(model)
    own, within = alone(plain, Exact(), loss, **ABSOLUTE), KFAC(model, TwoLevel(Exact(), space), **ABSOLUTE)
    gradient, (_, R) = flat(own.gradient), dense_correction(own, F, space)
    result = flat(layer_steps(model, within, loss(model, ALL)))
    target = torch.linalg.solve(damped, gradient)

    def error(point: Tensor) -> float:
        return ((point - target) @ damped @ (point - target)).sqrt().item()

    assert error(result) < 0.99 * error(flat(own.first))
    assert (R @ (damped @ result - gradient)).norm() <= 1e-10 * gradient.norm()
    for direction in R:
        assert error(result + 0.01 * direction) > error(result)


def test_one_layer_of_one_weight_gets_the_damped_newton_step():
    """R₀ is the whole space: whatever v₁ is, v = (F + λI)⁻¹∇."""
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    inputs = torch.randn(7, 1, dtype=torch.float64)
    targets = torch.randn(7, 1, dtype=torch.float64)
    preconditioner = KFAC(layer, TwoLevel(Foof(Exact())), **ABSOLUTE)
    residuals = (layer(inputs) - targets).detach()
    (0.5 * (layer(inputs) - targets).square()).mean().backward()
    preconditioner.step()
    F, gradient = (residuals * inputs).square().mean(), (residuals * inputs).mean()
    torch.testing.assert_close(layer.weight.grad.squeeze(), gradient / (F + DAMPING))


class Pooled(nn.Module):
    """A layer over positions, and one behind their mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 6, dtype=torch.float64)
        self.outer = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(inputs)).mean(1))


@pytest.mark.parametrize("space", SPACES)
def test_positions_are_summed_within_a_sample_and_blocks_have_the_scale_of_their_factors(space: str):
    """F = D (Σ v vᵀ) D, with √N of each layer on D's diagonal: N counts positions, as it does in A and G."""
    model, plain = Pooled(), Pooled()
    inputs = torch.randn(8, 5, 4, dtype=torch.float64)
    loss = cross_entropy(inputs, torch.randint(3, (8,)))
    parts = sample_gradients(linears(model), lambda n: loss(model, slice(n, n + 1)), 8)
    F = fisher([[inner * 40**0.5, outer * 8**0.5] for inner, outer in parts], 1)
    own, within = alone(plain, Exact(), loss, **ABSOLUTE), KFAC(model, TwoLevel(Exact(), space), **ABSOLUTE)
    expected, _ = dense_correction(own, F, space)
    assert_near(flat(layer_steps(model, within, loss(model, ALL))), expected, 1e-9)


class Words(nn.Module):
    """Every kind of rows: indices with padding, whole gradients, groups, and positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 4, padding_idx=0)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 6, 2, groups=2)
        self.out = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.conv(self.norm(self.words(inputs)).mT)
        return self.out(torch.tanh(hidden).mean(-1))


def test_layers_of_every_kind_take_part():
    """R₀ ((F + λI) v − ∇) = 0, with F from autograd alone and R₀ of ones."""
    model = Words().double()
    inputs, labels = torch.randint(9, (8, 5)), torch.randint(3, (8,))
    layers = [model.words, model.norm, model.conv, model.out]
    uses = [8 * 5, 8, 8 * 4, 8]

    def flat_gradients() -> list[Tensor]:
        return [flat([parameter.grad for parameter in layer.parameters()]) for layer in layers]

    rows = []
    for n in range(8):
        model.zero_grad()
        (nn.functional.cross_entropy(model(inputs[n : n + 1]), labels[n : n + 1]) / 8).backward()
        rows.append(flat([part * count**0.5 for part, count in zip(flat_gradients(), uses, strict=True)]))
    v = torch.stack(rows)
    preconditioner = KFAC(model, TwoLevel(Exact(inverse_every=1)), **ABSOLUTE)
    model.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    sizes = [part.numel() for part in flat_gradients()]
    R = torch.block_diag(*[torch.full((1, size), size**-0.5, dtype=torch.float64) for size in sizes])
    gradient = flat(flat_gradients())
    preconditioner.step()
    result = flat(flat_gradients())
    assert not preconditioner.report().unsupported
    defect = R @ (v.T @ (v @ result) + DAMPING * result - gradient)
    assert defect.norm() <= 1e-9 * (R @ gradient).norm()


def test_a_step_without_rows_is_the_inner_step():
    results = []
    for system in (TwoLevel(Exact(inverse_every=1)), Exact(inverse_every=1)):
        model = mlp(12, 14, 5)
        preconditioner = KFAC(model, system, factor_every=2)
        inputs, labels = batch(9, 12, 5)
        for _ in range(2):
            layer_steps(model, preconditioner, nn.functional.cross_entropy(model(inputs), labels))
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

    results = {}
    for name, system in {"two": TwoLevel(Exact()), "one": Exact()}.items():
        model = Halved()
        preconditioner = KFAC(model, system, clip=None)
        results[name] = layer_steps(model, preconditioner, model(torch.ones(8, 6, dtype=torch.float64)) / 8)
    same = [torch.allclose(one, other) for one, other in zip(results["one"], results["two"], strict=True)]
    assert same == [False, False, True]


@pytest.mark.parametrize("space", SPACES)
def test_it_wraps_systems_that_keep_no_factors(space: str):
    model = mlp(12, 14, 5)
    preconditioner = KFAC(model, TwoLevel(ConjugateGradient(), space), clip=None)
    inputs, labels = batch(9, 12, 5)
    for part in layer_steps(model, preconditioner, nn.functional.cross_entropy(model(inputs), labels)):
        assert torch.isfinite(part).all()
