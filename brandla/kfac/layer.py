"""One Linear layer under K-FAC: its two factors, and its gradient preconditioned by them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from brandla.damped import kron_damped_solve
from brandla.kfac.capture import Capture, Pair, Sharing
from brandla.kfac.strategy import Average, State, Strategy
from brandla.lowrank import LowRankEigh, LowRankSym

Scale = Literal["relative", "absolute"]


@dataclass
class Factor:
    """One Kronecker factor: the strategy it got, and why if not the one asked for, with the state it keeps."""

    n: int
    asked: Strategy
    strategy: Strategy = field(init=False)
    reason: str = ""
    count: int = 0
    state: State = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.strategy = self.asked

    def absorb(self, columns: Tensor, decay: float, scale: float) -> None:
        """Take in ``scale`` · A Aᵀ for new columns A (n, k), choosing the strategy at the first ones."""
        if self.count == 0:
            replacement = self.strategy.substitute(self.n, columns.shape[-1])
            if replacement is not None:
                self.strategy, self.reason = replacement
            self.state = self.strategy.start(self.n, columns.dtype, columns.device)
        self.count += 1
        average = Average.at(self.count, decay)
        # In the weight, the normalisation costs no scaled copy of the columns.
        self.strategy.absorb(self.state, columns, average._replace(weight=scale * average.weight))

    def damped(self, damping: float, scale: Scale) -> tuple[LowRankEigh | LowRankSym, Tensor]:
        """Return the factor and λ; a factor that is zero so far gets λ = 1, which leaves its side as it is."""
        lowrank = self.strategy.lowrank(self.state)
        largest = lowrank.largest_eigenvalue()
        if scale == "absolute":
            return lowrank, torch.full_like(largest, damping)
        return lowrank, torch.where(largest > 0, damping * largest, 1)


class Layer:
    """A Linear weight (d_out, d_in) and its bias, with the input factor A and the output factor G.

    A is the mean of a aᵀ over samples and positions, a being the input with a 1 appended for the bias; G is the mean of
    g gᵀ, g being the gradient of one term of a loss that is a mean over them (``docs/kfac.md``).
    """

    def __init__(self, name: str, module: nn.Linear, strategy: Strategy, sharing: Sharing) -> None:
        self.name = name
        self.weight = cast(nn.Parameter, module.weight)
        bias: nn.Parameter | None = module.bias
        self.bias = bias if bias is not None and bias.requires_grad else None
        self.sharing = sharing
        self.capture = Capture(self.weight)
        self.capture.attach(module)
        d_out, d_in = module.weight.shape
        self.input = Factor(d_in + (self.bias is not None), strategy)
        self.output = Factor(d_out, strategy)
        self._stacked_rows: tuple[Tensor, Tensor] | None = None
        # Whether the gradient is the sum of the captured pairs: None until looked at, once.
        self.linear: bool | None = None

    @property
    def started(self) -> bool:
        """Whether the factors hold data."""
        return self.input.count > 0

    @property
    def dtype(self) -> torch.dtype:
        """Precision of factors and of the step: that of the weight, but at least float32."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def forget_rows(self) -> None:
        """Drop the rows stacked for a step."""
        self._stacked_rows = None

    def absorb(self, decay: float) -> None:
        """Take the captured pairs into both factors."""
        if self.sharing == "expand":
            inputs, gradients = self._rows()
        else:
            inputs, gradients = self._stacked([pair.reduced() for pair in self.capture.pairs])
        count = len(inputs)
        self.input.absorb(inputs.mT, decay, 1 / count)
        self.output.absorb(gradients.mT, decay, count)

    def step(self, damping: float, scale: Scale, clip: float | None, *, may_be_linear: bool) -> None:
        """Overwrite the gradient with (G + λ_G I)⁻¹ (∂W) (A + λ_A I)⁻¹, clipped."""
        left, left_damping = self.output.damped(damping, scale)
        right, right_damping = self.input.damped(damping, scale)
        tails = {"left_tail": self.output.strategy.tail, "right_tail": self.input.strategy.tail}
        pair = self._pair() if may_be_linear else None
        if pair is None:
            step = kron_damped_solve(left, right, self._gradient(), left_damping, right_damping, **tails)
            self._write(step * _clipping(step.square().mean(), clip))
            return
        first, second = kron_damped_solve(left, right, pair, left_damping, right_damping, **tails)
        # ‖P Qᵀ‖_F² = ⟨PᵀP, QᵀQ⟩: the clip, too, needs no d_out × d_in matrix.
        mean_square = ((first.mT @ first) * (second.mT @ second)).sum() / (first.shape[0] * second.shape[0])
        self._write_product(first * _clipping(mean_square, clip), second)

    def _pair(self) -> tuple[Tensor, Tensor] | None:
        """Return (P, Q) with gradient P Qᵀ where it is cheaper to apply than the gradient, and is all of it."""
        columns = sum(pair.samples * pair.positions for pair in self.capture.pairs)
        ranks = (
            self.output.strategy.lowrank(self.output.state).rank + self.input.strategy.lowrank(self.input.state).rank
        )
        if columns == 0 or self.linear is False or columns > 2 * ranks or not self.capture.gradient_is_pairs():
            return None
        inputs, gradients = self._rows()
        pair = gradients.mT, inputs.mT
        if self.linear is None:
            self.linear = self._is_gradient(*pair)
        return pair if self.linear else None

    def _is_gradient(self, first: Tensor, second: Tensor) -> bool:
        """Compare P Qᵀ with the gradient, once in a layer's life: a weight used elsewhere in the loss shows here."""
        gradient = self._gradient()
        difference = torch.linalg.matrix_norm(first @ second.mT - gradient)
        eps = max(torch.finfo(part.dtype).eps for part in (*self.capture.pairs[0], self.weight))
        bound = 8 * eps * torch.linalg.matrix_norm(first) * torch.linalg.matrix_norm(second)
        return bool(difference <= bound)

    def _rows(self) -> tuple[Tensor, Tensor]:
        """One row for every sample and position, stacked once a step for both the factors and the application."""
        if self._stacked_rows is None:
            self._stacked_rows = self._stacked([pair.rows() for pair in self.capture.pairs])
        return self._stacked_rows

    def _stacked(self, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
        """Rows of inputs, with the 1 of the bias, and rows of gradients, in the factors' dtype."""
        inputs = torch.cat([pair.inputs for pair in pairs]).to(self.dtype)
        gradients = torch.cat([pair.gradients for pair in pairs]).to(self.dtype)
        if self.bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        return inputs, gradients

    def _gradient(self) -> Tensor:
        assert self.weight.grad is not None
        gradient = self.weight.grad.to(self.dtype)
        if self.bias is None:
            return gradient
        bias = torch.zeros_like(self.bias) if self.bias.grad is None else self.bias.grad
        return torch.cat([gradient, bias[:, None].to(self.dtype)], dim=1)

    def _write(self, step: Tensor) -> None:
        assert self.weight.grad is not None
        self.weight.grad.copy_(step[:, : self.weight.shape[1]])
        self._write_bias(step[:, -1])

    def _write_product(self, first: Tensor, second: Tensor) -> None:
        assert self.weight.grad is not None
        d_in = self.weight.shape[1]
        if self.weight.dtype == self.dtype:
            torch.mm(first, second[:d_in].mT, out=self.weight.grad)
        else:
            self.weight.grad.copy_(first @ second[:d_in].mT)
        self._write_bias(first @ second[-1])

    def _write_bias(self, step: Tensor) -> None:
        if self.bias is not None and self.bias.grad is not None:
            self.bias.grad.copy_(step)


def _clipping(mean_square: Tensor, clip: float | None) -> Tensor | float:
    """min(1, clip / RMS), on the device."""
    if clip is None:
        return 1.0
    return (clip / mean_square.sqrt()).clamp(max=1.0)
