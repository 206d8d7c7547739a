"""The step of every kind of layer against dense formulas, and against the Fisher matrix where it is exact."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from brandla.kfac import KFAC, Exact, Strategy
from brandla.kfac.capture.layer import Layer
from kfac.systems import full_rank

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

DAMPING = 0.03
SMALL_DAMPING = 1e-5
# Of two orders of summation, magnified by the condition of the damped factors, at most 1e5 on either side.
TOLERANCE = 1e-8
STRATEGIES = full_rank(12)
MODULES = {
    "linear": (nn.Linear(40, 35), (6, 2, 40)),
    "conv": (nn.Conv2d(5, 30, 3, stride=3), (3, 5, 6, 6)),
    "conv-groups": (nn.Conv2d(10, 60, 3, groups=2), (4, 10, 4, 3)),
    "conv-depthwise": (nn.Conv1d(3, 6, 5, groups=3, padding="same", padding_mode="circular"), (4, 3, 8)),
    "conv-transposed": (nn.ConvTranspose1d(12, 30, 3, stride=2), (3, 12, 1)),
    "attention": (nn.MultiheadAttention(34, 2), (2, 6, 34)),
    "layer-norm": (nn.LayerNorm(6), (5, 3, 6)),
    "batch-norm": (nn.BatchNorm2d(3), (5, 3, 2, 2)),
    "rms-norm": (nn.RMSNorm(6), (5, 6)),
    "embedding": (nn.Embedding(20, 40), (3, 4)),
}


def output_of(module: nn.Module, inputs: Tensor) -> Tensor:
    return module(inputs, inputs, inputs)[0] if isinstance(module, nn.MultiheadAttention) else module(inputs)


def gradients_of(preconditioner: KFAC) -> list[Tensor]:
    return [layer.gradient() for layer in preconditioner._layers]


def dense_step(layer: Layer, damping: float) -> Tensor:
    """(G + λ_G I)⁻¹ ∂W (A + λ_A I)⁻¹ by float64 inverses of all groups, from the rows."""
    rows = layer.rows("loss", None)
    assert rows is not None
    inputs, gradients, gradient = rows.inputs, rows.gradients, layer.gradient()
    if layer.kind.single:
        return gradient @ damped_inverse(rows.uses * inputs.mT @ inputs, damping)
    if layer.kind.one_hot:
        inputs = nn.functional.one_hot(inputs, layer.shape.d_in).double()
    A, G = inputs.mT @ inputs / rows.uses, rows.uses * gradients.mT @ gradients
    return damped_inverse(G, damping) @ gradient @ damped_inverse(A, damping)


def damped_inverse(factor: Tensor, damping: float) -> Tensor:
    """(M + damping · I)⁻¹."""
    return torch.linalg.inv(factor + damping * torch.eye(factor.shape[-1], dtype=factor.dtype))


def backward(model: nn.Module, inputs: Tensor, seed: int = 3) -> None:
    output = output_of(model, inputs)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    (output - targets).square().flatten(1).sum(1).mean().backward()


# Every kind of layer with a dense and a low-rank system, and every system with groups on both sides.
PAIRS = [
    (kind, system) for kind in MODULES for system in STRATEGIES if kind == "conv-groups" or system in ("exact", "brand")
]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("application", ["auto", "two-sided"])
@pytest.mark.parametrize(("kind", "system"), PAIRS)
def test_one_batch_equals_the_dense_formula(kind: str, system: str, application: str, sharing: str):
    """With groups, in both forms of the application, in both sharings, by every strategy at full rank."""
    module, shape = MODULES[kind]
    module = copy.deepcopy(module).double()
    torch.manual_seed(1)
    preconditioner = KFAC(
        module,
        STRATEGIES[system],
        damping=DAMPING,
        clip=None,
        application=application,
        sharing=sharing,
        damping_scale="absolute",
    )
    indices = torch.randint(20, shape, generator=torch.Generator().manual_seed(0))
    backward(module, indices if kind == "embedding" else torch.randn(shape, dtype=torch.float64))
    expected = [dense_step(layer, DAMPING) for layer in preconditioner._layers]
    preconditioner.step()
    for actual, wanted in zip(gradients_of(preconditioner), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=TOLERANCE * float(wanted.abs().max()))


def per_sample_gradients(model: nn.Module, inputs: Tensor, targets: Tensor, name: str) -> Tensor:
    """Gradients of ½ ‖f(x) − y‖² of each sample by one parameter, (samples, numbers)."""
    parameters = {key: part.detach() for key, part in model.named_parameters()}

    def loss(own: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (functional_call(model, own, (one[None],))[0] - target).square().sum()

    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, targets)[name].flatten(1)


class MeanOverPositions(nn.Module):
    """Average all dimensions after the channels."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(2).mean(2)


