"""Small networks, steps of training, and the dense K-FAC formula in float64 that steps are compared with."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from brandla.kfac import KFAC, Exact, Strategy

Batch = tuple[Tensor, Tensor]
Tensors = Tensor | Iterable[Tensor]
EXACT = Exact(inverse_every=1)
# The options that `assert_dense_step` expects.
DENSE: dict[str, Any] = {"damping": 0.03, "damping_scale": "absolute", "clip": None}


def mlp(*widths: int, seed: int = 0, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Sequential:
    """Return a ReLU network whose activations overwrite their input."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=bias, dtype=dtype), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def pooled(*modules: nn.Module, width: int = 4) -> nn.Sequential:
    """Return modules over positions, followed by a mean over positions and a Linear."""
    mean = nn.AdaptiveAvgPool2d((1, None)), nn.Flatten()
    return nn.Sequential(*modules, nn.Tanh(), *mean, nn.Linear(width, 3)).double()


def encoder() -> nn.Sequential:
    """Return a layer of a transformer, followed by a Linear."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, dtype=torch.float64)
    return nn.Sequential(layer, nn.Linear(6, 6, dtype=torch.float64))


class Words(nn.Module):
    """A network with every kind of rows: indices with padding, whole gradients, groups, positions; and attention."""

    def __init__(
        self, words: int, width: int, classes: int, *, channels: int = 6, kernel: int = 2, attention: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(words, width, padding_idx=0)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True) if attention else None
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, channels, kernel, groups=2)
        self.out = nn.Linear(channels, classes)
        self.activation = torch.tanh
        self.double()

    def forward(self, indices: Tensor) -> Tensor:
        vectors = self.words(indices)
        if self.attention is not None:
            vectors = vectors + self.attention(vectors, vectors, vectors, need_weights=False)[0]
        return self.out(self.activation(self.conv(self.norm(vectors).mT)).mean(-1))


def batch(count: int, d_in: int, classes: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Batch:
    """Return normal inputs and random labels."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, d_in, generator=generator, dtype=dtype)
    return inputs, torch.randint(classes, (count,), generator=generator)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def loss_of(model: nn.Module, data: Batch, preconditioner: KFAC | None = None) -> Tensor:
    """Return the cross-entropy of a batch, and call `KFAC.curvature` with its outputs if asked."""
    outputs = model(data[0])
    if preconditioner is not None:
        preconditioner.curvature(outputs)
    return nn.functional.cross_entropy(outputs, data[1])


def stepped(model: nn.Module, preconditioner: KFAC, loss: Tensor) -> list[Tensor]:
    """Take one backward pass and one step, and return copies of all gradients."""
    model.zero_grad()
    loss.backward()
    preconditioner.step()
    return gradients(model)


def lone_step(
    model: nn.Module, loss: Callable[[KFAC], Tensor], strategy: Strategy = EXACT, **options: Any
) -> list[Tensor]:
    """Return the gradients after one unclipped step of a new preconditioner, which is then removed."""
    preconditioner = KFAC(model, strategy, **{"clip": None} | options)
    after = stepped(model, preconditioner, loss(preconditioner))
    preconditioner.remove()
    return after


def train(
    model: nn.Module,
    preconditioner: KFAC,
    data: Iterable[Batch],
    rate: float = 0.1,
    loss: Callable[[nn.Module, Batch], Tensor] = loss_of,
) -> None:
    """Take a step of SGD for each batch."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for of_step in data:
        stepped(model, preconditioner, loss(model, of_step))
        optimizer.step()


def average(preconditioner: KFAC, side: str = "input", layer: int = 0) -> Tensor:
    """Return A or G of a layer from a factor that keeps the dense average."""
    factor = getattr(preconditioner._layers[layer].curvature, side)
    return factor.form.average(factor.state)


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    """Assert that all weights have the same bits."""
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def layer_gradient(layer: nn.Module) -> Tensor:
    """Return a copy of a layer's gradients as one matrix: one row per output, the bias as the last column."""
    parts = (parameter.grad for parameter in layer.parameters(recurse=False))
    return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)


