"""How the benchmarks take and compare times: turns, medians, slopes, threads of peers, and two runs."""

import json
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bench import compare
from bench.benches import peers, timing
from bench.benches.bench_functions import timing_row
from bench.gpu.device import Cpu, Floor


def test_calls_take_turns_and_the_record_is_the_first_ones():
    order, kept = [], []
    benchmark = SimpleNamespace(_make_stats=lambda iterations: SimpleNamespace(update=kept.append))
    seconds = timing.in_turn(benchmark, {name: partial(order.append, name) for name in "ab"}, 3, warm_up=1)
    assert "".join(order) == "ab" + "abbaab"
    assert kept == seconds["a"] != seconds["b"]
    assert len(kept) == len(seconds["b"]) == 3


def test_the_fit_recovers_a_known_exponent_within_its_interval():
    sizes = [2**power for power in range(9, 16)]
    source, held = np.random.default_rng(0), 0
    for _ in range(200):
        noise = np.exp(0.03 * source.standard_normal(len(sizes)))
        fit = timing.slope(sizes, [size**2 * factor for size, factor in zip(sizes, noise, strict=True)])
        # Six deviations of the slope: one is 0.03 over the spread of log n, which makes 0.0082.
        assert abs(fit.value - 2) < 0.05
        held += fit.low <= 2 <= fit.high
    # 95 % of 200, less four deviations of a binomial.
    assert held >= 190 - 4 * (200 * 0.95 * 0.05) ** 0.5


def test_memory_and_calls_are_counted():
    def double():
        return torch.ones(1000) + torch.ones(1000)

    assert timing.peak_extra_bytes(double) == 3 * 4000
    assert timing.torch_calls(double) == 3
    assert Cpu().sets(1) > 1


@pytest.mark.parametrize("quicker", [1, 2])
def test_a_peer_has_the_number_of_threads_that_it_is_quicker_with(quicker, monkeypatch):
    """The test has its own clock and pool: real ones may be slow, or set by other code."""
    pool, clock = [8], [0.0]

    @contextmanager
    def limited(threads, user_api):
        assert user_api == "blas"
        pool.append(threads)
        yield
        pool.pop()

    def wait(seconds):
        clock[0] += seconds

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(peers, "threadpool_limits", limited)
    monkeypatch.setattr(peers, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=wait))
    with peers.best_threads(lambda: wait(0.001 if pool[-1] == quicker else 0.1)) as chosen:
        assert chosen == pool[-1] == quicker
    assert pool == [8]


# One figure of each study, where it is kept, and the factor that makes it half as good.
N, CALLS = {"n": 1024, "r": 8, "k": 4}, {"rounds": 9, "reference": [1.0, 0.99, 1.01], "reference_rounds": 8}
GROWTH = {"axis": "n", "method": "eigh_update", **N, "over_reference": [2.0, 1.95, 2.05], "rounds": 12}
OP = {"op": "project", "case": "n 1", "of_ceiling": [0.5, 0.49, 0.51], "rounds": 9, "bound_by": "copy"}
FUNCTION = {"group": "eigh_update n=1", "by": "brandla", "over_reference": [0.5, 0.49, 0.51], **CALLS}
FIGURE = {"group": "update / its GEMMs", "case": "a", "value": 2.0, "low": 1.99, "high": 2.01, "unit": "×"}
STUDIES = {
    "updates": ({"figures": [FIGURE]}, "figures", ["value", "low", "high"], 2.0),
    "updates, more is better": ({"figures": [FIGURE | {"at_least": 1}]}, "figures", ["value", "low", "high"], 0.5),
    "scaling": (
        {"rows": [GROWTH | {"held_bytes": 100, "peak_bytes": 100}], "exponents": []},
        *("rows", ["over_reference"], 2.0),
    ),
    "roofline": (
        {"rows": [OP], "ceilings": [{"ceiling": "copy", "per_second": [100.0, 99.0, 101.0]}]},
        *("rows", ["of_ceiling"], 0.5),
    ),
    "functions": ({"rows": [FUNCTION]}, "rows", ["over_reference"], 2.0),
}


def worsened(case, factor):
    """Return the name of a study, and its results before and after one figure got worse by a factor."""
    old, rows, keys, half_as_good = STUDIES[case]
    new = deepcopy(old)
    for key in keys:
        new[rows][0][key] = (np.array(old[rows][0][key]) * half_as_good ** np.log2(factor)).tolist()
    return case.partition(",")[0], old, new


def regressions(name, old, new):
    return int(compare.changes(name, old, new, compare.LEAST)["regression"].sum())


@pytest.mark.parametrize("case", STUDIES)
def test_a_worse_figure_is_a_regression_and_noise_or_a_better_figure_is_not(case):
    assert [regressions(*worsened(case, factor)) for factor in (1.4, 1.05, 1 / 1.4)] == [1, 0, 0]


def test_scatter_in_either_run_widens_the_noise():
    name, old, new = worsened("scaling", 1.4)
    new["rows"][0]["over_reference"][1] = 2.0
    assert not regressions(name, old, new)
    name, old, new = worsened("roofline", 1.4)
    new["ceilings"].append({"ceiling": "copy", "per_second": [80.0, 79.0, 81.0]})
    assert not regressions(name, old, new)
    for run in (0, 1):
        name, *runs = deepcopy(worsened("functions", 1.4))
        runs[run]["rows"][0]["reference"] = [1.0, 0.9, 1.1]
        assert not regressions(name, *runs)
    # Memory has no scatter.
    name, old, new = worsened("scaling", 1.0)
    new["rows"][0]["peak_bytes"] = 200
    assert regressions(name, old, new) == 1


@pytest.mark.parametrize("scatter", [0.01, 0.2])
def test_equal_runs_are_not_told_apart_and_twice_the_noise_is_a_regression(scatter):
    source = np.random.default_rng(0)

    def measured(count, seconds):
        # All calls of a run share an error as large as each call's own: more than rounds alone can show.
        together, each = source.standard_normal(), source.standard_normal(count)
        return list(seconds * np.exp(scatter * (together + each)))

    def run(factor):
        counts = [8 * (case % 12 + 1) for case in range(500)]
        rows = [timing_row(measured(count, factor), measured(8, 1.0), Floor(1.0, "copy")) for count in counts]
        return {"rows": [{"group": str(case), "by": "brandla", **row} for case, row in enumerate(rows)]}

    first = run(1.0)
    again = compare.changes("functions", first, run(1.0), 0.0)
    # Beyond four deviations lie 3e-5 on one side: one of 500 cases with 2 % probability, two with 0.01 %.
    assert again["regression"].sum() <= 1
    slower = compare.changes("functions", first, run((1 + again["noise"].max()) ** 2), 0.0)
    assert slower["regression"].all()


def test_the_command_reports_a_regression_by_its_exit_code_and_names_what_it_cannot_compare(tmp_path):
    name, *runs = worsened("functions", 1.4)
    for place, content, quick in (("old", runs[0], False), ("new", runs[1], False), ("short", runs[1], True)):
        (tmp_path / place / "toy").mkdir(parents=True)
        found = {"facts": {"commit": "0" * 40, "modified": False, "quick": quick}, **content}
        (tmp_path / place / "toy" / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    for new, code, words in (("new", 1, "regression"), ("old", 0, "not measured anew"), ("short", 0, "short one")):
        done = CliRunner().invoke(compare.app, ["--old", str(tmp_path / "old"), "--new", str(tmp_path / new)])
        assert done.exit_code == code, done.output
        assert words in done.output
