"""What every system owes to training: checkpoints, batches that are not finite, every kind of layer, no read-back."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import EKFAC, KFAC, Brand, ConjugateGradient, Exact, Foof, Strategy, TwoLevel
from kfac.networks import batch, gradients, mlp

SYSTEMS = {
    "cholesky": Exact(inverse_every=3, method="cholesky"),
    "ekfac": EKFAC(inverse_every=3),
    "foof": Foof(Brand(6)),
    "foof-cholesky": Foof(Exact(inverse_every=3, method="cholesky")),
    "conjugate-gradient": ConjugateGradient(batches=2),
    "conjugate-gradient-warm": ConjugateGradient(batches=2, warm_start=True),
    "two-level": TwoLevel(Brand(6)),
    "two-level-residual": TwoLevel(Exact(inverse_every=3), "residual"),
}
every_system = pytest.mark.parametrize("strategy", SYSTEMS.values(), ids=SYSTEMS)

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")


def train(model: nn.Module, preconditioner: KFAC, seeds: range, poisoned: tuple[int, ...] = ()) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in seeds:
        inputs, labels = batch(8, 10, 4, seed, torch.float32)
        optimizer.zero_grad()
        if seed in poisoned:
            inputs[3, 2] = float("inf")
        nn.functional.cross_entropy(model(inputs), labels).backward()
        preconditioner.step()
        optimizer.step()


def tensors(preconditioner: KFAC) -> list[Tensor]:
    return [part.clone() for layer in preconditioner._layers for part in layer.curvature.tensors()]


@every_system
def test_training_goes_on_bit_equal_from_a_checkpoint(strategy: Strategy):
    model = mlp(10, 40, 30, 4, dtype=torch.float32)
    preconditioner = KFAC(model, strategy)
    train(model, preconditioner, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "kfac": preconditioner.state_dict()}, file)
    train(model, preconditioner, range(5, 12))
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    fresh = mlp(10, 40, 30, 4, dtype=torch.float32, seed=9)
    fresh.load_state_dict(checkpoint["model"])
    resumed = KFAC(fresh, strategy)
    resumed.load_state_dict(checkpoint["kfac"])
    train(fresh, resumed, range(5, 12))
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)


@every_system
def test_a_checkpoint_does_not_change_when_training_goes_on(strategy: Strategy):
    model = mlp(10, 40, 4, dtype=torch.float32)
    preconditioner = KFAC(model, strategy)
    train(model, preconditioner, range(3))
    state = preconditioner.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    train(model, preconditioner, range(3, 8))
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    assert str(kept) == str(state)


@every_system
@pytest.mark.parametrize("first", [0, 4])
def test_a_batch_that_is_not_finite_changes_nothing_and_poisons_nothing(strategy: Strategy, first: int):
    """Also where it is the very first batch. Factors are sums that decay with their weights: equal to rounding."""
    model, clean = (mlp(10, 40, 4, dtype=torch.float32) for _ in range(2))
    skipping, plain = KFAC(model, strategy, factor_every=1), KFAC(clean, strategy)
    train(model, skipping, range(first + 1), poisoned=(first,))
    train(clean, plain, range(first))
    for one, other in zip(model.parameters(), clean.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(torch.isfinite(part).all() for part in tensors(skipping))
    assert skipping.report().skipped == 1
    train(model, skipping, range(first + 1, first + 5))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert all(gradient.abs().max() > 0 for gradient in gradients(model))


class Everything(nn.Module):
    """Indices with padding, groups, whole gradients, positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(30, 8, padding_idx=0)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 12, 3, groups=2)
        self.out = nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(torch.relu(self.conv(self.norm(self.words(inputs)).mT)).mean(-1))


@every_system
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_every_kind_of_layer_trains(strategy: Strategy, sharing: str):
    model = Everything()
    preconditioner = KFAC(model, strategy, sharing=sharing, clip=0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(30, (64, 9), generator=generator)
    labels = torch.where((inputs < 8).sum(1) > 2, 1, 0)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(part).all() for part in gradients(model))
    # A two-level step couples the layers: shortened layer by layer, it need not go downhill.
    if not isinstance(strategy, TwoLevel) or sharing == "expand":
        assert losses[-1] < 0.8 * losses[0]
    assert not preconditioner.report().unsupported
    assert str(preconditioner.report())


@every_system
def test_a_state_of_another_system_is_refused(strategy: Strategy):
    model, other = mlp(10, 40, 4, dtype=torch.float32), mlp(10, 40, 4, dtype=torch.float32)
    preconditioner = KFAC(model, strategy)
    theirs = KFAC(other, Exact(inverse_every=7))
    train(other, theirs, range(1))
    with pytest.raises(ValueError, match=r"KFAC.load_state_dict"):
        preconditioner.load_state_dict(theirs.state_dict())


@every_system
def test_gradients_of_two_backward_passes_are_one_batch(strategy: Strategy):
    """Accumulation: halves of the batch, each loss divided by two, give the step of the whole."""
    inputs, labels = batch(8, 10, 4)
    results = []
    for parts in ([slice(None)], [slice(0, 4), slice(4, 8)]):
        model = mlp(10, 40, 4)
        preconditioner = KFAC(model, strategy)
        for part in parts:
            (nn.functional.cross_entropy(model(inputs[part]), labels[part]) / len(parts)).backward()
        preconditioner.step()
        results.append(gradients(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
