"""A training step of K-FAC beside SGD's and other people's, and what it takes to an accuracy: ratios within one run.

MLP 64-1024-1024-10 on scikit-learn's digits, batches of 128, rank 128, curvature taken at every step. float32, two
threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import fmean, median

import pytest

from bench import timing, to_accuracy, training_methods
from bench.training_methods import preconditioned
from brandla.demo import data
from brandla.kfac import Brand, BrandCorrected, BrandRandomized, Exact, Randomized

WIDTH, BATCH, RANK = 1024, 128, 128
# Renewals of the systems that have them, in steps.
PERIOD = 10
# Columns that a batch is sketched to where that is asked for.
COLUMNS = 32
TARGET = 0.97

OVER_SGD = "a step, renewals counted as often as they happen / SGD's step"

STRATEGIES = {
    "B-KFAC": Brand(RANK),
    f"B-KFAC, {COLUMNS} columns": Brand(RANK, sketch=COLUMNS),
    "B-KFAC, no eigh": Brand(RANK, update="subspace"),
    f"B-KFAC, no eigh, {COLUMNS} columns": Brand(RANK, update="subspace", sketch=COLUMNS),
    "B-R-KFAC": BrandRandomized(RANK),
    "B-KFAC-C": BrandCorrected(RANK),
    "SRE-KFAC": Randomized(RANK, inverse_every=PERIOD),
    "RS-KFAC": Randomized(RANK, method="svd", inverse_every=PERIOD),
    "K-FAC": Exact(inverse_every=PERIOD),
}
BRAND = [name for name in STRATEGIES if name.startswith("B-KFAC")]
# The rows that the targets are for.
HELD_TO = BRAND[:2]


def by_period(seconds: Sequence[float]) -> list[float]:
    """Mean step time of each period, so that a renewal counts as often as it happens."""
    return [fmean(seconds[start : start + PERIOD]) for start in range(0, len(seconds), PERIOD)]


@pytest.fixture(scope="module")
def steps() -> dict[str, training_methods.Step]:
    methods = {"SGD": training_methods.sgd(WIDTH, BATCH)}
    return methods | {name: preconditioned(WIDTH, BATCH, strategy) for name, strategy in STRATEGIES.items()}


@pytest.mark.benchmark(group=OVER_SGD)
@pytest.mark.parametrize("name", STRATEGIES)
def test_step_over_sgd(name, steps, benchmark, figures, repeats) -> None:
    pair = {"SGD": steps["SGD"], name: steps[name]}
    seconds = timing.alternating(pair, repeats(6 * PERIOD), warm_up=PERIOD)
    limit = {"at_most": 3.0} if name in HELD_TO else {}
    figures(name, timing.ratio(by_period(seconds[name]), by_period(seconds["SGD"])), **limit)
    benchmark.pedantic(steps[name], rounds=repeats(PERIOD))


@pytest.mark.benchmark(group=OVER_SGD)
@pytest.mark.parametrize("columns", [BATCH, COLUMNS])
def test_floor_of_a_step(columns, benchmark, figures, repeats) -> None:
    pair = {
        "SGD": training_methods.sgd(WIDTH, BATCH),
        "floor": training_methods.bare(WIDTH, BATCH, RANK, columns),
    }
    seconds = timing.alternating(pair, repeats(6 * PERIOD), warm_up=PERIOD)
    name = f"only the tall products and eigh of B-KFAC, {columns} columns"
    figures(name, timing.ratio(by_period(seconds["floor"]), by_period(seconds["SGD"])))
    benchmark.pedantic(pair["floor"], rounds=repeats(PERIOD))


@pytest.mark.benchmark(group="a step by width of the hidden layers and batch / SGD's step")
@pytest.mark.parametrize(("width", "batch"), [(256, 64), (256, 512), (1024, 64), (1024, 512), (2048, 64), (2048, 512)])
def test_step_by_size(width, batch, benchmark, figures, repeats) -> None:
    names = ["B-KFAC", f"B-KFAC, {COLUMNS} columns", "SRE-KFAC", "K-FAC"]
    taken = {"SGD": training_methods.sgd(width, batch)}
    taken |= {name: preconditioned(width, batch, STRATEGIES[name]) for name in names}
    seconds = timing.alternating(taken, repeats(2 * PERIOD), warm_up=3)
    for name in names:
        of_sgd = timing.ratio(by_period(seconds[name]), by_period(seconds["SGD"]))
        figures(f"width {width}, batch {batch}: {name}", of_sgd.value)
    benchmark.pedantic(taken["SGD"], rounds=repeats(PERIOD))


@pytest.mark.benchmark(group="99th percentile of the step time / its median")
@pytest.mark.parametrize("name", [*BRAND, "SRE-KFAC", "K-FAC"])
def test_evenness_of_steps(name, steps, benchmark, figures, repeats) -> None:
    seconds = timing.alternating({name: steps[name]}, repeats(200 if name in BRAND else 60))[name]
    worst = sorted(seconds)[int(0.99 * (len(seconds) - 1))]
    limit = {"at_most": 1.3} if name in HELD_TO else {}
    figures(name, worst / median(seconds), **limit)
    benchmark.pedantic(steps[name], rounds=repeats(PERIOD))


@pytest.mark.benchmark(group="other people's step / ours")
@pytest.mark.parametrize("name", HELD_TO)
@pytest.mark.parametrize("peer", ["singd, dense, T = 1", f"asdfghjkl, K-FAC, inverse every {PERIOD}"])
def test_against_other_peoples(peer, name, steps, benchmark, figures, repeats) -> None:
    pytest.importorskip(peer.partition(",")[0] if peer.startswith("singd") else "asdl")
    theirs = (
        training_methods.singd(WIDTH, BATCH, 1)
        if peer.startswith("singd")
        else training_methods.asdfghjkl(WIDTH, BATCH, PERIOD)
    )
    pair = {"theirs": theirs, "ours": steps[name]}
    seconds = timing.alternating(pair, repeats(4 * PERIOD), warm_up=PERIOD)
    ratio = timing.ratio(by_period(seconds["theirs"]), by_period(seconds["ours"]))
    figures(f"{peer} / {name}", ratio, at_least=8.0 if peer.startswith("singd") else 2.5)
    benchmark.pedantic(steps[name], rounds=repeats(PERIOD))


@pytest.mark.benchmark(group=f"to {TARGET:.0%} on digits / tuned AdamW, median of the seeds")
@pytest.mark.parametrize(("part", "limit"), [("steps", 0.3), ("seconds", 0.5)])
def test_to_accuracy(part, limit, figures, quick) -> None:
    # Of whole runs: there is no single call to time.
    digits = data.load("cpu")
    trials, seeds = (1, [0]) if quick else (12, [0, 1, 2, 3, 4])
    most = 4 if quick else 200
    strategies = [Brand(rank, sketch=columns) for rank in (16, 32) for columns in (None, COLUMNS)]
    choices = {
        "AdamW": to_accuracy.grid(0.001, 0.02, trials, [None]),
        "B-KFAC": to_accuracy.grid(0.025, 0.1, max(trials // len(strategies), 1), strategies[:trials]),
    }
    chosen = {
        name: to_accuracy.search(candidates, digits, WIDTH, most, TARGET, part) for name, candidates in choices.items()
    }
    taken: dict[str, list[float | None]] = {name: [] for name in chosen}
    # In turn, so that a change of the machine's speed meets both.
    for seed, (name, candidate) in itertools.product(seeds, chosen.items()):
        run = to_accuracy.train(candidate, WIDTH, digits.training, digits.test, most, seed, TARGET)
        taken[name].append(getattr(run, part))
    spelled = "; ".join(f"{name}: {candidate}" for name, candidate in chosen.items())
    note = f"{trials} trials each, chosen: {spelled}"
    middles = {name: to_accuracy.middle(values) for name, values in taken.items()}
    figures(f"B-KFAC, {part}", middles["B-KFAC"] / middles["AdamW"], at_most=limit, note=note)
    for name, middle in middles.items():
        figures(f"{name}, {part}", middle, unit="" if part == "steps" else "s")
