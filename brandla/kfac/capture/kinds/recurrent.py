"""Recurrent layers, run step by step where a user asks for that: positions are time steps. And their cells."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import _VF, Tensor, nn
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from brandla.kfac.capture.kinds.kind import Kind, own_forward, why_left
from brandla.kfac.capture.kinds.own_forward import ForwardKind, OwnForward, finding

# h and c, which is h again where there is none.
_State: TypeAlias = tuple[Tensor, Tensor]
_Cell: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], _State]
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
        if own_forward(module, *cls.types) or (forward := RecurrentForward.of(module)) is None:
            return own_forward(module)
        reason = why_left(module, "weight_ih", "weight_hh")
        return reason or [cls(forward, f"weight_{name}", f"bias_{name}") for name in ("ih", "hh")]


class RecurrentKind(CellKind):
    """One weight of a recurrent layer: inputs and outputs are (time steps, samples, d)."""

    types = ()
    positions_first = True


def unrolled(module: nn.Module) -> list[Kind] | str:
    """Return the weights of a recurrent layer that is to run step by step."""
    if own_forward(module, *_FUSED) or (forward := RecurrentForward.of(module)) is None:
        return own_forward(module)
    layer: Any = module
    if getattr(layer, "proj_size", 0):
        return "its outputs are projected (proj_size)"
    ways = ["", "_reverse"][: 1 + layer.bidirectional]
    names = [f"{of}_l{index}{way}" for index in range(layer.num_layers) for way in ways for of in ("ih", "hh")]
    reason = why_left(module, *(f"weight_{name}" for name in names))
    return reason or [RecurrentKind(forward, f"weight_{name}", f"bias_{name}" if layer.bias else "") for name in names]


class RecurrentForward(OwnForward):
    """Runs what a cell, or a recurrent layer, does with the products in sight: a layer one time step after another.

    A packed sequence becomes a padded batch, whose padding counts in no factor, in the order in which it is packed.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        layers = {name: partial(self._layer, cell) for name, cell in _CELLS.items()}
        cells = {f"{name}_cell": partial(self._cell, name, cell) for name, cell in _CELLS.items()}
        self.in_sight = finding(type(module).forward, _VF=SimpleNamespace(**layers, **cells))

    def _cell(self, name: str, cell: _Cell, inputs: Tensor, hx: Any, *weights: Any) -> Any:
        """As torch's function for one cell, which says what is wrong where it does not fit."""
        states = hx if name == "lstm" else (hx, hx)
        if any(state.shape != (len(inputs), self.module.hidden_size) for state in states):
            return getattr(_VF, f"{name}_cell")(inputs, hx, *weights)
        products = [
            self.recorded(f"weight_{of}", own, linear(own, weight, bias))
            for of, own, weight, bias in zip(("ih", "hh"), (inputs, states[0]), weights[:2], weights[2:], strict=True)
        ]
        after = cell(*products, *states)
        return after if name == "lstm" else after[0]

    def _layer(self, cell: _Cell, inputs: Tensor, *of_call: Any) -> tuple[Tensor, ...]:
        """As torch's function for all layers: of inputs, states and weights, or of packed data and its sizes first."""
        batch_first = self.module.batch_first
        if isinstance(of_call[1], list):
            steps, *last = self._through(cell, inputs.transpose(0, 1) if batch_first else inputs, of_call[0])
            return steps.transpose(0, 1) if batch_first else steps, *last
        steps, lengths = pad_packed_sequence(PackedSequence(inputs, of_call[0]))
        valid = (torch.arange(len(steps)) < lengths[:, None]).to(steps.device)
        steps, *last = self._through(cell, steps, of_call[1], valid)
        return pack_padded_sequence(steps, lengths).data, *last

    def _through(self, cell: _Cell, steps: Tensor, hx: Any, valid: Tensor | None = None) -> list[Tensor]:
        """Run (time steps, samples, d) through all layers; return their output, and the last states of each."""
        layer, ways = self.module, ["", "_reverse"][: 1 + self.module.bidirectional]
        h, c = hx if isinstance(layer, nn.LSTM) else (hx, hx)
        states = zip(h.unbind(), c.unbind(), strict=True)
        ended: list[_State] = []
        for index in range(layer.num_layers):
            runs = [self._run(cell, f"l{index}{way}", steps, next(states), valid) for way in ways]
            steps = torch.cat([output for output, _ in runs], -1)
            ended += [state for _, state in runs]
            if layer.dropout and index < layer.num_layers - 1:
                steps = dropout(steps, layer.dropout, layer.training)
        last = [torch.stack(part) for part in zip(*ended, strict=True)]
        return [steps, *last] if isinstance(layer, nn.LSTM) else [steps, last[0]]

    def _run(self, cell: _Cell, name: str, steps: Tensor, state: _State, valid: Tensor | None) -> tuple[Tensor, _State]:
        """Run one layer in one direction; return h of all time steps, and the last state.

        Time steps of a sample that are not ``valid`` leave its state as it is.
        """
        layer, reverse = self.module, name.endswith("_reverse")
        of_input, of_hidden = (
            (getattr(layer, f"weight_{of}_{name}"), getattr(layer, f"bias_{of}_{name}", None)) for of in ("ih", "hh")
        )
        made = self.recorded(f"weight_ih_{name}", steps, linear(steps, *of_input), valid)
        # Zeros, added to the products with h: their gradients are those of all time steps at once.
        added = torch.zeros_like(made).requires_grad_() * 1
        before, after = [], []
        times = reversed(range(len(steps))) if reverse else range(len(steps))
        for time in times:
            before.append(state[0].detach())
            h, c = cell(made[time], linear(state[0], *of_hidden) + added[time], *state)
            if valid is not None:
                is_there = valid[:, time, None]
                h, c = torch.where(is_there, h, state[0]), torch.where(is_there, c, state[1])
            state = h, c
            after.append(h)
        if reverse:
            before, after = before[::-1], after[::-1]
        if after:
            self.recorded(f"weight_hh_{name}", torch.stack(before), added, valid)
        return torch.stack(after), state


def _lstm(made: Tensor, hidden: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    taken, kept, new, shown = (made + hidden).chunk(4, -1)
    c = kept.sigmoid() * c + taken.sigmoid() * new.tanh()
    return shown.sigmoid() * c.tanh(), c


def _gru(made: Tensor, hidden: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (reset, kept, new), (of_reset, of_kept, of_new) = made.chunk(3, -1), hidden.chunk(3, -1)
    new = (new + (reset + of_reset).sigmoid() * of_new).tanh()
    kept = (kept + of_kept).sigmoid()
    return (1 - kept) * new + kept * h, c


# By torch's names: what makes the next h and c of the products with the input and with h, and of h and c.
_CELLS: dict[str, _Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda made, hidden, _, c: ((made + hidden).tanh(), c),
    "rnn_relu": lambda made, hidden, _, c: ((made + hidden).relu(), c),
}
