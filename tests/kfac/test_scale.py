"""How many terms a loss has, once told: the G of its own gradients is that of the model's labels, in expectation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KBFGS, KFAC, Strategy, Woodbury
from kfac.networks import EXACT, stepped

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

DOUBLE = torch.float64


class Mean(nn.Module):
    """Average over positions."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(1)


class Attended(nn.Module):
    """Self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attention(inputs, inputs, inputs)[0]


def of_samples(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules, nn.Tanh(), Mean(), nn.Linear(4, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: of_samples(nn.Linear(5, 4)), (2, 6, 5)),
    "more-dimensions": (lambda: of_samples(nn.Linear(5, 4), nn.Flatten(1, 2)), (2, 2, 3, 5)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)), (2, 2, 3, 3)),
    "attention": (lambda: of_samples(Attended()), (2, 5, 4)),
    "embedding": (lambda: of_samples(nn.Embedding(7, 4)), (2, 5)),
    "scale": (lambda: of_samples(nn.LayerNorm(4)), (2, 5, 4)),
}
# A term at each of two positions of the output, which four of the first layer go into.
SEGMENTATION = (
    lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.Tanh(), nn.AvgPool1d(2), nn.Conv1d(4, 3, 1)),
    (1, 2, 4),
)
CASES = {
    **{f"{name}-{way}": (*case, way) for name, case in NETWORKS.items() for way in ("expand", "reduce")},
    "segmentation": (*SEGMENTATION, "expand"),
}


def drawn(shape: tuple[int, ...], *, indices: bool) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(7, shape) if indices else torch.randn(shape, dtype=DOUBLE)


def of_gradients(preconditioner: KFAC) -> list[Tensor]:
    """The factors that are made of gradients: G, or the blocks of scale and shift."""
    curvatures = [layer.curvature for layer in preconditioner._layers]
    factors = [own.input if own.output is None else own.output for own in curvatures]
    return [factor.strategy.average(factor.state) for factor in factors]


def told_step(preconditioner: KFAC, inputs: Tensor, labels: Tensor, *, tells: bool = True) -> list[Tensor]:
    outputs = preconditioner._model(inputs)
    if tells:
        preconditioner.curvature(outputs)
    stepped(preconditioner._model, preconditioner, nn.functional.cross_entropy(outputs, labels))
    return of_gradients(preconditioner)


@pytest.mark.parametrize(("make", "shape", "sharing"), CASES.values(), ids=CASES)
def test_the_mean_over_the_models_own_labels_is_the_exact_factor(
    make: Callable[[], nn.Module], shape: tuple[int, ...], sharing: str
):
    """The mean over all labels of two terms, each with its probability."""
    torch.manual_seed(0)
    model = make().double()
    inputs = drawn(shape, indices=isinstance(model[0], nn.Embedding))
    outputs = model(inputs).detach()
    p = outputs.softmax(1).movedim(1, -1).reshape(2, 3)
    found: dict[str, list[Tensor]] = {}
    for kind in ("type-2", "empirical"):
        preconditioner = KFAC(model, EXACT, curvature=kind, sharing=sharing, decay=0.0)
        weighted = []
        for labels in product(range(3), repeat=2):
            target = torch.tensor(labels).reshape(outputs.movedim(1, -1).shape[:-1])
            weight = p[0, labels[0]] * p[1, labels[1]]
            weighted.append([weight * own for own in told_step(preconditioner, inputs, target)])
        found[kind] = [sum(parts) for parts in zip(*weighted, strict=True)]
        preconditioner.remove()
    torch.testing.assert_close(found["empirical"], found["type-2"])


def test_untold_each_use_is_a_term():
    """Four positions of each of two samples: four times as much as for one term a sample."""
    torch.manual_seed(0)
    model = NETWORKS["convolution"][0]().double()
    inputs, labels = drawn((2, 2, 3, 3), indices=False), torch.tensor([0, 2])
    told, untold = (told_step(KFAC(model, EXACT), inputs, labels, tells=tells) for tells in (True, False))
    torch.testing.assert_close(untold, [4 * told[0], told[1]])


class Pooled(nn.Module):
    """The mean over the positions with data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 4, dtype=DOUBLE), nn.Linear(4, 3, dtype=DOUBLE)

    def forward(self, inputs: Tensor, valid: Tensor) -> Tensor:
        hidden = self.first(inputs).tanh() * valid[..., None]
        return self.last(hidden.sum(1) / valid.sum(1, keepdim=True).clamp_min(1))


LENGTHS = (2, 4, 1)


def backward(preconditioner: KFAC, rows: slice, *, extra: int = 0, scale: float = 1.0) -> None:
    """The mean over three samples, some of which come with padding, and ``extra`` samples of weight 0."""
    inputs, labels = drawn((4, 6, 5), indices=False), torch.tensor([0, 2, 1, 0])
    lengths = torch.tensor([*LENGTHS[rows], *[0] * extra])
    inputs, labels = (torch.cat([part[rows], part[3 : 3 + extra]]) for part in (inputs, labels))
    inputs = inputs[:, : 6 if extra else int(lengths.max())]
    valid = torch.arange(inputs.shape[1]) < lengths[:, None]
    preconditioner.mask(valid)
    outputs = preconditioner._model(inputs, valid)
    weights = (lengths > 0).double()
    preconditioner.curvature(outputs, weights=weights if extra else None)
    losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
    (scale * (losses * weights).sum() / 3).backward()


