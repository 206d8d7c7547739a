"""The demo's pieces, on a network small enough to take no time."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from brandla.demo import data, machine, record, study, tracking, training
from brandla.demo.figures import draw
from brandla.demo.meter import Meter
from brandla.demo.methods import METHODS, Trainer
from brandla.demo.results import Evaluation, Results, Run, Tracking
from brandla.demo.settings import Settings, TrackingSettings, TrainingSettings, make_settings
from brandla.demo.summary import NORMS, summarize_memory, summarize_tracking, summarize_training
from brandla.demo.tables import tables

TINY = Settings(
    width=40,
    batch=16,
    tracking=TrackingSettings(ranks=(4, 8), headline_rank=8, steps=10, reference_every=4, warmup=2),
    training=TrainingSettings(seeds=(0, 1), steps=6, search_steps=4, trials=2, warmup=1, rank=4, inverse_every=2),
)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=80)


@pytest.fixture(scope="module")
def results() -> Results:
    return study.run(TINY, quiet())


def printed(results: Results) -> str:
    console = quiet()
    for table in tables(results):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def without_times(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if "seconds" not in key}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


# data


def test_no_image_is_in_two_parts() -> None:
    digits = data.load("cpu")
    assert [len(part.labels) for part in digits] == [1437, 360, 1149, 288]
    training_set, test, search_training, search_validation = ({*map(tuple, part.images.tolist())} for part in digits)
    assert not training_set & test
    assert not search_training & search_validation
    assert search_training | search_validation == training_set


def test_an_epoch_shows_no_image_twice() -> None:
    split = data.Split(torch.arange(50.0)[:, None], torch.arange(50))
    first = torch.cat([batch.labels for batch in data.batches(split, 16, 3, seed=0)])
    assert len(first.unique()) == 48
    again = torch.cat([batch.labels for batch in data.batches(split, 16, 6, seed=0)])
    assert torch.equal(first, again[:48])
    assert len(again[48:].unique()) == 48
    assert not torch.equal(first, again[48:])


def test_network_depends_on_its_seed_alone() -> None:
    first = data.network(8, "cpu", 3)[0].weight
    state = torch.get_rng_state()
    assert torch.equal(first, data.network(8, "cpu", 3)[0].weight)
    assert torch.equal(state, torch.get_rng_state())


# tracking


def test_no_tracked_error_is_below_the_best_possible(results: Results) -> None:
    assert results.tracking is not None
    for one in summarize_tracking(results.tracking, TINY):
        assert set(one.ratios) == set(NORMS)
        for ratio in one.ratios.values():
            assert 1 - 1e-3 <= ratio.median <= ratio.worst < 3


def test_running_bound_holds(results: Results) -> None:
    assert results.tracking is not None
    assert all(one.bound_held for one in summarize_tracking(results.tracking, TINY))


def test_tracked_bases_are_orthonormal(results: Results) -> None:
    assert results.tracking is not None
    assert all(one.orthogonality < 1e-5 for one in summarize_tracking(results.tracking, TINY))


def test_every_step_is_measured(results: Results) -> None:
    found = results.tracking
    assert found is not None
    assert found.steps == list(range(1, 11))
    assert [(one.update, one.rank) for one in found.trackers] == [
        (update, rank) for rank in (4, 8) for update in ("root_update", "eigh_update")
    ]
    assert all(len(one.milliseconds) == len(one.errors.spectral) == 10 for one in found.trackers)
    assert all(len(one.milliseconds) + one.failures == 2 for one in found.references)


def test_failed_decomposition_is_counted_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh = torch.linalg.eigh

    def fail_when_dense(matrix: torch.Tensor) -> Any:
        if matrix.shape[-1] < tracking.order(TINY):
            return eigh(matrix)
        message = "did not converge"
        raise torch.linalg.LinAlgError(message)

    monkeypatch.setattr(torch.linalg, "eigh", fail_when_dense)
    found = Tracking(tracking.order(TINY), TINY.batch)
    with Meter(quiet(), 1) as meter:
        tracking.track(TINY, data.load("cpu"), found, meter)
    record_of = {one.name: one for one in found.references}
    assert (record_of["torch.linalg.eigh"].failures, record_of["torch.linalg.eigh"].milliseconds) == (2, [])
    assert record_of["randomized_eigh"].failures == 0


# training


def test_every_method_learns_from_every_seed(results: Results) -> None:
    runs = results.training.runs
    assert [(run.seed, run.method) for run in runs] == [(seed, one.name) for seed in (0, 1) for one in METHODS]
    assert all(run.finished and len(run.milliseconds) == 6 for run in runs)
    assert [at.step for at in runs[0].evaluations] == [2, 4, 6]


def test_every_method_gets_the_same_number_of_trials(results: Results) -> None:
    searches = results.training.searches
    assert [one.method for one in searches] == [one.name for one in METHODS]
    for one in searches:
        best = max(one.trials, key=lambda trial: trial.score)
        assert len(one.trials) == 2
        assert one.chosen == best.rate


def test_search_seed_is_not_a_final_one() -> None:
    for settings in (TINY, make_settings("cpu"), make_settings("cpu", quick=True), make_settings("cpu", seeds=9)):
        assert settings.training.search_seed not in settings.training.seeds


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_grid_lies_within_the_decade(method: Any) -> None:
    assert method.grid(4)[0] == pytest.approx(method.rates[0])
    assert method.grid(4)[-1] == pytest.approx(method.rates[1])
    assert method.grid(2) == method.grid(4)[1:3]


def test_only_brand_keeps_less_than_the_dense_factor(results: Results) -> None:
    shares = {one.method: one.largest / one.largest_dense for one in summarize_memory(results.training)}
    assert {name for name, share in shares.items() if share < 1} == {"B-KFAC", "B-KFAC, sketched"}
    n, rank = TINY.width + 1, TINY.training.rank
    brand = results.training.memory["B-KFAC"]
    # F and S, the error bound, the trace and the sum of the weights.
    assert max(factor.bytes for factor in brand if factor.n == n) == 4 * (n * rank + rank**2 + 3)


def test_numerical_failure_is_noted_and_the_study_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def fail(self: Trainer, batch: data.Split) -> None:
        if self.preconditioner is not None:
            message = "eigendecomposition failed"
            raise RuntimeError(message)
        step(self, batch)

    monkeypatch.setattr(Trainer, "step", fail)
    found = Results({}, TINY)
    with Meter(quiet(), 1) as meter:
        training.search(TINY, data.load("cpu"), found.training, meter)
        training.train(TINY, data.load("cpu"), found.training, meter)
    failed = {run.method for run in found.training.runs if run.failure == "eigendecomposition failed"}
    assert failed == {one.name for one in METHODS if one.strategy is not None}
    assert {one.method for one in summarize_training(found.training, TINY)} == {"SGD, momentum", "AdamW"}


def test_target_counts_steps_and_seconds_until_it_is_reached() -> None:
    def made_up(seed: int, accuracies: list[float]) -> Run:
        evaluations = [Evaluation(2 * at, 0.5 * at, accuracy) for at, accuracy in enumerate(accuracies, start=1)]
        return Run("AdamW", seed, 0.1, [1.0] * 9 + [50.0], evaluations, finished=True)

    found = Results({}, TINY)
    found.training.runs = [made_up(0, [0.5, 0.97, 0.96]), made_up(1, [0.5, 0.6, 0.98]), made_up(2, [0.1, 0.2, 0.3])]
    (one,) = summarize_training(found.training, TINY)
    assert (one.runs, one.reached, one.steps_to_target, one.seconds_to_target) == (3, 2, 5, 1.25)
    assert one.accuracy == pytest.approx((0.96 + 0.98 + 0.3) / 3)
    assert (one.median_milliseconds, one.largest_milliseconds) == (1, 50)


# what is left behind


def test_figures_are_the_same_again_except_times(results: Results) -> None:
    found = [record.record(one) for one in (results, study.run(TINY, quiet()))]
    for one in found:
        del one["machine"]
    assert without_times(found[0]) == without_times(found[1])


def test_json_holds_everything(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    record.write(results, path)
    found = json.loads(path.read_text(), parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert set(found) == {"schema", "machine", "settings", "tracking", "training", "interrupted", "seconds"}
    assert found["schema"] == record.SCHEMA
    assert {"cpu", "cores", "gpus", "platform", "versions", "blas", "lapack", "threads"} <= set(found["machine"])
    assert {"torch", "python", "brandla"} <= set(found["machine"]["versions"])
    assert found["settings"]["training"]["damping"] == 0.03
    assert {"best", "trackers", "references", "summary"} <= set(found["tracking"])
    assert {"searches", "runs", "memory", "summary", "memory_summary"} <= set(found["training"])
    assert found["interrupted"] is False


def test_unfinished_figures_never_replace_the_old_ones(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "demo.json"
    path.write_text("old")
    broken = dataclasses.replace(results, machine={"cpu": object()})
    with pytest.raises(TypeError):
        record.write(broken, path)
    assert path.read_text() == "old"


def test_tables_fit_a_terminal(results: Results) -> None:
    text = printed(results)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for method in METHODS:
        assert text.count(method.name) >= 1


def test_picture_is_drawn(results: Results, tmp_path: Path) -> None:
    assert draw(results, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def interrupted_after(advances: int, monkeypatch: pytest.MonkeyPatch) -> Results:
    advance = Meter.advance
    count = 0

    def counting(self: Meter, cost: float = 1.0) -> None:
        nonlocal count
        count += 1
        if count == advances:
            os.kill(os.getpid(), signal.SIGINT)
        advance(self, cost)

    monkeypatch.setattr(Meter, "advance", counting)
    return study.run(TINY, quiet())


# In the tracking study, in the search, and in the first, a middle and the last run of the training study.
@pytest.mark.parametrize("advances", [1, 10, 12, 82, 83, 130, 190])
def test_interrupted_study_keeps_what_was_measured(
    advances: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    found = interrupted_after(advances, monkeypatch)
    assert found.interrupted
    assert signal.getsignal(signal.SIGINT) is before
    assert found.tracking is not None
    assert len(found.tracking.steps) == min(advances, 10)
    steps_taken = sum(len(run.milliseconds) for run in found.training.runs)
    assert steps_taken == max(0, advances - 10 - 2 * 4 * len(METHODS))
    study.leave(found, tmp_path, quiet())
    assert json.loads((tmp_path / "demo.json").read_text())["interrupted"] is True
    assert (tmp_path / "demo.png").exists()


@pytest.mark.parametrize(("load", "said"), [(0.4, False), (1.7, True), (None, False)])
def test_busy_machine_is_pointed_out(load: float | None, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "load", lambda: load)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(study, "_measure", lambda *_: None)
    console = quiet()
    study.run(TINY, console)
    assert isinstance(console.file, io.StringIO)
    assert ("busy" in console.file.getvalue()) is said


def test_nothing_measured_is_no_picture(tmp_path: Path) -> None:
    found = Results(machine.facts(), TINY, interrupted=True)
    study.leave(found, tmp_path, quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


def test_commit_is_named_only_where_git_tracks_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"ls-files": "machine.py", "rev-parse": "abc", "status": ""}
    monkeypatch.setattr(machine, "_git", lambda *arguments: answers.get(arguments[0]))
    assert machine.commit() == {"commit": "abc", "modified": False}
    del answers["ls-files"]
    assert machine.commit() == {}
