"""The training study: a learning rate searched for each method, then every method from every seed."""

from __future__ import annotations

from collections.abc import Iterator

from brandla.demo import data
from brandla.demo.data import Digits, Split
from brandla.demo.meter import Meter
from brandla.demo.methods import METHODS, Method, Trainer
from brandla.demo.results import Evaluation, Run, Search, Training, Trial
from brandla.demo.settings import Settings
from brandla.demo.timing import timed


def search(settings: Settings, digits: Digits, study: Training, meter: Meter) -> None:
    """Try every method's rates from one seed that no final run uses, and choose by validation accuracy."""
    for method in METHODS:
        meter.stage(f"learning rate of {method.name}")
        record = Search(method.name)
        study.searches.append(record)
        for rate in method.grid(settings.training.trials):
            score = _try(method, rate, settings, digits, meter)
            record.trials.append(Trial(rate, score))
        _choose(record)


def train(settings: Settings, digits: Digits, study: Training, meter: Meter) -> None:
    """Train every method from every seed, seed by seed, so that an interrupted study compares all methods."""
    rates = {record.method: record.chosen for record in study.searches}
    for seed in settings.training.seeds:
        for method in METHODS:
            meter.stage(f"{method.name}, seed {seed}")
            rate = rates[method.name]
            assert rate is not None
            run = Run(method.name, seed, rate)
            study.runs.append(run)
            trainer = _trainer(method, rate, seed, settings)
            for _ in steps(run, trainer, digits.training, digits.test, settings, settings.training.steps):
                meter.advance(method.cost)
            if trainer.preconditioner is not None and method.name not in study.memory and run.failure is None:
                study.memory[method.name] = trainer.preconditioner.report().factors


def steps(run: Run, trainer: Trainer, training: Split, judged: Split, settings: Settings, count: int) -> Iterator[None]:
    """Train for ``count`` steps, yielding after each; times and accuracies go to ``run``.

    A numerical failure ends the run and is noted in it.
    """
    elapsed = 0.0
    stream = data.batches(training, settings.batch, count, run.seed)
    for step, batch in enumerate(stream, start=1):
        try:
            # mypy infers no type for a lambda with a default.
            _, milliseconds = timed(lambda batch=batch: trainer.step(batch), settings.device)  # type: ignore[misc]
        except RuntimeError as error:
            run.failure = str(error)
            return
        run.milliseconds.append(milliseconds)
        elapsed += milliseconds / 1e3
        if step % settings.training.evaluate_every == 0 or step == count:
            run.evaluations.append(Evaluation(step, elapsed, data.accuracy(trainer.model, judged)))
        yield
    run.finished = True


def total_cost(settings: Settings) -> float:
    """Cost of the whole study, in the unit of the progress bar."""
    options = settings.training
    count = options.trials * options.search_steps + len(options.seeds) * options.steps
    return count * sum(method.cost for method in METHODS)


def _try(method: Method, rate: float, settings: Settings, digits: Digits, meter: Meter) -> float:
    """Train briefly and return the mean validation accuracy along the way; 0 if it failed."""
    options = settings.training
    run = Run(method.name, options.search_seed, rate)
    trainer = _trainer(method, rate, options.search_seed, settings)
    count = options.search_steps
    for _ in steps(run, trainer, digits.search_training, digits.search_validation, settings, count):
        meter.advance(method.cost)
    if run.failure is not None:
        return 0.0
    return sum(evaluation.accuracy for evaluation in run.evaluations) / len(run.evaluations)


def _choose(record: Search) -> None:
    best = max(record.trials, key=lambda trial: trial.score)
    rates = [trial.rate for trial in record.trials]
    record.chosen = best.rate
    record.at_edge = best.rate in (min(rates), max(rates))


def _trainer(method: Method, rate: float, seed: int, settings: Settings) -> Trainer:
    return Trainer(method, data.network(settings.width, settings.device, seed), rate, settings)
