"""Steps and seconds to a target: every K-FAC beside other optimizers, tuned at an equal budget, on usual networks.

Run by ``make study-kfac``. The search of every method comes first, then the cost of a step by width, then all seeds.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from bench.frame.samples import FOLDER, UnusableError, check_files, standardised_fashion
from bench.frame.study import Full, Out, Piece, Quick, Resume, Row, Study, Tables, new_app, run_study, sweep
from bench.gpu.device import Device, size_of
from bench.studies.kfac_methods import EXPONENTS, FULL, KINDS, METHODS, QUICK, USUAL, Method, Settings, Task, points
from bench.studies.kfac_page import shown
from brandla.demo import data
from brandla.demo.data import Parts, Split
from brandla.demo.studies import Trainer, timed, train_and_evaluate

Samples = Callable[[Task], Parts]
PIXELS = 784
# The fewest and the most steps whose cost is measured. The first is left out; one of the next two renews, if any does.
LEAST, MOST = 3, 9


def pieces(settings: Settings, device: Device, tables: Tables, folder: Path = FOLDER) -> Iterator[Piece]:
    """Yield the search of each task, the cost of a step by width, and the runs.

    The runs go seed by seed. So a slow phase of the machine affects all methods, and an early end has all of them.
    """
    where = str(device.tensors)
    samples = cache(lambda task: task.data(folder, where, settings.most))
    suits = lambda task, method: method.installed and method.refuses != task.kind and (method.usual or task.everyone)
    pairs = [pair for pair in product(settings.tasks, METHODS) if suits(*pair)]
    count = lambda task: settings.trials if not task.follows else len(EXPONENTS) if task.rates else 0
    cost, about = lambda task, method, _: method.cost * task.cost, (settings, samples, tables)
    trials = [(task, method, point) for task, method in pairs for point in range(count(task))]
    yield from sweep("trials", ("task", "method", "point"), trials, trial, *about, cost=cost)
    steps = product(settings.widths, [method for method in METHODS if method.priced])
    yield from sweep("costs", ("width", "method"), steps, cost_of, settings, where, cost=lambda width, _: width / 512)
    runs = [(*pair, seed) for seed in settings.seeds for pair in pairs if seed in settings.seeds[: pair[0].seeds]]
    yield from sweep("runs", ("task", "method", "seed"), runs, run_seed, *about, cost=cost)


# --- The search


def trial(task: Task, method: Method, point: int, settings: Settings, samples: Samples, tables: Tables) -> list[Row]:
    """Return the end of a trial, which takes no more steps than the best one before it."""
    most = min([row["step"] for row in trials_of(tables, task, method) if row["step"]], default=task.steps)
    if task.follows:
        given = rescaled(task, method, settings, tables, EXPONENTS[point])
    else:
        given = {"numbers": method.numbers(points(settings)[point]), "exponent": 0.0}
    seed, limited, parts = settings.search_seed, replace(task, steps=most, seconds=task.seconds / 3), samples(task)
    trainer = method.trainer(task.model(parts.training.images, seed), given["numbers"], settings, task, seed)
    return [given | train(trainer, limited, parts[2:], seed, settings)]


def trials_of(tables: Tables, task: Task, method: Method) -> list[Row]:
    return [row for row in tables.get("trials", []) if (row["task"], row["method"]) == (task.name, method.name)]


def rescaled(task: Task, method: Method, settings: Settings, tables: Tables, exponent: float | None = None) -> Row:
    """Return the followed task's numbers, with the rate times a power (by default its best) of the ratio of widths."""
    other = next(other for other in settings.tasks if other.name == task.follows)
    best = best_numbers(other, method, settings, tables)
    exponent = best["exponent"] if exponent is None else exponent
    rate = best["numbers"]["rate"] * (other.width / task.width) ** exponent
    return {"numbers": best["numbers"] | {"rate": float(f"{rate:.3g}")}, "exponent": exponent}


def best_numbers(task: Task, method: Method, settings: Settings, tables: Tables) -> Row:
    """Return the numbers of the trial with the fewest steps, else the best score; without trials, rescaled ones."""
    sign = 1 if task.network.by_loss else -1
    failed = lambda row: row["failure"] is not None
    order = lambda row: (failed(row), row["step"] or math.inf, 0 if failed(row) else sign * row["score"])
    trials = trials_of(tables, task, method)
    return min(trials, key=order) if trials else rescaled(task, method, settings, tables)


# --- The runs


def run_seed(task: Task, method: Method, seed: int, settings: Settings, samples: Samples, tables: Tables) -> list[Row]:
    """Return a run with the numbers of the best trial, and the bytes that it keeps beyond weights and gradients."""
    numbers, parts = best_numbers(task, method, settings, tables)["numbers"], samples(task)
    trainer = method.trainer(task.model(parts.training.images, seed), numbers, settings, task, seed)
    return [{"numbers": numbers} | train(trainer, task, parts[:2], seed, settings) | kept_bytes(trainer)]


