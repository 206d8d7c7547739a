"""The demo's pieces, on a network small enough to take no time."""

import io
import itertools
import json
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from brandla.demo import commands, data, frame, machine, studies, summary
from brandla.demo.studies import METHODS, QUICK, Settings, Trainer

CURSOR_SHOWN, CURSOR_HIDDEN = "\x1b[?25h", "\x1b[?25l"
TINY = Settings(
    width=40, batch=16, warmup=1, ranks=(4, 8), headline_rank=8, tracking_steps=10, reference_every=4,
    seeds=(0, 1), steps=6, search_steps=4, trials=2, rank=4, inverse_every=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts():
    # A shell makes background processes ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def quiet():
    return Console(file=io.StringIO(), width=80)


@pytest.fixture(scope="module")
def content():
    return commands.measure(TINY, quiet())


def without_times(tree):
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if "seconds" not in key}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def test_a_file_is_written_whole_or_not_at_all_and_holds_no_nan(tmp_path):
    path = tmp_path / "one.json"
    frame.write({"rows": [{"a": float("nan"), "b": [1.23456789, 2]}], "words": "[1,\n2]"}, path)
    assert json.loads(path.read_text()) == {"rows": [{"a": None, "b": [1.23457, 2]}], "words": "[1,\n2]"}
    with pytest.raises(TypeError):
        frame.write({"a": object()}, path)
    assert json.loads(path.read_text())["words"] == "[1,\n2]"


def test_no_image_is_in_two_parts():
    digits = data.load("cpu")
    assert [len(part.labels) for part in digits] == [1437, 360, 1149, 288]
    training, test, search_training, search_validation = ({*map(tuple, part.images.tolist())} for part in digits)
    assert not training & test
    assert not search_training & search_validation
    assert search_training | search_validation == training


def test_an_epoch_shows_no_image_twice():
    split = data.Split(torch.arange(50.0)[:, None], torch.arange(50))
    first = torch.cat([batch.labels for batch in data.batches(split, 16, 3, seed=0)])
    assert len(first.unique()) == 48
    again = torch.cat([batch.labels for batch in data.batches(split, 16, 6, seed=0)])
    assert torch.equal(first, again[:48])
    assert not torch.equal(first, again[48:])


def test_a_network_depends_only_on_its_seed():
    state = torch.get_rng_state()
    assert torch.equal(*(data.seeded(3, data.mlp, 64, 8)[0].weight for _ in range(2)))
    assert torch.equal(state, torch.get_rng_state())


def test_tracked_factors_are_close_to_the_best_possible_and_their_bounds_hold(content):
    rows = summary.tracked_errors(content)
    assert rows.groupby(["method", "rank"])["step"].apply(list).map(lambda steps: steps == [*range(1, 11)]).all()
    assert len(rows) == 2 * 2 * 10
    ratios = rows[[f"{norm} ratio" for norm in summary.NORMS]]
    assert ratios.notna().any().all()
    assert ratios.min().min() >= 1 - 1e-3
    assert ratios.max().max() < 3
    assert not rows["broken"].any()
    assert rows["orthogonality"].max() < 1e-5


def test_a_failed_decomposition_has_no_time(monkeypatch):
    eigh = torch.linalg.eigh

    def fail_when_dense(matrix):
        if matrix.shape[-1] < TINY.width + 1:
            return eigh(matrix)
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail_when_dense)
    rows = list(studies.track(TINY, data.load("cpu")))
    assert summary.reference_times({"tracking": rows, "settings": {"warmup": 1}}).isna().to_dict() == {
        "dense average": False, "torch.linalg.eigh": True,
        **{f"{name} ({rank})": False for rank in TINY.ranks for name in ("randomized_eigh", "torch.svd_lowrank")},
    }  # fmt: skip


def test_every_method_gets_the_same_search_and_learns_from_every_seed(content):
    runs, trials = content["runs"], content["trials"]
    assert [(run["seed"], run["method"]) for run in runs] == [(seed, m.name) for seed in (0, 1) for m in METHODS]
    assert all(run["finished"] and len(run["milliseconds"]) == 6 for run in runs)
    assert [at["step"] for at in runs[0]["evaluations"]] == [2, 4, 6]
    for run in runs:
        of_method = [row for row in trials if row["method"] == run["method"]]
        assert len(of_method) == 2
        assert run["rate"] == max(of_method, key=lambda row: row["score"])["rate"]


def test_the_search_has_a_seed_of_its_own_and_its_grid_lies_within_the_decade():
    assert all(settings.search_seed not in settings.seeds for settings in (TINY, QUICK, Settings()))
    for method in METHODS:
        assert method.grid(4)[::3] == pytest.approx(method.rates)
        assert method.grid(2) == method.grid(4)[1:3]


def test_only_brand_takes_less_memory_than_the_dense_factor(content):
    largest = {run["method"]: max(run["memory"], key=lambda row: row["n"]) for run in content["runs"] if run["memory"]}
    smaller = {method for method, row in largest.items() if row["bytes"] < row["dense_bytes"]}
    assert smaller == {"B-KFAC", "B-KFAC, sketched"}
    brand = next(run["memory"] for run in content["runs"] if run["method"] == "B-KFAC")
    # F and S, the error bound, the trace and the sum of the weights.
    expected = 4 * ((TINY.width + 1) * TINY.rank + TINY.rank**2 + 3)
    assert max(row["bytes"] for row in brand if row["n"] == TINY.width + 1) == expected


