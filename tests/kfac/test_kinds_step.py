"""The step of every kind of layer against dense formulas, and against the Fisher matrix where it is exact."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from brandla.kfac import KFAC
from brandla.kfac.capture.layer import Layer
from kfac.networks import DENSE, EXACT, Conv1D, OwnLinear, Router, assert_dense_step, weighted
from kfac.systems import full_rank

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

SMALL_DAMPING = 1e-5
STRATEGIES = full_rank(12)


class Doubled(nn.Linear):
    """Its product is not one with its input, but is seen."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(2 * inputs).relu()


class Adapter(nn.Module):
    """Two matrices of one module, by functions and operators, with transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(3, 4))
        self.up_bias = nn.Parameter(torch.randn(4))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs @ self.down.transpose(0, 1)
        return torch.addmm(self.up_bias, hidden.tanh().flatten(0, -2), self.up).unflatten(0, inputs.shape[:-1])


MODULES = {
    "linear": (nn.Linear(40, 35), (6, 2, 40)),
    "conv": (nn.Conv2d(5, 30, 3, stride=3), (3, 5, 6, 6)),
    "conv-groups": (nn.Conv2d(10, 60, 3, groups=2), (4, 10, 4, 3)),
    "conv-depthwise": (nn.Conv1d(3, 6, 5, groups=3, padding="same", padding_mode="circular"), (4, 3, 8)),
    "conv-transposed": (nn.ConvTranspose1d(12, 30, 3, stride=2), (3, 12, 1)),
    "attention": (nn.MultiheadAttention(34, 2), (2, 6, 34)),
    "decoder": (nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0), (5, 2, 8)),
    "transposed": (Conv1D(40, 35), (6, 2, 40)),
    "own-type": (OwnLinear(40, 35), (6, 2, 40)),
    "layer-norm": (nn.LayerNorm(6), (5, 3, 6)),
    "batch-norm": (nn.BatchNorm2d(3), (5, 3, 2, 2)),
    "rms-norm": (nn.RMSNorm(6), (5, 6)),
    "embedding": (nn.Embedding(20, 40), (3, 4)),
}
# Kinds that are found by what they compute, at least in part; small ones in every form.
FOUND = {
    "transposed-square": Conv1D(6, 6, bias=False),
    "own-type-no-bias": OwnLinear(bias=False),
    "own-type-square": OwnLinear(6, 6),
    "own-forward": Doubled(6, 4),
    "router": Router(bias=False),
    "two-matrices": Adapter(),
    "bilinear": nn.Bilinear(6, 6, 4),
}
MODULES |= {name: (module, (5, 2, 6)) for name, module in FOUND.items()}
# Large enough for Brand, in both sharings.
LARGE = {"linear", "conv", "transposed", "own-type"}
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
    inputs = torch.randint(20, shape) if kind == "embedding" else torch.randn(shape, dtype=torch.float64)
    two = (inputs, inputs.flip(0))
    arguments = {"attention": (inputs,) * 3, "bilinear": two, "decoder": two}.get(kind, (inputs,))
    plain = module(*arguments)
    preconditioner = KFAC(module, STRATEGIES[system], application=application, sharing=sharing, **DENSE)
    output = module(*arguments)
    torch.testing.assert_close(output, plain, rtol=0, atol=0)
    (weighted(output) / len(inputs)).backward()
    assert_dense_step(preconditioner)
    report = preconditioner.report()
    assert report.unsupported == {}
    assert kind not in LARGE or {row.reason for row in report.factors} == {""}
    assert len(preconditioner.parameters()) == len(list(module.parameters()))
    preconditioner.remove()
    assert "forward" not in vars(module)


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


def step_against_fisher(
    model: nn.Module, name: str, inputs: Tensor, targets: Tensor, terms: tuple[Tensor, Tensor], sharing: str
) -> None:
    """The step of one layer against the mean over gradients of terms, by torch.func."""
    rows = per_sample_gradients(model, *terms, name)
    model.zero_grad()
    preconditioner = KFAC(model, EXACT, sharing=sharing, damping=SMALL_DAMPING, damping_scale="absolute", clip=None)
    (0.5 * (model(inputs) - targets).square().sum(1).mean()).backward()
    weight = model.get_parameter(name)
    gradient = weight.grad.clone()
    preconditioner.step()
    preconditioner.remove()
    layer = next(layer for layer in preconditioner._layers if layer.kind.weight is weight)
    assert_solves(rows.T @ rows / len(rows), weight.grad, gradient, layer)


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
    inputs, targets = factorial(model, torch.randn(30, 2, 4, 4, dtype=torch.float64))
    for name in ("0.weight", "1.weight", "3.weight"):
        step_against_fisher(model, name, inputs, targets, (inputs, targets), "reduce")


def test_expand_is_the_fisher_matrix_of_a_linear_network_with_a_term_for_each_position():
    """1 × 1 convolutions: a position is a sample of its own; the mean over samples and positions divides by both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 3, 1, bias=False), nn.Conv1d(3, 3, 1, bias=False)).double()
    points = torch.randn(60, 3, 1, dtype=torch.float64)
    # Each position as a sample, and five of them as the positions of one.
    terms = factorial(model, points)
    inputs, targets = (part.unflatten(0, (-1, 5)).squeeze(-1).mT for part in terms)
    for name in ("0.weight", "1.weight"):
        step_against_fisher(model, name, inputs, targets, terms, "expand")
