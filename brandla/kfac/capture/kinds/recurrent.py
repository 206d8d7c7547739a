"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``, run step by step where a user asks for that: positions are time steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from brandla.kfac.capture.kinds.kind import Kind, Record, Uses, is_called_as, own_forward, why_left
from brandla.kfac.capture.kinds.linear import LinearKind
from brandla.kfac.capture.kinds.own_forward import OwnForward

# From a layer's products with the input and with h, its h and its c, to the next h and c.
Cell: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_FUSED: tuple[Any, ...] = (nn.LSTM, nn.GRU, nn.RNN)


class RecurrentKind(LinearKind):
    """One weight of a recurrent layer: inputs and gradients are (time steps, samples, d)."""

    leaves_out = False
    positions_first = True
    may_lead = False
    # A step that takes nothing in runs the fused layer.
    pairs = False

    def __init__(self, forward: RecurrentForward, weight: str, bias: str) -> None:
        super().__init__(forward.module, weight, bias)
        self.part = weight
        self._forward = forward

    def attach(self, record: Record) -> list[Any]:
        """Have the time steps call ``record``."""
        return [self._forward.attach(self, record)]

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return samples, time steps and features."""
        return Uses(inputs.transpose(0, 1), gradient.transpose(0, 1))


def unrolled(module: nn.Module) -> list[Kind] | str:
    """Return the weights of a recurrent layer that is to run step by step."""
    forward = RecurrentForward.of(module)
    if forward is None or not is_called_as(module, *_FUSED):
        return own_forward(module)
    layer: Any = module
    if getattr(layer, "proj_size", 0):
        return "its outputs are projected (proj_size)"
    names = [f"{of}_l{index}{way}" for index in range(layer.num_layers) for way in _ways(layer) for of in ("ih", "hh")]
    reason = why_left(module, *(f"weight_{name}" for name in names))
    return reason or [RecurrentKind(forward, f"weight_{name}", f"bias_{name}" if layer.bias else "") for name in names]


class RecurrentForward(OwnForward):
    """Computes what a recurrent layer does, one time step after another, while the products are to be captured.

    Other calls are left to the module: those with no gradients, in steps that take no data in, and of packed sequences,
    which are not captured.
    """

    def forward(self, inputs: Any, hx: Any = None) -> Any:
        """As the module's."""
        layer = self.module
        is_wanted = any(map(self.is_watched, self._records)) and not torch.compiler.is_compiling()
        if not is_wanted or not isinstance(inputs, Tensor) or inputs.ndim not in (2, 3):
            return type(layer).forward(layer, inputs, hx)
        batched, first = inputs.ndim == 3, inputs.ndim == 3 and layer.batch_first
        steps = inputs.transpose(0, 1) if first else inputs if batched else inputs[:, None]
        states = self._start(hx, steps, batched=batched)
        ended: list[tuple[Tensor, Tensor]] = []
        for index in range(layer.num_layers):
            outputs = []
            for way in _ways(layer):
                output, state = self._run(f"l{index}{way}", steps, *states[len(ended)], reverse=bool(way))
                outputs.append(output)
                ended.append(state)
            steps = torch.cat(outputs, -1)
            if layer.dropout and index < layer.num_layers - 1:
                steps = dropout(steps, layer.dropout, layer.training)
        last = [torch.stack(part) if batched else torch.cat(part) for part in zip(*ended, strict=True)]
        output = steps.transpose(0, 1) if first else steps if batched else steps[:, 0]
        return output, tuple(last) if isinstance(layer, nn.LSTM) else last[0]

    def _start(self, hx: Any, steps: Tensor, *, batched: bool) -> list[tuple[Tensor, Tensor]]:
        """Return h and c of each layer and direction before the first time step."""
        layer = self.module
        count = layer.num_layers * len(_ways(layer))
        if hx is None:
            h = c = steps.new_zeros(count, steps.shape[1], layer.hidden_size)
        else:
            h, c = hx if isinstance(layer, nn.LSTM) else (hx, hx)
            h, c = (h, c) if batched else (h[:, None], c[:, None])
        return list(zip(h.unbind(), c.unbind(), strict=True))

    def _run(
        self, name: str, steps: Tensor, h: Tensor, c: Tensor, *, reverse: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run one layer in one direction; return h of all time steps, and the last h and c."""
        layer, cell = self.module, _cell(self.module)
        of_input, of_hidden = (
            (getattr(layer, f"weight_{of}_{name}"), getattr(layer, f"bias_{of}_{name}", None)) for of in ("ih", "hh")
        )
        made = self.recorded(f"weight_ih_{name}", steps, linear(steps, *of_input))
        # Zeros, added to the products with h: their gradients are those of all time steps at once.
        added = torch.zeros_like(made).requires_grad_() * 1
        before, after = [], []
        times = reversed(range(len(steps))) if reverse else range(len(steps))
        for time in times:
            before.append(h.detach())
            h, c = cell(made[time], linear(h, *of_hidden) + added[time], h, c)
            after.append(h)
        if reverse:
            before, after = before[::-1], after[::-1]
        if after:
            self.recorded(f"weight_hh_{name}", torch.stack(before), added)
        return torch.stack(after), (h, c)


def _ways(layer: Any) -> list[str]:
    """Name the directions."""
    return ["", "_reverse"] if layer.bidirectional else [""]


def _cell(layer: Any) -> Cell:
    if isinstance(layer, nn.LSTM):
        return _lstm
    if isinstance(layer, nn.GRU):
        return _gru
    return _relu if layer.nonlinearity == "relu" else _tanh


def _lstm(made: Tensor, hidden: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    taken, kept, new, shown = (made + hidden).chunk(4, -1)
    c = kept.sigmoid() * c + taken.sigmoid() * new.tanh()
    return shown.sigmoid() * c.tanh(), c


def _gru(made: Tensor, hidden: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (reset, kept, new), (of_reset, of_kept, of_new) = made.chunk(3, -1), hidden.chunk(3, -1)
    new = (new + (reset + of_reset).sigmoid() * of_new).tanh()
    kept = (kept + of_kept).sigmoid()
    return (1 - kept) * new + kept * h, c


def _tanh(made: Tensor, hidden: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return (made + hidden).tanh(), c


def _relu(made: Tensor, hidden: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return (made + hidden).relu(), c
