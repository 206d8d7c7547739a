"""Cells, and packed sequences: the rows are those of Linears in their place, and of the sequences one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence

from brandla.kfac import EKFAC, KFAC, register
from brandla.kfac.capture.kinds import like
from kfac.networks import DENSE, EXACT, assert_all_near, assert_dense_step, gradients, weighted, with_one

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

DOUBLE = torch.float64


class Products(nn.Module):
    """A cell by two Linears."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.name = type(cell).__name__
        self.ih, self.hh = (
            nn.Linear(*own.shape[::-1], bias=cell.bias, dtype=DOUBLE) for own in (cell.weight_ih, cell.weight_hh)
        )
        self.load_state_dict({".".join(reversed(name.split("_"))): own for name, own in cell.state_dict().items()})

    def forward(self, inputs: Tensor, state: Any = None) -> Any:
        h, c = (inputs.new_zeros(len(inputs), 5),) * 2 if state is None else self._pair(state)
        made, hidden = self.ih(inputs), self.hh(h)
        if self.name == "RNNCell":
            return (made + hidden).tanh()
        if self.name == "GRUCell":
            reset, kept = (made + hidden)[:, :10].sigmoid().chunk(2, 1)
            return kept * h + (1 - kept) * (made[:, 10:] + reset * hidden[:, 10:]).tanh()
        taken, kept, new, shown = (made + hidden).chunk(4, 1)
        c = kept.sigmoid() * c + taken.sigmoid() * new.tanh()
        return shown.sigmoid() * c.tanh(), c

    def _pair(self, state: Any) -> tuple[Tensor, Tensor]:
        return state if isinstance(state, tuple) else (state, state)


def through(cell: nn.Module) -> Tensor:
    """Three time steps of four samples."""
    torch.manual_seed(1)
    state = None
    for inputs in torch.randn(3, 4, 6, dtype=DOUBLE):
        state = cell(inputs, state)
    return torch.stack(state) if isinstance(state, tuple) else state


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_is_two_linears(make: Any, bias: bool, sharing: str):
    torch.manual_seed(0)
    cell = make(6, 5, bias=bias, dtype=DOUBLE)
    plain, found = through(cell), {}
    for model in (cell, Products(cell)):
        preconditioner = KFAC(model, EXACT, sharing=sharing, clip=None)
        output = through(model)
        torch.testing.assert_close(output, plain)
        output.square().mean().backward()
        preconditioner.step()
        report = preconditioner.report()
        assert report.unsupported == {}
        found[type(model)] = {name: part.grad for name, part in model.named_parameters()}
        if model is cell:
            assert {row.layer for row in report.factors} == {"weight_ih", "weight_hh"}
            assert [layer.kind.weight is cell.weight_ih for layer in preconditioner._layers] == [True, False]
    own = [found[make]["_".join(reversed(name.split(".")))] for name in found[Products]]
    assert_all_near(own, found[Products].values())


def test_a_cell_takes_single_samples_and_leaves_other_arguments_to_the_module():
    cell = nn.GRUCell(6, 5, dtype=DOUBLE)
    preconditioner = KFAC(cell, EXACT)
    cell(torch.randn(6, dtype=DOUBLE)).sum().backward()
    assert [layer.rows("loss", None).uses for layer in preconditioner._layers] == [1, 1]
    with pytest.raises(RuntimeError, match="hidden"):
        cell(torch.randn(2, 6, dtype=DOUBLE), torch.zeros(2, 4, dtype=DOUBLE))


@pytest.fixture
def _unrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(like, "_REGISTERED", {})
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        register(kind, like="unrolled")


@pytest.mark.usefixtures("_unrolled")
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True, "bidirectional": True, "num_layers": 2}, {"bias": False}], ids=str
)
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN, partial(nn.RNN, nonlinearity="relu")])
def test_a_recurrent_layer_is_unrolled_where_a_user_asks(make: Callable[..., nn.RNNBase], options: dict):
    torch.manual_seed(0)
    module = make(4, 5, dtype=DOUBLE, **options)
    inputs = torch.randn(3, 6, 4, dtype=DOUBLE)
    plain = module(inputs)
    weighted(plain).backward()
    expected = gradients(module)
    module.zero_grad()
    preconditioner = KFAC(module, EXACT, **DENSE)
    found = module(inputs)
    torch.testing.assert_close(found, plain)
    weighted(found).backward()
    torch.testing.assert_close(gradients(module), expected)
    positions = {layer.rows("loss", None).positions for layer in preconditioner._layers}
    assert positions == {6 if "batch_first" in options else 3}
    assert_dense_step(preconditioner)
    assert preconditioner.report().unsupported == {}


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(length, 4, dtype=DOUBLE, generator=generator) for length in (3, 6, 1, 3)]


def states(module: nn.RNNBase) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    count = module.num_layers * (1 + module.bidirectional)
    return [torch.randn(count, 4, 5, dtype=DOUBLE, generator=generator) for _ in range(2)]


def loss_of(found: tuple[Any, Any]) -> Tensor:
    output, last = found
    parts = [output.data if isinstance(output, PackedSequence) else output, *(last if type(last) is tuple else [last])]
    return sum(part.square().sum() for part in parts) / 13


def started(module: nn.RNNBase, pair: Iterable[Tensor]) -> Any:
    h, c = pair
    return (h, c) if isinstance(module, nn.LSTM) else h


@pytest.mark.usefixtures("_unrolled")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_packed_sequence_has_the_rows_of_its_sequences_one_by_one(make: Any, sharing: str):
    torch.manual_seed(0)
    module = make(4, 5, num_layers=2, bidirectional=True, dtype=DOUBLE)
    packed = pack_sequence(sequences(), enforce_sorted=False)
    h = started(module, states(module))
    plain = module(packed, h)
    found = []
    for together in (True, False):
        module.zero_grad()
        preconditioner = KFAC(module, EXACT, sharing=sharing, clip=None)
        if together:
            output = module(packed, h)
            torch.testing.assert_close(output[0].data, plain[0].data)
            torch.testing.assert_close(output[1], plain[1])
            assert torch.equal(output[0].unsorted_indices, packed.unsorted_indices)
            loss_of(output).backward()
        else:
            for index, own in enumerate(sequences()):
                pair = (part[:, index : index + 1] for part in states(module))
                loss_of(module(own[:, None], started(module, pair))).backward()
        preconditioner.step()
        found.append(gradients(module))
        if sharing == "expand":
            first = preconditioner._layers[0].curvature.input
            rows = with_one(torch.cat(sequences()))
            torch.testing.assert_close(first.strategy.average(first.state), rows.T @ rows / 13)
        preconditioner.remove()
    assert_all_near(*found)


@pytest.mark.usefixtures("_unrolled")
def test_a_packed_sequence_is_a_padded_batch_with_a_mask():
    """For systems that sum over the positions of a sample too."""
    torch.manual_seed(0)
    module = nn.LSTM(4, 5, batch_first=True, dtype=DOUBLE)
    valid = torch.arange(6) < torch.tensor([[3], [6], [1], [3]])
    found = []
    for is_packed in (True, False):
        module.zero_grad()
        preconditioner = KFAC(module, EKFAC(inverse_every=1), clip=None)
        preconditioner.mask(None if is_packed else valid)
        if is_packed:
            output = module(pack_sequence(sequences(), enforce_sorted=False))[0].data
        else:
            output = module(pad_sequence(sequences(), batch_first=True))[0][valid]
        output.square().mean().backward()
        preconditioner.step()
        found.append(gradients(module))
        preconditioner.remove()
    assert_all_near(*found)
