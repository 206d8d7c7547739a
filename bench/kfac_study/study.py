"""The study: for each task a search for every method, then every method from every seed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from torch import nn

from bench.kfac_study.images import Images, load
from bench.kfac_study.methods import METHODS, Method, Numbers, Trainer, points
from bench.kfac_study.networks import judge, network
from bench.kfac_study.record import Memory, Record, Run
from bench.kfac_study.settings import Settings, Task
from brandla.demo import data
from brandla.demo.data import Split
from brandla.demo.meter import Meter
from brandla.demo.results import Evaluation
from brandla.demo.timing import timed


def total(settings: Settings) -> float:
    """Cost of the whole study, for the progress bar."""
    methods = sum(method.cost for method in METHODS)
    return methods * sum(
        task.cost * (settings.trials * task.search_steps + len(settings.seeds) * task.steps) for task in settings.tasks
    )


def run_all(record: Record, folder: Path, device: str, meter: Meter) -> None:
    """Do everything. An interruption leaves what was measured until then."""
    try:
        for task in record.settings.tasks:
            images = load(task, folder, device, record.settings.most_images)
            _search(record, task, images, device, meter)
            _measure(record, task, images, device, meter)
    except KeyboardInterrupt:
        record.interrupted = True


def _search(record: Record, task: Task, images: Images, device: str, meter: Meter) -> None:
    """Try every method at the same points."""
    seed = record.settings.search_seed
    for method in METHODS:
        meter.stage(f"{task.name}: search for {method.name}")
        for point in points(record.settings):
            run = Run(task.name, method.name, seed, method.numbers(point))
            record.trials.append(run)
            parts = images.search_training, images.search_validation
            train(run, _trainer(record, task, method, run, images, device), task, parts, task.search_steps, meter)
            run.judge()


def _measure(record: Record, task: Task, images: Images, device: str, meter: Meter) -> None:
    """Train seed by seed, so that what slows the machine for a while meets all methods, and an early end has all."""
    for seed in record.settings.seeds:
        for method in METHODS:
            meter.stage(f"{task.name}: {method.name}, seed {seed}")
            chosen = record.chosen(task.name, method.name)
            assert chosen is not None
            run = Run(task.name, method.name, seed, chosen.numbers)
            record.runs.append(run)
            trainer = _trainer(record, task, method, run, images, device)
            train(run, trainer, task, (images.training, images.test), task.steps, meter)
            if run.finished and record.kept(task.name, method.name) is None:
                record.memory.append(Memory(task.name, method.name, *trainer.kept_bytes()))


def _trainer(record: Record, task: Task, method: Method, run: Run, images: Images, device: str) -> Trainer:
    model: nn.Module = network(task, images.training.images.shape[1], device, run.seed)
    numbers: Numbers = run.numbers
    return Trainer(method, model, numbers, record.settings, run.seed)


def train(run: Run, trainer: Trainer, task: Task, parts: tuple[Split, Split], steps: int, meter: Meter) -> None:
    """Train for ``steps`` steps on the first part, judging by the second. Only the steps are timed.

    A loss that is not finite and a numerical failure end the run, and are noted in it.
    """
    training, judged = parts
    cost = task.cost * next(method.cost for method in METHODS if method.name == run.method)
    milliseconds: list[float] = []
    device = str(training.images.device)
    try:
        for step, batch in enumerate(data.batches(training, task.batch, steps, run.seed), start=1):
            milliseconds.append(timed(lambda batch=batch: trainer.step(batch), device)[1])
            if step % task.evaluate_every == 0 or step == steps:
                accuracy, loss = judge(trainer.model, judged)
                if not math.isfinite(loss):
                    run.failure = f"diverged: the loss was not finite after {step} steps"
                    return
                run.evaluations.append(Evaluation(step, sum(milliseconds) / 1e3, accuracy))
            meter.advance(cost)
        run.finished = True
    except RuntimeError as error:
        run.failure = f"stopped after {len(milliseconds)} steps: {str(error).splitlines()[0]}"
    finally:
        if milliseconds:
            median, late = np.percentile(milliseconds, [50, 99])
            run.milliseconds = float(median), float(late)
