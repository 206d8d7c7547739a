"""The figures that the tables state, derived from what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, median
from typing import Literal

import numpy as np

from brandla.demo.results import Run, Tracker, Tracking, Training
from brandla.demo.settings import Settings

Norm = Literal["trace", "frobenius", "spectral"]
NORMS: tuple[Norm, ...] = ("trace", "frobenius", "spectral")

# Below this, relative to the norm of M, an error is float32's rounding and a ratio to it means nothing.
_NOISE = 1e-6

# What rounding in float32 may add to an error that the running bound covers, relative to ‖M‖₂.
_SLACK = 4e-7


@dataclass(frozen=True)
class Ratio:
    """Error over best rank-r error, over the steps; ``within`` is the share of steps at which it is at most 1.1."""

    median: float
    worst: float
    last: float
    within: float


@dataclass(frozen=True)
class TrackerSummary:
    """What the study says of one tracked factor."""

    update: str
    rank: int
    ratios: dict[Norm, Ratio]
    relative_error: float
    bound_held: bool
    bound_over_error: float | None
    orthogonality: float
    milliseconds: float


@dataclass(frozen=True)
class MethodSummary:
    """What the study says of one training method; None where no run got that far."""

    method: str
    rate: float
    runs: int
    finished: int
    accuracy: float | None
    lowest: float | None
    highest: float | None
    reached: int
    steps_to_target: float | None
    seconds_to_target: float | None
    median_milliseconds: float
    p99_milliseconds: float
    largest_milliseconds: float


@dataclass(frozen=True)
class MemorySummary:
    """Memory of one method's factors, in bytes: the largest one's, and all together, beside the dense ones."""

    method: str
    n: int
    largest: int
    largest_dense: int
    total: int
    total_dense: int


def ratios(study: Tracking, tracker: Tracker, norm: Norm) -> tuple[list[int], list[float]]:
    """Return the steps at which error over best error means something, and that ratio."""
    errors, best, whole = (getattr(part, norm) for part in (tracker.errors, study.best[tracker.rank], study.norms))
    kept = [
        (step, error / least)
        for step, error, least, size in zip(study.steps, errors, best, whole, strict=False)
        if least > _NOISE * size
    ]
    return [step for step, _ in kept], [value for _, value in kept]


def summarize_tracking(study: Tracking, settings: Settings) -> list[TrackerSummary]:
    """Summarize every tracked factor that has been measured."""
    return [_summarize_tracker(study, tracker, settings) for tracker in study.trackers if tracker.bound]


def timing(milliseconds: list[float], warmup: int) -> float:
    """Median after ``warmup`` calls, or of all where there are no more."""
    return median(milliseconds[warmup:] or milliseconds)


def summarize_training(study: Training, settings: Settings) -> list[MethodSummary]:
    """Summarize every method that took a step, in the order of the study."""
    methods = dict.fromkeys(run.method for run in study.runs if run.milliseconds)
    return [
        _summarize_method([run for run in study.runs if run.method == method and run.milliseconds], settings)
        for method in methods
    ]


def summarize_memory(study: Training) -> list[MemorySummary]:
    """Summarize the reports of the K-FAC methods."""
    summaries = []
    for method, factors in study.memory.items():
        largest = max(factors, key=lambda factor: factor.n)
        total, dense = sum(factor.bytes for factor in factors), sum(factor.dense_bytes for factor in factors)
        summaries.append(MemorySummary(method, largest.n, largest.bytes, largest.dense_bytes, total, dense))
    return summaries


def step_times(runs: list[Run], settings: Settings) -> list[float]:
    """All step times of the runs, in milliseconds, without the first steps of each."""
    return [value for run in runs for value in run.milliseconds[settings.training.warmup :]]


def _summarize_tracker(study: Tracking, tracker: Tracker, settings: Settings) -> TrackerSummary:
    bounds = _bounds(study, tracker)
    return TrackerSummary(
        update=tracker.update,
        rank=tracker.rank,
        ratios={norm: ratio for norm in NORMS if (ratio := _ratio(ratios(study, tracker, norm)[1]))},
        relative_error=tracker.errors.frobenius[-1] / study.norms.frobenius[-1],
        bound_held=all(error <= bound + _SLACK * size for bound, error, size in bounds),
        bound_over_error=median(bound / error for bound, error, _ in bounds) if bounds else None,
        orthogonality=max(tracker.orthogonality),
        milliseconds=timing(tracker.milliseconds, settings.tracking.warmup),
    )


def _bounds(study: Tracking, tracker: Tracker) -> list[tuple[float, float, float]]:
    """List running bound, true spectral error and ‖M‖₂, where the error is above rounding."""
    measured = zip(tracker.bound, tracker.errors.spectral, study.norms.spectral, strict=False)
    return [(bound, error, size) for bound, error, size in measured if error > _NOISE * size]


def _ratio(values: list[float]) -> Ratio | None:
    if not values:
        return None
    within = mean(value <= 1.1 for value in values)
    return Ratio(median=median(values), worst=max(values), last=values[-1], within=within)


def _summarize_method(runs: list[Run], settings: Settings) -> MethodSummary:
    finished = [run.evaluations[-1].accuracy for run in runs if run.finished]
    reached = [
        first
        for run in runs
        if (first := next((at for at in run.evaluations if at.accuracy >= settings.training.target), None))
    ]
    times = step_times(runs, settings) or [value for run in runs for value in run.milliseconds]
    return MethodSummary(
        method=runs[0].method,
        rate=runs[0].rate,
        runs=len(runs),
        finished=len(finished),
        accuracy=mean(finished) if finished else None,
        lowest=min(finished, default=None),
        highest=max(finished, default=None),
        reached=len(reached),
        steps_to_target=mean(at.step for at in reached) if reached else None,
        seconds_to_target=mean(at.seconds for at in reached) if reached else None,
        median_milliseconds=median(times),
        p99_milliseconds=float(np.percentile(times, 99)),
        largest_milliseconds=max(times),
    )