def apart(preconditioner: KFAC) -> None:
    for index in range(3):
        backward(preconditioner, slice(index, index + 1))


def after_one_that_was_given_up(preconditioner: KFAC) -> None:
    backward(preconditioner, slice(0, 2))
    preconditioner._model.zero_grad()
    backward(preconditioner, slice(0, 3))


WAYS: dict[str, Callable[[KFAC], None]] = {
    "padded": lambda own: backward(own, slice(0, 3)),
    "accumulated": lambda own: [backward(own, slice(0, 2)), backward(own, slice(2, 3))],
    "weights": lambda own: backward(own, slice(0, 3), extra=1),
    "scaled": lambda own: backward(own, slice(0, 3), scale=1024.0),
    "given-up": after_one_that_was_given_up,
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("way", WAYS)
def test_terms_are_counted_whatever_the_batch_looks_like(way: str, sharing: str):
    """G = M Σ γ γᵀ with M = 3, of the samples one by one without padding."""
    model = Pooled()
    reference = KFAC(model, EXACT, sharing=sharing, application="two-sided")
    apart(reference)
    rows = reference._layers[0].rows("loss", None)
    reference.step()
    (expected, _), reference_step = of_gradients(reference), model.first.weight.grad.clone()
    reference.remove()
    torch.testing.assert_close(expected, 3 * rows.gradients.mT @ rows.gradients)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=way == "scaled")
    scaler.scale(torch.ones(()))
    preconditioner = KFAC(model, EXACT, sharing=sharing, scaler=scaler)
    WAYS[way](preconditioner)
    scaler.unscale_(torch.optim.SGD(model.parameters(), 0.1))
    preconditioner.step()
    torch.testing.assert_close(of_gradients(preconditioner)[0], expected)
    torch.testing.assert_close(model.first.weight.grad, reference_step)


@pytest.mark.parametrize("of_positions", [False, True])
def test_the_natural_gradient_of_a_batch_has_the_same_scale(of_positions: bool):
    """F = M Σ v vᵀ over samples, for a loss with a term for each sample or each position."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False, dtype=DOUBLE)
    inputs = drawn((3, 4, 3), indices=False)
    outputs = layer(inputs)
    terms = outputs.flatten(0, 1) if of_positions else outputs.mean(1)
    v = torch.stack([torch.autograd.grad(own.sum(), layer.weight, retain_graph=True)[0] for own in terms.square()])
    v = v.unflatten(0, (3, -1)).sum(1).flatten(1) / len(terms)
    preconditioner = KFAC(layer, Woodbury(), damping=0.1, damping_scale="absolute", clip=None)
    outputs = layer(inputs)
    terms = outputs.flatten(0, 1) if of_positions else outputs.mean(1)
    preconditioner.curvature(terms, loss="mse")
    terms.square().sum(1).mean().backward()
    F = len(terms) * v.T @ v + 0.1 * torch.eye(6, dtype=DOUBLE)
    expected = torch.linalg.solve(F, layer.weight.grad.flatten())
    preconditioner.step()
    torch.testing.assert_close(layer.weight.grad.flatten(), expected)


def passes(strategy: Strategy, *, tells: bool) -> list[Tensor]:
    """Two steps, each with a second pass."""
    torch.manual_seed(0)
    model = of_samples(nn.Linear(5, 4)).double()
    preconditioner = KFAC(model, strategy, clip=None)
    inputs, labels = drawn((2, 6, 5), indices=False), torch.tensor([0, 2])
    for _ in range(2):
        for take in (preconditioner.step, preconditioner.second_pass):
            model.zero_grad()
            outputs = model(inputs)
            if tells:
                preconditioner.curvature(outputs)
            nn.functional.cross_entropy(outputs, labels).backward()
            take()
            if take == preconditioner.step:
                torch.optim.SGD(model.parameters(), 0.1).step()
    return [part.detach() for part in model.parameters()]


def test_second_passes_compare_gradients_as_they_are():
    torch.testing.assert_close(passes(KBFGS(), tells=True), passes(KBFGS(), tells=False), rtol=0, atol=0)


def test_a_number_of_terms_that_comes_too_late_is_refused():
    model = of_samples(nn.Linear(5, 4)).double()
    preconditioner = KFAC(model, EXACT)
    outputs = model(drawn((2, 6, 5), indices=False))
    outputs.square().mean().backward()
    preconditioner.curvature(outputs, loss="mse")
    with pytest.raises(RuntimeError, match=r"KFAC.step: curvature\(outputs\) was called after .*; call it before that"):
        preconditioner.step()