def factorial(model: nn.Module, points: Tensor) -> tuple[Tensor, Tensor]:
    """Each point with each residual of a scaled basis: the residuals' second moment is I, whatever the point."""
    with torch.no_grad():
        outputs = model(points)
    residuals = torch.eye(outputs[0].numel(), dtype=points.dtype) * math.sqrt(outputs[0].numel())
    residuals = residuals.reshape(-1, *outputs.shape[1:])
    count = len(residuals)
    return points.repeat_interleave(count, 0), outputs.repeat_interleave(count, 0) - residuals.repeat(
        len(points), *[1] * (residuals.ndim - 1)
    )


def step_against_fisher(model: nn.Module, name: str, sharing: str, points: Tensor, scale: float) -> None:
    """The step of one layer against ``scale`` times the Fisher matrix, from gradients of samples by torch.func."""
    inputs, targets = factorial(model, points)
    rows = per_sample_gradients(model, inputs, targets, name)
    fisher = scale * rows.T @ rows / len(rows)
    model.zero_grad()
    preconditioner = KFAC(
        model, Exact(inverse_every=1), sharing=sharing, damping=SMALL_DAMPING, damping_scale="absolute", clip=None
    )
    (0.5 * (model(inputs) - targets).square().flatten(1).sum(1).mean()).backward()
    weight = model.get_parameter(name)
    gradient = weight.grad.clone()
    preconditioner.step()
    preconditioner.remove()
    layer = next(layer for layer in preconditioner._layers if layer.kind.weight is weight)
    assert_solves(fisher, weight.grad, gradient, layer)


def assert_solves(fisher: Tensor, step: Tensor, gradient: Tensor, layer: Layer) -> None:
    """F · step = ∂W but for λ: by 2 λ / (smallest nonzero eigenvalue of the factors), and by ε / λ² of rounding."""
    factors = [side.state["dense"] / side.state["total"] for _, side in layer.curvature.factors()]
    values = torch.cat([torch.linalg.eigvalsh(factor) for factor in factors])
    bound = 2 * SMALL_DAMPING / float(values[values > 1e-9].min()) + 2e-16 / SMALL_DAMPING**2
    assert bound < 0.05
    error = torch.linalg.vector_norm(fisher @ step.flatten() - gradient.flatten())
    assert error <= bound * torch.linalg.vector_norm(gradient)


def test_reduce_is_the_fisher_matrix_of_a_deep_linear_convolutional_network():
    """Convolutions, 1 × 1 after the first so that the positions' gradients agree, and an average over positions."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2, bias=False), nn.Conv2d(3, 4, 1, bias=False), MeanOverPositions(), nn.Linear(4, 3, bias=False)
    ).double()
    points = torch.randn(30, 2, 4, 4, dtype=torch.float64)
    for name in ("0.weight", "1.weight", "3.weight"):
        step_against_fisher(model, name, "reduce", points, 1.0)


def test_expand_is_the_fisher_matrix_of_a_linear_network_with_a_term_for_each_position():
    """1 × 1 convolutions: position is a sample of its own; the mean over samples and positions divides by both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 3, 1, bias=False), nn.Conv1d(3, 3, 1, bias=False)).double()
    points = torch.randn(12, 3, 5, dtype=torch.float64)
    residuals = torch.eye(3, dtype=torch.float64) * 3**0.5
    inputs = points.repeat_interleave(3, 0)
    targets = model(inputs).detach() - residuals.repeat(12, 1)[:, :, None]
    # Terms are positions: a sample for each, of the same network on one position.
    single_inputs = inputs.movedim(1, 2).flatten(0, 1)[:, :, None]
    single_targets = targets.movedim(1, 2).flatten(0, 1)[:, :, None]
    for name in ("0.weight", "1.weight"):
        rows = per_sample_gradients(model, single_inputs, single_targets, name)
        fisher = rows.T @ rows / len(rows)
        model.zero_grad()
        preconditioner = KFAC(model, Exact(inverse_every=1), damping=SMALL_DAMPING, damping_scale="absolute", clip=None)
        (0.5 * (model(inputs) - targets).square().sum(1).mean()).backward()
        weight = model.get_parameter(name)
        gradient = weight.grad.clone()
        preconditioner.step()
        preconditioner.remove()
        layer = next(layer for layer in preconditioner._layers if layer.kind.weight is weight)
        assert_solves(fisher, weight.grad, gradient, layer)


