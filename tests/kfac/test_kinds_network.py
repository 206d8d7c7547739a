"""A network with every kind of layer: training, checkpoints, compiled and in half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KFAC, Brand, BrandCorrected, BrandRandomized, Exact, Randomized, Strategy

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

STRATEGIES = {
    "exact": Exact(inverse_every=3),
    "randomized-svd": Randomized(6, method="svd", oversample=4, inverse_every=3),
    "randomized-eigh": Randomized(6, oversample=4, inverse_every=3),
    "brand": Brand(6),
    "brand-cholesky": Brand(6, compress="cholesky"),
    "brand-eigh": Brand(6, form="eigh"),
    "brand-randomized": BrandRandomized(6, overwrite_every=4, oversample=4),
    "brand-corrected": BrandCorrected(6, correct_every=3),
}


class Everything(nn.Module):
    """An encoder and a decoder of sequences, a convolution with groups, and normalisations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 16, padding_idx=0)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.conv = nn.Conv1d(16, 16, 3, padding="same", groups=2)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, indices: Tensor) -> Tensor:
        encoded = self.encoder(self.embedding(indices))
        decoded = self.decoder(encoded[:, :3], encoded)
        return self.head(self.norm(self.conv(decoded.mT)).mean(2))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Sequences whose class is their first element's."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(20, (24, 7), generator=generator)
    return indices, indices[:, 0] % 5


def train(model: nn.Module, preconditioner: KFAC, seeds: range) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for seed in seeds:
        indices, labels = batch(seed % 4)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(indices), labels)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_every_kind_trains_with_every_strategy(strategy: Strategy, sharing: str):
    model = Everything()
    preconditioner = KFAC(model, strategy, sharing=sharing)
    losses = train(model, preconditioner, range(24))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert preconditioner.report().unsupported == {}


@pytest.mark.parametrize("strategy", [Exact(inverse_every=3), Brand(6)], ids=["exact", "brand"])
def test_training_goes_on_bit_equal_from_a_checkpoint(strategy: Strategy):
    model = Everything()
    preconditioner = KFAC(model, strategy)
    train(model, preconditioner, range(3))
    fresh = Everything()
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = KFAC(fresh, strategy)
    resumed.load_state_dict(preconditioner.state_dict())
    train(model, preconditioner, range(3, 6))
    train(fresh, resumed, range(3, 6))
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_autocast_gives_nearly_the_same_factors(sharing: str):
    """Inputs and gradients in bfloat16, ε = 2⁻⁸, through some ten layers; factors in float32."""
    states = []
    for enabled in (False, True):
        model = Everything()
        preconditioner = KFAC(model, Exact(), sharing=sharing)
        indices, labels = batch(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = nn.functional.cross_entropy(model(indices), labels)
        loss.backward()
        preconditioner.step()
        states.append({layer.name: layer.curvature for layer in preconditioner._layers})
    for name, curvature in states[0].items():
        for (_, plain), (_, half) in zip(curvature.factors(), states[1][name].factors(), strict=True):
            key = "diagonal" if "diagonal" in plain.state else "dense"
            difference = torch.linalg.vector_norm(half.state[key] - plain.state[key])
            assert half.state[key].dtype == torch.float32
            assert difference <= 40 * 2**-8 * torch.linalg.vector_norm(plain.state[key]), name


# The compiler instantiates autograd functions, and looks at .grad of what is no leaf.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_model_gets_the_same_step():
    steps = []
    for compiled in (False, True):
        model = Everything()
        preconditioner = KFAC(model, Exact())
        indices, labels = batch(0)
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        nn.functional.cross_entropy(forward(indices), labels).backward()
        preconditioner.step()
        assert preconditioner.report().unsupported == {}
        steps.append([part.grad for part in model.parameters()])
    for eager, compiled in zip(*steps, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-4 * float(eager.abs().max()))


def test_without_dropout_the_model_computes_the_same_with_and_without():
    plain, watched = Everything(), Everything()
    preconditioner = KFAC(watched, Exact())
    indices, _ = batch(0)
    assert torch.equal(watched(indices), plain(indices))
    keys = [set(vars(module)) for module in watched.modules()]
    preconditioner.remove()
    assert torch.equal(watched(indices), plain(indices))
    assert [set(vars(module)) for module in plain.modules()] == [set(vars(module)) for module in watched.modules()]
    assert keys != [set(vars(module)) for module in watched.modules()]
