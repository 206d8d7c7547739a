"""``make study-kfac``: its data, its methods, and how the search and the runs end."""

import gzip
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from bench.frame import samples
from bench.studies import kfac_images, peers
from bench.studies.kfac_methods import FULL, KINDS, METHODS, QUICK, USUAL, Settings, Task, points
from brandla.demo.data import Split
from brandla.kfac import KFAC, Brand, InverseFree

TASK = Task("toy", "mlp", 8, 4, 6, 60, 0.75)
WIDER = replace(TASK, name="wider", width=32, follows="toy", rates=True)
WIDEST = replace(TASK, name="widest", width=128, follows="wider")
TINY = Settings((TASK, WIDER, WIDEST), seeds=(0, 1), trials=2, rank=2, look_after=1)
COUNTS = (48, 20)
BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """Files in the format of Fashion-MNIST, with random pixels."""
    folder, random = tmp_path_factory.mktemp("fashion"), np.random.default_rng(0)
    for name, count in zip(samples.FILES, np.repeat(COUNTS, 2), strict=True):
        shape = (count, 28, 28) if "images" in name else (count,)
        (folder / name).write_bytes(idx(random.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8)))
    return folder


def idx(array):
    """Return the bytes of an idx file that holds an array."""
    sizes = np.array(array.shape, ">i4").tobytes()
    return gzip.compress(b"\0\0\x08" + bytes([array.ndim]) + sizes + array.tobytes())