def test_the_study_notes_a_numerical_failure_and_goes_on(monkeypatch):
    step = Trainer.step

    def fail(self, batch):
        if self.preconditioner is not None:
            raise RuntimeError("eigendecomposition failed")
        step(self, batch)

    monkeypatch.setattr(Trainer, "step", fail)
    content = commands.measure(TINY, quiet())
    failed = {run["method"] for run in content["runs"] if run["failure"] == "step 1: eigendecomposition failed"}
    assert failed == {method.name for method in METHODS if method.strategy is not None}
    assert summary.training_table(content)["method"].tolist() == ["SGD, momentum", "AdamW"]


def test_the_table_has_steps_and_seconds_to_the_target():
    def make_run(seed, accuracies):
        evaluations = [{"step": 2 * i, "seconds": 0.5 * i, "accuracy": value} for i, value in enumerate(accuracies, 1)]
        about = {"method": "AdamW", "seed": seed, "rate": 0.1, "finished": True, "failure": None, "memory": None}
        return about | {"milliseconds": [9.0, *[1.0] * 9, 50.0], "evaluations": evaluations}

    runs = [make_run(0, [0.5, 0.97, 0.96]), make_run(1, [0.5, 0.6, 0.98]), make_run(2, [0.1, 0.2, 0.3])]
    (row,) = summary.training_table({"settings": {"target": 0.97, "warmup": 1}, "runs": runs}).to_dict("records")
    assert (row["steps"], row["seconds"]) == ("5*", "1.25*")
    assert row["accuracy, %"] == "74.7 (30.0–98.0)"
    assert row["median"] == "1"


def test_a_second_run_has_the_same_figures_except_times(content):
    first, second = (without_times({**run, "facts": None}) for run in (content, commands.measure(TINY, quiet())))
    assert first == second


def test_a_whole_run_writes_and_prints_everything(content, tmp_path):
    console = quiet()
    commands.report(content, tmp_path, console)
    written = json.loads((tmp_path / "demo.json").read_text())
    assert set(written) == {"schema", "facts", "settings", "tracking", "trials", "runs"}
    assert {"cpu", "cores", "gpus", "platform", "versions", "blas", "lapack", "threads"} <= set(written["facts"])
    assert {"torch", "python", "brandla"} <= set(written["facts"]["versions"])
    assert (written["settings"]["damping"], written["facts"]["interrupted"]) == (0.03, False)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    text = console.file.getvalue()
    assert max(len(line) for line in text.splitlines() if "Figures in" not in line) <= 80
    assert "…" not in text
    for title in ("Tracked error / best", "Training, 6 steps", "torch.linalg.eigh"):
        assert title in text
    assert all(method.name in text for method in METHODS)


# The interrupt comes in the tracking study, in the search, and in the first run of the training study.
@pytest.mark.parametrize("steps", [3, 12, 10 + 4 * 2 * len(METHODS) + 2])
def test_an_interrupted_study_keeps_its_rows_and_leaves_a_clean_terminal(steps, monkeypatch, tmp_path):
    batches, count = data.batches, itertools.count(1)

    def interrupted(*arguments):
        for batch in batches(*arguments):
            if next(count) > steps:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(data, "batches", interrupted)
    monkeypatch.setattr(commands, "QUICK", replace(TINY, seeds=(0,)))
    monkeypatch.setattr(commands, "Console", partial(Console, force_terminal=True))
    done = CliRunner().invoke(commands.app, ["--quick", "--device", "cpu", "--output", str(tmp_path)])
    assert done.exit_code == frame.INTERRUPTED
    assert "Tracked error" in done.output
    assert "Interrupted" in done.output
    assert done.output.rfind(CURSOR_SHOWN) > done.output.rfind(CURSOR_HIDDEN) > -1
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["facts"]["interrupted"]
    assert len(summary.tracked_errors(written)) == 4 * min(steps, 10)
    assert len(written.get("trials", [])) == min(max(steps - 10, 0) // 4, 2 * len(METHODS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "demo.png"]


@pytest.mark.parametrize(("load", "warns"), [(0.4, False), (1.7, True), (None, False)])
def test_a_busy_machine_gets_a_warning(load, warns, monkeypatch, tmp_path):
    facts = machine.facts() | {"load": load, "cores": 2}
    monkeypatch.setattr(machine, "facts", lambda: facts)
    monkeypatch.setattr(commands, "run", lambda *_: "tracking: seed 0")
    console = quiet()
    content = commands.measure(TINY, console)
    assert ("busy" in console.file.getvalue()) is warns
    # Nothing was measured, so nothing is drawn.
    commands.report(content, tmp_path, quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


def test_the_commit_is_named_only_if_git_tracks_the_package(monkeypatch):
    answers = {"ls-files": "machine.py", "rev-parse": "abc", "status": ""}
    monkeypatch.setattr(machine, "output_of", lambda *command: answers.get(command[3]))
    assert machine.commit() == {"commit": "abc", "modified": False}
    del answers["ls-files"]
    assert machine.commit() == {"commit": None, "modified": None}