class Step(NamedTuple):
    """A step of a Linear layer: its rows with the bias's 1, their gradients, and ∂W before and after."""

    inputs: Tensor
    outputs: Tensor
    gradient: Tensor
    result: Tensor

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A, and G for a mean loss."""
        count = len(self.inputs)
        return self.inputs.T @ self.inputs / count, count * self.outputs.T @ self.outputs


def layer_step(layer: nn.Linear, preconditioner: KFAC, data: Batch) -> Step:
    """Take a step on the cross-entropy of one layer's outputs for a batch."""
    layer.zero_grad()
    outputs = layer(data[0])
    outputs.retain_grad()
    nn.functional.cross_entropy(outputs, data[1]).backward()
    gradient = layer_gradient(layer)
    preconditioner.step()
    inputs = data[0] if layer.bias is None else with_one(data[0])
    return Step(inputs, outputs.grad, gradient, layer_gradient(layer))


def with_one(inputs: Tensor) -> Tensor:
    """Append the 1 of the bias to each row."""
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)


def damped_inverse(factor: Tensor, damping: float, largest: Tensor | None = None) -> Tensor:
    """Return (M + damping · λ_max I)⁻¹; ``largest`` replaces λ_max if given."""
    shift = damping * (torch.linalg.eigvalsh(factor)[-1] if largest is None else largest)
    return torch.linalg.inv(factor + shift * torch.eye(len(factor), dtype=factor.dtype))


def weighted(output: Tensor, seed: int = 5) -> Tensor:
    """Return a sum of outputs with random weights; of a tuple, the first entry counts."""
    output = output[0] if isinstance(output, tuple) else output
    generator = torch.Generator().manual_seed(seed)
    return (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()


def one_hot(indices: Tensor, count: int) -> Tensor:
    """Return a one-hot row for each index; −1 gives a row of zeros."""
    return nn.functional.one_hot(indices + 1, count + 1)[:, 1:].double()


def assert_dense_step(preconditioner: KFAC, tolerance: float = 1e-8) -> None:
    """Assert that a step is (G + λI)⁻¹ ∂W (A + λI)⁻¹ in each layer and group, by dense inverses from captured rows.

    The product of the rows must be the gradient, unless positions are summed first.
    """
    expected = []
    for layer in preconditioner._layers:
        rows, gradient = layer.rows("loss", None), layer.gradient()
        assert rows is not None
        if layer.kind.single:
            factors = [rows.uses * rows.inputs.mT @ rows.inputs]
        else:
            inputs = one_hot(rows.inputs, layer.shape.d_in) if layer.kind.one_hot else rows.inputs
            if layer.sharing == "expand":
                torch.testing.assert_close(rows.gradients.mT @ inputs, gradient)
            factors = [inputs.mT @ inputs / rows.uses, rows.uses * rows.gradients.mT @ rows.gradients]
        eyes = (DENSE["damping"] * torch.eye(factor.shape[-1], dtype=factor.dtype) for factor in factors)
        A, *G = (torch.linalg.inv(factor + eye) for factor, eye in zip(factors, eyes, strict=True))
        expected.append((G[0] @ gradient if G else gradient) @ A)
    preconditioner.step()
    # The two sums differ in order. The condition of the damped factors, at most 1e5 per side, magnifies rounding.
    assert_near([layer.gradient() for layer in preconditioner._layers], expected, tolerance)


def assert_near(result: Tensors, expected: Tensors, tolerance: float = 1e-6) -> None:
    """Compare relative to the largest entry, for several tensors each by itself."""
    ones, others = ([part] if isinstance(part, Tensor) else part for part in (result, expected))
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


def through_a_file(content: Any, *, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


class OwnLinear(nn.Module):
    def __init__(self, d_in: int = 6, d_out: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(d_out, dtype=torch.float64)) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight, self.bias)


class Router(OwnLinear):
    """A module that does not return its product, so that products inside its forward pass must be watched."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(inputs)
        return logits.softmax(-1), logits.argmax(-1)


class Conv1D(OwnLinear):
    """A Linear with a transposed weight, as in transformers."""

    def __init__(self, d_in: int = 6, d_out: int = 4, bias: bool = True) -> None:
        super().__init__(d_in, d_out, bias)
        self.weight = nn.Parameter(self.weight.detach().mT.contiguous() / d_in**0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])
        output = flat @ self.weight if self.bias is None else torch.addmm(self.bias, flat, self.weight)
        return output.view(*inputs.shape[:-1], self.weight.shape[1])


class RMSNorm(nn.Module):
    """The norm of Llama and T5; with ``offset`` 1 that of Gemma."""

    def __init__(self, width: int = 6, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, dtype=torch.float64))
        self.offset = offset

    def forward(self, inputs: Tensor) -> Tensor:
        normal = inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + 1e-6)
        return normal * (self.offset + self.weight)
