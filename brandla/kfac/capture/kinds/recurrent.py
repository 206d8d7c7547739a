"""Recurrent cells, and recurrent layers that run step by step on request: their positions are time steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import _VF, Tensor, nn
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from brandla.kfac.capture.kinds.kind import Kind, overridden_forward, unusable
from brandla.kfac.capture.kinds.watched_forward import ForwardKind, WatchedForward, with_globals

# h and c. Without a c, it is h again.
_State: TypeAlias = tuple[Tensor, Tensor]
_Cell: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], _State]
_FUSED: tuple[Any, ...] = (nn.LSTM, nn.GRU, nn.RNN)


class CellKind(ForwardKind):
    """One weight of a cell: each call of the cell is a use of it."""

    types: ClassVar[tuple[type[Any], ...]] = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    # In a step that collects no rows, the cell runs unwatched, so there is no pair.
    pairs = False

    @classmethod
    def of(cls, module: nn.Module) -> list[Kind] | str | None:
        if not isinstance(module, cls.types):
            return None
        if overridden_forward(module, *cls.types) or (forward := RecurrentForward.of(module)) is None:
            return overridden_forward(module)
        reason = unusable(module, "weight_ih", "weight_hh")
        return reason or [cls(forward, f"weight_{name}", f"bias_{name}") for name in ("ih", "hh")]


class RecurrentKind(CellKind):
    """One weight of a recurrent layer: inputs and outputs are (time steps, samples, d)."""

    types = ()
    positions_first = True


def unrolled(module: nn.Module) -> list[Kind] | str:
    """Return the weights of a recurrent layer that will run step by step, or why they are left to the optimizer."""
    if overridden_forward(module, *_FUSED) or (forward := RecurrentForward.of(module)) is None:
        return overridden_forward(module)
    layer: Any = module
    if getattr(layer, "proj_size", 0):
        return "its outputs are projected (proj_size)"
    directions = ["", "_reverse"][: 1 + layer.bidirectional]
    names = [f"{of}_l{index}{end}" for index in range(layer.num_layers) for end in directions for of in ("ih", "hh")]
    reason = unusable(module, *(f"weight_{name}" for name in names))
    return reason or [RecurrentKind(forward, f"weight_{name}", f"bias_{name}" if layer.bias else "") for name in names]


class RecurrentForward(WatchedForward):
    """Runs a cell, or a recurrent layer one time step after another, and reports the products.

    A packed sequence becomes a padded batch, in the packed order. Its padding counts in no factor.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        layers = {name: partial(self._layer, cell) for name, cell in _CELLS.items()}
        cells = {f"{name}_cell": partial(self._cell, name, cell) for name, cell in _CELLS.items()}
        self.run_watched = with_globals(type(module).forward, _VF=SimpleNamespace(**layers, **cells))

    def _cell(self, name: str, cell: _Cell, inputs: Tensor, hx: Any, *weights: Any) -> Any:
        """Compute as torch's function for one cell, and leave arguments of the wrong shape to it."""
        states = hx if name == "lstm" else (hx, hx)
        if any(state.shape != (len(inputs), self.module.hidden_size) for state in states):
            return getattr(_VF, f"{name}_cell")(inputs, hx, *weights)
        products = [
            self.recorded(f"weight_{of}", part, linear(part, weight, bias))
            for of, part, weight, bias in zip(("ih", "hh"), (inputs, states[0]), weights[:2], weights[2:], strict=True)
        ]
        new_states = cell(*products, *states)
        return new_states if name == "lstm" else new_states[0]

    def _layer(self, cell: _Cell, inputs: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """Compute as torch's function for all layers. The data of a packed sequence come with their batch sizes."""
        batch_first = self.module.batch_first
        if isinstance(arguments[1], list):
            steps, *last = self._run_layers(cell, inputs.transpose(0, 1) if batch_first else inputs, arguments[0])
            return steps.transpose(0, 1) if batch_first else steps, *last
        steps, lengths = pad_packed_sequence(PackedSequence(inputs, arguments[0]))
        valid = (torch.arange(len(steps)) < lengths[:, None]).to(steps.device)
        steps, *last = self._run_layers(cell, steps, arguments[1], valid)
        return pack_padded_sequence(steps, lengths).data, *last

    def _run_layers(self, cell: _Cell, steps: Tensor, hx: Any, valid: Tensor | None = None) -> list[Tensor]:
        """Run (time steps, samples, d) through all layers; return their output, and the last states of each."""
        layer, directions = self.module, ["", "_reverse"][: 1 + self.module.bidirectional]
        h, c = hx if isinstance(layer, nn.LSTM) else (hx, hx)
        states = zip(h.unbind(), c.unbind(), strict=True)
        last_states: list[_State] = []
        for index in range(layer.num_layers):
            runs = [self._run(cell, f"l{index}{end}", steps, next(states), valid) for end in directions]
            steps = torch.cat([output for output, _ in runs], -1)
            last_states += [state for _, state in runs]
            if layer.dropout and index < layer.num_layers - 1:
                steps = dropout(steps, layer.dropout, layer.training)
        last = [torch.stack(part) for part in zip(*last_states, strict=True)]
        return [steps, *last] if isinstance(layer, nn.LSTM) else [steps, last[0]]

    def _run(self, cell: _Cell, name: str, steps: Tensor, state: _State, valid: Tensor | None) -> tuple[Tensor, _State]:
        """Run one layer in one direction; return h of all time steps, and the last state.

        Time steps of a sample that are not ``valid`` leave its state as it is.
        """
        layer, reverse = self.module, name.endswith("_reverse")
        of_input, of_hidden = (
            (getattr(layer, f"weight_{of}_{name}"), getattr(layer, f"bias_{of}_{name}", None)) for of in ("ih", "hh")
        )
        from_input = self.recorded(f"weight_ih_{name}", steps, linear(steps, *of_input), valid)
        # Zeros, added to the products with h. Their gradients are the output gradients of all time steps at once.
        zeros = torch.zeros_like(from_input).requires_grad_() * 1
        before, after = [], []
        times = reversed(range(len(steps))) if reverse else range(len(steps))
        for time in times:
            before.append(state[0].detach())
            h, c = cell(from_input[time], linear(state[0], *of_hidden) + zeros[time], *state)
            if valid is not None:
                is_valid = valid[:, time, None]
                h, c = torch.where(is_valid, h, state[0]), torch.where(is_valid, c, state[1])
            state = h, c
            after.append(h)
        if reverse:
            before, after = before[::-1], after[::-1]
        if after:
            self.recorded(f"weight_hh_{name}", torch.stack(before), zeros, valid)
        return torch.stack(after), state


def _lstm(from_input: Tensor, from_hidden: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    input_gate, forget_gate, candidate, output_gate = (from_input + from_hidden).chunk(4, -1)
    c = forget_gate.sigmoid() * c + input_gate.sigmoid() * candidate.tanh()
    return output_gate.sigmoid() * c.tanh(), c


def _gru(from_input: Tensor, from_hidden: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (reset, update, candidate), hidden = from_input.chunk(3, -1), from_hidden.chunk(3, -1)
    candidate = (candidate + (reset + hidden[0]).sigmoid() * hidden[2]).tanh()
    update = (update + hidden[1]).sigmoid()
    return (1 - update) * candidate + update * h, c


# By torch's name of a cell, the next (h, c) from the products with the input and with h, and from the last h and c.
_CELLS: dict[str, _Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda from_input, from_hidden, _, c: ((from_input + from_hidden).tanh(), c),
    "rnn_relu": lambda from_input, from_hidden, _, c: ((from_input + from_hidden).relu(), c),
}
