"""Positions before samples, and positions that are padding: the factors are those of the same data without either."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import EKFAC, KBFGS, KFAC, ConjugateGradient, InverseFree, Strategy, TwoLevel
from brandla.kfac.capture.kinds import like
from kfac.networks import EXACT, Conv1D, RMSNorm, assert_all_near, gradients, with_one

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")
SYSTEMS: list[Strategy] = [
    *(EXACT, EKFAC(inverse_every=1), ConjugateGradient()),
    *(InverseFree(preconditioner_every=1), TwoLevel(EXACT)),
]


class Model(nn.Module):
    """Every kind of layer that takes samples and positions in either order, beside one that says which."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.entries = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(8, 5)

    def forward(self, words: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.block(self.entries(words), src_key_padding_mask=padding))


class Others(nn.Module):
    """Kinds that are found or registered, and an embedding tied with the head."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.entries = nn.Embedding(11, 8)
        self.recurrent = nn.LSTM(8, 8, batch_first=batch_first)
        self.wide, self.norm, self.products = Conv1D(8, 8), RMSNorm(8), nn.Bilinear(8, 8, 8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.entries.weight

    def forward(self, words: Tensor) -> Tensor:
        found = self.norm(self.wide(self.recurrent(self.entries(words))[0]))
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
def test_the_order_is_an_option_where_no_module_says_it(option: Any, order: str):
    preconditioner = KFAC(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), EXACT, batch_first=option)
    assert preconditioner.report().layouts["0"] == order
    with pytest.raises(ValueError, match=re.escape("batch_first must be True, False or None; got 'time'")):
        KFAC(nn.Linear(3, 3), batch_first="time")


def test_the_report_says_which_module_has_said_the_order():
    report = KFAC(Model(batch_first=False), EXACT).report()
    assert report.layouts["head"] == "positions first, as the model says"
    assert report.layouts["block.linear1"] == "positions first, as block says"
    assert "block.norm1: positions first, as block says" in str(report)


def padded_step(own: nn.Module, strategy: Strategy, filled: int, **options: Any) -> list[Tensor]:
    """The step of three samples of 4 positions, filled up with what the loss and the attention ignore."""
    preconditioner = KFAC(own, strategy, clip=None, **options)
    generator = torch.Generator().manual_seed(1)
    inputs, labels = (torch.randint(most, (3, 9), generator=generator)[:, :filled] for most in (11, 5))
    valid = torch.arange(filled).expand(3, -1) < 4
    if filled > 4:
        preconditioner.mask(valid.long())
    is_first = getattr(own, "batch_first", True)
    inputs = inputs if is_first else inputs.T
    outputs = own(inputs, ~valid) if isinstance(own, Model) else own(inputs)
    outputs = (outputs if is_first else outputs.transpose(0, 1)).mT
    preconditioner.curvature(outputs, weights=valid.double())
    nn.functional.cross_entropy(outputs, labels.masked_fill(~valid, -100)).backward()
    preconditioner.step()
    return gradients(own)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    ("make", "strategy"),
    [*((Model, strategy) for strategy in SYSTEMS), (Others, EXACT), (Others, KBFGS())],
    ids=lambda own: getattr(own, "__name__", str(own)),
)
def test_neither_the_order_nor_padding_makes_a_difference(
    make: type[Model | Others], strategy: Strategy, sharing: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(like._REGISTERED, nn.LSTM, "unrolled")

    def step(batch_first: bool, filled: int) -> list[Tensor]:
        torch.manual_seed(0)
        return padded_step(make(batch_first).double(), strategy, filled, sharing=sharing)

    data = step(True, 4)
    for batch_first, filled in ((False, 4), (True, 9), (False, 9)):
        assert_all_near(step(batch_first, filled), data, 1e-6)


@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: nn.Conv1d(5, 5, 1), (3, 5, 4)), (lambda: nn.EmbeddingBag(9, 4), (15, 2))]
)
def test_a_mask_is_not_for_calls_whose_dimensions_only_happen_to_fit(make: Callable[[], nn.Module], shape: Any):
    """Channels are no positions, and bags no rows."""
    found = []
    for valid in (None, torch.arange(15).reshape(3, 5) % 2):
        torch.manual_seed(0)
        own = make()
        preconditioner = KFAC(own, EXACT)
        preconditioner.mask(valid)
        own(torch.randn(shape) if isinstance(own, nn.Conv1d) else torch.randint(9, shape)).square().mean().backward()
        preconditioner.step()
        found.append(gradients(own))
    assert_all_near(*found)


def test_padding_is_left_out_of_the_curvature_of_outputs_too():
    """In a model where no term reaches another's inputs: the random signs of terms have no effect."""
    found = []
    for filled in (4, 9):
        torch.manual_seed(0)
        own = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)).double()
        found.append(padded_step(own, EXACT, filled, curvature="type-2"))
    assert_all_near(*found)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_rows_of_each_accumulated_batch_are_masked_by_its_own(sharing: str):
    """A and G are those of the positions with data, also where what the padding holds is not finite."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    preconditioner = KFAC(layer, EXACT, sharing=sharing, application="two-sided")
    inputs, gradients = [], []
    for lengths in ([1, 3, 2], [4, 4, 1]):
        valid = torch.arange(4) < torch.tensor(lengths)[:, None]
        points = torch.randn(3, 4, 5, dtype=torch.float64)
        factors = torch.randn(3, 4, 4, dtype=torch.float64) * valid[..., None]
        preconditioner.mask(valid)
        (layer(points) * factors).sum().backward()
        for point, factor, length in zip(points, factors, lengths, strict=True):
            own, gradient = point[:length], factor[:length]
            inputs.append(own if sharing == "expand" else own.mean(0, keepdim=True))
            gradients.append(gradient if sharing == "expand" else gradient.sum(0, keepdim=True))
    preconditioner.step()
    a, g = with_one(torch.cat(inputs)), torch.cat(gradients)
    curvature = preconditioner._layers[0].curvature
    for factor, expected in ((curvature.input, a.T @ a / len(a)), (curvature.output, len(g) * g.T @ g)):
        torch.testing.assert_close(factor.strategy.average(factor.state), expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_mask_fits_positions_and_samples_in_one_dimension(batch_first: bool):
    """In the order of the layer's inputs."""
    layer = nn.Linear(5, 4).double()
    preconditioner = KFAC(layer, EXACT, batch_first=batch_first, application="two-sided")
    valid = torch.arange(4) < torch.tensor([2, 4, 1])[:, None]
    points = torch.randn(3, 4, 5, dtype=torch.float64)
    preconditioner.mask(valid)
    layer((points if batch_first else points.transpose(0, 1)).reshape(12, 5)).sum().backward()
    preconditioner.step()
    factor, kept = preconditioner._layers[0].curvature.input, with_one(points[valid])
    torch.testing.assert_close(factor.strategy.average(factor.state), kept.T @ kept / 7)


