"""``make study-kfac``: its images, what each method is, and what the tables state."""

from __future__ import annotations

import gzip
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from bench.frame import images
from bench.studies import kfac_images, peers
from bench.studies.kfac_methods import FULL, METHODS, QUICK, USUAL, Method, Settings, Task, points
from brandla.demo.data import Split
from brandla.kfac import KFAC, Brand, BrandCorrected, BrandRandomized, Exact, InverseFree, Randomized

TASK = Task("toy", "digits", "mlp", 8, 4, 6, 4, 2, 0.75)
TINY = Settings((TASK,), seeds=(0, 1), trials=2, rank=2)
COUNTS = (48, 20)


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the form of Fashion-MNIST's, of random pixels."""
    folder, random = tmp_path_factory.mktemp("fashion"), np.random.default_rng(0)
    for name, count in zip(images.FILES, np.repeat(COUNTS, 2), strict=True):
        shape = (count, 28, 28) if "images" in name else (count,)
        write_idx(folder / name, random.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8))
    return folder


def write_idx(path: Path, array: np.ndarray) -> None:
    sizes = np.array(array.shape, ">i4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(b"\0\0\x08" + bytes([array.ndim]) + sizes + array.tobytes())


def test_the_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    write_idx(tmp_path / "one.gz", array)
    np.testing.assert_array_equal(images.read(tmp_path / "one.gz"), array)


def test_images_are_standardised_and_validation_is_apart(fashion: Path) -> None:
    found = images.load("fashion-mnist", fashion, "cpu")
    sizes = [tuple(part.images.shape) for part in found]
    validating = COUNTS[0] // images.PARTS
    assert sizes == [(COUNTS[0], 784), (COUNTS[1], 784), (COUNTS[0] - validating, 784), (validating, 784)]
    # The means of 37,632 pixels in float32.
    assert float(found.training.images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(found.training.images.std()) == pytest.approx(1, abs=1e-5)
    seen = {tuple(row) for row in found.search_training.images.tolist()}
    assert not any(tuple(row) in seen for row in found.search_validation.images.tolist())


# Named, since a compressed file holds the time it was made at, and a name must be the same in every test process.
@pytest.mark.parametrize(
    "broken",
    [b"", b"no gzip", gzip.compress(b"\0\0"), gzip.compress(b"\0\0\x0d\1\0\0\0\1\0")],
    ids=["empty", "not compressed", "too short", "of floats"],
)
def test_a_file_that_is_no_idx_file_is_named(broken: bytes, tmp_path: Path) -> None:
    (tmp_path / "one.gz").write_bytes(broken)
    with pytest.raises(images.UnusableError, match=r"one\.gz is no idx file"):
        images.read(tmp_path / "one.gz")


def test_images_without_labels_are_refused(fashion: Path, tmp_path: Path) -> None:
    shutil.copytree(fashion, tmp_path / "copy")
    write_idx(tmp_path / "copy" / images.FILES[1], np.zeros(3, np.uint8))
    with pytest.raises(images.UnusableError, match="48 images and 3 labels"):
        images.fashion(tmp_path / "copy")


@pytest.mark.skipif(not images.FOLDER.is_dir(), reason=f"needs Debian's package {images.PACKAGE}")
def test_the_packages_files_are_the_60000_images() -> None:
    found = images.fashion(images.FOLDER)
    assert [len(part.labels) for part in found] == [60_000, 10_000, 55_000, 5_000]
    assert found.test.labels.bincount().tolist() == [1000] * 10


def test_missing_files_are_said_in_one_line(tmp_path: Path) -> None:
    options = ["--quick", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(kfac_images.app, options)
    assert answer.exit_code == 2
    (line,) = answer.stderr.splitlines()
    assert images.PACKAGE in line
    assert "--data" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [USUAL, FULL, QUICK], ids=["usual", "full", "quick"])
def test_every_method_has_the_same_trials_that_cover_its_ranges(settings: Settings) -> None:
    assert settings.search_seed not in settings.seeds
    cube = np.array(points(settings))
    assert cube.shape == (settings.trials, 3)
    for column in cube.T:
        assert sorted(np.floor(column * settings.trials)) == list(range(settings.trials))
    for method in METHODS:
        for name, (low, high) in method.ranges.items():
            tried = [method.numbers(list(point))[name] for point in cube]
            # Three digits are kept.
            assert low * 0.995 <= min(tried) < low * (high / low) ** (1 / settings.trials) * 1.005
            assert max(tried) <= high * 1.005


def by_hand(method: Method, model: nn.Module, numbers: dict[str, float]) -> tuple[torch.optim.Optimizer, KFAC | None]:
    """Return the optimizer and the preconditioner of a method, written out."""
    rate = numbers["rate"]
    if method.name == "AdamW":
        betas, decay = (1 - numbers["1 − β₁"], 0.999), numbers["weight decay"]
        return torch.optim.AdamW(model.parameters(), rate, betas, weight_decay=decay), None
    if method.optimizer is not None:
        beta, decay = 1 - numbers["1 − β₁"], numbers["weight decay"]
        kind = getattr(peers, method.name)
        matrix = () if kind is peers.Muon else (10,)
        betas = beta if kind is peers.Muon else (beta, 0.99)
        return kind(model.parameters(), rate, betas, decay, *matrix), None
    if method.name == "SGD":
        momentum, decay = 1 - numbers["1 − momentum"], numbers["weight decay"]
        return torch.optim.SGD(model.parameters(), rate, momentum, weight_decay=decay), None
    strategy = {
        "K-FAC": Exact(inverse_every=10),
        "RS-KFAC": Randomized(2, method="svd", inverse_every=10),
        "SRE-KFAC": Randomized(2, method="eigh", inverse_every=10),
        "B-KFAC": Brand(2),
        "B-KFAC, sketched": Brand(2, sketch=1),
        "B-R-KFAC": BrandRandomized(2, overwrite_every=50),
        "B-KFAC-C": BrandCorrected(2, correct_every=10),
        "SINGD": InverseFree("dense", variant="singd", rate=numbers.get("β", 1), preconditioner_every=5),
    }[method.name]
    decay = 1 - numbers.get("1 − ρ", 0.05)
    kfac = KFAC(model, strategy, damping=numbers["damping"], clip=0.07, decay=decay, sharing="reduce", seed=3)
    return torch.optim.SGD(model.parameters(), rate), kfac


@pytest.mark.filterwarnings("ignore:KFAC. some factors are too small")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_method_takes_the_steps_that_its_name_says(method: Method) -> None:
    batch = Split(torch.randn(16, 24, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10)
    numbers = method.numbers([0.5, 0.4, 0.3])
    own, other = (TASK.model(24, "cpu", 3) for _ in range(2))
    trainer = method.trainer(own, numbers, TINY, 3)
    optimizer, preconditioner = by_hand(method, other, numbers)
    for _ in range(3):
        trainer.step(batch)
        optimizer.zero_grad()
        F.cross_entropy(other(batch.images), batch.labels).backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()
    for taken, expected in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(taken, expected, rtol=0, atol=0)
    weights = sum(weight.numel() for weight in own.parameters()) * 4
    # Momentum is a number a weight; AdamW keeps two, and a count of steps for each of the 6 parameters. Muon keeps one
    # for matrices; Shampoo and SOAP two, and four squares for each matrix (d_out, d_in).
    vectors, matrices = (
        [weight for weight in own.parameters() if (weight.ndim > 1) is is_matrix] for is_matrix in (False, True)
    )
    squares = 4 * sum(2 * n**2 for matrix in matrices for n in matrix.shape)
    of_vectors = sum(4 * vector.numel() + 4 for vector in vectors)
    assert kfac_images.kept_bytes(trainer) == {
        "optimizer_bytes": {
            "SGD": weights,
            "AdamW": 2 * weights + 6 * 4,
            "Muon": weights + of_vectors,
            "Shampoo": 2 * weights + squares,
            "SOAP": 2 * weights + squares,
        }.get(method.name, 0),
        "factor_bytes": 0 if preconditioner is None else preconditioner.report().bytes,
    }


def test_accuracy_and_loss_are_those_of_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "CHUNK", 7)
    split = Split(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 5)
    accuracy, loss = images.judge(nn.Identity(), split)
    assert accuracy == pytest.approx(float((split.images.argmax(1) == split.labels).float().mean()))
    # A sum of 20 losses in another order.
    assert loss == pytest.approx(float(F.cross_entropy(split.images, split.labels)), rel=1e-5)


def test_a_loss_that_is_not_finite_ends_a_run_and_is_noted() -> None:
    found, run = images.load("digits", Path(), "cpu"), {}
    trainer = METHODS[0].trainer(TASK.model(64, "cpu", 0), METHODS[0].numbers([0.5] * 3), TINY, 0)
    with torch.no_grad():
        trainer.model[0].weight.fill_(float("nan"))
    kfac_images.train(run, trainer, TASK, (found.training, found.test), 6, 0, lambda share: None)
    assert not run["finished"]
    assert run["failure"] == "step 2: diverged: the loss is not finite"


def looked(*accuracies: float, method: str = "AdamW", seed: int = 0, failure: str | None = None) -> dict[str, Any]:
    """Return a run that was looked at after every second step, each 0.5 s."""
    looks = [{"step": 2 * at, "seconds": at, "accuracy": value} for at, value in enumerate(accuracies, start=1)]
    about = {"task": "toy", "method": method, "seed": seed, "numbers": {}, "finished": failure is None}
    kept = {"factor_bytes": 10, "optimizer_bytes": 0, "milliseconds": [1.0, 2.0], "failure": failure}
    return about | kept | {"evaluations": looks}


def test_steps_and_seconds_are_those_to_the_first_look_at_the_target() -> None:
    content = {"runs": [looked(0.5, 0.75, 0.7), looked(0.8, 0.9, 0.9, seed=1)]}
    (row,) = kfac_images.summary(content, asdict(TASK)).to_dict("records")
    assert (row["runs"], row["reached"]) == (2, 2)
    assert [row[f"step {part}"] for part in ("mean", "min", "max")] == [3, 2, 4]
    assert [row[f"seconds {part}"] for part in ("mean", "min", "max")] == [1.5, 1, 2]
    assert row["accuracy mean"] == pytest.approx(0.8)


def test_losers_are_stated_and_compared_with_nobody() -> None:
    runs = [looked(0.8), looked(0.9, seed=1), looked(0.2, method="SGD"), looked(0.9, method="SGD", seed=1)]
    runs += [looked(0.1, method="SINGD", failure="step 2: so it was")]
    trial = {"task": "toy", "method": "SGD", "numbers": {}, "score": 0.0, "failure": "step 1: no"}
    content = {"settings": asdict(TINY), "runs": runs, "trials": [trial]}
    said = "\n".join(kfac_images.verdict(content, asdict(TASK)))
    assert "where every run arrived: AdamW 2" in said
    assert "did not reach it: SGD (1 of 2), SINGD (1 of 1)" in said
    assert "SINGD, seed 0: step 2: so it was" in said
    assert "search that failed: SGD 1" in said
    ((_, cells),) = kfac_images.shown(content)
    rows = cells.set_index("method")
    assert rows.loc["SGD", "reached by"] == "1 of 2"
    assert rows.loc[["SGD", "SINGD"], "seconds × AdamW"].tolist() == ["–", "–"]