@pytest.mark.parametrize("name", ["1", "3"])
def test_blocks_of_scale_and_shift_are_those_of_the_fisher_matrix(name: str):
    """The 2 × 2 blocks of the mean of gradients' outer products; those between channels are left out."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.GroupNorm(2, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    inputs, targets = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    parts = [per_sample_gradients(model, inputs, targets, f"{name}.{part}") for part in ("weight", "bias")]
    rows = torch.stack(parts, -1)
    blocks = torch.einsum("nci,ncj->cij", rows, rows) / len(rows)
    preconditioner = KFAC(model, Exact(inverse_every=1), damping=0.1, damping_scale="absolute", clip=None)
    (0.5 * (model(inputs) - targets).square().sum(1).mean()).backward()
    layer = next(layer for layer in preconditioner._layers if layer.name == name)
    expected = torch.linalg.solve(blocks + 0.1 * torch.eye(2), layer.gradient().mT).mT
    preconditioner.step()
    torch.testing.assert_close(layer.gradient(), expected)
    assert {row.strategy.partition("(")[0] for row in preconditioner.report().factors if row.layer == name} == {
        "Blocks"
    }


class Graph(nn.Module):
    """Two graph convolutions: features are averaged over neighbours, then given to a Linear."""

    def __init__(self, neighbours: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.neighbours = neighbours
        self.first = nn.Linear(6, 5, dtype=torch.float64)
        self.second = nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, features: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(self.neighbours @ features))
        return self.second(self.neighbours @ hidden)


def test_a_graph_layer_is_a_linear_of_aggregated_features():
    torch.manual_seed(1)
    adjacency = (torch.rand(12, 12) < 0.3).double() + torch.eye(12, dtype=torch.float64)
    neighbours = (adjacency / adjacency.sum(1, keepdim=True)).to_sparse()
    model, features = Graph(neighbours), torch.randn(12, 6, dtype=torch.float64)
    labels = torch.randint(3, (12,))
    preconditioner = KFAC(model, Exact(inverse_every=1), damping=DAMPING, damping_scale="absolute", clip=None)
    nn.functional.cross_entropy(model(features), labels).backward()
    first, second = preconditioner._layers
    torch.testing.assert_close(first.rows("loss", None).inputs[:, :6], neighbours @ features)
    expected = [dense_step(layer, DAMPING) for layer in (first, second)]
    preconditioner.step()
    torch.testing.assert_close(gradients_of(preconditioner), expected)


@pytest.mark.parametrize("strategy", [STRATEGIES["brand"], STRATEGIES["brand-cholesky"]], ids=["eigh", "cholesky"])
def test_brand_with_reduce_takes_as_many_columns_as_samples(strategy: Strategy):
    """On a convolution whose positions would be more than the order of both factors: nothing falls back."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 40, 3, padding=1)
    preconditioner = KFAC(conv, strategy, sharing="reduce")
    for _ in range(3):
        conv.zero_grad()
        conv(torch.randn(8, 4, 9, 9)).square().mean().backward()
        (layer,) = preconditioner._layers
        rows = layer.rows("loss", None)
        assert rows.inputs.shape == (8, 37)
        assert rows.gradients.shape == (8, 40)
        preconditioner.step()
    report = preconditioner.report()
    assert {row.strategy.partition("(")[0] for row in report.factors} == {"Brand"}
    assert {row.reason for row in report.factors} == {""}
    assert torch.isfinite(conv.weight.grad).all()
