"""Steps and seconds to a target: every K-FAC beside other optimizers, tuned at an equal budget, on usual networks.

Run by ``make study-kfac``. For each task a search for every method, then the cost of a step by width, then every method
from every seed.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.frame.samples import FOLDER, UnusableError, check, garments
from bench.frame.study import Full, Out, Piece, Quick, Resume, Row, Study, application, conduct, settings_of
from bench.gpu.device import Device
from bench.studies.kfac_methods import EXPONENTS, FULL, KINDS, METHODS, QUICK, USUAL, Method, Settings, Task, points
from bench.studies.kfac_page import shown
from brandla.demo import data
from brandla.demo.data import Parts, Split
from brandla.demo.frame import Tables
from brandla.demo.training import Trainer, timed

PIXELS = 784
# Steps whose cost is measured, at least and at most. The first is left out; of the next two one renews, if any does.
LEAST, MOST = 3, 9


def pieces(settings: Settings, device: Device, folder: Path = FOLDER) -> list[Piece]:
    """Return the search of each task, the cost of a step by width, and the runs.

    They go seed by seed, so that what slows the machine for a while meets all methods, and an early end has all.
    """
    where = str(device.tensors)
    samples = cache(lambda task: task.data(folder, where, settings.most))
    cube, found = points(settings), []

    def piece(table: str, task: Task, method: Method, name: str, value: int, measure: Any) -> Piece:
        key = {"task": task.name, "method": method.name, name: value}
        call = lambda tables, tick: measure(task, method, value, settings, samples(task), tables, tick)
        return Piece(table, key, method.cost * task.cost, call)

    for task in settings.tasks:
        count = settings.trials if not task.follows else len(EXPONENTS) if task.rates else 0
        for method in filter(lambda method: method.takes_part(task), METHODS):
            trial = partial(tried, cube=cube)
            found += [piece("trials", task, method, "point", point, trial) for point in range(count)]
    for width in settings.widths:
        for method in filter(lambda method: method.priced, METHODS):
            call = lambda _, tick, method=method, width=width: cost_of(method, width, settings, where)
            found.append(Piece("costs", {"width": width, "method": method.name}, (width / 512) ** 2, call))
    for seed in settings.seeds:
        for task in settings.tasks:
            for method in METHODS if seed in settings.seeds[: task.seeds] else ():
                if method.takes_part(task):
                    found.append(piece("runs", task, method, "seed", seed, measured))
    return found


# --- The search


def tried(task, method, point, settings, samples, tables, tick, cube) -> Iterator[Row]:
    """Yield how a trial ended; it does not go on for longer than the best one before it."""
    before = trials_of(tables, task, method)
    most = min([row["step"] for row in before if row["step"]], default=task.steps)
    if task.follows:
        exponent = EXPONENTS[point]
        numbers = scaled(chosen(other(task, settings), method, settings, tables), task, settings, exponent)
    else:
        exponent, numbers = 0.0, method.numbers(cube[point])
    trainer = trainer_of(task, method, numbers, samples, settings, settings.search_seed)
    yield {"numbers": numbers, "exponent": exponent} | train(
        trainer, task, samples[2:], most, task.seconds / 3, settings.search_seed, settings, tick
    )


def trials_of(tables: Tables, task: Task, method: Method) -> list[Row]:
    return [row for row in tables.get("trials", []) if (row["task"], row["method"]) == (task.name, method.name)]


def other(task: Task, settings: Settings) -> Task:
    return next(each for each in settings.tasks if each.name == task.follows)


def scaled(found: Row, task: Task, settings: Settings, exponent: float) -> Row:
    """Return numbers with the rate times a power of the ratio of the widths."""
    ratio = other(task, settings).width / task.width
    return found["numbers"] | {"rate": float(f"{found['numbers']['rate'] * ratio**exponent:.3g}")}


def chosen(task: Task, method: Method, settings: Settings, tables: Tables) -> Row:
    """Return the numbers of the best trial: the fewest steps to the target, else the best score at the end.

    A task without trials has those of the one that it follows, the rate at the exponent that was best there.
    """

    def order(row: Row) -> tuple[bool, float, float]:
        failed = row["failure"] is not None
        worth = 0.0 if failed else row["score"] if task.network.by_loss else -row["score"]
        return failed, row["step"] or math.inf, worth

    if found := trials_of(tables, task, method):
        return min(found, key=order)
    followed = chosen(other(task, settings), method, settings, tables)
    return followed | {"numbers": scaled(followed, task, settings, followed["exponent"])}


# --- The runs


def trainer_of(task: Task, method: Method, numbers: Row, samples: Parts, settings: Settings, seed: int) -> Any:
    """Return the network of a seed with what trains it by these numbers."""
    inputs = samples.training.images
    return method.trainer(task.model(inputs.shape[1], str(inputs.device), seed), numbers, settings, task, seed)


def measured(task, method, seed, settings, samples, tables, tick) -> Iterator[Row]:
    """Yield a run with the numbers of the best trial, and the bytes that it keeps beside weights and gradients."""
    numbers = chosen(task, method, settings, tables)["numbers"]
    trainer = trainer_of(task, method, numbers, samples, settings, seed)
    run = train(trainer, task, samples[:2], task.steps, task.seconds, seed, settings, tick)
    yield {"numbers": numbers} | run | kept_bytes(trainer)


def train(trainer, task, parts, most, seconds, seed, settings, tick) -> Row:
    """Train on the first part until the second one finds the target reached, or steps or seconds are spent.

    Only the steps are timed. ``step`` and ``seconds`` are those that the target took, None where it was not reached.
    """
    run: Row = {"step": None, "seconds": None, "score": None, "failure": None}
    times, look = [], settings.look_after
    device = str(parts[0].images.device)
    for step, batch in enumerate(data.batches(parts[0], task.batch, most, seed), start=1):
        try:
            times.append(timed(partial(trainer.step, batch), device)[1] / 1e3)
            last = step == most or sum(times) >= seconds
            if step >= look or last:
                look = max(step + 1, round(step * (1 + settings.look_every)))
                run["score"] = task.score(trainer.model, parts[1])
        except RuntimeError as error:
            run["failure"] = f"step {step}: {str(error).splitlines()[0]}"
            break
        tick(1 / most)
        if run["score"] is not None and task.reached(run["score"]):
            run |= {"step": step, "seconds": sum(times)}
            break
        if last:
            break
    return run | {"steps": len(times), "milliseconds": 1e3 * float(np.median(times)) if times else None}


def kept_bytes(trainer: Trainer) -> Row:
    """Return what the factors take, and what the optimizer keeps."""
    states = tree_leaves([list(state.values()) for state in trainer.optimizer.state.values()])
    kept = sum(value.numel() * value.element_size() for value in states if isinstance(value, Tensor))
    factors = 0 if trainer.preconditioner is None else trainer.preconditioner.report().bytes
    return {"factor_bytes": factors, "optimizer_bytes": kept}


# --- The cost of a step


def cost_of(method: Method, width: int, settings: Settings, where: str) -> Iterator[Row]:
    """Yield the milliseconds of a step of an MLP: that of one that renews, of the others, and the mean of a period.

    To need few of the dear ones every second step renews; the mean is that of steps at the pace of the settings.
    """
    task = Task("", "mlp", width, width // 8, 0, 0, 0)
    period = getattr(settings, method.renews) if method.renews else 1
    often = replace(settings, **({method.renews: 2} if method.renews else {}))
    trainer = method.trainer(task.model(PIXELS, where, 0), method.numbers([0.5] * 3), often, task, 0)
    if method.name == "SOAP":
        # It begins with eigendecompositions, which are not repeated.
        for weight in (weight for weight in trainer.model.parameters() if weight.ndim == 2):
            bases = [torch.eye(n, device=where) for n in weight.shape]
            trainer.optimizer.state[weight] |= {"bases": bases, "mean": torch.zeros_like(weight)}
    draws = torch.Generator().manual_seed(0)
    images, labels = torch.randn(task.batch, PIXELS, generator=draws), torch.arange(task.batch) % 10
    batch, times = Split(images.to(where), labels.to(where)), []
    while len(times) < LEAST or (len(times) < MOST and sum(times) < 1e3 * settings.cost_seconds):
        times.append(timed(partial(trainer.step, batch), where)[1])
    # Which of two steps renews depends on the method.
    plain, dear = sorted(float(np.median(times[first::2])) for first in (1, 2))
    typical = (dear + (period - 1) * plain) / period if method.renews else float(np.median(times[1:]))
    yield {"milliseconds": typical, "renewing": dear if method.renews else None}


STUDY = Study("kfac-study", {"quick": QUICK, "usual": USUAL, "full": FULL}, pieces, shown)
app = application(__doc__)


@app.command(help=__doc__)
def main(
    quick: Quick = False,
    full: Full = False,
    resume: Resume = False,
    out: Out = None,
    only: Annotated[str | None, typer.Option(help=f"These networks alone: {', '.join(KINDS)}.")] = None,
    folder: Annotated[Path, typer.Option("--data", help="Folder of Fashion-MNIST's four files.")] = FOLDER,
) -> None:
    """Take the tasks that are wanted, with the images that they need."""
    settings = settings_of(STUDY, quick=quick, full=full)
    if only is not None:
        settings = replace(settings, tasks=tuple(task for task in settings.tasks if task.kind == only), widths=())
    if not settings.tasks:
        message = f"no networks are called {only!r}: name one of {', '.join(KINDS)}"
        raise typer.BadParameter(message, param_hint="--only")
    for method in METHODS:
        if not method.installed:
            typer.echo(f"{method.name} is left out: it is not installed")
    try:
        if any(task.network.load is garments for task in settings.tasks):
            check(folder)
        study = replace(STUDY, pieces=partial(pieces, folder=folder))
        conduct(study, settings, quick=quick, full=full, resume=resume, out=out)
    except UnusableError as error:
        typer.echo(f"study-kfac: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
