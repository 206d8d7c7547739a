"""Mixed precision: autocast, loss scaling, batches that overflow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KFAC
from kfac.networks import EXACT, batch, gradients, loss_of, mlp

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

# Well-conditioned, so that what rounding does to the gradients is not made larger.
OPTIONS = {"damping": 1.0, "clip": None}


def model_of(seed: int = 0) -> nn.Sequential:
    return mlp(10, 32, 32, 4, seed=seed, dtype=torch.float32)


def scaled(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1_000_000)


def one_step(
    scaler: torch.amp.GradScaler | None,
    dtype: torch.dtype | None = None,
    parts: int = 1,
    **options: object,
) -> tuple[KFAC, list[Tensor]]:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = KFAC(model, EXACT, scaler=scaler, **{**OPTIONS, **options})
    # Narrow enough that the pair is cheaper in every layer.
    inputs, labels = batch(4, 10, 4, dtype=torch.float32)
    for rows in torch.arange(4).chunk(parts):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            outputs = model(inputs[rows])
            preconditioner.curvature(outputs)
            loss = nn.functional.cross_entropy(outputs, labels[rows]) / parts
        (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None:
        scaler.unscale_(optimizer)
    preconditioner.step()
    return preconditioner, gradients(model)


@pytest.mark.parametrize("curvature", ["empirical", "type-2"])
@pytest.mark.parametrize("application", ["auto", "two-sided"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_loss_scale_changes_nothing(application: str, parts: int, curvature: str, monkeypatch: pytest.MonkeyPatch):
    """A power of two as scale rounds nothing, and is never read back."""
    options = {"application": application, "parts": parts, "curvature": curvature}
    scaler = scaled(2.0**12)
    monkeypatch.setattr(scaler, "get_scale", lambda: pytest.fail("a read-back"))
    preconditioner, found = one_step(scaler, **options)
    expected = one_step(None, **options)[1]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    disabled = one_step(torch.amp.GradScaler("cpu", enabled=False), **options)[1]
    torch.testing.assert_close(disabled, expected, rtol=0, atol=0)
    # Unscaling is known to be all that happened to the gradient.
    linear = [layer.linear for layer in preconditioner._layers]
    assert linear == ([True] * 3 if application == "auto" else [None] * 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_agrees_with_full_precision(dtype: torch.dtype):
    """To what rounding does to the gradients themselves, error e, a unit that changes sides of a ReLU included.

    With relative damping 1 each side of the solve has condition 2: the gradient's error is magnified 4 times at most,
    and errors of the factors, 2 e each for A and G as products of two such rows, 2 times each: 12 e.
    """
    raw = []
    for enabled in (True, False):
        model = model_of()
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = loss_of(model, batch(16, 10, 4, dtype=torch.float32))
        (loss * 1024).backward()
        raw.append(gradients(model))
    own_error = max(relative_error(one, other) for one, other in zip(*raw, strict=True))
    _, found = one_step(scaled(2.0**10) if dtype == torch.float16 else None, dtype)
    _, expected = one_step(None)
    assert max(relative_error(one, other) for one, other in zip(found, expected, strict=True)) < 12 * own_error


def relative_error(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other))


def test_gradients_that_are_still_scaled_are_refused():
    model = model_of()
    scaler = scaled(2.0**10)
    preconditioner = KFAC(model, EXACT, scaler=scaler)
    scaler.scale(loss_of(model, batch(16, 10, 4, dtype=torch.float32))).backward()
    with pytest.raises(RuntimeError, match=r"KFAC.step: .*call scaler.unscale_\(optimizer\) between"):
        preconditioner.step()


def test_a_batch_that_overflows_is_skipped_by_all():
    """At a scale of 2^30 a float16 gradient is infinite: weights stay, and the scale is halved."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = scaled(2.0**10)
    preconditioner = KFAC(model, EXACT, scaler=scaler)

    def train(seed: int) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, batch(16, 10, 4, seed, dtype=torch.float32))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        preconditioner.step()
        scaler.step(optimizer)
        scaler.update()

    train(0)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    scaler.update(2.0**30)
    train(1)
    assert scaler.get_scale() == 2.0**29
    assert preconditioner.report().skipped == 1
    assert all(map(torch.equal, model.parameters(), weights))
    scaler.update(2.0**10)
    train(2)
    assert preconditioner.report().skipped == 1
    assert not torch.equal(model[0].weight, weights[0])
