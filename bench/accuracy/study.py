"""The runs, one after the other."""

from __future__ import annotations

from itertools import islice

from bench.accuracy.record import Record, Run
from bench.accuracy.settings import FACTORS, Settings
from bench.accuracy.trackers import BEST, Kept, Tracker, measure_costs, trackers
from bench.accuracy.training import observations
from bench.accuracy.truth import Truth, step_errors
from brandla.demo.meter import Meter

# Columns that a factor has seen before its updates are timed.
SEEN = 20


def total(record: Record) -> float:
    """Cost of all that is left, for the progress bar."""
    return sum(record.settings.steps * step_cost(width) for width, _ in record.missing())


def step_cost(width: int) -> float:
    """Return the cost of one step, most of which are products of the square matrices with narrow ones."""
    return width**2 / 512**2


def run_all(record: Record, meter: Meter) -> None:
    """Make every run that is missing. An interruption leaves the record with the steps measured until then."""
    record.runs = [run for run in record.runs if run.finished]
    record.interrupted = False
    try:
        for width, seed in record.missing():
            _prepare(record, width, meter)
            _run(record, width, seed, meter)
    except KeyboardInterrupt:
        record.interrupted = True
        for run in record.runs:
            run.cut()
    record.runs = [run for run in record.runs if run.steps]


def _prepare(record: Record, width: int, meter: Meter) -> None:
    """Time the pieces at this width, and choose the periods; once for all seeds."""
    if width in record.trackers:
        return
    meter.stage(f"width {width}: costs")
    settings = record.settings
    seen = min(SEEN, settings.steps)
    stream = [one.columns["inputs"] for one in islice(observations(settings, width, settings.seeds[0]), seen)]
    record.costs[width] = measure_costs(settings, stream)
    record.trackers[width] = trackers(settings, record.costs[width])


def _run(record: Record, width: int, seed: int, meter: Meter) -> None:
    meter.stage(f"width {width}: seed {seed}")
    settings, chosen = record.settings, record.trackers[width]
    run = Run(width, seed)
    record.runs.append(run)
    sizes = {"inputs": width + 1, "gradients": width}
    truths = {name: Truth(sizes[name]) for name in FACTORS}
    kept = {name: Kept(settings, sizes[name], seed, chosen) for name in FACTORS}
    for one in observations(settings, width, seed):
        for name in FACTORS:
            truths[name].absorb(one.columns[name], settings.decay)
            kept[name].absorb(one.step, one.columns[name])
        if one.step in settings.measured:
            _measure(run, settings, truths, kept, chosen, one.gradient)
            run.steps.append(one.step)
        meter.advance(step_cost(width))
    run.finished = True


def _measure(
    run: Run,
    settings: Settings,
    truths: dict[str, Truth],
    kept: dict[str, Kept],
    chosen: list[Tracker],
    gradient: object,
) -> None:
    exact = {name: truth.decompose(settings) for name, truth in truths.items()}
    candidates = {BEST: {name: exact[name].best(settings.rank) for name in FACTORS}}
    candidates |= {one.name: {name: kept[name].factors[one.name] for name in FACTORS} for one in chosen}
    for tracker, factors in candidates.items():
        for name in FACTORS:
            run.note(tracker, name, exact[name].errors(factors[name]))
        both = (exact["gradients"], exact["inputs"])
        run.note(tracker, "step", step_errors(gradient, both, (factors["gradients"], factors["inputs"])))
