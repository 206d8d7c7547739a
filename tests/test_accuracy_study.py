"""``make study-accuracy``: what it measures, at sizes where that can be written out, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import brandla
from bench.accuracy import __main__ as command
from bench.accuracy import page, record, study, summary, tables
from bench.accuracy.record import Record
from bench.accuracy.settings import QUICK
from bench.accuracy.trackers import BEST, Costs, Kept, Tracker, trackers
from bench.accuracy.training import observations
from bench.accuracy.truth import Truth, step_errors

ROOT = Path(__file__).parents[1]
TINY = replace(QUICK, widths=(96,), steps=8, measure_every=2, warmup=3, batch=24, rank=6)
COSTS = Costs(average=3.0, brand=4.0, root=2.5, cholesky=3.0, svd=26.0, eigh=14.0, correction=1.5)


def columns(n: int, k: int, seed: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5


def test_periods_cost_no_more_than_b_r_and_no_shorter_one_would_do():
    found = {one.name: one for one in trackers(QUICK, COSTS)}
    spent = found["B-R"].cost(COSTS)
    assert spent == pytest.approx(3.0 + 4.0 + 26.0 / QUICK.overwrite_every)
    for name in ("B-C", "RS", "SRE"):
        one = found[name]
        assert one.cost(COSTS) <= spent
        assert one.period == 1 or replace(one, period=one.period - 1).cost(COSTS) > spent
    assert found["B"].cost(COSTS) == 4.0


def test_a_tracker_is_due_at_the_first_step_and_once_a_period():
    one = Tracker("RS", None, "svd", 5)
    assert [step for step in range(1, 13) if one.due(step)] == [1, 6, 11]
    assert not Tracker("B", "brand", None, 0).due(1)


def test_the_columns_are_those_of_the_weights_gradient():
    """∂W of the mean loss over k samples is G Aᵀ of the columns over √k each."""
    one = next(observations(TINY, 96, 0))
    a, g = one.columns["inputs"], one.columns["gradients"]
    assert a.shape == (97, 24)
    assert g.shape == (96, 24)
    torch.testing.assert_close(a[-1], torch.full((24,), 24**-0.5))
    torch.testing.assert_close(one.gradient, g @ a.mT)


def test_errors_are_those_of_their_definitions():
    n, settings = 30, replace(TINY, rank=4)
    truth = Truth(n)
    for seed in range(3):
        truth.absorb(columns(n, 8, seed), 0.9)
    exact = truth.decompose(settings)
    matrix, identity = truth.matrix, torch.eye(n, dtype=torch.float64)
    factor = brandla.eigh_update(brandla.LowRankEigh.zeros(n, 4), columns(n, 8, 2))
    damping = settings.damping * torch.linalg.eigvalsh(matrix)[-1]
    right = torch.linalg.inv(matrix + damping * identity)
    own = torch.linalg.inv(factor.dense().double() + damping * identity)
    projector = factor.eigenvectors.double() @ factor.eigenvectors.double().mT
    errors = exact.errors(factor)
    # The factor is float32, and its vectors are orthonormal to that.
    assert errors.inverse == pytest.approx(float((own - right).norm() / right.norm()), rel=1e-5)
    assert errors.trace == pytest.approx(
        float(torch.trace(matrix - projector @ matrix) / torch.trace(matrix)), rel=1e-5
    )
    distance = torch.linalg.matrix_norm(factor.dense().double() - matrix, 2) / torch.linalg.matrix_norm(matrix, 2)
    assert errors.spectral == pytest.approx(float(distance), rel=1e-5)
    values = torch.linalg.eigvalsh(matrix).flip(0)
    assert exact.errors(exact.best(4)).spectral == pytest.approx(float(values[4] / values[0]), rel=1e-5)


def test_the_step_is_compared_with_that_of_the_true_factors():
    settings, exact = replace(TINY, rank=3), []
    for n in (20, 25):
        truth = Truth(n)
        truth.absorb(columns(n, 9, n), 0.0)
        exact.append(truth.decompose(settings))
    gradient = columns(20, 25, 1)
    whole = tuple(one.best(len(one.values)) for one in exact)
    # acos loses half of the digits at 1.
    assert step_errors(gradient, tuple(exact), whole) == pytest.approx((0, 0), abs=1e-5)
    own = step_errors(gradient, tuple(exact), tuple(one.best(3) for one in exact))
    g, a = (
        torch.linalg.inv(one.best(3).dense() + one.damping * torch.eye(len(one.values), dtype=torch.float64))
        for one in exact
    )
    taken, right = g @ gradient.double() @ a, exact[0].inverse @ gradient.double() @ exact[1].inverse
    assert own.error == pytest.approx(float((taken - right).norm() / right.norm()), rel=1e-9)
    cosine = (taken * right).sum() / (taken.norm() * right.norm())
    assert own.angle == pytest.approx(float(torch.rad2deg(torch.acos(cosine))), rel=1e-9)


def test_trackers_do_what_they_are_called():
    settings = replace(TINY, overwrite_every=2)
    chosen = [
        Tracker("B", "brand", None, 0),
        Tracker("B-R", "brand", "svd", 2),
        Tracker("RS", None, "svd", 2),
        Tracker("SRE", None, "eigh", 3),
    ]
    kept, batches = Kept(settings, 40, 0, chosen), [columns(40, 3, seed) for seed in range(2)]
    kept.absorb(1, batches[0])
    first = dict(kept.factors)
    kept.absorb(2, batches[1])
    assert kept.factors["RS"] is first["RS"]
    assert kept.factors["SRE"] is first["SRE"]
    weight = 1 - settings.decay
    exact = weight * (settings.decay * batches[0] @ batches[0].mT + batches[1] @ batches[1].mT)
    # Rank 6 holds both batches of 3 columns: a few ε‖M‖ are left.
    for name in ("B", "B-R"):
        torch.testing.assert_close(kept.factors[name].dense(), exact, rtol=0, atol=2e-6 * float(exact.norm()))


def test_a_short_run_is_written_tabulated_drawn_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "accuracy.json",
        "accuracy-light.png",
        "accuracy-dark.png",
    }
    machine, measured = record.read(tmp_path / "accuracy.json")
    assert machine["quick"] is True
    assert not measured.interrupted
    assert all(run.finished and run.steps == QUICK.measured for run in measured.runs)
    assert record.of_content(json.loads(json.dumps(measured.content()))) == measured
    printed = capsys.readouterr().out
    assert "error of B-R over that of RS at equal cost" in printed
    for width in QUICK.widths:
        for key in summary.MEASURES:
            # The best rank-r one is the best of its rank in the norms that Eckart and Young are about.
            if key[1] in ("spectral", "trace"):
                best = summary.spread(measured, width, BEST, *key).mean
                for one in measured.trackers[width]:
                    assert summary.spread(measured, width, one.name, *key).mean >= best * (1 - 1e-4)
    folder = tmp_path / "results" / "some-machine"
    folder.mkdir(parents=True)
    (tmp_path / "accuracy.json").rename(folder / "accuracy.json")
    text = page.page(tmp_path / "results")
    assert "A short run: its figures mean nothing." in text
    assert all(f"### Width {width}" in text for width in QUICK.widths)


def quick_record() -> Record:
    return Record(TINY)


class _Stopping:
    """A meter that is interrupted after some steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def stage(self, description: str) -> None:
        pass

    def advance(self, cost: float = 1.0) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