def test_a_mask_ends_with_the_step_and_is_a_matrix():
    layer = nn.Linear(5, 4)
    preconditioner = KFAC(layer, EXACT, clip=None)
    preconditioner.mask(torch.ones(2, 3))
    layer(torch.randn(2, 3, 5)).sum().backward()
    preconditioner.step()
    assert preconditioner._recorder.valid is None
    with pytest.raises(ValueError, match=re.escape("KFAC.mask: valid must be a tensor (samples, positions)")):
        preconditioner.mask(torch.ones(3))


@pytest.mark.parametrize("gradient", ["autograd", "pair"])
def test_padding_that_has_a_gradient_stays_in_the_gradient(gradient: str):
    """A loss that forgets its padding moves the weights by it all the same; the factors have no part of it."""
    torch.manual_seed(0)
    layer = nn.Linear(30, 20).double()
    points, valid = torch.randn(2, 3, 30, dtype=torch.float64), torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = []
    for application in ("auto", "two-sided"):
        layer.zero_grad()
        preconditioner = KFAC(layer, EXACT, clip=None, application=application, gradient=gradient)
        preconditioner.mask(valid)
        layer(points).square().mean().backward()
        preconditioner.step()
        found.append(gradients(layer))
        preconditioner.remove()
    assert_all_near(*found)


class Dense(nn.Module):
    """Graphs as nodes one after the other, then as a padded batch, then with the rows of that in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.nodes, self.padded, self.flat = (nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, nodes: Tensor, sizes: list[int], of: KFAC) -> Tensor:
        graphs, most = len(sizes), max(sizes)
        index = torch.arange(graphs).repeat_interleave(torch.tensor(sizes))
        valid = torch.arange(most) < torch.tensor(sizes)[:, None]
        of.mask(valid)
        with of.graphs(index, graphs):
            hidden = self.nodes(nodes).tanh()
        dense = hidden.new_zeros(graphs, most, 5).masked_scatter(valid[..., None], hidden)
        flat = self.padded(dense).tanh().flatten(0, 1)
        with of.graphs(torch.arange(graphs).repeat_interleave(most), graphs):
            hidden = self.flat(flat).tanh().unflatten(0, (graphs, most)) * valid[..., None]
        return self.head(hidden.sum(1) / valid.sum(1, keepdim=True))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("sizes", [[3, 5, 2], [4, 4, 4]], ids=str)
def test_graphs_and_a_mask_are_the_graphs_one_by_one(sizes: list[int], sharing: str):
    """Also where no graph is padded, and the nodes are as many as the places of the padded batch."""
    own = Dense()
    nodes, labels = torch.randn(sum(sizes), 5, dtype=torch.float64), torch.tensor([0, 2, 1])
    found = []
    for together in (True, False):
        own.zero_grad()
        preconditioner = KFAC(own, EXACT, sharing=sharing, clip=None)
        apart = zip(nodes.split(sizes), ([size] for size in sizes), labels[:, None], strict=True)
        for part, counts, label in [(nodes, sizes, labels)] if together else apart:
            outputs = own(part, counts, preconditioner)
            (nn.functional.cross_entropy(outputs, label, reduction="sum") / 3).backward()
        preconditioner.step()
        found.append(gradients(own))
        preconditioner.remove()
    assert_all_near(*found)
