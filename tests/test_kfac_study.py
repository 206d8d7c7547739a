"""``make study-kfac``: what it tries, trains and states, and how it ends."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.kfac_study import __main__ as command
from bench.kfac_study import images, networks, page, record, study, summary, tables
from bench.kfac_study.methods import METHODS, Method, Trainer, points
from bench.kfac_study.record import Record, Run
from bench.kfac_study.settings import FULL, QUICK, USUAL, Settings, Task
from brandla.demo.results import Evaluation
from torch import nn
from torch.nn import functional as F

from bench.frame import pictures
from brandla.demo.data import Split
from brandla.kfac import KFAC, Brand, BrandCorrected, BrandRandomized, Exact, InverseFree, Randomized

ROOT = Path(__file__).parents[1]
TASK = Task("toy", "digits", "mlp", 8, 4, 6, 4, 2, 0.75)
TINY = Settings((TASK,), seeds=(0, 1), trials=2, rank=2)
COUNTS = (48, 20)


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the form of Fashion-MNIST's, of random pixels."""
    folder, random = tmp_path_factory.mktemp("fashion"), np.random.default_rng(0)
    for name, count in zip(images.FILES, np.repeat(COUNTS, 2), strict=True):
        shape = (count, 28, 28) if "images" in name else (count,)
        values = random.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8)
        write_idx(folder / name, values)
    return folder


def write_idx(path: Path, array: np.ndarray) -> None:
    sizes = np.array(array.shape, ">i4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(b"\0\0\x08" + bytes([array.ndim]) + sizes + array.tobytes())


class Stopping:
    """A meter that is interrupted after some steps, or never."""

    def __init__(self, steps: int = -1) -> None:
        self.left = steps

    def stage(self, description: str) -> None:
        pass

    def advance(self, cost: float = 1.0) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def looked(*accuracies: float, **about: object) -> Run:
    """Return a finished run that was looked at after every second step, each 0.5 s."""
    looks = [Evaluation(2 * place, place, value) for place, value in enumerate(accuracies, start=1)]
    given = {"task": "toy", "method": "AdamW", "seed": 0, "numbers": {}, "finished": True}
    return Run(evaluations=looks, milliseconds=(1.0, 2.0), **(given | about))


def named(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def test_the_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    write_idx(tmp_path / "one.gz", array)
    np.testing.assert_array_equal(images.read(tmp_path / "one.gz"), array)


def test_images_are_standardised_and_validation_is_apart(fashion: Path) -> None:
    found = images.load(QUICK.task("fashion-mnist"), fashion, "cpu")
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


def test_missing_files_are_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--quick", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == command.UNUSABLE
    (line,) = capsys.readouterr().err.splitlines()
    assert images.PACKAGE in line
    assert "--data" in line
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Methods and runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [USUAL, FULL], ids=["usual", "full"])
def test_every_method_has_the_same_trials_that_cover_its_ranges(settings: Settings) -> None:
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


def test_the_searchs_seed_is_none_that_is_measured() -> None:
    for settings in (USUAL, FULL, QUICK):
        assert settings.search_seed not in settings.seeds
        assert len({task.name for task in settings.tasks}) == len(settings.tasks)


def by_hand(method: Method, model: nn.Module, numbers: dict[str, float]) -> tuple[torch.optim.Optimizer, KFAC | None]:
    """Return the optimizer and the preconditioner of a method, written out."""
    rate = numbers["rate"]
    if method.name == "AdamW":
        betas, decay = (1 - numbers["1 − β₁"], 0.999), numbers["weight decay"]
        return torch.optim.AdamW(model.parameters(), rate, betas, weight_decay=decay), None
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
    own, other = (networks.network(TASK, 24, "cpu", 3) for _ in range(2))
    trainer = Trainer(method, own, numbers, TINY, 3)
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
    factors, kept = trainer.kept_bytes()
    # Momentum is a number a weight; AdamW keeps two, and a count of steps for each of the 6 parameters.
    assert kept == {"SGD": weights, "AdamW": 2 * weights + 6 * 4}.get(method.name, 0)
    assert factors == (0 if preconditioner is None else preconditioner.report().bytes)


def test_accuracy_and_loss_are_those_of_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "CHUNK", 7)
    split = Split(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 5)
    found = networks.judge(nn.Identity(), split)
    assert found.accuracy == pytest.approx(float((split.images.argmax(1) == split.labels).float().mean()))
    # A sum of 20 losses in another order.
    assert found.loss == pytest.approx(float(F.cross_entropy(split.images, split.labels)), rel=1e-5)


