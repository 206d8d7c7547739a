"""Damping adapted to how well the curvature predicts the loss: the rule of Levenberg and Marquardt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brandla import _check
from brandla._sharded import gathered
from brandla.kfac.capture.layer import Layer
from brandla.kfac.values import Gradient, dense, inner_products


@dataclass(frozen=True)
class Adaptive:
    """Damping that follows the ratio of the loss's reduction to the reduction that the curvature predicts.

    If the ratio is above 3/4, the damping is multiplied by ``factor ** every``. If it is below 1/4, the damping is
    divided by it. `KFAC.adapt` measures the ratio every ``every`` steps, with one more forward pass and one read-back.

    Parameters
    ----------
    initial
        The first damping.
    every
        Steps between two measurements.
    factor
        In (0, 1): the change for each step.
    least, most
        Bounds of the damping.

    References
    ----------
    J. Martens, R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015, arXiv
    1503.05671, section 6.5.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, Adaptive
    >>> model, inputs = torch.nn.Linear(20, 5), torch.randn(8, 20)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> preconditioner = KFAC(model, damping=Adaptive(initial=0.1, every=5))
    >>> loss = model(inputs).square().mean()
    >>> loss.backward()
    >>> preconditioner.step()
    >>> optimizer.step()
    >>> ratio = preconditioner.adapt(loss, lambda: model(inputs).square().mean())
    """

    initial: float = 0.03
    every: int = 5
    factor: float = 0.95
    least: float = 1e-8
    most: float = 1e8

    def __post_init__(self) -> None:
        _check.count("Adaptive", "every", self.every, 1)
        if not 0 < self.factor < 1:
            _check.fail_value("Adaptive", f"factor must be in (0, 1); got {self.factor}")
        if not 0 < self.least <= self.initial <= self.most < math.inf:
            bounds = f"got {self.least}, {self.initial} and {self.most}"
            _check.fail_value("Adaptive", f"0 < least <= initial <= most < inf must hold; {bounds}")

    def next(self, damping: float, ratio: float) -> float:
        """Return the damping after a measurement."""
        change = self.factor**self.every
        if 0.75 < ratio < math.inf:
            return max(damping * change, self.least)
        # A non-finite loss, whose ratio is NaN or infinite, counts as badly predicted.
        return damping if 0.25 <= ratio < math.inf else min(damping / change, self.most)


class Trial:
    """The weights before a step, and the numbers from which the step's effect is predicted, by layer (*groups,)."""

    def __init__(self, layers: Sequence[Layer], steps: Sequence[Gradient], gradients: Sequence[Gradient]) -> None:
        self._layers = list(layers)
        self._before = [_part(layer, layer.kind.weight.detach()).clone() for layer in layers]
        self._slopes = [inner_products(*pair) for pair in zip(steps, gradients, strict=True)]
        # Squared lengths of the steps before the clip, without the bias.
        self._squares = [
            dense(step)[..., : layer.kind.shape[2]].square().sum((-2, -1))
            for layer, step in zip(layers, steps, strict=True)
        ]

    def predicted(self) -> Tensor:
        """Return the reduction −⟨∂W, δ⟩ − ½ ⟨δ, F δ⟩ that the damped curvature F predicts of the weights' change δ.

        With s = F⁻¹ ∂W and δ = −β s the reduction is β (1 − β/2) ⟨s, ∂W⟩. β is the optimizer's rate times the clip,
        measured from δ and the clipped step in the gradient. If the gradients are gone, this raises an error.
        """
        total: list[Tensor] = []
        for layer, before, slope, whole in zip(self._layers, self._before, self._slopes, self._squares, strict=True):
            gradient = layer.kind.weight.grad
            if gradient is None:
                message = f"KFAC.adapt: {layer.name}.weight has no gradient; call adapt before zero_grad()"
                raise RuntimeError(message)
            step = layer.kind.matrix(_part(layer, gradient).to(layer.shape.dtype))
            change = layer.kind.matrix((_part(layer, layer.kind.weight.detach()) - before).to(layer.shape.dtype))
            clipped = inner_products(step, step)
            rate = -inner_products(change, step) / torch.where(clipped > 0, clipped, 1)
            beta = rate * (clipped / torch.where(whole > 0, whole, 1)).sqrt()
            total.append((beta * (1 - beta / 2) * slope).sum().to(total[0].device if total else slope.device))
        return torch.stack(total).sum()


def _part(layer: Layer, parameter: Tensor) -> Tensor:
    """Return the layer's part of a tensor that has the parameter's shape and may be sharded."""
    return layer.kind.weight_part(gathered(parameter))
