"""Steps and seconds to a target: every K-FAC beside other optimizers, tuned at an equal budget, on usual networks.

Run by ``make study-kfac``. For each task a search for every method, then the cost of a step by width, then every method
from every seed.
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
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.frame.samples import FOLDER, UnusableError, check, garments
from bench.frame.study import Full, Out, Piece, Quick, Resume, Row, Study, Tables, application, conduct, each
from bench.gpu.device import Device
from bench.studies.kfac_methods import EXPONENTS, FULL, KINDS, METHODS, QUICK, USUAL, Method, Settings, Task, points
from bench.studies.kfac_page import shown
from brandla.demo import data
from brandla.demo.data import Parts, Split
from brandla.demo.studies import Trainer, timed, train_and_evaluate

Samples = Callable[[Task], Parts]
PIXELS = 784
# Steps whose cost is measured, at least and at most. The first is left out; of the next two one renews, if any does.
LEAST, MOST = 3, 9


def pieces(settings: Settings, device: Device, tables: Tables, folder: Path = FOLDER) -> Iterator[Piece]:
    """Yield the search of each task, the cost of a step by width, and the runs.

    They go seed by seed, so that what slows the machine for a while meets all methods, and an early end has all.
    """
    where = str(device.tensors)
    samples = cache(lambda task: task.data(folder, where, settings.most))
    wanted = lambda task, method: task.kind != method.refuses and (method.usual or task.everyone)
    pairs = [(task, own) for task in settings.tasks for own in METHODS if own.installed and wanted(task, own)]
    count = lambda task: settings.trials if not task.follows else len(EXPONENTS) if task.rates else 0
    cost, about = lambda task, method, _: method.cost * task.cost, (settings, samples, tables)
    trials = [(task, method, point) for task, method in pairs for point in range(count(task))]
    yield from each("trials", ("task", "method", "point"), trials, tried, *about, cost=cost)
    steps = product(settings.widths, [method for method in METHODS if method.priced])
    yield from each("costs", ("width", "method"), steps, cost_of, settings, where, cost=lambda width, _: width / 512)
    runs = [(*pair, seed) for seed in settings.seeds for pair in pairs if seed in settings.seeds[: pair[0].seeds]]
    yield from each("runs", ("task", "method", "seed"), runs, measured, *about, cost=cost)


# --- The search


def tried(task: Task, method: Method, point: int, settings: Settings, samples: Samples, tables: Tables) -> list[Row]:
    """Return how a trial ended; it does not go on for longer than the best one before it."""
    most = min([row["step"] for row in trials_of(tables, task, method) if row["step"]], default=task.steps)
    if task.follows:
        given = followed(task, method, settings, tables, EXPONENTS[point])
    else:
        given = {"numbers": method.numbers(points(settings)[point]), "exponent": 0.0}
    seed, limited, parts = settings.search_seed, replace(task, steps=most, seconds=task.seconds / 3), samples(task)
    trainer = method.trainer(task.model(parts.training.images, seed), given["numbers"], settings, task, seed)
    return [given | train(trainer, limited, parts[2:], seed, settings)]


def trials_of(tables: Tables, task: Task, method: Method) -> list[Row]:
    return [row for row in tables.get("trials", []) if (row["task"], row["method"]) == (task.name, method.name)]


def followed(task: Task, method: Method, settings: Settings, tables: Tables, exponent: float | None = None) -> Row:
    """Return the numbers of the task that one follows, the rate times a power of the ratio of the widths.

    The exponent is the one that was best there, unless another is to be tried.
    """
    other = next(own for own in settings.tasks if own.name == task.follows)
    found = chosen(other, method, settings, tables)
    exponent = found["exponent"] if exponent is None else exponent
    rate = found["numbers"]["rate"] * (other.width / task.width) ** exponent
    return {"numbers": found["numbers"] | {"rate": float(f"{rate:.3g}")}, "exponent": exponent}


def chosen(task: Task, method: Method, settings: Settings, tables: Tables) -> Row:
    """Return the numbers of the trial with the fewest steps, else the best score, or those of the task it follows."""
    sign = 1 if task.network.by_loss else -1
    failed = lambda row: row["failure"] is not None
    order = lambda row: (failed(row), row["step"] or math.inf, 0 if failed(row) else sign * row["score"])
    trials = trials_of(tables, task, method)
    return min(trials, key=order) if trials else followed(task, method, settings, tables)


# --- The runs


def measured(task: Task, method: Method, seed: int, settings: Settings, samples: Samples, tables: Tables) -> list[Row]:
    """Return a run with the numbers of the best trial, and the bytes that it keeps beside weights and gradients."""
    numbers, parts = chosen(task, method, settings, tables)["numbers"], samples(task)
    trainer = method.trainer(task.model(parts.training.images, seed), numbers, settings, task, seed)
    return [{"numbers": numbers} | train(trainer, task, parts[:2], seed, settings) | kept_bytes(trainer)]


def train(trainer: Any, task: Task, parts: tuple[Split, Split], seed: int, settings: Settings) -> Row:
    """Train on the first part until the second one finds the target reached, or steps or seconds are spent.

    ``step`` and ``seconds`` are those that the target took, None where it was not reached.
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
    """Return what the factors take, and what the optimizer keeps."""
    states = tree_leaves([list(state.values()) for state in trainer.optimizer.state.values()])
    kept = sum(value.nbytes for value in states if isinstance(value, Tensor))
    factors = 0 if trainer.preconditioner is None else trainer.preconditioner.report().bytes
    return {"factor_bytes": factors, "optimizer_bytes": kept}