class Broken:
    """A trainer whose step does what is asked."""

    def __init__(self, act: Callable[[nn.Module], object]) -> None:
        self.model, self._act = networks.network(TASK, 64, "cpu", 0), act

    def step(self, batch: Split) -> None:
        self._act(self.model)


def poison(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.fill_(math.nan)


def refuse(model: nn.Module) -> None:
    message = "no convergence\nof the eigenvalues"
    raise RuntimeError(message)


@pytest.mark.parametrize(
    ("act", "said"), [(poison, "diverged: .* after 2 steps"), (refuse, "stopped after 0 steps: no")]
)
def test_a_failure_ends_a_run_and_is_noted(act: Callable[[nn.Module], object], said: str) -> None:
    found, run = images.load(TASK, Path(), "cpu"), Run("toy", "SGD", 0, {})
    study.train(run, Broken(act), TASK, (found.training, found.test), TASK.steps, Stopping())
    assert not run.finished
    assert re.match(said, str(run.failure))
    run.judge()
    assert run.score == 0


def test_a_run_is_looked_at_as_often_as_the_task_says() -> None:
    found, run = images.load(TASK, Path(), "cpu"), Run("toy", "SGD", 0, named("SGD").numbers([0.5, 0.5, 0.5]))
    trainer = Trainer(named("SGD"), networks.network(TASK, 64, "cpu", 0), run.numbers, TINY, 0)
    study.train(run, trainer, TASK, (found.training, found.test), 5, Stopping())
    assert [at.step for at in run.evaluations] == [2, 4, 5]
    assert run.finished
    assert run.evaluations[-1].accuracy == networks.judge(trainer.model, found.test).accuracy
    seconds = [at.seconds for at in run.evaluations]
    assert seconds == sorted(seconds)
    assert run.milliseconds is not None
    assert run.milliseconds[0] <= run.milliseconds[1]


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def test_the_best_trial_is_chosen_once_all_are_made() -> None:
    measured = Record(TINY)
    for scores in ((0.5, 0.3), (0.6, 0.8)):
        assert measured.chosen("toy", "AdamW") is None
        measured.trials.append(looked(*scores))
        measured.trials[-1].judge()
    chosen = measured.chosen("toy", "AdamW")
    assert chosen is measured.trials[1]
    assert chosen.score == pytest.approx(0.7)


def test_steps_and_seconds_are_those_to_the_first_look_at_the_target() -> None:
    measured = Record(TINY, runs=[looked(0.5, 0.75, 0.7), looked(0.8, 0.9, 0.9, seed=1)])
    found = summary.summarize(measured, "toy", "AdamW")
    assert (found.runs, found.reached) == (2, 2)
    assert found.steps == (3, 2, 4)
    assert found.seconds == (1.5, 1, 2)
    assert found.accuracy == pytest.approx((0.8, 0.7, 0.9))
    assert summary.over_base([found], "AdamW", "steps") == 1


def test_losers_are_stated_and_compared_with_nobody() -> None:
    runs = [looked(0.8), looked(0.9, seed=1), looked(0.2, method="SGD"), looked(0.9, method="SGD", seed=1)]
    runs += [looked(0.1, method="SINGD", finished=False, failure="diverged: so it was")]
    measured = Record(TINY, runs=runs)
    found = summary.summaries(measured, "toy")
    assert summary.over_base(found, "SGD", "seconds") is None
    assert [one.method for one in summary.ranking(found, "seconds")] == ["AdamW"]
    said = "\n".join(tables.verdict(measured, TASK))
    assert "did not reach it: SGD (1 of 2), SINGD (1 of 1)" in said
    assert "SINGD, seed 0 diverged: so it was" in said
    rows = {row[0]: row for row in tables.rows(measured, TASK)}
    assert rows["SGD"][5] == "1 of 2"
    assert rows["SINGD"][1] == tables.NOTHING


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_a_short_run_is_written_tabulated_drawn_and_read_back(
    fashion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--quick", "--data", str(fashion), "--out", str(tmp_path / "machine")]) == 0
    drawn = {f"kfac-study-{theme.name}.png" for theme in pictures.THEMES}
    assert {path.name for path in (tmp_path / "machine").iterdir()} == {"kfac-study.json", *drawn}
    content = json.loads((tmp_path / "machine" / "kfac-study.json").read_text(encoding="utf-8"))
    measured = record.of_content(content)
    # The facts of the file are beside the record, and hold what it says of its end.
    kept = {name: value for name, value in measured.content().items() if name != "interrupted"}
    assert json.loads(json.dumps(kept)) == {name: content[name] for name in kept}
    assert len(measured.trials) == len(QUICK.tasks) * len(METHODS) * QUICK.trials
    assert len(measured.runs) == len(QUICK.tasks) * len(METHODS) * len(QUICK.seeds)
    assert all(run.finished for run in (*measured.trials, *measured.runs))
    printed = capsys.readouterr().out
    text = page.page(tmp_path)
    assert "A short run: its figures mean nothing." in text
    for task in QUICK.tasks:
        assert f"### {task.name}, to 30 %" in text
        assert f"{task.name}: to 30 %" in printed
        assert all(f"| {method.name} |" in text for method in METHODS)
    output = tmp_path / "docs" / "kfac-study.md"
    output.parent.mkdir()
    arguments = ["--results", str(tmp_path), "--output", str(output)]
    page.main(arguments)
    page.main([*arguments, "--check"])
    (output.parent / "measured" / "machine" / "kfac-study-dark.png").unlink()
    with pytest.raises(SystemExit, match="kfac-study-dark"):
        page.main([*arguments, "--check"])


def test_an_interruption_keeps_what_was_measured_and_marks_it(tmp_path: Path) -> None:
    measured, whole = Record(TINY), len(METHODS) * (TINY.trials * TASK.search_steps)
    study.run_all(measured, tmp_path, "cpu", Stopping(whole + TASK.steps + 3))
    assert measured.interrupted
    assert [run.finished for run in measured.runs] == [True, False]
    assert [at.step for at in measured.runs[1].evaluations] == [2]
    assert list(tables.of(measured))
    assert list(tables.search_rows(measured, TASK))
    halfway = Record(TINY)
    study.run_all(halfway, tmp_path, "cpu", Stopping(TASK.search_steps + 1))
    assert halfway.interrupted
    assert [run.score is not None for run in halfway.trials] == [True, False]
    assert halfway.chosen("toy", "SGD") is None
    assert list(tables.of(halfway)) == []
    facts = page.provenance(_facts() | {"interrupted": True})
    assert "Interrupted" in facts
    assert "Interrupted" not in page.provenance(_facts())


def _facts() -> dict[str, Any]:
    return {
        "threads": 1,
        "versions": {},
        "commit": None,
        "modified": None,
        "date": "today",
        "seconds": 60.0,
        "quick": False,
        "interrupted": False,
    }


@pytest.mark.slow
def test_ctrl_c_ends_with_a_file_that_says_so(tmp_path: Path) -> None:
    source = (
        "import sys; from dataclasses import replace; from bench.kfac_study import __main__ as m;"
        " m.QUICK = replace(m.QUICK, seeds=tuple(range(100000)));"
        f" sys.exit(m.main(['--quick', '--only', 'digits', '--out', {str(tmp_path)!r}]))"
    )
    with subprocess.Popen(
        [sys.executable, "-u", "-c", source], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        while "K-FAC, seed 1" not in process.stdout.readline():
            assert process.poll() is None
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == command.INTERRUPTED
    content = json.loads((tmp_path / "kfac-study.json").read_text(encoding="utf-8"))
    assert content["facts"]["interrupted"] is True
    assert record.of_content(content).interrupted
    assert "**Interrupted**" in "\n".join(page.of_file(content, "here"))
    assert (tmp_path / "kfac-study-light.png").exists()


def test_the_page_is_that_of_the_result_files() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.kfac_study.page", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_page_that_was_edited_is_found(tmp_path: Path) -> None:
    edited = tmp_path / "kfac-study.md"
    edited.write_text("0.3", encoding="utf-8")
    with pytest.raises(SystemExit, match="not what the result files say"):
        page.main(["--check", "--output", str(edited)])


def test_without_a_result_the_page_says_so(tmp_path: Path) -> None:
    assert "Nothing has been measured yet." in page.page(tmp_path)