def train(trainer: Any, task: Task, parts: tuple[Split, Split], seed: int, settings: Settings) -> Row:
    """Train on the first part until the score on the second reaches the target, or steps or seconds run out.

    ``step`` and ``seconds`` are those to the target; None if it was not reached.
    """
    looks = [settings.look_after]
    while looks[-1] < task.steps:
        looks.append(max(looks[-1] + 1, round(looks[-1] * (1 + settings.look_every))))
    judge, done = lambda model: {"score": task.score(model, parts[1])}, lambda look: task.reached(look["score"])
    batches = data.batches(parts[0], task.batch, task.steps, seed)
    run = train_and_evaluate(trainer, batches, judge, {*looks, task.steps}, task.seconds, done)
    took, last = run["milliseconds"], (run["evaluations"] or [{"score": None}])[-1]
    arrived = run["failure"] is None and task.reached(last["score"])
    return {
        "step": last["step"] if arrived else None,
        "seconds": last["seconds"] if arrived else None,
        "score": last["score"],
        "failure": run["failure"],
        "steps": len(took),
        "milliseconds": float(np.median(took)) if took else None,
    }


def kept_bytes(trainer: Trainer) -> Row:
    """Return the bytes of the factors and of the optimizer's state."""
    factors = 0 if trainer.preconditioner is None else trainer.preconditioner.report().bytes
    states = [list(state.values()) for state in trainer.optimizer.state.values()]
    return {"factor_bytes": factors, "optimizer_bytes": size_of(states)}


def cost_of(width: int, method: Method, settings: Settings, where: str) -> Iterator[Row]:
    """Yield the milliseconds of an MLP's step, as the mean over a period, and those of a step that renews.

    Every second step renews here, so that few expensive ones are needed. The mean is for the period of the settings.
    """
    task = Task("", "mlp", width, width // 8, 0, 0, 0)
    period = getattr(settings, method.renews) if method.renews else 1
    often = replace(settings, **({method.renews: 2} if method.renews else {}))
    images = torch.randn(task.batch, PIXELS, generator=torch.Generator().manual_seed(0)).to(where)
    trainer = method.trainer(task.model(images, 0), method.numbers([0.5] * 3), often, task, 0)
    if method.name == "SOAP":
        # SOAP begins with eigendecompositions, which it does not repeat.
        for weight in (weight for weight in trainer.model.parameters() if weight.ndim == 2):
            bases = [torch.eye(n, device=where) for n in weight.shape]
            trainer.optimizer.state[weight] |= {"bases": bases, "mean": torch.zeros_like(weight)}
    batch, times = Split(images, torch.arange(task.batch).to(where) % 10), []
    while len(times) < LEAST or (len(times) < MOST and sum(times) < 1e3 * settings.cost_seconds):
        times.append(timed(partial(trainer.step, batch), where)[1])
    # The method determines which of two steps renews: the longer one.
    plain, renewing = sorted(float(np.median(times[first::2])) for first in (1, 2))
    mean = (renewing + (period - 1) * plain) / period if method.renews else float(np.median(times[1:]))
    yield {"milliseconds": mean, "renewing": renewing if method.renews else None}


STUDY = Study("kfac-study", {"quick": QUICK, "usual": USUAL, "full": FULL}, pieces, shown)
Kinds = Enum("Kinds", {kind: kind for kind in KINDS})
app = new_app(__doc__)


@app.command(help=__doc__)
def main(
    quick: Quick = False,
    full: Full = False,
    resume: Resume = False,
    out: Out = None,
    only: Annotated[Kinds | None, typer.Option(help="These networks alone.")] = None,
    folder: Annotated[Path, typer.Option("--data", help="Folder of Fashion-MNIST's four files.")] = FOLDER,
) -> None:
    """Run the tasks that are asked for, after a check of the images that they need."""
    sizes = STUDY.sizes
    if only:
        tasks_of = lambda settings: tuple(task for task in settings.tasks if task.kind == only.value)
        sizes = {name: replace(settings, tasks=tasks_of(settings), widths=()) for name, settings in sizes.items()}
    for method in METHODS:
        if not method.installed:
            typer.echo(f"{method.name} is left out: it is not installed")
    try:
        if any(KINDS[kind.value].load is standardised_fashion for kind in ([only] if only else Kinds)):
            check_files(folder)
        run_study(replace(STUDY, sizes=sizes, pieces=partial(pieces, folder=folder)), quick, full, resume, out)
    except UnusableError as error:
        typer.echo(f"study-kfac: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
