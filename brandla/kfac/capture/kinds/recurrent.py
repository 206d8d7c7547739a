"""Recurrent layers, run step by step where a user asks for that: positions are time steps. And their cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map_only

from brandla.kfac.capture.kinds.kind import Kind, own_forward, why_left
from brandla.kfac.capture.kinds.own_forward import ForwardKind, OwnForward

_FUSED: tuple[Any, ...] = (nn.LSTM, nn.GRU, nn.RNN)


class CellKind(ForwardKind):
    """One weight of a cell: each call of the cell is a use of it."""

    types: ClassVar[tuple[type[Any], ...]] = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    # A step that takes nothing in runs the cell as it is.
    pairs = False

    @classmethod
    def of(cls, module: nn.Module) -> list[Kind] | str | None:
        if not isinstance(module, cls.types):
            return None
        forward = CellForward.of(module)
        if forward is None or own_forward(module, *cls.types):
            return own_forward(module)
        reason = why_left(module, "weight_ih", "weight_hh")
        return reason or [cls(forward, f"weight_{name}", f"bias_{name}") for name in ("ih", "hh")]


class CellForward(OwnForward):
    """Computes what a cell does, with its products in sight, while they are to be captured."""

    def forward(self, inputs: Tensor, hx: Any = None) -> Any:
        cell = self.module
        shape = (*inputs.shape[:-1], cell.hidden_size)
        states = (inputs.new_zeros(shape),) * 2 if hx is None else hx if isinstance(cell, nn.LSTMCell) else (hx, hx)
        fits = inputs.ndim in (1, 2) and all(state.shape == shape for state in states)
        if torch.compiler.is_compiling() or not fits or not self.is_watched():
            return type(cell).forward(cell, inputs, hx)
        h, c = states
        products = [
            self.recorded(f"weight_{of}", own, linear(own, getattr(cell, f"weight_{of}"), getattr(cell, f"bias_{of}")))
            for of, own in (("ih", inputs), ("hh", h))
        ]
        h, c = _cell(cell)(products[0], products[1], h, c)
        return (h, c) if isinstance(cell, nn.LSTMCell) else h


class RecurrentKind(CellKind):
    """One weight of a recurrent layer: inputs and gradients are (time steps, samples, d)."""

    types = ()
    positions_first = True


def unrolled(module: nn.Module) -> list[Kind] | str:
    """Return the weights of a recurrent layer that is to run step by step."""
    forward = RecurrentForward.of(module)
    if forward is None or own_forward(module, *_FUSED):
        return own_forward(module)
    layer: Any = module
    if getattr(layer, "proj_size", 0):
        return "its outputs are projected (proj_size)"
    names = [f"{of}_l{index}{way}" for index in range(layer.num_layers) for way in _ways(layer) for of in ("ih", "hh")]
    reason = why_left(module, *(f"weight_{name}" for name in names))
    return reason or [RecurrentKind(forward, f"weight_{name}", f"bias_{name}" if layer.bias else "") for name in names]


class RecurrentForward(OwnForward):
    """Computes what a recurrent layer does, one time step after another, while the products are to be captured.

    A packed sequence becomes a padded batch, whose padding counts in no factor, in the order in which it is packed.
    Other calls are left to the module: those with no gradients, and in steps that take no data in.
    """

    def forward(self, inputs: Any, hx: Any = None) -> Any:
        layer = self.module
        is_wanted = not torch.compiler.is_compiling() and self.is_watched()
        if is_wanted and isinstance(inputs, PackedSequence):
            steps, lengths = pad_packed_sequence(PackedSequence(inputs.data, inputs.batch_sizes))
            valid = (torch.arange(len(steps)) < lengths[:, None]).to(steps.device)
            if hx is not None:
                hx = layer.permute_hidden(hx, inputs.sorted_indices)
            steps, last = self._through(steps, hx, valid)
            packed = inputs._replace(data=pack_padded_sequence(steps, lengths).data)
            return packed, layer.permute_hidden(last, inputs.unsorted_indices)
        if not is_wanted or not isinstance(inputs, Tensor) or inputs.ndim not in (2, 3):
            return type(layer).forward(layer, inputs, hx)
        if inputs.ndim == 2:
            steps, last = self._through(inputs[:, None], tree_map_only(Tensor, lambda part: part[:, None], hx))
            return steps[:, 0], tree_map_only(Tensor, lambda part: part[:, 0], last)
        steps, last = self._through(inputs.transpose(0, 1) if layer.batch_first else inputs, hx)
        return steps.transpose(0, 1) if layer.batch_first else steps, last

    def _through(self, steps: Tensor, hx: Any, valid: Tensor | None = None) -> tuple[Tensor, Any]:
        """Run (time steps, samples, d) through all layers; return their output, and the last states of each."""
        layer, ways = self.module, _ways(self.module)
        if hx is None:
            h = c = steps.new_zeros(layer.num_layers * len(ways), steps.shape[1], layer.hidden_size)
        else:
            h, c = hx if isinstance(layer, nn.LSTM) else (hx, hx)
        states = zip(h.unbind(), c.unbind(), strict=True)
        ended: list[tuple[Tensor, Tensor]] = []
        for index in range(layer.num_layers):
            runs = [self._run(f"l{index}{way}", steps, *next(states), valid, reverse=bool(way)) for way in ways]
            steps = torch.cat([output for output, _ in runs], -1)
            ended += [state for _, state in runs]
            if layer.dropout and index < layer.num_layers - 1:
                steps = dropout(steps, layer.dropout, layer.training)
        last = tuple(torch.stack(part) for part in zip(*ended, strict=True))
        return steps, last if isinstance(layer, nn.LSTM) else last[0]

    def _run(
        self, name: str, steps: Tensor, h: Tensor, c: Tensor, valid: Tensor | None, *, reverse: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run one layer in one direction; return h of all time steps, and the last h and c.

        Time steps of a sample that are not ``valid`` leave its h and c as they are.
        """
        layer, cell = self.module, _cell(self.module)
        of_input, of_hidden = (
            (getattr(layer, f"weight_{of}_{name}"), getattr(layer, f"bias_{of}_{name}", None)) for of in ("ih", "hh")
        )
        made = self.recorded(f"weight_ih_{name}", steps, linear(steps, *of_input), valid)
        # Zeros, added to the products with h: their gradients are those of all time steps at once.
        added = torch.zeros_like(made).requires_grad_() * 1
        before, after = [], []
        times = reversed(range(len(steps))) if reverse else range(len(steps))
        for time in times:
            before.append(h.detach())
            new_h, new_c = cell(made[time], linear(h, *of_hidden) + added[time], h, c)
            if valid is not None:
                is_there = valid[:, time, None]
                new_h, new_c = torch.where(is_there, new_h, h), torch.where(is_there, new_c, c)
            h, c = new_h, new_c
            after.append(h)
        if reverse:
            before, after = before[::-1], after[::-1]
        if after:
            self.recorded(f"weight_hh_{name}", torch.stack(before), added, valid)
        return torch.stack(after), (h, c)


def _ways(layer: Any) -> list[str]:
    return ["", "_reverse"] if layer.bidirectional else [""]


def _cell(layer: Any) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return what makes the next h and c of a layer's products with the input and with h, its h and its c."""
    if isinstance(layer, nn.LSTM | nn.LSTMCell):
        return _lstm
    if isinstance(layer, nn.GRU | nn.GRUCell):
        return _gru
    activation = torch.relu if layer.nonlinearity == "relu" else torch.tanh
    return lambda made, hidden, h, c: (activation(made + hidden), c)


def _lstm(made: Tensor, hidden: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    taken, kept, new, shown = (made + hidden).chunk(4, -1)
    c = kept.sigmoid() * c + taken.sigmoid() * new.tanh()
    return shown.sigmoid() * c.tanh(), c


def _gru(made: Tensor, hidden: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (reset, kept, new), (of_reset, of_kept, of_new) = made.chunk(3, -1), hidden.chunk(3, -1)
    new = (new + (reset + of_reset).sigmoid() * of_new).tanh()
    kept = (kept + of_kept).sigmoid()
    return (1 - kept) * new + kept * h, c