def test_an_interruption_keeps_what_was_measured_and_a_resumed_study_finishes():
    measured = quick_record()
    study.run_all(measured, _Stopping(5))
    assert measured.interrupted
    (run,) = measured.runs
    assert (run.finished, run.steps) == (False, [2, 4])
    assert all(len(values) == 2 for values in run.errors["B"]["step"].values())
    assert "Interrupted" in page.provenance(_machine(), measured)
    assert list(tables.of(measured))
    chosen = measured.trackers[96]
    study.run_all(measured, _Stopping(-1))
    assert not measured.interrupted
    assert [run.finished for run in measured.runs] == [True]
    assert measured.trackers[96] is chosen


def _machine() -> dict[str, Any]:
    return {"threads": 1, "versions": {"torch": "2"}, "commit": None, "modified": None, "quick": False}


def test_a_study_is_not_resumed_from_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    machine = command.facts(True)
    Record(TINY).write(machine, tmp_path)
    assert command.main(["--quick", "--resume", "--out", str(tmp_path)]) == 2
    assert "other settings" in capsys.readouterr().err
    Record(QUICK).write(machine | {"commit": "another"}, tmp_path)
    assert command.main(["--quick", "--resume", "--out", str(tmp_path)]) == 2
    assert "other versions" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_with_a_file_that_says_so(tmp_path: Path):
    source = (
        "import sys; from dataclasses import replace; from bench.accuracy import __main__ as m;"
        " m.QUICK = replace(m.QUICK, steps=100000, measure_every=5);"
        f" sys.exit(m.main(['--quick', '--out', {str(tmp_path)!r}]))"
    )
    with subprocess.Popen(
        [sys.executable, "-u", "-c", source], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        while "seed 0" not in process.stdout.readline():
            assert process.poll() is None
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == command.INTERRUPTED
    assert json.loads((tmp_path / "accuracy.json").read_text(encoding="utf-8"))["interrupted"] is True


def test_the_page_is_that_of_the_result_file():
    done = subprocess.run(
        [sys.executable, "-m", "bench.accuracy.page", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_page_that_was_edited_is_found(tmp_path: Path):
    edited = tmp_path / "accuracy.md"
    edited.write_text("0.3", encoding="utf-8")
    with pytest.raises(SystemExit, match="not what the result files say"):
        page.main(["--check", "--output", str(edited)])


def test_without_a_result_the_page_says_so(tmp_path: Path):
    assert "Nothing has been measured yet." in page.page(tmp_path)
