"""Positions before samples, padding, packed sequences and graphs: the factors equal those of plain data."""

from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence

from brandla.kfac import EKFAC, KBFGS, KFAC, ConjugateGradient, InverseFree, TwoLevel, register
from brandla.kfac.capture.kinds import like
from kfac.networks import (
    DENSE,
    EXACT,
    Conv1D,
    RMSNorm,
    assert_dense_step,
    assert_near,
    average,
    gradients,
    lone_step,
    weighted,
    with_one,
)

# Few iterations of conjugate gradients: rounding grows from one to the next until they have converged.
SYSTEMS = [EXACT, ConjugateGradient(iterations=3), InverseFree(preconditioner_every=1), TwoLevel(EXACT), KBFGS()]
DOUBLE = torch.float64

both_sharings = pytest.mark.parametrize("sharing", ["expand", "reduce"])


@pytest.fixture(autouse=True)
def _unrolled(monkeypatch):
    monkeypatch.setattr(like, "_REGISTERED", {})
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        register(kind, like="unrolled")


class Model(nn.Module):
    """Every kind of layer that takes samples and positions in either order: known, found, registered and tied."""

    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.entries = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
        self.recurrent = nn.LSTM(8, 8, batch_first=batch_first)
        self.wide, self.norm, self.products = Conv1D(8, 8), RMSNorm(8), nn.Bilinear(8, 8, 8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.entries.weight

    def forward(self, words, padding):
        found = self.recurrent(self.block(self.entries(words), src_key_padding_mask=padding))[0]
        found = self.norm(self.wide(found))
        return self.head(self.products(found, found))


@pytest.mark.parametrize(
    ("option", "order"),
    [
        (False, "positions first, as batch_first says"),
        ({"0": False}, "positions first, as batch_first says"),
        (lambda name, module: False if isinstance(module, nn.Linear) else None, "positions first, as batch_first says"),
        (None, "samples first, assumed"),
    ],
)
def test_the_order_is_an_option_if_no_module_defines_it(option, order):
    preconditioner = KFAC(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), EXACT, batch_first=option)
    assert preconditioner.report().layouts["0"] == order


def test_the_report_names_the_module_that_defines_the_order():
    report = KFAC(Model(batch_first=False), EXACT).report()
    assert report.layouts["head"] == "positions first, as the model says"
    assert report.layouts["block.linear1"] == "positions first, as block says"
    assert "block.norm1: positions first, as block says" in str(report)


def padded_step(own, strategy, filled, **options):
    """Return the step on three samples of 4 positions, padded to ``filled``; loss and attention ignore the padding."""
    generator = torch.Generator().manual_seed(1)
    inputs, labels = (torch.randint(most, (3, 9), generator=generator)[:, :filled] for most in (11, 5))
    valid = torch.arange(filled).expand(3, -1) < 4

    def loss(preconditioner):
        if filled > 4:
            preconditioner.mask(valid.long())
        outputs = own(inputs, ~valid) if own.batch_first else own(inputs.T, ~valid).transpose(0, 1)
        preconditioner.curvature(outputs.mT, weights=valid.double())
        return nn.functional.cross_entropy(outputs.mT, labels.masked_fill(~valid, -100))

    return lone_step(own, loss, strategy, **options)


@pytest.mark.parametrize(
    ("strategy", "sharing"),
    # With few rows, rounding decides the eigenvectors of EK-FAC, so "reduce" is left out.
    [*product(SYSTEMS, ("expand", "reduce")), (EKFAC(inverse_every=1), "expand")],
    ids=str,
)
def test_neither_the_order_nor_padding_makes_a_difference(strategy, sharing):
    def step(batch_first, filled):
        torch.manual_seed(0)
        return padded_step(Model(batch_first).double(), strategy, filled, sharing=sharing)

    data = step(True, 4)
    for batch_first, filled in ((False, 4), (True, 9), (False, 9)):
        assert_near(step(batch_first, filled), data, 1e-6)


class Entrywise(nn.Sequential):
    """No term reaches another term's inputs, so the random signs of terms have no effect."""

    batch_first = True

    def forward(self, words, padding):
        return super().forward(words)


