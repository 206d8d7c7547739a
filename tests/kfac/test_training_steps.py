"""Steps as training takes them: batches that are not finite, schedules, groups, frozen layers, clips, misuse."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import (
    EKFAC,
    KFAC,
    Brand,
    BrandCorrected,
    BrandRandomized,
    ConjugateGradient,
    Exact,
    Foof,
    InverseFree,
    Randomized,
    Strategy,
    TwoLevel,
)
from brandla.kfac.clip import by_kl, by_rms
from kfac.networks import batch, gradients, layer_gradient, mlp

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

CROSS_ENTROPY = nn.functional.cross_entropy
STRATEGIES = {
    "exact": Exact(inverse_every=1),
    "randomized": Randomized(6, oversample=4, inverse_every=1),
    "brand": Brand(6),
    "brand-cholesky": Brand(6, compress="cholesky"),
    "brand-eigh": Brand(6, form="eigh"),
    "brand-randomized": BrandRandomized(6, overwrite_every=2, oversample=4),
    "brand-corrected": BrandCorrected(6, correct_every=2),
    "inverse-free": InverseFree(),
    "foof": Foof(Exact(inverse_every=1)),
    "ekfac": EKFAC(inverse_every=1),
    "conjugate-gradient": ConjugateGradient(),
    "two-level": TwoLevel(Exact(inverse_every=1)),
}


def backward(model: nn.Module, seed: int, poison: str = "") -> None:
    inputs, labels = batch(8, 10, 4, seed)
    if poison == "input":
        inputs[3, 2] = float("nan")
    loss = CROSS_ENTROPY(model(inputs), labels)
    if poison == "loss":
        loss = loss * float("inf")
    loss.backward()
    if poison == "gradient":
        model[-1].weight.grad[0, 0] = float("inf")


def train(strategy: Strategy, batches: list[tuple[int, str]], **options: object) -> tuple[KFAC, list[list[Tensor]]]:
    model = mlp(10, 40, 4)
    preconditioner = KFAC(model, strategy, **options)
    steps = []
    for seed, poison in batches:
        model.zero_grad()
        backward(model, seed, poison)
        preconditioner.step()
        steps.append(gradients(model))
    return preconditioner, steps


@pytest.mark.parametrize("free", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("poison", ["input", "loss", "gradient"])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_batches_that_are_not_finite_count_for_nothing(
    strategy: Strategy, poison: str, free: bool, monkeypatch: pytest.MonkeyPatch
):
    """As on a device, where nobody knows, nothing is read back to find out."""
    if not free:
        monkeypatch.setattr("brandla.kfac.capture.mask.reads_are_free", lambda tensor: False)
    batches = [(0, ""), (1, poison), (2, ""), (3, poison), (4, poison), (5, "")]
    preconditioner, steps = train(strategy, batches)
    for (_, poisoned), own in zip(batches, steps, strict=True):
        assert all(torch.isfinite(gradient).all() for gradient in own)
        if poisoned:
            assert all(not gradient.any() for gradient in own)
        else:
            assert any(gradient.any() for gradient in own)
    assert preconditioner.report().skipped == 3
    for tensor in (part for layer in preconditioner._layers for part in layer.curvature.tensors()):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("application", ["auto", "two-sided"])
@pytest.mark.parametrize("name", ["exact", "brand"])
def test_skipped_batches_leave_the_factors_where_they_were(name: str, application: str):
    """S and its weight decay alike, so that M is the same but for rounding; what comes next is weighted by its age."""
    _, steps = train(STRATEGIES[name], [(0, ""), (1, "input"), (0, "")], decay=0.5, application=application, clip=None)
    model = mlp(10, 40, 4)
    preconditioner = KFAC(model, STRATEGIES[name], decay=0.5, application=application, clip=None)
    backward(model, 0)
    preconditioner.step()
    # One batch, whatever its weights.
    torch.testing.assert_close(steps[2], gradients(model), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_first_batch_that_is_not_finite(strategy: Strategy):
    preconditioner, steps = train(strategy, [(0, "input"), (1, ""), (2, "")])
    assert all(not gradient.any() for gradient in steps[0])
    assert all(torch.isfinite(gradient).all() for own in steps for gradient in own)
    assert preconditioner.report().skipped == 1


def test_accumulation_with_factors_now_and_then():
    """Micro-batches of different sizes at every step, and data in every other one."""
    found = []
    for parts in ([slice(0, 12)], [slice(0, 2), slice(2, 7), slice(7, 12)]):
        model = mlp(10, 20, 4)
        preconditioner = KFAC(model, Exact(inverse_every=1), factor_every=2, clip=None)
        for seed in range(4):
            inputs, labels = batch(12, 10, 4, seed)
            model.zero_grad()
            for rows in parts:
                (CROSS_ENTROPY(model(inputs[rows]), labels[rows], reduction="sum") / 12).backward()
            preconditioner.step()
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1])


def test_parameter_groups_keep_their_rates():
    model, reference = mlp(10, 20, 4), mlp(10, 20, 4)
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "lr": 0.25}]
    optimizer = torch.optim.SGD(groups)
    preconditioner = KFAC(model, Exact())
    backward(model, 0)
    preconditioner.step()
    optimizer.step()
    for index, rate in ((0, 0.5), (2, 0.25)):
        expected = reference[index].weight - rate * model[index].weight.grad
        torch.testing.assert_close(model[index].weight, expected)


def test_a_layer_that_thaws_starts_then():
    model = mlp(10, 20, 4)
    model[0].requires_grad_(False)
    preconditioner = KFAC(model, Exact(inverse_every=1), factor_every=10)
    backward(model, 0)
    preconditioner.step()
    assert not preconditioner._layers[0].curvature.started
    model.zero_grad()
    model[0].requires_grad_(True)
    backward(model, 1)
    before = model[0].weight.grad.clone()
    preconditioner.step()
    assert preconditioner._layers[0].curvature.started
    assert not torch.equal(model[0].weight.grad, before)


def test_a_layer_that_freezes_is_left_alone():
    model = mlp(10, 20, 4)
    preconditioner = KFAC(model, Exact(inverse_every=1))
    backward(model, 0)
    preconditioner.step()
    total = preconditioner._layers[0].curvature.input.state["total"].clone()
    model.zero_grad()
    model[0].requires_grad_(False)
    backward(model, 1)
    preconditioner.step()
    assert model[0].weight.grad is None
    assert torch.equal(preconditioner._layers[0].curvature.input.state["total"], total)


def test_a_bias_that_freezes_takes_no_part():
    found = []
    for application in ("auto", "two-sided"):
        model = mlp(10, 20, 4)
        preconditioner = KFAC(model, Exact(inverse_every=1), application=application)
        backward(model, 0)
        preconditioner.step()
        model.zero_grad()
        model[0].bias.requires_grad_(False)
        backward(model, 1)
        preconditioner.step()
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1])


def test_schedules_are_functions_of_the_step():
    asked: dict[str, list[int]] = {}

    def schedule(name: str, values: list[float | None]) -> object:
        return lambda step: (asked.setdefault(name, []).append(step), values[step % len(values)])[1]

    model, reference = mlp(10, 20, 4), mlp(10, 20, 4)
    scheduled = KFAC(
        model,
        Exact(inverse_every=1),
        damping=schedule("damping", [0.1, 0.2, 0.3]),
        clip=schedule("clip", [None, 1e-3, 1e-2]),
        decay=schedule("decay", [0.9, 0.5, 0.7]),
        factor_every=schedule("factor_every", [1]),
    )
    fixed = KFAC(reference, Exact(inverse_every=1))
    for step in range(3):
        object.__setattr__(fixed.options, "damping", [0.1, 0.2, 0.3][step])
        object.__setattr__(fixed.options, "clip", [None, 1e-3, 1e-2][step])
        object.__setattr__(fixed.options, "decay", [0.9, 0.5, 0.7][step])
        for own, preconditioner in ((model, scheduled), (reference, fixed)):
            own.zero_grad()
            backward(own, step)
            preconditioner.step()
        torch.testing.assert_close(gradients(model), gradients(reference), rtol=0, atol=0)
    assert set(asked) == {"damping", "clip", "decay", "factor_every"}
    assert set(asked["damping"]) == {0, 1, 2, 3}


def test_a_schedule_that_leaves_its_range_says_so():
    preconditioner = KFAC(mlp(10, 20, 4), Exact(), damping=lambda step: 1.0 - step)
    backward(preconditioner._model, 0)
    with pytest.raises(ValueError, match=re.escape("KFAC: damping must be finite and > 0; got 0.0")):
        preconditioner.step()


@pytest.mark.parametrize("application", ["auto", "two-sided"])
def test_kl_clip_bounds_the_length_in_the_metric_of_the_factors(application: str):
    """Step s = F⁻¹ g of all layers, F block-diagonal with damped blocks: ν² sᵀ F s = min(sᵀ F s, clip)."""
    lengths = {}
    for clip in (None, 1e-3, 1e9):
        model = mlp(10, 20, 4)
        preconditioner = KFAC(
            model, Exact(inverse_every=1), clip=clip, clip_by="kl", damping=0.1, application=application
        )
        backward(model, 0)
        preconditioner.step()
        lengths[clip] = 0.0
        for layer, module in zip(preconditioner._layers, (model[0], model[2]), strict=True):
            damped = []
            for factor in (layer.curvature.output, layer.curvature.input):
                M = factor.state["dense"] / factor.state["total"]
                damped.append(M + 0.1 * torch.linalg.eigvalsh(M)[-1] * torch.eye(len(M), dtype=M.dtype))
            step = layer_gradient(module)
            lengths[clip] += float((step * (damped[0] @ step @ damped[1])).sum())
    assert lengths[None] > 1e-3
    assert lengths[1e-3] == pytest.approx(1e-3)
    assert lengths[1e9] == pytest.approx(lengths[None])


def test_clips_of_zero_steps_are_one():
    zeros = torch.zeros(3, 4)
    assert [float(factor) for factor in by_rms([[zeros], [zeros, zeros]], 0.1)] == [1, 1]
    assert by_kl([zeros], [zeros], 0.1) == 1


def test_the_clip_by_rms_is_that_of_all_entries_of_a_layer():
    """Layers of other dtypes and numbers of parts; a length that is not finite gives no step at all."""
    generator = torch.Generator().manual_seed(0)
    steps = [
        [torch.randn(size, generator=generator, dtype=dtype) * scale for size in sizes]
        for sizes, dtype, scale in [
            (((6, 5), (6,)), torch.float32, 3.0),
            (((7, 3),), torch.float64, 2.0),
            (((6, 5), (6,)), torch.float64, 1.0),
            (((6, 5), (6,)), torch.float32, 1e-3),
        ]
    ]
    for factor, step in zip(by_rms(steps, 0.07), steps, strict=True):
        rms = float(torch.cat([part.double().flatten() for part in step]).square().mean().sqrt())
        # Sums of up to 36 squares: a relative error of a few ε.
        assert float(factor) == pytest.approx(min(1.0, 0.07 / rms), rel=1e-6)
        assert factor.dtype == step[0].dtype
    assert by_rms([[torch.full((2,), math.inf)]], 0.07)[0] == 0


def test_a_step_before_any_backward_pass_does_nothing():
    model = mlp(10, 20, 4)
    preconditioner = KFAC(model, Exact())
    preconditioner.step()
    assert gradients(model) == []


@pytest.mark.parametrize("free", [True, False], ids=["host", "device"])
def test_a_second_step_with_no_new_gradient_does_nothing(free: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("brandla.kfac.capture.mask.reads_are_free", lambda tensor: free)
    model = mlp(10, 20, 4)
    preconditioner = KFAC(model, Exact())
    backward(model, 0)
    preconditioner.step()
    once = gradients(model)
    preconditioner.step()
    torch.testing.assert_close(gradients(model), once, rtol=0, atol=0)
    backward(model, 0)
    preconditioner.step()
    assert not torch.equal(gradients(model)[0], once[0])


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("started", [False, True])
def test_factors_follow_a_model_that_gets_another_dtype(strategy: Strategy, started: bool):
    model = mlp(10, 40, 4, dtype=torch.float32)
    preconditioner = KFAC(model, strategy)
    if started:
        inputs, labels = batch(8, 10, 4, dtype=torch.float32)
        CROSS_ENTROPY(model(inputs), labels).backward()
        preconditioner.step()
        model.zero_grad()
    model.double()
    backward(model, 1)
    preconditioner.step()
    dtypes = {part.dtype for layer in preconditioner._layers for part in layer.curvature.tensors()}
    assert dtypes == {torch.float64}
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model))


def test_modules_that_are_added_later_are_left_alone():
    model = mlp(10, 20, 4)
    preconditioner = KFAC(model, Exact())
    model.append(nn.Linear(4, 4, dtype=torch.float64))
    backward(model, 0)
    before = layer_gradient(model[-1])
    preconditioner.step()
    assert torch.equal(layer_gradient(model[-1]), before)


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match=r"KFAC: the model must not be in nn\.DataParallel; use"):
        KFAC(nn.DataParallel(mlp(10, 20, 4)))


def test_repr_says_what_there_is():
    preconditioner = KFAC(mlp(10, 20, 4), Brand(6), damping=lambda step: 0.1)
    text = repr(preconditioner)
    assert text.startswith("KFAC(2 Brand(")
    assert "clip=0.07" in text
    assert text.endswith("step 0)")
    assert "0x" not in text


def test_report_counts_the_memory():
    preconditioner, _ = train(Brand(6), [(0, "")])
    report = preconditioner.report()
    kept = [part for layer in preconditioner._layers for part in layer.curvature.tensors()]
    assert report.bytes == sum(part.numel() * part.element_size() for part in kept)
    assert report.dense_bytes == 8 * (11**2 + 40**2 + 41**2 + 4**2)
    assert report.captured_bytes == 8 * 8 * (10 + 40 + 40 + 4)
    assert re.search(r"factors: .* KiB, dense: .* KiB; captured in the last step: 5.9 KiB", str(report))
