"""The demo's pieces, on a network small enough to take no time."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from brandla.demo import data, frame, machine, meter, study, summary, tracking
from brandla.demo.frame import Piece
from brandla.demo.settings import Settings, make_settings
from brandla.demo.training import METHODS, Trainer

TINY = Settings(
    width=40, batch=16, warmup=1, ranks=(4, 8), headline_rank=8, tracking_steps=10, reference_every=4,
    seeds=(0, 1), steps=6, search_steps=4, trials=2, rank=4, inverse_every=2,
)  # fmt: skip


def quiet() -> Console:
    return Console(file=io.StringIO(), width=80)


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return study.measure(TINY, quiet())


def without_times(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if "seconds" not in key}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


# the frame


def piece(table: str, *rows: dict[str, Any], stop: bool = False) -> Piece:
    def measure(tables: Any, tick: Any) -> Any:
        yield rows[0]
        if stop:
            signal.raise_signal(signal.SIGINT)
        try:
            tick(0.5)
        finally:
            yield from rows[1:]

    return Piece(table, {"piece": str(rows[0]["value"])}, 1.0, measure)


def test_pieces_that_have_rows_are_left_out_and_ctrl_c_keeps_what_is_done() -> None:
    tables: dict[str, Any] = {"a": [{"piece": "1", "value": 1}]}
    pieces = [piece("a", {"value": 1}), piece("a", {"value": 2}, {"value": 3}, stop=True), piece("b", {"value": 4})]
    before = signal.getsignal(signal.SIGINT)
    assert frame.run(pieces, tables, quiet()) == "a: piece 2"
    assert signal.getsignal(signal.SIGINT) is before
    assert [row["value"] for row in tables["a"]] == [1, 2, 3]
    assert "b" not in tables
    assert frame.run(pieces[2:], tables, quiet()) is None
    assert tables["b"] == [{"piece": "4", "value": 4}]


def test_a_file_is_written_whole_or_not_at_all_and_holds_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    frame.write({"rows": [{"a": float("nan"), "b": [1.23456789, 2]}], "words": "[1,\n2]"}, path)
    assert json.loads(path.read_text()) == {"rows": [{"a": None, "b": [1.23457, 2]}], "words": "[1,\n2]"}
    with pytest.raises(TypeError):
        frame.write({"a": object()}, path)
    assert json.loads(path.read_text())["words"] == "[1,\n2]"


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
    assert not torch.equal(first, again[48:])


def test_network_depends_on_its_seed_alone() -> None:
    first = data.network(8, "cpu", 3)[0].weight
    state = torch.get_rng_state()
    assert torch.equal(first, data.network(8, "cpu", 3)[0].weight)
    assert torch.equal(state, torch.get_rng_state())


# tracking


def test_tracked_factors_are_close_to_the_best_possible_and_their_bounds_hold(content: dict[str, Any]) -> None:
    rows = summary.tracked(content)
    assert rows.groupby(["method", "rank"])["step"].apply(list).map(lambda steps: steps == [*range(1, 11)]).all()
    assert len(rows) == 2 * 2 * 10
    ratios = rows[[f"{norm} ratio" for norm in summary.NORMS]]
    assert ratios.notna().any().all()
    assert ratios.min().min() >= 1 - 1e-3
    assert ratios.max().max() < 3
    assert not rows["broken"].any()
    assert rows["orthogonality"].max() < 1e-5


def test_failed_decomposition_is_counted_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh = torch.linalg.eigh

    def fail_when_dense(matrix: torch.Tensor) -> Any:
        if matrix.shape[-1] < TINY.order:
            return eigh(matrix)
        message = "did not converge"
        raise torch.linalg.LinAlgError(message)

    monkeypatch.setattr(torch.linalg, "eigh", fail_when_dense)
    rows = list(tracking.track(TINY, data.load("cpu"), lambda share: None))
    found = summary.times({"tracking": rows, "settings": {"warmup": 1}})
    assert found.loc[("torch.linalg.eigh", 0), ["count", "size"]].tolist() == [0, 2]
    assert found.loc[("randomized_eigh", 8), ["count", "size"]].tolist() == [2, 2]


# training


def test_every_method_is_searched_alike_and_learns_from_every_seed(content: dict[str, Any]) -> None:
    runs, trials = content["runs"], content["trials"]
    assert [(run["seed"], run["method"]) for run in runs] == [(seed, one.name) for seed in (0, 1) for one in METHODS]
    assert all(run["finished"] and len(run["milliseconds"]) == 6 for run in runs)
    assert [at["step"] for at in runs[0]["evaluations"]] == [2, 4, 6]
    for run in runs:
        own = [row for row in trials if row["method"] == run["method"]]
        assert len(own) == 2
        assert run["rate"] == max(own, key=lambda row: row["score"])["rate"]


def test_search_seed_is_not_a_final_one() -> None:
    for settings in (TINY, make_settings("cpu"), make_settings("cpu", quick=True), make_settings("cpu", seeds=9)):
        assert settings.search_seed not in settings.seeds


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_grid_lies_within_the_decade(method: Any) -> None:
    assert method.grid(4)[0] == pytest.approx(method.rates[0])
    assert method.grid(4)[-1] == pytest.approx(method.rates[1])
    assert method.grid(2) == method.grid(4)[1:3]


def test_only_brand_keeps_less_than_the_dense_factor(content: dict[str, Any]) -> None:
    factors = {run["method"]: max(run["memory"], key=lambda one: one["n"]) for run in content["runs"] if run["memory"]}
    less = {name for name, one in factors.items() if one["bytes"] < one["dense_bytes"]}
    assert less == {"B-KFAC", "B-KFAC, sketched"}
    brand = next(run["memory"] for run in content["runs"] if run["method"] == "B-KFAC")
    # F and S, the error bound, the trace and the sum of the weights.
    expected = 4 * (TINY.order * TINY.rank + TINY.rank**2 + 3)
    assert max(one["bytes"] for one in brand if one["n"] == TINY.order) == expected


def test_numerical_failure_is_noted_and_the_study_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def fail(self: Trainer, batch: data.Split) -> None:
        if self.preconditioner is not None:
            message = "eigendecomposition failed"
            raise RuntimeError(message)
        step(self, batch)

    monkeypatch.setattr(Trainer, "step", fail)
    found = study.measure(TINY, quiet())
    failed = {run["method"] for run in found["runs"] if run["failure"] == "step 1: eigendecomposition failed"}
    assert failed == {one.name for one in METHODS if one.strategy is not None}
    assert summary.training(found)["method"].tolist() == ["SGD, momentum", "AdamW"]


def test_target_counts_steps_and_seconds_until_it_is_reached() -> None:
    def made_up(seed: int, accuracies: list[float]) -> dict[str, Any]:
        looks = [{"step": 2 * at, "seconds": 0.5 * at, "accuracy": value} for at, value in enumerate(accuracies, 1)]
        about = {"method": "AdamW", "seed": seed, "rate": 0.1, "finished": True, "failure": None, "memory": None}
        return about | {"milliseconds": [9.0, *[1.0] * 9, 50.0], "evaluations": looks}

    runs = [made_up(0, [0.5, 0.97, 0.96]), made_up(1, [0.5, 0.6, 0.98]), made_up(2, [0.1, 0.2, 0.3])]
    (row,) = summary.training({"settings": {"target": 0.97, "warmup": 1}, "runs": runs}).to_dict("records")
    assert (row["steps"], row["seconds"]) == ("5*", "1.25*")
    assert row["accuracy, %"] == "74.7 (30.0–98.0)"
    assert row["median"] == "1"


# what is left behind


def test_figures_are_the_same_again_except_times(content: dict[str, Any]) -> None:
    found = [without_times({**one, "facts": None}) for one in (content, study.measure(TINY, quiet()))]
    assert found[0] == found[1]


def test_a_whole_run_leaves_everything(content: dict[str, Any], tmp_path: Path) -> None:
    console = quiet()
    study.leave(content, tmp_path, console)
    found = json.loads((tmp_path / "demo.json").read_text())
    assert set(found) == {"schema", "facts", "settings", "tracking", "trials", "runs"}
    assert {"cpu", "cores", "gpus", "platform", "versions", "blas", "lapack", "threads"} <= set(found["facts"])
    assert {"torch", "python", "brandla"} <= set(found["facts"]["versions"])
    assert (found["settings"]["damping"], found["facts"]["interrupted"]) == (0.03, False)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(len(line) for line in text.splitlines() if "Figures in" not in line) <= 80
    assert "…" not in text
    for title in ("Tracked error / best", "Time per update", "Training, 6 steps", "Memory of the factors"):
        assert title in text
    assert all(method.name in text for method in METHODS)


# In the tracking study and at its end, in the search, and in the first run of the training study. A piece ends with a
# tick of its own.
@pytest.mark.parametrize("advances", [0, 11, 82, 104])
def test_interrupted_study_keeps_what_was_measured(advances: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    advance, count = meter.Meter.advance, 0

    def counting(self: meter.Meter, cost: float = 1.0) -> None:
        nonlocal count
        count += 1
        if count == advances + 1:
            os.kill(os.getpid(), signal.SIGINT)
        advance(self, cost)

    monkeypatch.setattr(meter.Meter, "advance", counting)
    found = study.measure(TINY, quiet())
    assert found["facts"]["interrupted"]
    assert len(summary.tracked(found)) == 4 * min(advances + 1, 10)
    started = max(0, advances + 1 - 11 - 5 * 2 * len(METHODS))
    assert sum(len(run["milliseconds"]) for run in found.get("runs", [])) == started - started // 7
    study.leave(found, tmp_path, quiet())
    assert json.loads((tmp_path / "demo.json").read_text())["facts"]["interrupted"]
    assert (tmp_path / "demo.png").exists()


@pytest.mark.parametrize(("load", "said"), [(0.4, False), (1.7, True), (None, False)])
def test_busy_machine_is_pointed_out(load: float | None, said: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(machine, "load", lambda: load)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(study, "run", lambda *_: "tracking: seed 0")
    console = quiet()
    found = study.measure(TINY, console)
    assert isinstance(console.file, io.StringIO)
    assert ("busy" in console.file.getvalue()) is said
    # Nothing was measured, so nothing is drawn.
    study.leave(found, tmp_path, quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


def test_commit_is_named_only_where_git_tracks_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"ls-files": "machine.py", "rev-parse": "abc", "status": ""}
    monkeypatch.setattr(machine, "_git", lambda *arguments: answers.get(arguments[0]))
    assert machine.commit() == {"commit": "abc", "modified": False}
    del answers["ls-files"]
    assert machine.commit() == {}