def test_padding_is_left_out_of_the_curvature_of_outputs_too():
    own = Entrywise(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    assert_near(*(padded_step(own, EXACT, filled, curvature="type-2") for filled in (4, 9)))


@pytest.mark.parametrize(
    ("own", "inputs"),
    [(nn.Conv1d(5, 5, 1), torch.ones(3, 5, 4)), (nn.EmbeddingBag(9, 4), torch.arange(30).view(15, 2) % 9)],
    ids=["channels", "bags"],
)
def test_a_mask_does_not_apply_to_calls_whose_dimensions_happen_to_fit(own, inputs):
    """Channels are not positions, and entries of bags are not either."""

    def loss(valid, preconditioner):
        preconditioner.mask(valid)
        return own(inputs).square().mean()

    assert_near(*(lone_step(own, partial(loss, valid)) for valid in (None, torch.arange(15).reshape(3, 5) % 2)))


@pytest.mark.parametrize(
    ("sharing", "batch_first"), [("expand", None), ("reduce", None), ("expand", True), ("expand", False)]
)
def test_rows_of_each_accumulated_batch_have_their_own_mask(sharing, batch_first):
    """A and G are made of positions with data alone, also if all rows are in one dimension, in either order."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    preconditioner = KFAC(layer, EXACT, sharing=sharing, batch_first=batch_first, application="two-sided")
    inputs, gradients = [], []

    def arranged(part):
        return part if batch_first is None else (part if batch_first else part.transpose(0, 1)).reshape(12, -1)

    for lengths in ([1, 3, 2], [4, 4, 1]):
        valid = torch.arange(4) < torch.tensor(lengths)[:, None]
        points = torch.randn(3, 4, 5, dtype=DOUBLE)
        factors = torch.randn(3, 4, 4, dtype=DOUBLE) * valid[..., None]
        preconditioner.mask(valid)
        (layer(arranged(points)) * arranged(factors)).sum().backward()
        for point, factor, length in zip(points, factors, lengths, strict=True):
            data, gradient = point[:length], factor[:length]
            inputs.append(data if sharing == "expand" else data.mean(0, keepdim=True))
            gradients.append(gradient if sharing == "expand" else gradient.sum(0, keepdim=True))
    preconditioner.step()
    assert preconditioner._recorder.valid is None
    a, g = with_one(torch.cat(inputs)), torch.cat(gradients)
    torch.testing.assert_close(average(preconditioner), a.T @ a / len(a))
    torch.testing.assert_close(average(preconditioner, "output"), len(g) * g.T @ g)


class Graphs(nn.Module):
    """Graphs as concatenated nodes, then as a padded batch, then with the padded rows in one dimension."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.nodes, self.padded, self.flat = (nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, nodes, sizes, of):
        graphs, most = len(sizes), max(sizes)
        index = torch.arange(graphs).repeat_interleave(torch.tensor(sizes))
        valid = torch.arange(most) < torch.tensor(sizes)[:, None]
        of.mask(valid)
        with of.graphs(index):
            hidden = self.nodes(nodes).tanh()
        dense = hidden.new_zeros(graphs, most, 5).masked_scatter(valid[..., None], hidden)
        flat = self.padded(dense).tanh().flatten(0, 1)
        with of.graphs(torch.arange(graphs).repeat_interleave(most), graphs):
            hidden = self.flat(flat).tanh().unflatten(0, (graphs, most)) * valid[..., None]
        return self.head(hidden.sum(1) / valid.sum(1, keepdim=True))

    def of_one(self, nodes):
        """Return the output for a single graph: one sample, whose nodes are positions."""
        hidden = self.padded(self.nodes(nodes[None]).tanh()).tanh()
        return self.head(self.flat(hidden).tanh().mean(1))


@both_sharings
@pytest.mark.parametrize("sizes", [[3, 5, 2], [4, 4, 4]], ids=str)
def test_graphs_and_a_mask_equal_the_graphs_one_by_one(sizes, sharing):
    """Also if no graph is padded, so that the padded batch has as many rows as there are nodes."""
    own, labels = Graphs(), torch.tensor([0, 2, 1])
    nodes = torch.randn(sum(sizes), 5, dtype=DOUBLE)

    def together(preconditioner):
        return nn.functional.cross_entropy(own(nodes, sizes, preconditioner), labels)

    def apart(preconditioner):
        return nn.functional.cross_entropy(torch.cat([own.of_one(part) for part in nodes.split(sizes)]), labels)

    assert_near(*(lone_step(own, loss, sharing=sharing) for loss in (together, apart)))


# --- Cells, recurrent layers and packed sequences


def outputs_of(module):
    """Return the outputs for 3 × 6 rows; a cell takes them as three time steps."""
    inputs = torch.randn(3, 6, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    if isinstance(module, nn.RNNBase):
        return module(inputs)[0]
    state = None
    for own in inputs:
        state = module(own, state)
    return torch.stack(state) if isinstance(state, tuple) else state


LAYERS = [nn.LSTM, nn.GRU, nn.RNN, partial(nn.RNN, nonlinearity="relu")]
# With the number of positions: the length of the first dimension, or the second if batch_first, or 1 for a cell.
CASES = [
    *((make, {}, 3) for make in LAYERS),
    *((make, {"batch_first": True, "bidirectional": True, "num_layers": 2}, 6) for make in LAYERS),
    *((make, {"bias": bias}, 1) for make in (nn.LSTMCell, nn.GRUCell, nn.RNNCell) for bias in (True, False)),
    *((make, {"bias": False}, 3) for make in LAYERS),
]


@both_sharings
@pytest.mark.parametrize(("make", "options", "positions"), CASES)
def test_every_use_of_a_weight_has_its_rows(make, options, positions, sharing):
    torch.manual_seed(0)
    module = make(4, 5, dtype=DOUBLE, **options)
    plain = outputs_of(module)
    weighted(plain).backward()
    expected = gradients(module)
    module.zero_grad()
    preconditioner = KFAC(module, EXACT, sharing=sharing, **DENSE)
    found = outputs_of(module)
    torch.testing.assert_close(found, plain)
    weighted(found).backward()
    torch.testing.assert_close(gradients(module), expected)
    if sharing == "expand":
        rows = [layer.rows("loss", None) for layer in preconditioner._layers]
        assert {(own.uses, own.positions) for own in rows} == {(18, positions)}
    assert_dense_step(preconditioner)
    report = preconditioner.report()
    assert report.unsupported == {}
    assert {row.layer.partition("_l")[0] for row in report.factors} == {"weight_ih", "weight_hh"}


def test_a_cell_takes_single_samples_and_leaves_other_arguments_to_the_module():
    cell = nn.GRUCell(6, 5, dtype=DOUBLE)
    preconditioner = KFAC(cell, EXACT)
    cell(torch.randn(6, dtype=DOUBLE)).sum().backward()
    assert [layer.rows("loss", None).uses for layer in preconditioner._layers] == [1, 1]
    with pytest.raises(RuntimeError, match="hidden"):
        cell(torch.randn(2, 6, dtype=DOUBLE), torch.zeros(2, 4, dtype=DOUBLE))


def sequences():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(length, 4, dtype=DOUBLE, generator=generator) for length in (3, 6, 1, 3)]


def loss_of(found):
    output, last = found
    parts = [output.data if isinstance(output, PackedSequence) else output, *(last if type(last) is tuple else [last])]
    return sum(part.square().sum() for part in parts) / 13


@both_sharings
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_packed_sequence_has_the_rows_of_its_sequences_one_by_one(make, sharing):
    torch.manual_seed(0)
    module = make(4, 5, num_layers=2, bidirectional=True, dtype=DOUBLE)
    states = torch.randn(2, 4, 4, 5, dtype=DOUBLE)
    packed = pack_sequence(sequences(), enforce_sorted=False)

    def started(of):
        return tuple(states[:, :, of]) if make is nn.LSTM else states[0, :, of]

    plain = module(packed, started(slice(None)))

    def together(preconditioner):
        output = module(packed, started(slice(None)))
        torch.testing.assert_close(output[0].data, plain[0].data)
        torch.testing.assert_close(output[1], plain[1])
        assert torch.equal(output[0].unsorted_indices, packed.unsorted_indices)
        return loss_of(output)

    def apart(preconditioner):
        outputs = (module(one[:, None], started(slice(at, at + 1))) for at, one in enumerate(sequences()))
        return sum(map(loss_of, outputs))

    assert_near(*(lone_step(module, loss, sharing=sharing) for loss in (together, apart)))


def test_a_packed_sequence_is_a_padded_batch_with_a_mask():
    """Also for systems that sum over the positions of a sample."""
    torch.manual_seed(0)
    module = nn.LSTM(4, 5, batch_first=True, dtype=DOUBLE)
    valid = torch.arange(6) < torch.tensor([[3], [6], [1], [3]])

    def packed(preconditioner):
        return module(pack_sequence(sequences(), enforce_sorted=False))[0].data.square().mean()

    def padded(preconditioner):
        preconditioner.mask(valid)
        return module(pad_sequence(sequences(), batch_first=True))[0][valid].square().mean()

    assert_near(*(lone_step(module, loss, EKFAC(inverse_every=1)) for loss in (packed, padded)))