def cost_of(width: int, method: Method, settings: Settings, where: str) -> Iterator[Row]:
    """Yield the milliseconds of a step of an MLP: that of one that renews, of the others, and the mean of a period.

    To need few of the dear ones every second step renews; the mean is that of steps at the pace of the settings.
    """
    task = Task("", "mlp", width, width // 8, 0, 0, 0)
    period = getattr(settings, method.renews) if method.renews else 1
    often = replace(settings, **({method.renews: 2} if method.renews else {}))
    images = torch.randn(task.batch, PIXELS, generator=torch.Generator().manual_seed(0)).to(where)
    trainer = method.trainer(task.model(images, 0), method.numbers([0.5] * 3), often, task, 0)
    if method.name == "SOAP":
        # It begins with eigendecompositions, which are not repeated.
        for weight in (weight for weight in trainer.model.parameters() if weight.ndim == 2):
            bases = [torch.eye(n, device=where) for n in weight.shape]
            trainer.optimizer.state[weight] |= {"bases": bases, "mean": torch.zeros_like(weight)}
    batch, times = Split(images, torch.arange(task.batch).to(where) % 10), []
    while len(times) < LEAST or (len(times) < MOST and sum(times) < 1e3 * settings.cost_seconds):
        times.append(timed(partial(trainer.step, batch), where)[1])
    # Which of two steps renews depends on the method.
    plain, dear = sorted(float(np.median(times[first::2])) for first in (1, 2))
    typical = (dear + (period - 1) * plain) / period if method.renews else float(np.median(times[1:]))
    yield {"milliseconds": typical, "renewing": dear if method.renews else None}


STUDY = Study("kfac-study", {"quick": QUICK, "usual": USUAL, "full": FULL}, pieces, shown)
Kinds = Enum("Kinds", {kind: kind for kind in KINDS})
app = application(__doc__)


@app.command(help=__doc__)
def main(
    quick: Quick = False,
    full: Full = False,
    resume: Resume = False,
    out: Out = None,
    only: Annotated[Kinds | None, typer.Option(help="These networks alone.")] = None,
    folder: Annotated[Path, typer.Option("--data", help="Folder of Fashion-MNIST's four files.")] = FOLDER,
) -> None:
    """Take the tasks that are wanted, with the images that they need."""
    sizes = STUDY.sizes
    if only:
        of_kind = lambda of: replace(of, tasks=tuple(task for task in of.tasks if task.kind == only.value), widths=())
        sizes = {name: of_kind(of) for name, of in sizes.items()}
    for method in METHODS:
        if not method.installed:
            typer.echo(f"{method.name} is left out: it is not installed")
    try:
        if any(KINDS[kind.value].load is garments for kind in ([only] if only else Kinds)):
            check(folder)
        conduct(replace(STUDY, sizes=sizes, pieces=partial(pieces, folder=folder)), quick, full, resume, out)
    except UnusableError as error:
        typer.echo(f"study-kfac: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