def test_the_files_are_read_as_they_were_written(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    (tmp_path / "one.gz").write_bytes(idx(array))
    np.testing.assert_array_equal(samples.read_idx(tmp_path / "one.gz"), array)


def test_images_are_standardised_and_validation_is_apart(fashion):
    found = TASK.data(fashion, "cpu", None)
    sizes = [tuple(part.images.shape) for part in found]
    validating = COUNTS[0] // samples.PARTS
    assert sizes == [(COUNTS[0], 784), (COUNTS[1], 784), (COUNTS[0] - validating, 784), (validating, 784)]
    # These are means over 37,632 pixels in float32.
    assert float(found.training.images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(found.training.images.std()) == pytest.approx(1, abs=1e-5)
    seen = {tuple(row) for row in found.search_training.images.tolist()}
    assert not any(tuple(row) in seen for row in found.search_validation.images.tolist())


BROKEN = {
    "empty": b"",
    "not compressed": b"no gzip",
    "too short": gzip.compress(b"\0\0"),
    "of floats": gzip.compress(b"\0\0\x0d\1\0\0\0\1\0"),
    "of few labels": idx(np.zeros(3, np.uint8)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_idx_file_or_has_too_few_labels_is_named(name, fashion, tmp_path):
    folder = shutil.copytree(fashion, tmp_path / "copy")
    (folder / samples.FILES[1]).write_bytes(BROKEN[name])
    words = "48 images and 3 labels" if "labels" in name else rf"{samples.FILES[1]} is no idx file"
    with pytest.raises(samples.UnusableError, match=words):
        samples.fashion(folder)


def test_missing_files_are_reported_in_one_line(tmp_path):
    options = ["--quick", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(kfac_images.app, options)
    assert answer.exit_code == 2
    (line,) = answer.stderr.splitlines()
    assert samples.PACKAGE in line
    assert "--data" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_takes_its_data_and_the_score_is_that_of_the_target(kind, fashion):
    task = Task("toy", kind, 8, 4, 6, 60, 0.5)
    found = task.data(fashion, "cpu", 16)
    inputs, labels = found.search_validation
    model = task.model(inputs, 0)
    with torch.no_grad():
        outputs = model(inputs)
    right = [float(output.argmax() == label) for output, label in zip(outputs, labels, strict=True) if output.ndim == 1]
    expected = float(task.network.loss(outputs, labels)) if task.network.by_loss else sum(right) / len(right)
    assert task.score(model, found.search_validation) == pytest.approx(expected, rel=1e-5)
    assert task.reached(0.4) is task.network.by_loss is not task.reached(0.6)


@pytest.mark.parametrize("settings", [USUAL, FULL, QUICK], ids=["usual", "full", "quick"])
def test_every_method_has_the_same_trials_that_cover_its_ranges(settings):
    assert settings.search_seed not in settings.seeds
    cube = np.array(points(settings))
    assert cube.shape == (settings.trials, 3)
    for column in cube.T:
        assert sorted(np.floor(column * settings.trials)) == list(range(settings.trials))
    for method in METHODS:
        for name, (low, high) in method.ranges.items():
            tried = [method.numbers(list(point))[name] for point in cube]
            # The numbers are rounded to three digits.
            assert low * 0.995 <= min(tried) < low * (high / low) ** (1 / settings.trials) * 1.005
            assert max(tried) <= high * 1.005


def by_hand(name, model, numbers):
    """Return the optimizer and the preconditioner of a method, written out."""
    rate, weights = numbers["rate"], model.parameters()
    if "weight decay" in numbers:
        decay, beta = numbers["weight decay"], 1 - numbers.get("1 − β₁", 0)
        return {
            "AdamW": lambda: torch.optim.AdamW(weights, rate, (beta, 0.999), weight_decay=decay),
            "SGD": lambda: torch.optim.SGD(weights, rate, 1 - numbers["1 − momentum"], weight_decay=decay),
            "SOAP": lambda: peers.SOAP(weights, rate, (beta, 0.99), decay, 10),
        }[name](), None
    strategies = {
        "B-KFAC, sketched": Brand(2, sketch=1),
        "SINGD": InverseFree("dense", variant="singd", rate=numbers.get("β", 1), preconditioner_every=5),
    }
    options = {"damping": numbers["damping"], "clip": 0.07, "decay": 1 - numbers.get("1 − ρ", 0.05), "seed": 3}
    kfac = KFAC(model, strategies[name], sharing="reduce", **options)
    return torch.optim.SGD(model.parameters(), rate), kfac


@pytest.mark.filterwarnings("ignore:KFAC. some factors are too small")
@pytest.mark.parametrize("name", ["SGD", "AdamW", "SOAP", "B-KFAC, sketched", "SINGD"])
def test_a_method_takes_the_steps_that_its_name_says(name):
    batch = Split(torch.randn(16, 24, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10)
    numbers = BY_NAME[name].numbers([0.5, 0.4, 0.3])
    own, other = (TASK.model(batch.images, 3) for _ in range(2))
    trainer = BY_NAME[name].trainer(own, numbers, TINY, TASK, 3)
    optimizer, preconditioner = by_hand(name, other, numbers)
    for _ in range(3):
        trainer.step(batch)
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(batch.images), batch.labels).backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()
    for taken, expected in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(taken, expected, rtol=0, atol=0)
    weights = 4 * sum(weight.numel() for weight in own.parameters())
    # Momentum keeps one number per weight. AdamW keeps two, and a count of steps for each of the 6 parameters. SOAP
    # keeps two, and four squares for each matrix (d_out, d_in).
    squares = 4 * sum(2 * n**2 for weight in own.parameters() if weight.ndim > 1 for n in weight.shape)
    kept = {"SGD": weights, "AdamW": 2 * weights + 6 * 4, "SOAP": 2 * weights + squares}
    assert kfac_images.kept_bytes(trainer) == {
        "optimizer_bytes": kept.get(name, 0),
        "factor_bytes": 0 if preconditioner is None else preconditioner.report().bytes,
    }


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_muon_equals_that_of_torch(shape):
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    own, other = (nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (
        peers.Muon([own], 0.1, 0.9, 0.01),
        torch.optim.Muon([other], 0.1, 0.01, 0.9, adjust_lr_fn="match_rms_adamw"),
    )
    for gradient in gradients:
        own.grad, other.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    # torch.optim.Muon multiplies in bfloat16, which has three digits.
    torch.testing.assert_close(own - start, other - start, rtol=0.05, atol=0.01)


# The target, the seconds, a factor on the weights, and how the run ends.
RUNS = {
    "at its target": (0.0, 60.0, 1.0, (1, 1, None)),
    "after its steps": (2.0, 60.0, 1.0, (None, 6, None)),
    "after its seconds": (2.0, 0.0, 1.0, (None, 1, None)),
    "with its loss": (2.0, 60.0, float("nan"), (None, 1, "step 1: diverged: the loss is not finite")),
}


@pytest.mark.parametrize(("target", "seconds", "scale", "found"), RUNS.values(), ids=RUNS)
def test_a_run_ends(target, seconds, scale, found, fashion):
    task, model = replace(TASK, steps=6, target=target, seconds=seconds), TASK.model(torch.empty(1, 784), 0)
    trainer = METHODS[0].trainer(model, METHODS[0].numbers([0.5] * 3) | {"rate": 0.1}, TINY, TASK, 0)
    with torch.no_grad():
        model[0].weight.mul_(scale)
    run = kfac_images.train(trainer, task, task.data(fashion, "cpu", None)[:2], 0, TINY)
    assert (run["step"], run["steps"], run["failure"]) == found
    assert run["seconds"] == (pytest.approx(run["milliseconds"] / 1e3) if run["step"] else None)
    assert (run["score"] is None) == (run["failure"] is not None)


def trial(step, score, rate, exponent=0.0, **about):
    numbers = METHODS[0].numbers([0.5] * 3) | {"rate": rate}
    ended = {"step": step, "score": score, "failure": None, "numbers": numbers, "exponent": exponent}
    return {"task": "toy", "method": "SGD"} | ended | about


def test_the_fewest_steps_are_chosen_and_then_the_best_score():
    trials = [trial(None, 0.7, 1.0), trial(None, 0.9, 2.0, failure="step 2: so it was"), trial(None, 0.72, 3.0)]

    def chosen(task):
        return kfac_images.best_numbers(task, METHODS[0], TINY, {"trials": trials})["numbers"]["rate"]

    assert chosen(TASK) == 3
    trials += [trial(9, 0.75, 4.0), trial(8, 0.75, 5.0)]
    assert chosen(TASK) == 5
    # The rate goes with a power of the ratio of the widths, which is 4 each time; the second task's best trial sets it.
    trials += [trial(7, 0.8, 2.5, 0.5, task="wider"), trial(9, 0.8, 5.0, 0.0, task="wider")]
    assert [chosen(WIDER), chosen(WIDEST)] == [2.5, 1.25]


def test_a_trial_takes_no_more_steps_than_the_best_before_it(fashion):
    samples = TASK.data(fashion, "cpu", None)

    def call(task, point, tables):
        return kfac_images.trial(task, METHODS[0], point, TINY, lambda task: samples, tables)[0]

    hopeless = replace(TASK, target=2.0)
    assert call(hopeless, 0, {})["steps"] == 6
    assert call(hopeless, 0, {"trials": [trial(3, 0.8, 0.1)]})["steps"] == 3
    found = call(replace(hopeless, name="wider", width=32, follows="toy"), 2, {"trials": [trial(3, 0.8, 0.1)]})
    assert (found["numbers"]["rate"], found["exponent"]) == (0.025, 1.0)


def test_the_cost_of_a_step_is_the_mean_of_a_period(monkeypatch):
    count = iter(range(100))
    # The first step is left out. After it, every second step is expensive.
    monkeypatch.setattr(kfac_images, "timed", lambda call, where: (call(), [1000, 10, 60][next(count) % 3]))
    expected = {"SOAP": {"milliseconds": 15, "renewing": 60}, "SGD": {"milliseconds": 35, "renewing": None}}
    for name, row in expected.items():
        assert list(kfac_images.cost_of(16, BY_NAME[name], replace(TINY, cost_seconds=1.0), "cpu")) == [row]


def test_from_the_second_step_on_every_second_one_renews(monkeypatch):
    """`cost_of` relies on this. Here the number of eigendecompositions of a step stands for its milliseconds."""
    counts, real = [0], torch.linalg.eigh

    def counted(*arguments, **options):
        counts[-1] += 1
        return real(*arguments, **options)

    def timed(call, _):
        counts.append(0)
        return call(), counts[-1]

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    monkeypatch.setattr(kfac_images, "timed", timed)
    (row,) = kfac_images.cost_of(16, BY_NAME["K-FAC"], TINY, "cpu")
    assert row["renewing"] > 0
    assert row["milliseconds"] == pytest.approx(row["renewing"] / 10)
